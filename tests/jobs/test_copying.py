"""Rows by COPY: as they went in, and no end of a connection or of the time that is not told."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs import copying, listing, queue
from app.jobs.database import DATABASE_ERRORS, Sessions, is_passing, make_engine, make_sessions, ping
from app.jobs.ids import new_batch_id
from app.jobs.values import NewBatch, NewJobs
from tests.jobs.actors import waiting
from tests.waiting import until

BODY_COLUMNS = ("shard", "sha256", "encoding", "content")
END_WAITING = text("SELECT pg_terminate_backend(:pid)")


def body(content: bytes) -> bytes:
    return b"".join(
        (
            copying.row(len(BODY_COLUMNS)),
            copying.smallint(7),
            copying.field(os.urandom(32)),
            copying.text("identity"),
            copying.field(content),
        )
    )


async def copy_bodies(session: AsyncSession) -> None:
    """Far more than any socket takes."""
    await ping(session)
    rows = [body(os.urandom(2**20)) for _ in range(16)]
    await copying.copy(session, "body", columns=BODY_COLUMNS, rows=rows)


async def enqueue(session: AsyncSession) -> None:
    jobs = NewJobs()
    for number in range(20_000):
        jobs.add(f"http://h{number % 7}.test/{number}", f"h{number % 7}.test", metadata={"padding": "x" * 500})
    batch = NewBatch(id=new_batch_id(), name=None, metadata=None, options={}, skipped=[])
    await queue.enqueue(session, batch, jobs)


@asynccontextmanager
async def blocked(
    sessions: Sessions, copy: Callable[[AsyncSession], Awaitable[None]]
) -> AsyncIterator[asyncio.Task[None]]:
    """A transaction that waits for a lock on the tables, and has more to write than it can."""

    async def transaction() -> None:
        async with sessions.begin() as session:
            await copy(session)

    async with sessions.begin() as session:
        await session.execute(text("LOCK TABLE job, body"))
        task = asyncio.create_task(transaction())
        await until(lambda: waiting(sessions))
        yield task


@pytest.mark.parametrize("copy", [copy_bodies, enqueue])
async def test_a_connection_lost_while_it_writes_says_not_now(
    sessions: Sessions, copy: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    async with blocked(sessions, copy) as task:
        [pid] = await waiting(sessions)
        async with sessions.begin() as session:
            await session.execute(END_WAITING, {"pid": pid})
        with pytest.raises(DATABASE_ERRORS) as lost:
            await asyncio.wait_for(asyncio.shield(task), 20)
        assert is_passing(lost.value)


@pytest.mark.parametrize("copy", [copy_bodies, enqueue])
async def test_a_copy_whose_time_is_up_says_not_now(
    database_url: str, monkeypatch: pytest.MonkeyPatch, copy: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    monkeypatch.setattr("app.jobs.database.COMMAND_TIMEOUT_S", 2.0)
    engine = make_engine(database_url)
    sessions = make_sessions(engine)
    async with blocked(sessions, copy) as task:
        with pytest.raises(DATABASE_ERRORS):
            await asyncio.wait_for(asyncio.shield(task), 20)
        assert task.done()
    await engine.dispose()


async def test_copies_of_any_size_come_whole(sessions: Sessions) -> None:
    contents = sorted(
        [b"", b"\0", *(os.urandom(size) for size in (1, 1_000, copying.COPY_BYTES - 1, 3 * copying.COPY_BYTES))]
    )
    async with sessions.begin() as session:
        await ping(session)
        await copying.copy(session, "body", columns=BODY_COLUMNS, rows=map(body, contents))
    async with sessions.begin() as session:
        assert sorted((await session.execute(text("SELECT content FROM body"))).scalars()) == contents


@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 250])
async def test_a_list_comes_back_in_its_order(sessions: Sessions, count: int) -> None:
    batch_id, keys = uuid4(), [(number % 256, uuid4()) for number in range(count)]
    shards, ids = [shard for shard, _ in keys], [job_id.bytes for _, job_id in keys]
    async with sessions.begin() as session:
        await ping(session)
        rows = listing.rows(batch_id, shards=shards, ids=ids)
        await copying.copy(session, "batch_jobs", columns=listing.COLUMNS, rows=rows)
    async with sessions.begin() as session:
        listed = await session.execute(text(listing.list_keys() + ", number"), {"batch_id": batch_id})
        assert [(row.shard, row.id) for row in listed] == keys
