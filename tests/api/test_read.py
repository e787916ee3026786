"""Reading batches, jobs, bodies and results, cancelling and deleting."""

import asyncio
import base64
import gc
import json
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import GeneratorType, ModuleType
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
from msgspec import structs
from sqlalchemy import event, text
from starlette.types import Message

from app.api import results
from app.jobs import reads
from app.jobs.database import Sessions
from tests.api.conftest import AppMaker, calling, served
from tests.jobs.actors import Client as Reader
from tests.jobs.actors import Worker, failure, success
from tests.waiting import until

OPEN_TRANSACTIONS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND state LIKE 'idle in transaction%'
"""

BATCH_VIEW = {
    "id", "name", "status", "counts", "errors", "http_statuses", "wire_bytes", "body_bytes", "options", "metadata",
    "skipped", "skipped_total", "created_at", "started_at", "finished_at", "cancel_requested_at", "links",
}  # fmt: skip


async def finish(worker: Worker, reader: Reader, batch_id: UUID, *contents: bytes | None) -> list[UUID]:
    """Run a batch of one host: each job to the content given, or to a failure; the rest stays queued."""
    [(lease, jobs)] = (await worker.claim(jobs_per_host=len(contents))).items()
    outcomes = zip(jobs, contents, strict=True)
    await worker.record(*(failure(job) if content is None else success(job, content) for job, content in outcomes))
    await worker.release(lease)
    await reader.finish(batch_id)
    return [job.id for job in jobs]


async def test_others_have_turns_while_a_long_page_of_jobs_is_read(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = await reader.submit(*["h.example"] * (3 * reads.ROWS_PER_TURN))
    turn, read_in, make_job = 0, Counter[int](), reads.Job

    def count(**fields: Any) -> reads.Job:
        read_in[turn] += 1
        return make_job(**fields)

    async def take_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(reads, "Job", count)
    others = asyncio.create_task(take_turns())
    jobs = await reader.jobs(batch_id)
    others.cancel()
    assert [job.position for job in jobs] == list(range(3 * reads.ROWS_PER_TURN))
    assert max(read_in.values()) == reads.ROWS_PER_TURN


async def test_a_batch_shows_what_came_of_it(api: httpx2.AsyncClient, reader: Reader, worker: Worker) -> None:
    batch_id = await reader.submit("h.example", "h.example")
    before = await api.get(f"/v1/batches/{batch_id}")
    assert before.headers["Retry-After"] == "1"
    await finish(worker, reader, batch_id, b"hello", None)
    after = await api.get(f"/v1/batches/{batch_id}")
    view = after.json()
    assert view.keys() == BATCH_VIEW
    assert view["status"] == "completed"
    assert view["counts"] == {"total": 2, "queued": 0, "running": 0, "succeeded": 1, "failed": 1, "cancelled": 0}
    assert (view["errors"], view["http_statuses"]) == ({"read_timeout": 1}, {"200": 1})
    assert (view["wire_bytes"], view["body_bytes"]) == (5, 5)
    assert view["finished_at"].endswith("Z")
    assert "Retry-After" not in after.headers
    assert before.headers["ETag"] != after.headers["ETag"]


async def test_an_unchanged_batch_is_not_sent_again(api: httpx2.AsyncClient, reader: Reader, worker: Worker) -> None:
    batch_id = await reader.submit("h.example")
    etag = (await api.get(f"/v1/batches/{batch_id}")).headers["ETag"]
    for given in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        response = await api.get(f"/v1/batches/{batch_id}", headers={"If-None-Match": given})
        assert (response.status_code, response.content, response.headers["ETag"]) == (304, b"", etag)
    await finish(worker, reader, batch_id, b"hello")
    response = await api.get(f"/v1/batches/{batch_id}", headers={"If-None-Match": etag})
    assert response.status_code == 200


async def test_batches_are_listed_newest_first_page_by_page(
    api: httpx2.AsyncClient, reader: Reader, worker: Worker
) -> None:
    given = [str(await reader.submit("h.example")) for _ in range(5)]
    await finish(worker, reader, UUID(given[2]), b"x", b"x", b"x", b"x", b"x")
    seen, url = [], "/v1/batches?limit=2"
    while url:
        response = await api.get(url)
        seen += [batch["id"] for batch in response.json()["data"]]
        link = response.headers.get("Link", "")
        assert bool(link) == (response.json()["next_cursor"] is not None)
        url = link.removeprefix("<").partition(">")[0]
    assert seen == given[::-1]
    completed = (await api.get("/v1/batches", params={"status": "completed"})).json()
    assert [batch["id"] for batch in completed["data"]] == [given[2]]
    assert completed["next_cursor"] is None


async def test_jobs_are_listed_in_input_order_page_by_page(
    api: httpx2.AsyncClient, reader: Reader, worker: Worker
) -> None:
    batch_id = await reader.submit(*["b.example", "a.example:81"] * 3)
    seen, url = [], f"/v1/batches/{batch_id}/jobs?limit=2&status=queued"
    while url:
        response = await api.get(url)
        seen += [job["position"] for job in response.json()["data"]]
        url = response.headers.get("Link", "").removeprefix("<").partition(">")[0]
    assert seen == [0, 1, 2, 3, 4, 5]


async def test_jobs_are_filtered(api: httpx2.AsyncClient, reader: Reader, worker: Worker) -> None:
    batch_id = await reader.submit("h.example", "h.example", "h.example")
    await finish(worker, reader, batch_id, b"x", None)

    async def positions(**where: Any) -> list[int]:
        response = await api.get(f"/v1/batches/{batch_id}/jobs", params=where)
        assert response.status_code == 200, response.text
        return [job["position"] for job in response.json()["data"]]

    assert await positions(status="succeeded") == [0]
    assert await positions(error="read_timeout") == [1]
    assert await positions(http_status=200) == [0]
    assert await positions(host="h.example") == [0, 1, 2]
    assert await positions(host="other.example") == []
    assert await positions(status="queued", host="h.example") == [2]


async def test_a_job_shows_everything_known(api: httpx2.AsyncClient, reader: Reader, worker: Worker) -> None:
    batch_id = await reader.submit("h.example")
    [job_id] = await finish(worker, reader, batch_id, b"hello")
    view = (await api.get(f"/v1/jobs/{job_id}")).json()
    assert (view["id"], view["batch_id"], view["position"]) == (str(job_id), str(batch_id), 0)
    assert (view["status"], view["http_status"], view["attempts"], view["method"]) == ("succeeded", 200, 1, "GET")
    assert view["response_headers"] == [["Content-Type", "text/plain"]]
    assert view["evidence"]["body_bytes"] == 5
    assert [attempt["number"] for attempt in view["attempts_made"]] == [1]
    assert view["links"]["body"] == f"/v1/jobs/{job_id}/body"


async def test_a_body_is_sent_so_that_no_browser_runs_it(
    api: httpx2.AsyncClient, reader: Reader, worker: Worker
) -> None:
    batch_id = await reader.submit("h.example")
    [job_id] = await finish(worker, reader, batch_id, b"<script>alert(1)</script>")
    response = await api.get(f"/v1/jobs/{job_id}/body")
    assert response.content == b"<script>alert(1)</script>"
    assert response.headers["Content-Type"] == "text/plain"
    assert response.headers["Content-Disposition"].startswith("attachment")
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Content-Security-Policy"] == "sandbox; default-src 'none'"
    assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    head = await api.head(f"/v1/jobs/{job_id}/body")
    assert head.headers["Content-Length"] == "25"
    again = await api.get(f"/v1/jobs/{job_id}/body", headers={"If-None-Match": response.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")


MEDIA_TYPES = {
    "text/html; charset=utf-8": "text/html; charset=utf-8",
    "image/svg+xml": "image/svg+xml",
    "text/html\r\nX-Evil: 1": "application/octet-stream",
    "text/html; a=b; charset=utf-8": "application/octet-stream",
    "text": "application/octet-stream",
    "text/" + "x" * 100: "application/octet-stream",
    "": "application/octet-stream",
    "text/pl\u00e4in": "application/octet-stream",
}


async def test_only_a_plain_media_type_is_repeated(api: httpx2.AsyncClient, reader: Reader, worker: Worker) -> None:
    await reader.submit(*["h.example"] * len(MEDIA_TYPES))
    [jobs] = (await worker.claim(jobs_per_host=100)).values()
    for job, (stored, sent) in zip(jobs, MEDIA_TYPES.items(), strict=True):
        evidence = json.dumps({"headers": [["content-type", stored]], "body_bytes": 5})
        await worker.record(structs.replace(success(job), evidence=evidence))
        response = await api.get(f"/v1/jobs/{job.id}/body")
        assert response.headers.get_list("Content-Type") == [sent]
        assert "X-Evil" not in response.headers


async def test_a_missing_body_says_why(api: httpx2.AsyncClient, reader: Reader, worker: Worker) -> None:
    batch_id = await reader.submit("h.example", "h.example")
    [failed] = await finish(worker, reader, batch_id, None)
    queued = (await reader.jobs(batch_id, status="queued"))[0].id
    for job_id, status, code in (
        (failed, 404, "body_not_found"),
        (queued, 409, "job_not_finished"),
        (uuid4(), 404, "job_not_found"),
    ):
        response = await api.get(f"/v1/jobs/{job_id}/body")
        assert (response.status_code, response.json()["code"]) == (status, code)


async def test_a_job_that_waits_for_its_host_to_rest_says_until_when(
    api: httpx2.AsyncClient, reader: Reader, sessions: Sessions
) -> None:
    batch_id = await reader.submit("rests.example", "other.example")
    until = "2126-01-01T00:00:00Z"
    async with sessions.begin() as session:
        await session.execute(text(f"UPDATE host SET not_before = '{until}' WHERE host = 'rests.example'"))
    rests, other = (await api.get(f"/v1/batches/{batch_id}/jobs")).json()["data"]
    assert rests["run_at"] == until > other["run_at"]
    assert (await api.get(f"/v1/jobs/{rests['id']}")).json()["run_at"] == until


async def test_results_are_a_line_for_each_finished_job(
    api: httpx2.AsyncClient, reader: Reader, worker: Worker
) -> None:
    batch_id = await reader.submit(*["h.example"] * 4)
    await finish(worker, reader, batch_id, 'caf\u00e9 \U0001f600\0"\\\n'.encode(), b"\xff\x00", None)
    plain = await api.get(f"/v1/batches/{batch_id}/results")
    assert plain.headers["Content-Type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in plain.text.splitlines()]
    assert [(line["position"], line["status"]) for line in lines] == [(0, "succeeded"), (1, "succeeded"), (2, "failed")]
    assert "body_text" not in lines[0]
    full = await api.get(f"/v1/batches/{batch_id}/results", params={"include": "body"})
    textual, binary, none = [json.loads(line) for line in full.text.split("\n")[:-1]]
    assert (textual["body_text"], textual["body_base64"]) == ('caf\u00e9 \U0001f600\0"\\\n', None)
    assert (binary["body_text"], base64.b64decode(binary["body_base64"])) == (None, b"\xff\x00")
    assert (none["body_text"], none["body_base64"]) == (None, None)
    assert {name for name in textual if not name.startswith("body_")} == lines[0].keys() - {"body_sha256", "body_bytes"}


async def test_results_show_the_headers_of_each_response_if_asked_to(
    api: httpx2.AsyncClient, reader: Reader, worker: Worker, sessions: Sessions
) -> None:
    batch_id = await reader.submit(*["h.example"] * 2)
    await finish(worker, reader, batch_id, b"page", None)
    headers = [["Set-Cookie", "a=1"], ["Set-Cookie", "b=\u2028"]]
    async with sessions.begin() as session:
        evidence = json.dumps({"headers": headers})
        await session.execute(text("UPDATE job SET evidence = :evidence WHERE position = 0"), {"evidence": evidence})
    path = f"/v1/batches/{batch_id}/results"
    for included in ("headers", "body,headers", "headers,body"):
        response = await api.get(path, params={"include": included})
        page, none = [json.loads(line) for line in response.text.splitlines()]
        assert (page["response_headers"], none["response_headers"]) == (headers, None)
        assert ("body_text" in page) == ("body" in included)


async def test_results_of_one_status_and_those_behind_a_position(
    api: httpx2.AsyncClient, reader: Reader, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "PAGE_JOBS", 2)
    batch_id = await reader.submit(*["h.example"] * 7)
    await finish(worker, reader, batch_id, b"0", None, b"2", b"3", None, b"5", b"6")
    for query, positions in {
        "status=succeeded": [0, 2, 3, 5, 6],
        "status=failed": [1, 4],
        "status=cancelled": [],
        "after=2": [3, 4, 5, 6],
        "after=2&status=failed": [4],
        "after=6": [],
        "after=2147483647": [],
        "after=-1": [0, 1, 2, 3, 4, 5, 6],
    }.items():
        response = await api.get(f"/v1/batches/{batch_id}/results?{query}")
        assert [json.loads(line)["position"] for line in response.text.splitlines()] == positions, query


async def test_results_go_on_over_pages_and_pieces(
    api: httpx2.AsyncClient, reader: Reader, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"PAGE_JOBS": 3, "GROUP_BYTES_MAX": 100, "CHUNK_BYTES": 50, "TEXT_PIECE_CHARS": 7, "BASE64_PIECE_BYTES": 6}
    for name, value in sizes.items():
        monkeypatch.setattr(results, name, value)
    contents = [f"page {number} \U0001f600 \u00e9".encode() * 5 for number in (0, 0, 2, 3, 4, 5)] + [b"\xff" * 100]
    batch_id = await reader.submit(*["h.example"] * 7)
    await finish(worker, reader, batch_id, *contents)
    response = await api.get(f"/v1/batches/{batch_id}/results?include=body")
    lines = [json.loads(line) for line in response.text.split("\n")[:-1]]
    assert [line["body_text"] for line in lines[:6]] == [content.decode() for content in contents[:6]]
    assert base64.b64decode(lines[6]["body_base64"]) == contents[6]


async def test_results_break_off_when_their_batch_is_deleted(
    api: httpx2.AsyncClient, reader: Reader, worker: Worker, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "PAGE_JOBS", 1)
    batch_id = await reader.submit("h.example", "h.example")
    await finish(worker, reader, batch_id, b"one", b"two")
    jobs = await reader.jobs(batch_id)
    async with aclosing(results.stream(sessions, batch_id, total=2, with_bodies=True)) as lines:
        assert json.loads(await anext(lines))["body_text"] == "one"
        assert (await api.delete(f"/v1/batches/{batch_id}")).status_code == 204
        with pytest.raises(reads.BatchGone):
            await anext(lines)
    async with sessions.begin() as session:
        await session.execute(text("DELETE FROM body"))
        with pytest.raises(reads.BatchGone):
            await reads.list_bodies(session, jobs)


async def test_readers_of_lines_take_each_result_for_one(
    api: httpx2.AsyncClient, reader: Reader, worker: Worker
) -> None:
    """`str.splitlines`, by which httpx reads lines, ends them where JSON needs no escape."""
    body = "".join(chr(each) for each in (*range(1, 32), 0x85, 0x2028, 0x2029, 0x20AC))
    answer = await api.post("/v1/batches", json={"jobs": [{"url": "http://h.example/", "metadata": {"body": body}}]})
    await finish(worker, reader, UUID(answer.json()["id"]), body.encode())
    response = await api.get(f"/v1/batches/{answer.json()['id']}/results?include=body")
    [line] = [json.loads(line) for line in response.text.splitlines()]
    assert line["body_text"] == line["metadata"]["body"] == body


async def test_a_page_of_results_with_bodies_takes_two_statements(
    reader: Reader, worker: Worker, sessions: Sessions
) -> None:
    """And one more at the end of all, for whether the batch is still there."""
    batch_id = await reader.submit(*["h.example"] * 20)
    await finish(worker, reader, batch_id, *(f"page {number}".encode() for number in range(20)))
    statements: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    event.listen(sessions.kw["bind"].sync_engine, "before_cursor_execute", note)
    chunks = [chunk async for chunk in results.stream(sessions, batch_id, total=20, with_bodies=True)]
    assert b"".join(chunks).count(b"\n") == 20
    assert len(statements) == 3


async def test_results_go_on_past_pages_of_which_nothing_is_finished(
    api: httpx2.AsyncClient, reader: Reader, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "PAGE_JOBS", 2)
    batch_id = await reader.submit(*["h.example"] * 7)
    [jobs] = (await worker.claim(jobs_per_host=7)).values()
    await worker.record(*(success(job, b"page") for job in jobs if job.url.endswith(("/0", "/6"))))
    response = await api.get(f"/v1/batches/{batch_id}/results")
    assert [json.loads(line)["position"] for line in response.text.splitlines()] == [0, 6]


async def test_no_transaction_is_open_while_results_are_sent(
    make_app: AppMaker, reader: Reader, worker: Worker, sessions: Sessions
) -> None:
    batch_id = await reader.submit("h.example")
    # More than the buffers between the two sockets take: the server stays in the middle of the line.
    await finish(worker, reader, batch_id, b"\xff" * 30_000_000)
    path = f"/v1/batches/{batch_id}/results?include=body"
    async with served(make_app()) as url, httpx2.AsyncClient(base_url=url) as api, api.stream("GET", path) as response:
        await anext(response.aiter_raw(1000))
        async with sessions.begin() as session:
            open_count = await session.scalar(text(OPEN_TRANSACTIONS))
    assert open_count == 0


async def test_results_are_let_go_of_when_the_client_goes(make_app: AppMaker, reader: Reader, worker: Worker) -> None:
    """At once: until garbage is collected, a few clients could fill the memory."""
    batch_id = await reader.submit("h.example")
    await finish(worker, reader, batch_id, b"x" * 16_000_000)
    path = f"/v1/batches/{batch_id}/results?include=body"
    gc.collect()
    gc.disable()
    try:
        async with served(make_app()) as url, httpx2.AsyncClient(base_url=url) as api:
            async with api.stream("GET", path) as response:
                await anext(response.aiter_raw(1000))
            await until(lambda: not _open_generators(results))
    finally:
        gc.enable()


async def test_a_stream_is_closed_when_its_client_goes_while_it_waits_to_send() -> None:
    waits, ended = asyncio.Event(), asyncio.Event()

    async def lines() -> AsyncGenerator[bytes]:
        try:
            yield b"line\n"
        finally:
            ended.set()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            waits.set()
            await asyncio.Event().wait()

    async def receive() -> Message:
        await waits.wait()
        return {"type": "http.disconnect"}

    response = results.Lines(lines())
    await response({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
    assert ended.is_set()


async def test_a_stream_whose_batch_is_gone_has_no_end() -> None:
    sent: list[Message] = []

    async def lines() -> AsyncGenerator[bytes]:
        yield b"line\n"
        raise reads.BatchGone

    async def send(message: Message) -> None:
        sent.append(message)

    await results.Lines(lines()).stream_response(send)
    assert [message.get("more_body") for message in sent] == [None, True]


def _open_generators(module: ModuleType) -> list[object]:
    """Generators of a module that have begun and not ended."""
    every = [each for each in gc.get_objects() if isinstance(each, GeneratorType)]
    return [each for each in every if each.gi_code.co_filename == module.__file__ and each.gi_frame is not None]


async def test_cancelling_is_asked_for_once_and_shown(api: httpx2.AsyncClient, reader: Reader) -> None:
    batch_id = await reader.submit("h.example")
    first = await api.post(f"/v1/batches/{batch_id}/cancel")
    second = await api.post(f"/v1/batches/{batch_id}/cancel")
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["cancel_requested_at"] == second.json()["cancel_requested_at"] is not None


async def test_a_finished_batch_stays_as_it_is_when_cancelled(
    api: httpx2.AsyncClient, reader: Reader, worker: Worker
) -> None:
    batch_id = await reader.submit("h.example")
    await finish(worker, reader, batch_id, b"x")
    response = await api.post(f"/v1/batches/{batch_id}/cancel")
    assert (response.json()["status"], response.json()["cancel_requested_at"]) == ("completed", None)


async def test_a_deleted_batch_is_gone(api: httpx2.AsyncClient, reader: Reader, worker: Worker) -> None:
    batch_id = await reader.submit("h.example")
    refused = await api.delete(f"/v1/batches/{batch_id}")
    assert (refused.status_code, refused.json()["code"]) == (409, "batch_not_finished")
    assert "cancel it" in refused.json()["detail"]
    [job_id] = await finish(worker, reader, batch_id, b"x")
    assert (await api.delete(f"/v1/batches/{batch_id}")).status_code == 204
    for path in (
        f"/v1/batches/{batch_id}",
        f"/v1/batches/{batch_id}/jobs",
        f"/v1/batches/{batch_id}/results",
        f"/v1/jobs/{job_id}",
        f"/v1/jobs/{job_id}/body",
    ):
        assert (await api.get(path)).status_code == 404, path
    assert (await api.delete(f"/v1/batches/{batch_id}")).status_code == 404
    assert (await api.post(f"/v1/batches/{batch_id}/cancel")).status_code == 404
    assert (await api.get("/v1/batches")).json()["data"] == []


async def test_ids_that_are_none_and_ids_of_nothing(api: httpx2.AsyncClient) -> None:
    for path in ("/v1/batches/x", "/v1/jobs/x", "/v1/jobs/%00/body"):
        response = await api.get(path)
        assert (response.status_code, response.json()["code"]) == (422, "invalid_parameter"), path
    for path in (f"/v1/batches/{uuid4()}", f"/v1/jobs/{uuid4()}"):
        assert (await api.get(path)).status_code == 404


WRONG_QUERIES = (
    "limit=0", "limit=1001", "limit=x", "limit=", "status=done", "error=none", "http_status=99", "http_status=1e3",
    "host=%00", "host=", "host=" + "x" * 301, "cursor=%00", "cursor=!", "cursor=" + "A" * 65, "colour=red",
)  # fmt: skip


async def test_wrong_parameters_are_named(api: httpx2.AsyncClient, reader: Reader) -> None:
    batch_id = await reader.submit("h.example")
    for query in WRONG_QUERIES:
        response = await api.get(f"/v1/batches/{batch_id}/jobs?{query}")
        assert (response.status_code, response.json()["code"]) == (422, "invalid_parameter"), query
        assert response.json()["errors"][0]["pointer"] == "/query/" + query.partition("=")[0]


async def test_wrong_parameters_of_results_are_named(api: httpx2.AsyncClient, reader: Reader) -> None:
    batch_id = await reader.submit("h.example")
    for query in ("include=", "include=head", "status=queued", "after=-2", "after=2147483648", "after=x", "limit=1"):
        response = await api.get(f"/v1/batches/{batch_id}/results?{query}")
        assert (response.status_code, response.json()["code"]) == (422, "invalid_parameter"), query
        assert response.json()["errors"][0]["pointer"] == "/query/" + query.partition("=")[0]


async def test_batches_and_jobs_are_found_by_the_client_s_own_names(api: httpx2.AsyncClient) -> None:
    jobs = [{"url": f"http://h.example/{number}", "custom_id": f"no. {number % 2}"} for number in range(5)]
    named = await api.post("/v1/batches", json={"name": "caf\u00e9 & co.", "jobs": jobs})
    await api.post("/v1/batches", json={"name": "other", "urls": []})
    found = (await api.get("/v1/batches", params={"name": "caf\u00e9 & co."})).json()["data"]
    assert [batch["id"] for batch in found] == [named.json()["id"]]
    assert (await api.get("/v1/batches", params={"name": "caf"})).json()["data"] == []
    path, positions = f"/v1/batches/{named.json()['id']}/jobs", []
    first = await api.get(path, params={"custom_id": "no. 0", "limit": 2})
    for response in (first, await api.get(first.links["next"]["url"])):
        positions += [job["position"] for job in response.json()["data"]]
    assert positions == [0, 2, 4]
    for wrong in ("/v1/batches?name=%00", "/v1/batches?name=" + "x" * 201, f"{path}?custom_id=%00"):
        assert (await api.get(wrong)).status_code == 422, wrong


async def test_foreign_cursors_are_refused(api: httpx2.AsyncClient, reader: Reader) -> None:
    batch_id = await reader.submit("h.example", "h.example")
    await reader.submit("h.example")
    of_jobs = (await api.get(f"/v1/batches/{batch_id}/jobs?limit=1")).json()["next_cursor"]
    of_batches = (await api.get("/v1/batches?limit=1")).json()["next_cursor"]
    for path in (
        f"/v1/batches?cursor={of_jobs}",
        f"/v1/batches/{batch_id}/jobs?cursor={of_batches}",
        "/v1/batches?cursor=A",
        "/v1/batches?cursor=AAAA",
        f"/v1/batches/{batch_id}/jobs?cursor=av____8",
    ):
        response = await api.get(path)
        assert (response.status_code, response.json()["code"]) == (422, "invalid_cursor"), path


async def test_secrets_of_options_are_not_shown(make_app: AppMaker, reader: Reader) -> None:
    batch_id = await reader.submit("h.example", options={"headers": [["Authorization", "CANARY"]]})
    async with calling(make_app()) as api:
        for path in ("/v1/batches", f"/v1/batches/{batch_id}", f"/v1/batches/{batch_id}/jobs"):
            assert "CANARY" not in (await api.get(path)).text


async def test_head_is_get_without_the_bytes(make_app: AppMaker, reader: Reader, worker: Worker) -> None:
    batch_id = await reader.submit("h.example")
    [job_id] = await finish(worker, reader, batch_id, b"hello")
    paths = ("", "v1/batches", f"v1/batches/{batch_id}", f"v1/batches/{batch_id}/jobs")
    more = (
        f"v1/batches/{batch_id}/results",
        f"v1/jobs/{job_id}",
        f"v1/jobs/{job_id}/body",
        "healthz",
        "readyz",
        "docs",
    )
    async with served(make_app()) as url, httpx2.AsyncClient() as client:
        for path in (*paths, *more, f"v1/jobs/{uuid4()}", "static/docs.js"):
            got = await client.get(f"{url}/{path}")
            head = await client.head(f"{url}/{path}")
            assert (head.status_code, head.content) == (got.status_code, b""), path
            for name in ("Content-Type", "Content-Length", "ETag", "Content-Disposition"):
                assert head.headers.get(name) == got.headers.get(name), (path, name)
