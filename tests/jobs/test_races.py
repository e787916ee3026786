"""Many at once on real connections: each job is claimed once, nothing deadlocks, and nothing is lost on the way.

First plays with as many actors as there are things to do, whose order only the server decides; then single races, in
an order that was made to happen.
"""

import asyncio
import itertools
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from app.jobs import batches, bodies, hosts, leases, queue, workers
from app.jobs.database import Sessions, make_engine, make_sessions
from app.jobs.ids import shard_of_host
from app.jobs.leases import BackOff
from app.jobs.values import ClaimedJob, Lease, Recorded, Result
from app.jobs.workers import Identity
from tests.databases import connect
from tests.jobs.actors import LEASE_S, Client, Worker, failure, retry, success, waiting
from tests.waiting import until

CLAIMERS = 64
ACTORS_OF_A_KIND = 3
WAIT_S = 60.0
END_S = 600.0
"""Ten minutes of it leave some 10,000 batches to be erased one by one."""
BUSTLE_S = float(os.environ.get("FETCHPOOL_TEST_BUSTLE_S", "600"))
TOGETHER_S = BUSTLE_S + 600
BATCHES_MAX = 200
"""Batches of a bustle at once, so that one that lasts ends in time all the same."""


@asynccontextmanager
async def connections(url: str, count: int) -> AsyncIterator[Sessions]:
    """Sessions on up to `count` connections of their own."""
    engine = make_engine(url, pool_size=count)
    try:
        yield make_sessions(engine)
    finally:
        await engine.dispose()


async def fetch(url: str, statement: str) -> list[tuple[Any, ...]]:
    """Read on a connection beside the product's."""
    connection = await connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(statement)]
    finally:
        await connection.close()


async def together(*steps: Coroutine[Any, Any, Any]) -> list[Any]:
    """Let all run at once; the first error ends them all."""
    async with asyncio.timeout(TOGETHER_S), asyncio.TaskGroup() as group:
        tasks = [group.create_task(step) for step in steps]
    return [task.result() for task in tasks]


OTHER_CONNECTIONS = """
    SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
        AND backend_type = 'client backend'
"""


async def _is_alone(url: str) -> bool:
    return not await fetch(url, OTHER_CONNECTIONS)


async def deadlock_count(url: str) -> int:
    """Count the deadlocks so far; connections report theirs at the latest when they close, which takes a moment."""
    await until(lambda: _is_alone(url))
    [(count,)] = await fetch(url, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    return int(count)


DIFFERENCES = """
    WITH counted AS (
        SELECT shard, batch_id, count(*) AS total, count(*) FILTER (WHERE status = 'queued') AS queued,
            count(*) FILTER (WHERE status = 'running') AS running,
            count(*) FILTER (WHERE status = 'succeeded') AS succeeded,
            count(*) FILTER (WHERE status = 'failed') AS failed,
            count(*) FILTER (WHERE status = 'cancelled') AS cancelled
        FROM job GROUP BY shard, batch_id
    ), outcomes AS (
        SELECT shard, batch_id, 'error' AS kind, error AS key, count(*) AS n
        FROM job WHERE finished_at IS NOT NULL AND error IS NOT NULL GROUP BY 1, 2, 4
        UNION ALL
        SELECT shard, batch_id, 'http_status', http_status::text, count(*)
        FROM job WHERE finished_at IS NOT NULL AND http_status IS NOT NULL GROUP BY 1, 2, 4
    )
    SELECT batch_id, 'tally' FROM counted
    FULL JOIN tally USING (shard, batch_id, total, queued, running, succeeded, failed, cancelled)
    WHERE counted IS NULL OR tally IS NULL
    UNION ALL
    SELECT batch_id, 'histogram' FROM outcomes FULL JOIN (
        SELECT shard, batch_id, kind, key, n FROM histogram
        UNION ALL SELECT shard, batch_id, 'http_status', '200', http_200 FROM tally WHERE http_200 > 0
    ) AS kept USING (shard, batch_id, kind, key, n) WHERE outcomes IS NULL OR kept IS NULL
    UNION ALL
    SELECT NULL, 'body' FROM (
        SELECT shard, body_sha256 AS sha256, count(*) AS n FROM job WHERE body_sha256 IS NOT NULL GROUP BY 1, 2
    ) AS wanted FULL JOIN (
        SELECT shard, sha256, 1 + coalesce(more, 0) AS n FROM body LEFT JOIN body_shared USING (shard, sha256)
    ) AS kept USING (shard, sha256, n) WHERE wanted IS NULL OR kept IS NULL
    UNION ALL
    SELECT NULL, 'shared by nobody' FROM body_shared LEFT JOIN body USING (shard, sha256) WHERE body IS NULL
    UNION ALL
    SELECT batch_id, 'job without batch' FROM job WHERE NOT EXISTS (SELECT 1 FROM batch WHERE batch.id = job.batch_id)
"""


async def test_64_claimers_claim_each_job_once(database_url: str) -> None:
    await _claim_all(database_url, jobs=10_000, hosts=500)


@pytest.mark.long
async def test_64_claimers_claim_each_of_very_many_jobs_once(database_url: str) -> None:
    await _claim_all(database_url, jobs=100_000, hosts=5_000)


async def _claim_all(url: str, *, jobs: int, hosts: int) -> None:
    async with connections(url, CLAIMERS) as sessions:
        client = Client(sessions)
        names = [f"h{number % hosts}" for number in range(jobs)]
        batch_ids = [await client.submit(*names[half::2]) for half in (0, 1)]
        claimed = await together(*(_claim_until_none_is_left(sessions, batch_ids) for _ in range(CLAIMERS)))
        done = [job_id for some in claimed for job_id in some]
        assert (len(done), len(set(done))) == (jobs, jobs)
        for batch_id in batch_ids:
            assert (await client.read(batch_id)).counts.succeeded == jobs // 2
    assert await fetch(url, "SELECT 1 FROM job WHERE attempt <> 1 OR status <> 'succeeded'") == []
    assert await fetch(url, DIFFERENCES) == []
    assert await deadlock_count(url) == 0


async def _claim_until_none_is_left(sessions: Sessions, batch_ids: list[UUID]) -> list[UUID]:
    client, worker, done = Client(sessions), Worker(sessions), []
    while any([(await client.read(batch_id)).counts.queued for batch_id in batch_ids]):
        claimed = await worker.claim(hosts_max=20, jobs_max=100, jobs_per_host=8)
        jobs = [job for some in claimed.values() for job in some]
        await worker.record(*(success(job) for job in jobs))
        await worker.release(*claimed)
        done += [job.id for job in jobs]
    return done


@dataclass
class Bustle:
    """Clients, workers and upkeep that all do what they may at once, in an order of their own.

    Each takes so many steps, fewer if the time is over before.
    """

    sessions: Sessions
    random: random.Random
    steps: int
    seconds: float = 600.0
    batch_ids: list[UUID] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.client = Client(self.sessions)
        # Names whose order depends on who sorts them, several of them in one shard.
        self.names = [f"{letter}{mark}{number}.example" for letter in "aB" for mark in ".-" for number in range(8)]

    async def run(self) -> None:
        actors = (self.submit, self.work, self.work, self.cancel, self.rescue, self.sweep, self.delete, self.forget)
        self.until = time.monotonic() + self.seconds
        await together(*(self.play(actor) for actor in actors for _ in range(ACTORS_OF_A_KIND)))

    async def play(self, actor: Callable[[], Awaitable[None]]) -> None:
        """Let one act to its end, and keep whatever it meets that it should not."""
        try:
            await actor()
        except Exception:
            self.errors.append(f"{actor.__name__}, after {dict(self.done)}:\n{traceback.format_exc()}")

    def turns(self, count: int) -> Iterator[int]:
        return itertools.takewhile(lambda _: time.monotonic() < self.until, range(count))

    async def submit(self) -> None:
        for _ in self.turns(self.steps):
            if len(self.batch_ids) >= BATCHES_MAX:
                await asyncio.sleep(0.01)
                continue
            names = self.random.choices(self.names, k=self.random.randint(1, 60))
            method = self.random.choice(["GET", "POST"])
            self.batch_ids.append(await self.client.submit(*names, method=method))
            self.done["jobs submitted"] += len(names)

    async def work(self) -> None:
        """A worker that now and then crashes, and whose results then come too late."""
        worker, late = Worker(self.sessions), list[ClaimedJob]()
        for _ in self.turns(self.steps):
            held = await worker.claim(hosts_max=8, jobs_max=40, jobs_per_host=5)
            self.done["jobs claimed"] += sum(len(jobs) for jobs in held.values())
            if self.random.random() < 0.2:
                late += [job for jobs in held.values() for job in jobs]
                await self.end_leases(held)
                self.done["workers lost"] += 1
                worker = Worker(self.sessions)
                continue
            await self.work_off(worker, held)
            await worker.record(*(self.result(job) for job in late))
            late.clear()

    async def work_off(self, worker: Worker, held: dict[Lease, list[ClaimedJob]]) -> None:
        async with self.sessions.begin() as session:
            wanted = [(lease, 3) for lease in held]
            more = await queue.refill(session, worker.id, wanted, jobs_max=20) if wanted else []
        jobs = [job for some in held.values() for job in some] + more
        await together(worker.renew(*held), self.store(held, jobs[::2]), worker.give_back(jobs[1::4]))
        await self.store(held, jobs[3::4])
        await worker.release(*held)

    async def store(self, held: Iterable[Lease], jobs: list[ClaimedJob]) -> None:
        """Record as the recorder does: back-offs and results in one transaction, finished batches in another."""
        back_offs = [BackOff(lease=lease, delay_s=0.01, count=1) for lease in held if self.random.random() < 0.3]
        results = [self.result(job) for job in jobs]
        try:
            recorded = await self.record(back_offs, results, by_copy=True)
        except bodies.Conflict:
            recorded = await self.record(back_offs, results, by_copy=False)
        async with self.sessions.begin() as session:
            await batches.start(session, {job.batch_id for job in jobs})
        async with self.sessions.begin() as session:
            await batches.finish(session, recorded.maybe_finished)

    async def record(self, back_offs: list[BackOff], results: list[Result], *, by_copy: bool) -> Recorded:
        async with self.sessions.begin() as session:
            await leases.back_off(session, back_offs)
            return await queue.record(session, results, by_copy=by_copy)

    def result(self, job: ClaimedJob) -> Result:
        content = str(self.random.randrange(5)).encode()
        kinds = (success(job, content), success(job, content), failure(job), retry(job, delay_s=0.01))
        return self.random.choice(kinds)

    async def end_leases(self, held: Iterable[Lease]) -> None:
        for lease in held:
            async with self.sessions.begin() as session:
                statement = "UPDATE host SET next_at = now() WHERE shard = :shard AND host = :host AND lease = :lease"
                values = {"shard": lease.shard, "host": lease.host, "lease": lease.number}
                await session.execute(text(statement + " AND owner IS NOT NULL"), values)

    async def cancel(self) -> None:
        for _ in self.turns(self.steps // 2):
            if self.batch_ids:
                await self.client.cancel(self.random.choice(self.batch_ids))
                self.done["cancels"] += 1
            await asyncio.sleep(0)

    async def rescue(self) -> None:
        for _ in self.turns(self.steps):
            async with self.sessions.begin() as session:
                if stranded := await hosts.lock_stranded(session, limit=10):
                    await queue.rescue(session, stranded, lease_s=LEASE_S)
                    self.done["hosts rescued"] += len(stranded)

    async def sweep(self) -> None:
        """What upkeep does with unfinished batches."""
        for _ in self.turns(self.steps):
            async with self.sessions.begin() as session:
                cancelling = await batches.list_cancelling(session, limit=20)
            for batch_id, total in cancelling:
                async with self.sessions.begin() as session:
                    await queue.cancel_queued(session, batch_id, start=0, stop=total)
            async with self.sessions.begin() as session:
                finishable = await batches.find_finishable(session, limit=20)
            async with self.sessions.begin() as session:
                await batches.finish(session, finishable)

    async def delete(self) -> None:
        for _ in self.turns(self.steps):
            for batch_id in self.random.sample(self.batch_ids, min(len(self.batch_ids), 3)):
                if await self.client.delete(batch_id) == "deleted" and batch_id in self.batch_ids:
                    self.batch_ids.remove(batch_id)
                    self.done["deletes"] += 1
            await self.erase(limit=10)

    async def erase(self, *, limit: int) -> bool:
        """Take one step with each deleted batch; say whether there was any."""
        async with self.sessions.begin() as session:
            doomed = await batches.list_deleted(session, limit=5)
        for batch_id in doomed:
            async with self.sessions.begin() as session:
                await batches.erase(session, batch_id, limit=limit)
        return bool(doomed)

    async def forget(self) -> None:
        for _ in self.turns(self.steps):
            async with self.sessions.begin() as session:
                await hosts.forget_parked(session, after=(-1, ""), limit=100)

    async def come_to_an_end(self) -> None:
        """One worker and upkeep alone must be able to finish whatever is left."""
        worker = Worker(self.sessions)
        async with asyncio.timeout(END_S):
            while await self.count_unfinished():
                held = await worker.claim()
                await worker.record(*(success(job) for jobs in held.values() for job in jobs))
                await worker.release(*held)
                self.until = time.monotonic() + END_S
                await together(self.sweep(), self.rescue())
            while await self.erase(limit=1_000):
                pass

    async def count_unfinished(self) -> int:
        async with self.sessions.begin() as session:
            unfinished = text("SELECT count(*) FROM batch WHERE finished_at IS NULL")
            return int(await session.scalar(unfinished) or 0)


async def test_nothing_deadlocks_and_nothing_is_lost_when_all_happens_at_once(database_url: str) -> None:
    await _bustle(database_url, seed=4, steps=20)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
async def test_nothing_deadlocks_and_nothing_is_lost_for_long(database_url: str, seed: int) -> None:
    await _bustle(database_url, seed=seed, steps=400)


@pytest.mark.long
async def test_nothing_deadlocks_in_ten_minutes(database_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = await _bustle(database_url, seed=1, steps=10**9, seconds=BUSTLE_S)
    with capsys.disabled():
        sys.stdout.write(f"\n{BUSTLE_S:g} s without a deadlock: {done}\n")


async def _bustle(url: str, *, seed: int, steps: int, seconds: float = 600.0) -> dict[str, int]:
    async with connections(url, 40) as sessions:
        bustle = Bustle(sessions, random.Random(seed), steps, seconds)
        await bustle.run()
        assert not bustle.errors, "\n\n".join(bustle.errors)
        bustle.steps = 1
        await bustle.come_to_an_end()
        assert await fetch(url, "SELECT count(*) FROM batch") == [(len(bustle.batch_ids),)]
    assert await fetch(url, "SELECT 1 FROM job WHERE finished_at IS NULL") == []
    assert await fetch(url, DIFFERENCES) == []
    assert await deadlock_count(url) == 0
    return dict(bustle.done)


async def test_the_last_results_of_a_batch_finish_it_once(database_url: str) -> None:
    shard_count = 24
    async with connections(database_url, shard_count) as sessions:
        client, worker = Client(sessions), Worker(sessions)
        for _ in range(10):
            batch_id = await client.submit(*_hosts_of_as_many_shards(shard_count))
            claimed = await worker.claim()
            finished = await together(*(_record_and_finish(worker, jobs) for jobs in claimed.values()))
            assert [some for some in finished if some] == [{batch_id}]
            assert (await client.read(batch_id)).counts.succeeded == shard_count
            await worker.release(*claimed)


def _hosts_of_as_many_shards(count: int) -> list[str]:
    by_shard = {shard_of_host(f"h{number}"): f"h{number}" for number in range(10 * count)}
    return list(by_shard.values())[:count]


async def _record_and_finish(worker: Worker, jobs: list[ClaimedJob]) -> set[UUID]:
    recorded = await worker.record(*(success(job) for job in jobs))
    async with worker.sessions.begin() as session:
        return await batches.finish(session, recorded.maybe_finished)


async def test_a_claim_that_rescues_locks_the_tallies_in_order(database_url: str, sessions: Sessions) -> None:
    """The tallies of the rescued and of the claimed jobs are one set: two in a row would deadlock with a cancel."""
    client = Client(sessions)
    due, lost = sorted(_hosts_of_as_many_shards(2), key=shard_of_host)
    batch_id = await client.submit(due, lost)
    await execute(sessions, "UPDATE host SET next_at = now() + interval '1 minute' WHERE host = :due", due=due)
    await Worker(sessions).claim_one()
    await execute(sessions, "UPDATE host SET next_at = now()")
    lock = text("SELECT 1 FROM tally WHERE shard = :shard FOR UPDATE")
    async with sessions.begin() as session:
        await session.execute(lock, {"shard": shard_of_host(due)})
        claiming = asyncio.create_task(Worker(sessions).claim())
        await until(lambda: waiting(sessions))
        await session.execute(lock, {"shard": shard_of_host(lost)})
    assert len(await claiming) == 2
    assert (await client.read(batch_id)).counts.running == 2


async def execute(sessions: Sessions, statement: str, **values: object) -> None:
    async with sessions.begin() as session:
        await session.execute(text(statement), values)


async def test_two_that_erase_a_batch_at_once_leave_nothing_behind(database_url: str, sessions: Sessions) -> None:
    """Who finds the rows it wanted gone must not take the batch for empty: should the other die, they stay for ever."""
    client, worker = Client(sessions), Worker(sessions)
    batch_id = await client.submit("h", "h", "h")
    _, jobs = await worker.claim_one()
    await worker.record(*(success(job) for job in jobs))
    await client.finish(batch_id)
    await client.delete(batch_id)
    async with sessions.begin() as session:
        assert await batches.erase(session, batch_id, limit=2) == 2
        erasing = asyncio.create_task(_erase(sessions, batch_id, limit=2))
        await until(lambda: waiting(sessions))
    await erasing
    assert await fetch(database_url, "SELECT count(*) FROM job") == [(1,)]
    assert await fetch(database_url, "SELECT id FROM batch") == [(batch_id,)]


async def _erase(sessions: Sessions, batch_id: UUID, *, limit: int) -> int:
    async with sessions.begin() as session:
        return await batches.erase(session, batch_id, limit=limit)


async def test_two_workers_that_slept_an_hour_do_not_deadlock(database_url: str, sessions: Sessions) -> None:
    """As on a machine that was suspended: each finds the other long silent while it says that it is back."""
    identities = [Identity(id=UUID(int=n), machine="m", pid=n, version="0", slots=1) for n in (1, 2)]
    for identity in identities:
        async with sessions.begin() as session:
            await workers.beat(session, identity, running=0, dropped=0)
    await execute(sessions, "UPDATE worker SET beat_at = now() - interval '2 hours'")
    async with sessions.begin() as session:
        # the first half of the other's beat
        await session.execute(text("UPDATE worker SET beat_at = now() WHERE id = :id"), {"id": identities[1].id})
        beating = asyncio.create_task(_beat(sessions, identities[0]))
        looking = asyncio.create_task(until(lambda: waiting(sessions)))
        await asyncio.wait({beating, looking}, return_when=asyncio.FIRST_COMPLETED)
        looking.cancel()
        await workers.beat(session, identities[1], running=0, dropped=0)
    await beating
    assert await fetch(database_url, "SELECT count(*) FROM worker") == [(2,)]


async def _beat(sessions: Sessions, identity: Identity) -> None:
    async with sessions.begin() as session:
        await workers.beat(session, identity, running=0, dropped=0)


async def test_hosts_are_ordered_alike_by_everyone_who_locks_them(database_url: str, sessions: Sessions) -> None:
    """Enqueue sorts them in Python, renewals in SQL; where a locale ignores dots, these two would deadlock."""
    query = """
        SELECT DISTINCT collname::text FROM pg_attribute JOIN pg_collation ON pg_collation.oid = attcollation
        WHERE attrelid IN ('host'::regclass, 'job'::regclass) AND attname = 'host'
    """
    assert await fetch(database_url, query) == [("C",)]


async def test_a_refill_whose_commit_was_not_confirmed_strands_no_job(sessions: Sessions) -> None:
    """The worker never learns of such jobs and gives the host back; the next holder must find them all the same."""
    client, worker = Client(sessions), Worker(sessions)
    await client.submit(*["h"] * 4)
    [(lease, jobs)] = (await worker.claim(jobs_per_host=1)).items()
    assert len(await worker.refill(lease, 1)) == 1  # and the answer is lost
    await worker.record(*(success(job) for job in jobs))
    await worker.release(lease)
    _, left = await Worker(sessions).claim_one()
    assert len(left) == 3


async def test_a_rescue_ends_the_lease_even_if_there_is_no_room_for_the_host(sessions: Sessions) -> None:
    """Or the worker that was late would go on with what others now run too."""
    client, worker = Client(sessions), Worker(sessions)
    await client.submit("h", "i")
    held = await worker.claim()
    await execute(sessions, "UPDATE host SET next_at = now()")
    [claimed] = await Worker(sessions).claim(jobs_max=1)
    assert len(held) == 2
    assert [await worker.refill(lease, 1) for lease in held] == [[], []]
    [left] = await Worker(sessions).claim()
    assert claimed.host != left.host


async def test_a_result_that_comes_after_the_rescue_counts_as_dropped(sessions: Sessions) -> None:
    client, worker = Client(sessions), Worker(sessions)
    await client.submit("h")
    _, [job] = await worker.claim_one()
    await execute(sessions, "UPDATE host SET next_at = now()")
    async with sessions.begin() as session:
        await queue.rescue(session, await hosts.lock_stranded(session, limit=10), lease_s=LEASE_S)
    assert (await worker.record(success(job))).dropped == [job]


async def test_a_host_that_backs_off_is_left_alone_though_its_worker_dies(sessions: Sessions) -> None:
    client, worker = Client(sessions), Worker(sessions)
    await client.submit("h", "h")
    lease, [first, second] = await worker.claim_one()
    async with sessions.begin() as session:
        await leases.back_off(session, [BackOff(lease=lease, delay_s=3600, count=1)])
        await queue.record(session, [retry(first, delay_s=0)])
    await execute(sessions, "UPDATE host SET next_at = now()")  # the end of the lease
    assert await Worker(sessions).claim() == {}
    await execute(sessions, "UPDATE host SET next_at = now(), not_before = '-infinity'")
    other = Worker(sessions)
    again, [tried] = await other.claim_one()  # one, which tells whether it is to be left alone longer
    [rescued] = await other.refill(again, 5)
    assert {tried.id, rescued.id} == {first.id, second.id}


async def test_a_back_off_that_comes_after_the_release_changes_nothing(database_url: str, sessions: Sessions) -> None:
    client, worker = Client(sessions), Worker(sessions)
    await client.submit("h")
    lease, jobs = await worker.claim_one()
    await worker.give_back(jobs)
    await worker.release(lease, rest_s=60)
    before = await fetch(database_url, "SELECT * FROM host")
    async with sessions.begin() as session:
        await leases.back_off(session, [BackOff(lease=lease, delay_s=0, count=0)])
    assert await fetch(database_url, "SELECT * FROM host") == before


async def test_a_hundred_batches_that_wait_to_retry_do_not_starve_the_next(sessions: Sessions) -> None:
    client, worker = Client(sessions), Worker(sessions)
    for _ in range(queue.BATCHES_PER_TURN_MAX):
        await client.submit("h")
    lease, jobs = next(iter((await worker.claim(jobs_per_host=1000)).items()))
    assert len(jobs) == queue.BATCHES_PER_TURN_MAX
    await worker.record(*(retry(job, delay_s=3600) for job in jobs))
    due = await client.submit("h")
    assert [job.batch_id for job in await worker.refill(lease, 8)] == [due]


async def test_a_job_given_back_twice_is_not_cleared_of_a_crash(sessions: Sessions) -> None:
    """As after a commit that was not confirmed."""
    client, worker = Client(sessions), Worker(sessions)
    await client.submit("h")
    await Worker(sessions).claim_one()
    await execute(sessions, "UPDATE host SET next_at = now()")
    lease, jobs = await worker.claim_one()
    assert [job.crashes for job in jobs] == [1]
    for _ in range(2):
        await worker.give_back(jobs)
    await worker.release(lease)
    _, [again] = await worker.claim_one()
    assert again.crashes == 1
