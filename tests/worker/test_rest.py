"""Workers that hear hints ask rarely, and miss nothing by it: here they would rest for an hour."""

import asyncio
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs import batches, hints, leases, workers
from app.jobs.database import Sessions, connect
from app.jobs.hints import Listener
from app.jobs.workers import Identity
from app.worker import pool, upkeep
from tests.waiting import until
from tests.web import serving
from tests.worker.conftest import Service


@pytest.fixture(autouse=True)
def long_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints, "ASK_S", 3600.0)


async def give_hint(sessions: Sessions) -> None:
    async with sessions.begin() as session:
        await hints.give(session)


async def test_a_worker_rests_until_it_hears_a_hint(service: Service, database_url: str) -> None:
    async with serving() as site, service.worker(hears_at=database_url):
        await asyncio.sleep(1.5)  # after that it looked once more at least, and found nothing
        batch_id = await service.submit(site.url("/"))
        await asyncio.sleep(1.5)
        assert site.hits.total() == 0
        await give_hint(service.sessions)
        assert (await service.finished(batch_id)).counts.succeeded == 1


async def test_a_lost_hint_costs_no_more_than_the_pause_between_two_questions(
    service: Service, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hints, "ASK_S", 2.0)
    async with serving() as site, service.worker(hears_at=database_url):
        await asyncio.sleep(1.5)
        batch_id = await service.submit(site.url("/"))
        assert (await service.finished(batch_id)).counts.succeeded == 1


async def test_a_hint_that_comes_while_it_looks_is_not_forgotten(
    service: Service, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = leases.find_next_due_s

    async def look_too_early(session: AsyncSession) -> float:
        found_s = await look(session)
        if not submitted:
            submitted.append(await service.submit(site.url("/")))
            for worker in workers:
                worker.wake()
        return found_s

    submitted: list[UUID] = []
    workers: list[pool.Pool] = []
    async with serving() as site, service.worker(hears_at=database_url) as worker:
        await asyncio.sleep(1.5)
        workers.append(worker)
        monkeypatch.setattr(leases, "find_next_due_s", look_too_early)
        worker.wake()
        await until(lambda: site.hits.total() == 1)
        await service.finished(submitted[0])


async def test_a_retry_starts_when_it_is_due_without_a_hint(service: Service, database_url: str) -> None:
    answers = iter([500, 502, 200])
    async with serving(lambda _: (next(answers), {}, b"")) as site, service.worker(hears_at=database_url):
        batch_id = await service.submit(site.url("/"))
        await give_hint(service.sessions)
        assert (await service.finished(batch_id)).counts.succeeded == 1


async def test_a_worker_that_loses_its_connection_looks_by_itself(service: Service, database_url: str) -> None:
    async with serving() as site, service.worker(hears_at=database_url):
        async with service.sessions.begin() as session:
            listening = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
            await session.execute(text(f"{listening} AND datname = current_database()"))
        batch_id = await service.submit(site.url("/"))
        assert (await service.finished(batch_id)).counts.succeeded == 1


async def test_upkeep_follows_up_a_cancelled_batch_after_a_rest(service: Service, database_url: str) -> None:
    """No pool is there to do anything about it."""
    listener = Listener()
    keeper = upkeep.Upkeep(service.sessions, autocommit=service.sessions, listener=listener, lease_s=30.0)
    beside = [
        asyncio.create_task(keeper.run()),
        asyncio.create_task(listener.hear(database_url, lambda _: keeper.wake())),
    ]
    await until(lambda: listener.is_hearing)
    await asyncio.sleep(1.5)
    batch_id = await service.submit("http://127.0.0.1:9/")
    await give_hint(service.sessions)
    async with service.sessions.begin() as session:
        await batches.cancel(session, batch_id)
    assert (await service.finished(batch_id)).status == "cancelled"
    for task in beside:
        task.cancel()
    await asyncio.gather(*beside, return_exceptions=True)


async def test_the_next_host_is_due_when_its_time_has_come(service: Service) -> None:
    async with service.sessions.begin() as session:
        assert await leases.find_next_due_s(session) == float("inf")
    await service.submit("http://127.0.0.1:9/")
    async with service.sessions.begin() as session:
        assert await leases.find_next_due_s(session) == 0
        await session.execute(text("UPDATE host SET next_at = now() + interval '10 seconds'"))
        assert await leases.find_next_due_s(session) == 10


async def test_a_deleted_batch_is_erased_though_only_upkeep_rests(
    service: Service, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that rests for an hour keeps the pool awake, and a deletion gives no hint."""
    monkeypatch.setattr(hints, "ASK_S", 2.0)
    async with serving() as site, service.worker(hears_at=database_url):
        batch_id = await service.submit(site.url("/"))
        await give_hint(service.sessions)
        await service.finished(batch_id)
        async with service.sessions.begin() as session:
            await session.execute(text("UPDATE host SET next_at = now() + interval '1 hour'"))
        await asyncio.sleep(2.5)  # upkeep rests by then
        async with service.sessions.begin() as session:
            await batches.delete(session, batch_id)
        async with asyncio.timeout(15):
            while await _count_batches(service.sessions):
                await asyncio.sleep(0.1)


async def _count_batches(sessions: Sessions) -> int:
    async with sessions.begin() as session:
        return int(await session.scalar(text("SELECT count(*) FROM batch")) or 0)


async def test_at_rest_it_says_that_it_lives_and_sees_what_there_is_to_do(service: Service, database_url: str) -> None:
    identity = Identity(id=UUID(int=1), machine="m", pid=1, version="0", slots=1)
    async with service.sessions.begin() as session:
        await workers.beat(session, identity, running=3, dropped=2)
        await session.execute(text("UPDATE worker SET beat_at = now() - interval '10 minutes'"))
    connection = await connect(database_url)
    try:
        assert not await workers.beat_and_look(connection, identity, running=0)
        async with service.sessions.begin() as session:
            [heartbeat] = await workers.list_workers(session, limit=2)
        assert (heartbeat.is_heard, heartbeat.running, heartbeat.dropped) == (True, 0, 2)
        await service.submit("http://127.0.0.1:9/")
        assert await workers.beat_and_look(connection, identity, running=0)
        for change, is_found in [
            ("UPDATE host SET next_at = 'infinity'", True),
            ("UPDATE batch SET status = 'completed', finished_at = now()", False),
            ("UPDATE batch SET deleted_at = now()", True),
            ("UPDATE batch SET deleted_at = NULL", False),
            ("UPDATE host SET next_at = now() + interval '1 hour'", True),
            ("UPDATE host SET next_at = 'infinity'", False),
            ("DELETE FROM worker", True),  # forgotten meanwhile: the pool says it all anew
        ]:
            await connection.execute(change)
            assert await workers.beat_and_look(connection, identity, running=0) == is_found
    finally:
        await connection.close()
