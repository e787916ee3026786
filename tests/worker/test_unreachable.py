"""Many jobs of a host that cannot be connected to: what a try has met applies to all that are due."""

import asyncio
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from app.fetch import transport
from app.fetch.connection import Connection
from app.fetch.dialling import connect
from app.fetch.http import fetch
from app.fetch.limits import Failed
from app.jobs import batches
from app.jobs.database import Sessions
from app.outcome import FailureCode, Outcome
from app.worker import attempt, pool, retry, slots
from tests.waiting import until
from tests.web import Answer, Site, serving
from tests.worker.conftest import Service

REST_S = 3.0
"""Longer than jobs wait in a worker for a host that rests."""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first failure tells enough, and the host rests long."""
    monkeypatch.setattr(retry, "CONNECT_FAILURES_SHARED", 1)
    monkeypatch.setattr(retry, "BACK_OFF_FIRST_S", REST_S)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs that were fetched, or for which this was tried."""
    urls: list[str] = []

    async def note(request: Any, **others: Any) -> Outcome:
        urls.append(request.url)
        return await fetch(request, **others)

    monkeypatch.setattr(attempt, "fetch", note)
    return urls


@pytest.fixture
async def gone() -> Site:
    """A site that is no longer there."""
    async with serving() as site:
        pass
    return site


async def test_each_try_at_a_dead_host_counts_for_all_its_jobs(service: Service, gone: Site, tried: list[str]) -> None:
    async with service.worker(host_concurrency=4):
        batch_id = await service.submit(*(gone.url(f"/{number}") for number in range(300)), max_attempts=2)
        batch = await service.finished(batch_id)
    assert (batch.counts.failed, batch.errors) == (300, {"connect_refused": 300})
    assert len(tried) == 2  # one for all, and after the host's rest another one
    jobs = await service.jobs(batch_id)
    assert {job.attempts for job in jobs} == {2}
    untried = next(job for job in jobs if job.url not in tried)
    detail = await service.job(untried.id)
    assert (detail.error_detail or "").startswith(
        "Not tried for itself: the last 2 tries could not connect to this host."
    )
    assert [attempt.error for attempt in detail.attempts_made] == ["connect_refused", "connect_refused"]


async def test_a_host_that_comes_back_gets_all_its_jobs(service: Service, gone: Site, tried: list[str]) -> None:
    async with service.worker(host_concurrency=4):
        batch_id = await service.submit(*(gone.url(f"/{number}") for number in range(50)))
        await until(lambda: _all_wait(service, batch_id))
        assert len(tried) == 1
        async with serving(port=gone.port) as site:
            assert (await service.finished(batch_id)).counts.succeeded == 50
            assert sum(site.hits.values()) == 50


async def test_a_job_does_not_share_what_it_met_itself(
    service: Service, gone: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "RETRY_FIRST_S", 0.0)
    async with service.worker(host_concurrency=1):
        batch_id = await service.submit(*(gone.url(f"/{number}") for number in range(500)))
        await until(lambda: _all_wait(service, batch_id))


async def test_pages_by_https_are_not_charged_with_what_http_met(
    service: Service, gone: Site, tried: list[str]
) -> None:
    plain = [gone.url(f"/{number}") for number in range(20)]
    secure = [url.replace("http:", "https:") for url in plain]
    async with service.worker(host_concurrency=4):
        batch_id = await service.submit(*plain, *secure, max_attempts=1)
        assert (await service.finished(batch_id)).errors == {"connect_refused": 40}
    assert sum(url.startswith("http:") for url in tried) == 1
    assert any(url.startswith("https:") for url in tried)


async def test_a_host_that_answers_is_not_dead_for_refusing_once(service: Service, sessions: Sessions) -> None:
    async with serving(lambda _: (503, {"Retry-After": "0"}, b"")) as site, service.worker(host_concurrency=1):
        batch_id = await service.submit(*(site.url(f"/{number}") for number in range(9)), max_attempts=1)
        await service.finished(batch_id)
        async with sessions.begin() as session:
            counts = "SELECT back_offs, connect_failures FROM host"
            assert [tuple(row) for row in await session.execute(text(counts))] == [(9, 0)]


async def _all_wait(service: Service, batch_id: UUID) -> bool:
    jobs = await service.jobs(batch_id)
    return all((job.status, job.attempts) == ("queued", 1) for job in jobs)


async def test_a_redirect_to_a_dead_host_says_nothing_of_the_host_it_is_from(service: Service, gone: Site) -> None:
    def answer(path: str) -> Answer:
        return 302, {"Location": gone.url(path, address="127.0.0.2")}, b""

    async with serving(answer) as site, service.worker(host_concurrency=4):
        batch_id = await service.submit(*(site.url(f"/{number}") for number in range(20)), max_attempts=1)
        assert (await service.finished(batch_id)).errors == {"connect_refused": 20}
        assert sum(site.hits.values()) == 20


async def test_each_job_of_a_busy_host_is_sent(service: Service) -> None:
    async with serving(lambda _: (503, {"Retry-After": "0"}, b"")) as site, service.worker(host_concurrency=4):
        batch_id = await service.submit(*(site.url(f"/{number}") for number in range(20)), max_attempts=1)
        assert (await service.finished(batch_id)).http_statuses == {"503": 20}
        assert sum(site.hits.values()) == 20


async def test_hosts_that_rest_leave_their_slots_to_others(
    service: Service, gone: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "BACK_OFF_FIRST_S", 1.5)
    monkeypatch.setattr(retry, "BACK_OFF_MAX_S", 1.5)  # so that they are kept
    monkeypatch.setattr(retry, "CONNECT_FAILURES_SHARED", 100)
    addresses = [f"127.0.1.{number + 1}" for number in range(20)]
    urls = [gone.url(f"/{number}", address=address) for number in range(8) for address in addresses]
    async with serving() as site, service.worker(slots=8, host_concurrency=4):
        dead = await service.submit(*urls, max_attempts=10)
        live = await service.submit(site.url("/"))
        assert (await service.finished(live)).counts.succeeded == 1  # two hosts at a time, it took 40 s
        assert (await service.read(dead)).counts.failed == 0


async def test_a_worker_has_at_most_five_jobs_for_each_slot_though_all_hosts_rest(
    service: Service, gone: Site, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "BACK_OFF_FIRST_S", 1.5)
    monkeypatch.setattr(retry, "CONNECT_FAILURES_SHARED", 100)
    urls = [gone.url(f"/{number}", address=f"127.0.1.{number % 50 + 1}") for number in range(400)]
    async with service.worker(slots=4, host_concurrency=4) as worker:
        await service.submit(*urls, max_attempts=10)
        most = 0
        async with asyncio.timeout(30):
            while len(tried) < 100:
                most = max(most, worker._slots.running_count + worker._slots.waiting_count)
                await asyncio.sleep(0.002)
        assert 4 < most <= 20


@pytest.fixture
def wakes(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Until it is set, addresses of 127.0.1.0/24 are silent."""
    event = asyncio.Event()

    async def connect_late(target: Any, **others: Any) -> Connection:
        if target.host.startswith("127.0.1."):
            await event.wait()
        return await connect(target, **others)

    monkeypatch.setattr(transport, "connect", connect_late)
    return event


@pytest.mark.usefixtures("wakes")
async def test_silent_hosts_leave_all_but_one_of_their_slots_to_others(service: Service, tried: list[str]) -> None:
    async with serving() as site, service.worker(slots=8, host_concurrency=4):
        urls = [site.url(f"/{number}", address=f"127.0.1.{number % 7 + 1}") for number in range(7 * 4)]
        silent = await service.submit(*urls)
        await until(lambda: _are_tried(tried, 7))
        live = await service.submit(site.url("/live/1"), site.url("/live/2"))
        assert (await service.finished(live)).counts.succeeded == 2
        assert (await service.read(silent)).counts.running == len(tried) - 2 == 7


async def test_silent_hosts_never_have_all_slots(
    service: Service, tried: list[str], wakes: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "PUT_OFF_S", REST_S)
    async with serving() as site, service.worker(slots=4, host_concurrency=4):
        urls = [site.url(f"/{number}", address=f"127.0.1.{number % 10 + 1}") for number in range(20)]
        silent = await service.submit(*urls, max_attempts=1)
        live = await service.submit(site.url("/live/1"), site.url("/live/2"))
        assert (await service.finished(live)).counts.succeeded == 2
        await until(lambda: len({*tried}) == 10 + 2)  # of each host its first
        wakes.set()
        assert (await service.finished(silent)).counts.succeeded == 20
        assert {job.attempts for job in await service.jobs(silent)} == {1}


async def test_hosts_that_are_silent_at_their_second_try_leave_slots_as_well(
    service: Service, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "BACK_OFF_FIRST_S", 1.0)  # so that they are kept
    monkeypatch.setattr(retry, "CONNECT_FAILURES_SHARED", 100)

    async def connect_in_vain(target: Any, **others: Any) -> Connection:
        if not target.host.startswith("127.0.1."):
            return await connect(target, **others)
        if len(tried) > 4:
            await asyncio.Event().wait()
        raise Failed(FailureCode.CONNECT_TIMEOUT, "Nobody there.")

    monkeypatch.setattr(transport, "connect", connect_in_vain)
    async with serving() as site, service.worker(slots=4, host_concurrency=1):
        addresses = [f"127.0.1.{number + 1}" for number in range(4)]
        await service.submit(*(site.url(f"/{number}", address=each) for number in range(4) for each in addresses))
        await until(lambda: _are_tried(tried, 8))
        live = await service.submit(site.url("/live"))
        assert (await service.finished(live)).counts.succeeded == 1


async def test_what_was_put_back_for_a_silent_host_runs_once_it_is_there(
    service: Service, tried: list[str], wakes: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "POLL_S", 60.0)
    monkeypatch.setattr(pool, "BEAT_S", 60.0)  # so that only the connection itself makes it look for more
    async with serving() as site:
        batch_id = await service.submit(*(site.url(f"/held/{number}", address="127.0.1.1") for number in range(8)))
        async with service.worker(host_concurrency=4, lease_s=120.0):
            batch = await service.until(batch_id, lambda batch: batch.counts.queued == 7 and len(tried) == 1)
            assert batch.counts.running == 1
            wakes.set()
            await site.wait_for_hits(4)  # before any of them is answered
            assert len(tried) == 4
            site.gate.set()
            assert (await service.finished(batch_id)).counts.succeeded == 8
            assert {job.attempts for job in await service.jobs(batch_id)} == {1}


async def test_a_first_fetch_that_ends_unconnected_lets_others_start(
    service: Service, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connect_in_vain(_: Any, **others: Any) -> Connection:
        if len(tried) > 1:
            await asyncio.Event().wait()
        raise Failed(FailureCode.TLS_HANDSHAKE_FAILED, "Not this one.")

    monkeypatch.setattr(transport, "connect", connect_in_vain)
    urls = [f"https://127.0.0.1/{number}" for number in range(8)]
    async with service.worker(slots=4, host_concurrency=4):
        batch_id = await service.submit(*urls, request={"method": "POST"}, max_attempts=1)
        await until(lambda: _are_tried(tried, 5))
        batch = await service.until(batch_id, lambda batch: batch.counts.running == 0)  # put off, all of them
        assert (batch.counts.failed, batch.counts.queued) == (1, 7)


@pytest.mark.usefixtures("wakes")
async def test_a_try_that_its_client_cancels_does_not_let_others_start(
    service: Service, sessions: Sessions, tried: list[str]
) -> None:
    async with serving() as site, service.worker(host_concurrency=4):
        first = await service.submit(site.url("/first", address="127.0.1.1"))
        await until(lambda: _are_tried(tried, 1))
        await service.submit(*(site.url(f"/{number}", address="127.0.1.1") for number in range(8)))
        async with sessions.begin() as session:
            await batches.cancel(session, first)
        await service.finished(first)
        await until(lambda: _are_tried(tried, 2))  # and not at once five


async def test_what_was_not_sent_is_put_back_when_its_worker_stops_though_it_must_not_be_repeated(
    service: Service, tried: list[str], wakes: asyncio.Event
) -> None:
    async with serving() as site:
        async with service.worker() as worker:
            url = site.url("/pay", address="127.0.1.1")
            batch_id = await service.submit(url, request={"method": "POST", "body": "pay"})
            await until(lambda: _are_tried(tried, 1))
            worker.stop()
        wakes.set()
        async with service.worker():
            assert (await service.finished(batch_id)).counts.succeeded == 1
        assert sum(site.hits.values()) == 1


async def _are_tried(tried: list[str], count: int) -> bool:
    return len(tried) == count
