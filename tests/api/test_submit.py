"""Submitting batches: what is stored, and what is refused with which words."""

import asyncio
import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2

from app.api.intake import check
from app.api.problems import Problem
from app.fetch.policy import Policy
from app.jobs.database import Sessions
from tests.api.conftest import BOUNDS, AppMaker, calling, served
from tests.jobs.actors import Client as Reader
from tests.jobs.actors import Worker, success

URL = "https://example.com/"
CASES = Path(__file__).parents[1] / "cases"
JSON = {"Content-Type": "application/json"}


def codes(response: httpx2.Response) -> dict[str, str]:
    """What is wrong where."""
    return {error["pointer"]: error["code"] for error in response.json()["errors"]}


async def test_a_batch_is_stored_before_it_is_answered(api: httpx2.AsyncClient, reader: Reader) -> None:
    response = await api.post("/v1/batches", json={"urls": [URL, "http://EXAMPLE.org:80/a b".replace(" ", "%20")]})
    assert response.status_code == 202
    view = response.json()
    assert response.headers["Location"] == f"/v1/batches/{view['id']}" == view["links"]["self"]
    assert int(response.headers["Retry-After"]) > 0
    assert view["status"] == "queued"
    assert view["counts"] == {"total": 2, "queued": 2, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 0}
    jobs = await reader.jobs(UUID(view["id"]))
    assert [(job.url, job.host) for job in jobs] == [(URL, "example.com"), ("http://example.org/a%20b", "example.org")]


async def test_jobs_carry_settings_of_their_own(
    api: httpx2.AsyncClient, reader: Reader, worker: Worker, sessions: Sessions
) -> None:
    job = {
        "url": URL,
        "method": "post",
        "headers": {"Authorization": "Bearer CANARY", "X-A": "1"},
        "body": "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{GRINNING FACE}",
        "timeout_s": 5,
        "max_attempts": 1,
        "custom_id": "mine",
        "metadata": {"a": [1, {"b": None}]},
    }
    options = {"timeout_s": 20.5, "accept_statuses": ["2xx", "404", "300-302"], "headers": {"Cookie": "CANARY"}}
    response = await api.post(
        "/v1/batches",
        json={"jobs": [job, {"url": URL}], "options": options, "name": "n", "metadata": {"m": 1}},
    )
    assert response.status_code == 202, response.text
    assert "CANARY" not in response.text
    view = response.json()
    assert (view["name"], view["metadata"]) == ("n", {"m": 1})
    assert view["options"] == {
        "timeout_s": 20.5,
        "accept_statuses": ["2xx", "404", "300-302"],
        "header_names": ["Cookie"],
    }
    [[first, second]] = (await worker.claim()).values()
    assert first.request == {
        "method": "POST",
        "headers": [["Authorization", "Bearer CANARY"], ["X-A", "1"]],
        "body": job["body"],
        "timeout_s": 5,
        "max_attempts": 1,
    }
    assert second.request is None
    shown = (await api.get(f"/v1/jobs/{first.id}")).text
    assert "CANARY" not in shown
    detail = json.loads(shown)
    assert (detail["custom_id"], detail["metadata"], detail["method"]) == ("mine", {"a": [1, {"b": None}]}, "POST")
    assert detail["request_header_names"] == ["Authorization", "Cookie", "X-A"]


async def test_bad_urls_refuse_the_batch_and_are_named(api: httpx2.AsyncClient) -> None:
    response = await api.post(
        "/v1/batches", json={"urls": [URL, "ftp://example.com/", 5, "http://u:CANARY@example.com/"]}
    )
    assert response.status_code == 422
    assert response.headers["Content-Type"] == "application/problem+json"
    assert codes(response) == {
        "/urls/1": "scheme_not_allowed",
        "/urls/2": "invalid_url",
        "/urls/3": "userinfo_not_allowed",
    }
    assert response.json()["errors_total"] == 3
    assert "CANARY" not in response.text
    assert (await api.get("/v1/batches")).json()["data"] == []


async def test_only_the_first_hundred_bad_urls_are_named(api: httpx2.AsyncClient) -> None:
    response = await api.post("/v1/batches", json={"urls": ["ftp://x"] * 2500})
    assert len(response.json()["errors"]) == 100
    assert response.json()["errors_total"] == 2500


async def test_bad_urls_can_be_skipped_and_are_listed(api: httpx2.AsyncClient, reader: Reader) -> None:
    bad = ["ftp://example.com/", "http://u:CANARY@example.com/", "http://a\0b/", "http://a\ud800b/", None]
    response = await api.post(
        "/v1/batches", content=json.dumps({"urls": [URL, *bad, URL], "on_invalid": "skip"}), headers=JSON
    )
    assert response.status_code == 202, response.text
    view = response.json()
    assert view["counts"]["total"] == 2
    assert view["skipped_total"] == 5
    assert [(entry["index"], entry["url"], entry["code"]) for entry in view["skipped"]] == [
        (1, "ftp://example.com/", "scheme_not_allowed"),
        (2, None, "userinfo_not_allowed"),
        (3, "http://a\N{REPLACEMENT CHARACTER}b/", "invalid_url"),
        (4, "http://a\N{REPLACEMENT CHARACTER}b/", "invalid_url"),
        (5, None, "invalid_url"),
    ]
    assert [job.position for job in await reader.jobs(UUID(view["id"]))] == [0, 1]


async def test_of_many_skipped_entries_the_first_hundred_are_kept(api: httpx2.AsyncClient) -> None:
    response = await api.post("/v1/batches", json={"urls": ["ftp://x"] * 2500, "on_invalid": "skip"})
    assert response.json()["status"] == "completed"
    assert len(response.json()["skipped"]) == 100
    assert response.json()["skipped_total"] == 2500


async def test_an_empty_batch_is_completed(api: httpx2.AsyncClient) -> None:
    response = await api.post("/v1/batches", json={"urls": []}, headers={"Prefer": "wait=5"})
    assert response.status_code == 200
    assert response.json()["status"] == "completed"
    assert "Retry-After" not in response.headers


WRONG: list[tuple[Any, dict[str, str]]] = [
    ({}, {"": "missing"}),
    ({"urls": None}, {"": "missing"}),
    ({"urls": [], "jobs": []}, {"/jobs": "conflict"}),
    ({"urls": "https://example.com/"}, {"/urls": "invalid_type"}),
    ({"urls": [], "colour": 1}, {"/colour": "unknown_field"}),
    ({"urls": [], "a/b~c": 1}, {"/a~1b~0c": "unknown_field"}),
    ({"urls": [], "name": 5}, {"/name": "invalid_type"}),
    ({"urls": [], "name": "x" * 201}, {"/name": "too_long"}),
    ({"urls": [], "name": "a\0b"}, {"/name": "invalid_text"}),
    ({"urls": [], "name": "a\ud800b"}, {"/name": "invalid_text"}),
    ({"urls": [], "metadata": {"a": ["\ud800"]}}, {"/metadata/a/0": "invalid_text"}),
    ({"urls": [], "metadata": []}, {"/metadata": "invalid_type"}),
    ({"urls": [], "metadata": {"a": "x" * 20_000}}, {"/metadata": "too_long"}),
    ({"urls": [], "metadata": {"a": [[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]}}, {"/metadata": "too_deep"}),
    ({"urls": [], "on_invalid": "maybe"}, {"/on_invalid": "invalid_value"}),
    ({"urls": [], "options": 1}, {"/options": "invalid_type"}),
    ({"urls": [], "options": {"timeout": 1}}, {"/options/timeout": "unknown_field"}),
    ({"urls": [], "options": {"timeout_s": 301}}, {"/options/timeout_s": "out_of_range"}),
    ({"urls": [], "options": {"timeout_s": 0}}, {"/options/timeout_s": "out_of_range"}),
    ({"urls": [], "options": {"timeout_s": "5"}}, {"/options/timeout_s": "invalid_type"}),
    ({"urls": [], "options": {"timeout_s": True}}, {"/options/timeout_s": "invalid_type"}),
    ({"urls": [], "options": {"body_bytes_max": 2**24 + 1}}, {"/options/body_bytes_max": "out_of_range"}),
    ({"urls": [], "options": {"wire_bytes_max": 10**30}}, {"/options/wire_bytes_max": "out_of_range"}),
    ({"urls": [], "options": {"redirects_max": 11}}, {"/options/redirects_max": "out_of_range"}),
    ({"urls": [], "options": {"header_bytes_max": 2**17 + 1}}, {"/options/header_bytes_max": "out_of_range"}),
    ({"urls": [], "options": {"header_count_max": 257}}, {"/options/header_count_max": "out_of_range"}),
    ({"urls": [], "options": {"informational_max": 17}}, {"/options/informational_max": "out_of_range"}),
    ({"urls": [], "options": {"encodings_max": 4}}, {"/options/encodings_max": "out_of_range"}),
    ({"urls": [], "options": {"encodings_max": -1}}, {"/options/encodings_max": "out_of_range"}),
    ({"urls": [], "options": {"max_attempts": 11}}, {"/options/max_attempts": "out_of_range"}),
    ({"urls": [], "options": {"accept_statuses": ["6xx"]}}, {"/options/accept_statuses/0": "invalid_value"}),
    ({"urls": [], "options": {"accept_statuses": ["300-200"]}}, {"/options/accept_statuses": "invalid_value"}),
    ({"urls": [], "options": {"accept_statuses": []}}, {"/options/accept_statuses": "too_short"}),
    ({"urls": [], "options": {"method": "CONNECT"}}, {"/options/method": "method_not_allowed"}),
    ({"jobs": [{"url": URL, "method": ""}]}, {"/jobs/0/method": "method_not_allowed"}),
    ({"urls": [], "options": {"headers": {"Host": "x"}}}, {"/options/headers": "header_not_allowed"}),
    ({"urls": [], "options": {"headers": {"X": 1}}}, {"/options/headers/X": "invalid_type"}),
    ({"jobs": [5]}, {"/jobs/0": "invalid_type"}),
    ({"jobs": [{}]}, {"/jobs/0/url": "missing"}),
    ({"jobs": [{"url": URL, "x": 1}]}, {"/jobs/0/x": "unknown_field"}),
    ({"jobs": [{"url": URL}, {"url": "ftp://x"}]}, {"/jobs/1/url": "scheme_not_allowed"}),
    ({"jobs": [{"url": URL, "body": "a\0"}]}, {"/jobs/0/body": "invalid_text"}),
    ({"jobs": [{"url": URL, "custom_id": "x" * 201}]}, {"/jobs/0/custom_id": "too_long"}),
    ({"jobs": [{"url": URL, "custom_id": "\ud800"}]}, {"/jobs/0/custom_id": "invalid_text"}),
    ({"jobs": [{"url": URL, "timeout_s": 301}]}, {"/jobs/0/timeout_s": "out_of_range"}),
    (
        {"jobs": [{"url": "ftp://x", "method": "TRACE", "headers": {"a b": "c"}}]},
        {
            "/jobs/0/url": "scheme_not_allowed",
            "/jobs/0/method": "method_not_allowed",
            "/jobs/0/headers": "header_invalid",
        },
    ),
    ({"urls": ["ftp://x"], "colour": 1}, {"/colour": "unknown_field", "/urls/0": "scheme_not_allowed"}),
]


async def test_what_is_wrong_is_named(api: httpx2.AsyncClient) -> None:
    for document, wrong in WRONG:
        response = await api.post("/v1/batches", content=json.dumps(document), headers=JSON)
        assert (response.status_code, response.json()["code"]) == (422, "invalid_request"), document
        assert codes(response) == wrong


REMEDIES: list[tuple[Any, str]] = [
    ({"url": [URL]}, "did you mean urls?"),
    ({"urls": [], "colour": 1}, "there are jobs, metadata, name, on_invalid, options, urls."),
    ({"urls": [], "options": {"timeout": 1}}, "did you mean timeout_s or"),
    ({"jobs": [{"url": URL, "customid": "a"}]}, "did you mean custom_id?"),
    ({"urls": [], "options": {"accept_statuses": ["ok"]}}, 'Write statuses as "2xx", "404" or "200-299".'),
    ({"urls": [], "name": "\ud800"}, "leave them out."),
    ({"urls": [], "name": "\0"}, "leave them out."),
]


async def test_a_mistake_is_told_with_its_remedy(api: httpx2.AsyncClient) -> None:
    for document, remedy in REMEDIES:
        response = await api.post("/v1/batches", content=json.dumps(document), headers=JSON)
        assert any(remedy in error["detail"] for error in response.json()["errors"]), document


async def test_a_body_that_is_empty_or_too_deep_is_told_so(api: httpx2.AsyncClient) -> None:
    for body, words in ((b"", "is empty"), (b" \n", "is empty"), (b'{"metadata":' + b"[" * 500_000, "too deep")):
        response = await api.post("/v1/batches", content=body, headers=JSON)
        assert (response.status_code, response.json()["code"]) == (400, "invalid_json")
        assert words in response.json()["detail"]


async def test_what_is_not_a_json_object_is_refused(api: httpx2.AsyncClient) -> None:
    for body in (
        b"",
        b"not json",
        b"[]",
        b'"x"',
        b"\xff{}",
        b'{"urls": [NaN]}',
        b'{"urls": ["a" "b"]}',
        b"[" * 500_000,
    ):
        response = await api.post("/v1/batches", content=body, headers=JSON)
        assert (response.status_code, response.json()["code"]) == (400, "invalid_json"), body[:100]


async def test_other_media_types_are_refused(api: httpx2.AsyncClient) -> None:
    for headers in (
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ):
        response = await api.post("/v1/batches", content=b'{"urls": []}', headers=headers)
        assert (response.status_code, response.json()["code"]) == (415, "media_type_not_supported")


async def test_json_may_name_its_charset(api: httpx2.AsyncClient) -> None:
    response = await api.post(
        "/v1/batches", content=b'{"urls": []}', headers={"Content-Type": "Application/JSON; charset=utf-8"}
    )
    assert response.status_code == 202


async def test_too_many_jobs_are_refused(make_app: AppMaker) -> None:
    async with calling(make_app(bounds=replace(BOUNDS, batch_jobs_max=3))) as api:
        assert (await api.post("/v1/batches", json={"urls": [URL] * 3})).status_code == 202
        response = await api.post("/v1/batches", json={"urls": [URL] * 4})
    assert (response.status_code, response.json()["code"]) == (422, "too_many_jobs")
    assert "at most 3 jobs" in response.json()["detail"]


async def test_too_large_a_body_is_refused_as_it_arrives(make_app: AppMaker) -> None:
    async def endless() -> Any:
        for _ in range(5000):
            yield b" " * 1000

    async with (
        served(make_app(bounds=replace(BOUNDS, request_bytes_max=100_000))) as url,
        httpx2.AsyncClient(base_url=url) as api,
    ):
        announced = await api.post("/v1/batches", content=b" " * 5_000_000, headers=JSON)
        asking = await api.post("/v1/batches", content=b" " * 200_000, headers={**JSON, "Expect": "100-continue"})
        streamed = await api.post("/v1/batches", content=endless(), headers=JSON)
    for response in (announced, asking, streamed):
        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
        assert "100,000 bytes" in response.json()["detail"]


async def test_a_wait_is_answered_when_the_batch_is_done(
    api: httpx2.AsyncClient, worker: Worker, reader: Reader
) -> None:
    async def work() -> None:
        while not (claimed := await worker.claim()):
            await asyncio.sleep(0.01)
        [[job]] = claimed.values()
        await worker.record(success(job))
        await reader.finish(job.batch_id)

    async with asyncio.timeout(20):
        response, _ = await asyncio.gather(
            api.post("/v1/batches", json={"urls": [URL]}, headers={"Prefer": "respond-async, wait=15"}), work()
        )
    assert response.status_code == 200
    assert response.headers["Preference-Applied"] == "wait=15"
    assert response.headers["Location"] == response.json()["links"]["self"]
    assert response.json()["status"] == "completed"


async def test_a_wait_that_ends_too_soon_is_answered_202(api: httpx2.AsyncClient) -> None:
    response = await api.post("/v1/batches", json={"urls": [URL]}, headers={"Prefer": "wait=1"})
    assert response.status_code == 202
    assert response.headers["Preference-Applied"] == "wait=1"
    assert response.json()["status"] == "queued"


async def test_the_loop_runs_on_while_a_large_batch_is_checked(api: httpx2.AsyncClient) -> None:
    job = {"url": "https://example.com/some/page", "headers": {"x": "y"}, "metadata": {"n": [1]}}
    body = json.dumps({"jobs": [*[job] * 50_000, {"url": "ftp://x"}]}).encode()
    submitting = asyncio.create_task(api.post("/v1/batches", content=body, headers=JSON))
    turns = 0
    while not submitting.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert (await submitting).status_code == 422
    assert turns > 20  # on the loop itself it would be three or four


def test_the_shared_header_cases_are_judged_as_they_say() -> None:
    with (CASES / "headers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        body = json.dumps({"jobs": [{"url": URL, **_request_of(row["name"], row["caller input"])}]}).encode()
        try:
            check(body, Policy(), BOUNDS)
            outcome = "accepted"
        except Problem as problem:
            outcome = f"422 {problem.faults[0].code}"
        expected = row["expected outcome"].replace("as Authorization", "accepted")
        assert outcome.split()[0] in expected, (row["name"], outcome)
        if "_" in expected and expected.startswith("422"):
            assert outcome == expected, row["name"]


def _request_of(name: str, given: str) -> dict[str, Any]:
    if name.startswith("method_"):
        text = given.split(" ", 1)[1].strip("'")
        return {"method": text.encode().decode("unicode_escape")}
    if name == "count_101":
        return {"headers": {f"x-{number}": "a" for number in range(101)}}
    if name == "total_33k":
        return {"headers": {"x": "a" * 33 * 2**10}}
    if given.startswith("'"):
        header, value = given.rsplit(":", 1)
        return {"headers": {header.strip("'"): value.strip()}}
    header, _, value = given.partition(":")
    text = value.strip().replace("\\r", "\r").replace("\\n", "\n").replace("\\0", "\0")
    return {"headers": {header.rstrip("*"): text or "x"}}


async def test_what_is_no_json_is_told_where_and_what_the_body_must_be(api: httpx2.AsyncClient) -> None:
    for body, words in (
        (b'{\n  "urls": ["a",]\n}', "Expecting value at line 2, column 16."),
        (b'{"urls": ["a" "b"]}', "Expected ',' or ']' at line 1, column 15."),
        (b"{urls: []}", "Expected a name in double quotes at line 1, column 2."),
        (b'{"urls": [nope]}' + b" " * 2**21, "Expecting value at line 1, column 11."),
        (b'{"urls": ["' + b"x" * 2**21 + b'"]}', "longer than 1,048,576 characters at line 1, column 11."),
    ):
        detail = (await api.post("/v1/batches", content=body, headers=JSON)).json()["detail"]
        assert words in detail, body[:50]
        assert '{"urls": [' in detail


async def test_no_wording_of_a_library_reaches_a_client(api: httpx2.AsyncClient) -> None:
    answers = [await api.post("/v1/batches", content=json.dumps(document), headers=JSON) for document, _ in WRONG]
    answers += [
        await api.get(path)
        for path in ("/v1/jobs/5", "/v1/batches?limit=x", "/v1/batches?limit=999", "/v1/batches?status=x")
    ]
    details = [error["detail"] for answer in answers for error in answer.json()["errors"]]
    assert [detail for detail in details if "nput should" in detail or "valid " in detail or "required" in detail] == []


async def test_a_parameter_of_a_wrong_form_is_named_with_the_right_one(api: httpx2.AsyncClient) -> None:
    answers = [
        await api.post("/v1/batches", json={"urls": []}, headers={"Idempotency-Key": "a b"}),
        await api.get("/v1/batches?cursor=!"),
        await api.get("/v1/batches?cursor=AAAA"),
        await api.get("/v1/batches?limits=5"),
    ]
    [key, form, foreign, unknown] = [answer.json()["errors"][0] for answer in answers]
    assert (key["pointer"], form["pointer"]) == ("/header/Idempotency-Key", "/query/cursor")
    assert "1 to 255 visible ASCII characters" in key["detail"]
    assert "next_cursor" in form["detail"]
    assert (foreign["pointer"], foreign["detail"]) == ("/query/cursor", form["detail"])
    assert unknown["detail"] == "There is no such parameter; did you mean limit?"


async def test_a_skipped_entry_names_the_field_that_is_wrong(api: httpx2.AsyncClient) -> None:
    batch = {"jobs": [{"url": URL, "timeout_s": 0}], "on_invalid": "skip"}
    [entry] = (await api.post("/v1/batches", json=batch)).json()["skipped"]
    assert entry["pointer"] == "/jobs/0/timeout_s"


async def test_an_option_in_the_wrong_place_is_led_to_the_right_one(api: httpx2.AsyncClient) -> None:
    for batch in ({"urls": [], "timeout_s": 5}, {"jobs": [{"url": URL, "redirects_max": 1}]}):
        [error] = (await api.post("/v1/batches", json=batch)).json()["errors"]
        assert "goes in options" in error["detail"]
