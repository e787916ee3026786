"""What a job costs the store, in what is the same on every machine: statements, rows and WAL, never time.

Each bound is what was measured and a little more. Whoever makes a job dearer on purpose raises it, and says why.
"""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.jobs.database import make_engine, make_sessions
from tests.jobs.actors import Client, Worker, success

JOBS = 2_000
HOSTS = 49
JOBS_PER_CLAIM = 100
BODY_BYTES = 200
"""Little, or it would drown the rest of the WAL: the 3,800 bytes of a page of 10 KiB add 3,600 to 1,340."""

TRIES = 3
"""Of which the least counts: a checkpoint in between, another test's too, adds whole pages to the WAL."""

BACKEND_WAL_SINCE = 180_000
"""The first version of PostgreSQL that says how much one connection wrote."""

FLUSH = text("SELECT pg_stat_force_next_flush()")
ROWS = text("SELECT sum(n_tup_ins + n_tup_upd + n_tup_del) FROM pg_stat_user_tables")
INDEX = text("SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = :index")
WAL = text("SELECT wal_bytes FROM pg_stat_get_backend_wal(pg_backend_pid())")


@dataclass(frozen=True)
class Cost:
    """What one job takes."""

    statements: float
    rows: float
    wal_bytes: float

    def __le__(self, other: "Cost") -> bool:
        """Whether nothing of it is more than the other's."""
        return self.statements <= other.statements and self.rows <= other.rows and self.wal_bytes <= other.wal_bytes


SUBMITTED_MAX = Cost(statements=0.0018, rows=1.07, wal_bytes=360)
"""Measured 0.0015, 1.056 and 332 to 334: three statements for 2,000 jobs, and two COPYs, which are not counted; a row
for each job, and a hundredth of one that lists them."""

DONE_MAX = Cost(statements=0.088, rows=3.62, wal_bytes=1_390)
"""Measured 0.0845, 3.549 to 3.57 and 1,336 to 1,347: eight statements for 100 jobs, and a COPY; the job's row twice,
its body's, and those of hosts and counts that jobs share. One more index on finished jobs alone adds 60 bytes, one on
all jobs 200, a lock of each job's row before its update 54."""


class Meter:
    """Reads what the one connection of an engine did."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.sessions = make_sessions(engine)
        self._engine = engine
        self._statement_count = 0
        event.listen(engine.sync_engine, "before_cursor_execute", self._count)

    async def measure(self, step: Callable[[], Awaitable[Any]], *, jobs: int = JOBS) -> Cost:
        rows, wal_bytes = await self._read()
        self._statement_count = 0
        await step()
        statement_count = self._statement_count
        rows_after, wal_bytes_after = await self._read()
        return Cost(statement_count / jobs, (rows_after - rows) / jobs, (wal_bytes_after - wal_bytes) / jobs)

    async def looks(self, index: str) -> int:
        """Return how often an index was searched so far."""
        async with self._engine.begin() as connection:
            await connection.execute(FLUSH)
        async with self._engine.begin() as connection:
            return int(await connection.scalar(INDEX, {"index": index}) or 0)

    async def is_able(self) -> bool:
        async with self._engine.begin() as connection:
            return int(await connection.scalar(text("SHOW server_version_num")) or 0) >= BACKEND_WAL_SINCE

    async def _read(self) -> tuple[int, int]:
        async with self._engine.begin() as connection:
            await connection.execute(FLUSH)
        async with self._engine.begin() as connection:
            return int(await connection.scalar(ROWS) or 0), int(await connection.scalar(WAL) or 0)

    def _count(self, *_: object) -> None:
        self._statement_count += 1


@pytest.fixture
async def meter(database_url: str) -> AsyncIterator[Meter]:
    engine = make_engine(database_url, pool_size=1)
    meter = Meter(engine)
    if not await meter.is_able():
        pytest.skip("a connection's WAL is counted since PostgreSQL 18")
    yield meter
    await engine.dispose()


async def submit(meter: Meter) -> None:
    await Client(meter.sessions).submit(*(f"h{number % HOSTS}" for number in range(JOBS)))


async def run(meter: Meter) -> None:
    """As a worker: claim, record, give back, until nothing is left."""
    worker, count = Worker(meter.sessions), 0
    while claimed := await worker.claim(jobs_max=JOBS_PER_CLAIM):
        jobs = [job for some in claimed.values() for job in some]
        await worker.record(*(success(job, random.Random(job.id.int).randbytes(BODY_BYTES)) for job in jobs))
        await worker.release(*claimed)
        count += len(jobs)
    assert count == JOBS


def least(costs: list[Cost]) -> Cost:
    return Cost(
        statements=min(cost.statements for cost in costs),
        rows=min(cost.rows for cost in costs),
        wal_bytes=min(cost.wal_bytes for cost in costs),
    )


async def test_a_job_costs_the_store_no_more_than_it_did(meter: Meter) -> None:
    submitted, done = [], []
    for _ in range(TRIES):
        submitted.append(await meter.measure(lambda: submit(meter)))
        done.append(await meter.measure(lambda: run(meter)))
    assert least(submitted) <= SUBMITTED_MAX
    assert least(done) <= DONE_MAX


MANY = 100
LOOKS_PER_JOB_MAX = 8.0
"""Measured 3 to 5, by how many turns chance has look at all batches; each turn that looks at a hundred costs 25."""


async def test_a_claim_looks_at_few_of_many_batches(meter: Meter) -> None:
    client, worker = Client(meter.sessions), Worker(meter.sessions)
    for _ in range(MANY):
        await client.submit(*(f"h{number}" for number in range(HOSTS)))
    before = await meter.looks("job_claim")
    claimed = await worker.claim()
    after = await meter.looks("job_claim")
    count = sum(len(jobs) for jobs in claimed.values())
    assert count == 8 * HOSTS
    assert (after - before) / count <= LOOKS_PER_JOB_MAX


async def test_a_poll_is_one_statement_and_writes_nothing(meter: Meter) -> None:
    client = Client(meter.sessions)
    batch_id = await client.submit("h")
    cost = await meter.measure(lambda: client.read(batch_id), jobs=1)
    assert (cost.statements, cost.rows) == (1, 0)
