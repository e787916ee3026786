"""Bodies are stored once, whoever stores or erases the same bytes at the same time, and come back as they went in."""

import asyncio
import hashlib
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs import batches, bodies
from app.jobs.database import DATABASE_ERRORS, Sessions, is_passing, ping
from tests.jobs.actors import Client, Worker, success, waiting
from tests.waiting import until

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LOCK = text("SELECT FROM body WHERE sha256 = :sha256 FOR UPDATE")
SHARED = text("SELECT shard, sha256, more FROM body_shared")
STORED = text("SELECT shard, sha256, encoding, content FROM body ORDER BY shard, sha256")


def packed(*contents: bytes, shard: int = 1) -> dict[bodies.Key, bodies.Packed]:
    return {(shard, hashlib.sha256(content).digest()): bodies.pack(content) for content in contents}


@asynccontextmanager
async def storing(
    sessions: Sessions,
    wanted: dict[bodies.Key, bodies.Packed],
    *,
    seen: Iterable[bodies.Key] = (),
    by_copy: bool = True,
) -> AsyncIterator[AsyncSession]:
    """A transaction that has stored them, after another statement, as results are."""
    async with sessions.begin() as session:
        await ping(session)
        await bodies.store(session, wanted, seen=list(seen), counts=Counter(wanted.keys()), by_copy=by_copy)
        yield session


async def store(
    sessions: Sessions, wanted: dict[bodies.Key, bodies.Packed], *, seen: Iterable[bodies.Key] = ()
) -> None:
    """Store them, anew when another has just stored some of them."""
    for by_copy in (True, False):
        with suppress(bodies.Conflict):
            async with storing(sessions, wanted, seen=seen, by_copy=by_copy):
                return
    raise AssertionError("a conflict without COPY")


async def stored(sessions: Sessions) -> dict[bodies.Key, bodies.Packed]:
    async with sessions.begin() as session:
        rows = await session.execute(STORED)
        return {(row.shard, row.sha256): (row.content, row.encoding) for row in rows}


async def shared(sessions: Sessions) -> dict[bodies.Key, int]:
    """How many jobs have a body beside the first, where any do."""
    async with sessions.begin() as session:
        return {(row.shard, row.sha256): row.more for row in await session.execute(SHARED)}


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (b"", "identity"),
        (b"a" * (bodies.PACK_BYTES_MIN - 1), "identity"),
        (b"page " * 2_000, "gzip"),
        (os.urandom(10_000), "identity"),
        (b"page " * bodies.SMALL_BYTES_MAX, "zstd"),
        (os.urandom(bodies.SMALL_BYTES_MAX + 1), "identity"),
    ],
    ids=["nothing", "too small", "a page", "random", "large", "large and random"],
)
def test_what_is_packed_comes_back(content: bytes, encoding: str) -> None:
    packed, found = bodies.pack(content)
    assert found == encoding
    assert (len(packed) < len(content)) == (encoding != "identity")
    assert bodies.unpack(packed, found) == content


def test_pages_packed_before_gzip_was_come_back() -> None:
    page = b"page " * 2_000
    assert bodies.unpack(zstd.compress(page), "zstd") == page


async def test_bodies_of_every_size_come_back(sessions: Sessions) -> None:
    wanted = packed(b"", b"\0", b"page " * 2_000, *(os.urandom(size) for size in (511, 9_000, 65_536, 300_000)))
    wanted |= packed(b"page " * 2_000, shard=255)
    await store(sessions, wanted)
    assert await stored(sessions) == wanted
    assert {encoding for _, encoding in wanted.values()} == {"identity", "gzip"}


async def test_two_that_store_the_same_bytes_at_once_both_succeed(sessions: Sessions) -> None:
    first, second = packed(b"shared", b"first"), packed(b"shared", b"second", b"third")
    async with storing(sessions, first):
        other = asyncio.create_task(store(sessions, second))
        await until(lambda: waiting(sessions))
    await other
    assert await stored(sessions) == first | second
    assert await shared(sessions) == dict.fromkeys(first.keys() & second.keys(), 1)


async def test_a_body_is_erased_with_the_last_of_its_jobs(sessions: Sessions) -> None:
    client, worker = Client(sessions), Worker(sessions)
    batch_ids = [await client.submit(*["h"] * count) for count in (3, 1, 2)]
    _, jobs = await worker.claim_one()
    for some in (jobs[:2], jobs[2:]):  # several at once, and several to what is there already
        await worker.record(*(success(job, b"the same") for job in some))
    [key] = await stored(sessions)
    left = []
    for batch_id in batch_ids:
        await client.finish(batch_id)
        await client.delete(batch_id)
        async with sessions.begin() as session:
            await batches.erase(session, batch_id, limit=100)
        left.append((list(await stored(sessions)), await shared(sessions)))
    assert left == [([key], {key: 2}), ([key], {key: 1}), ([], {})]


async def test_a_body_that_was_seen_and_is_erased_by_then_is_stored_again(sessions: Sessions) -> None:
    wanted = packed(b"kept", b"erased")
    await store(sessions, packed(b"kept"))
    await store(sessions, wanted, seen=wanted)
    assert await stored(sessions) == wanted


async def test_an_erasure_gets_the_next_body_though_the_one_it_has_is_waited_for(sessions: Sessions) -> None:
    wanted = packed(b"one", b"two")
    await store(sessions, wanted)
    first, second = sorted(wanted)
    async with sessions.begin() as session:
        await session.execute(LOCK, {"sha256": first[1]})
        storing = asyncio.create_task(store(sessions, wanted, seen=[second]))
        await until(lambda: waiting(sessions))
        await session.execute(LOCK, {"sha256": second[1]})
    await storing
    assert await stored(sessions) == wanted


async def test_a_result_whose_body_is_just_being_erased_keeps_its_body(sessions: Sessions) -> None:
    client, worker = Client(sessions), Worker(sessions)
    doomed, kept = await client.submit("h"), await client.submit("h")
    _, jobs = await worker.claim_one()
    first, second = sorted(jobs, key=lambda job: job.batch_id != doomed)
    await worker.record(success(first))
    await client.finish(doomed)
    await client.delete(doomed)
    async with sessions.begin() as session:
        await batches.erase(session, doomed, limit=100)
        recording = asyncio.create_task(worker.record(success(second)))
        await until(lambda: waiting(sessions))
    await recording
    [job] = await client.jobs(kept)
    assert list(await stored(sessions)) == [(second.shard, bytes.fromhex(job.body_sha256 or ""))]


async def test_a_connection_lost_in_the_middle_says_not_now_and_stores_nothing(sessions: Sessions) -> None:
    wanted = packed(b"shared", b"more")
    async with storing(sessions, packed(b"shared")) as session:
        other = asyncio.create_task(store(sessions, wanted))
        await until(lambda: waiting(sessions))
        [pid] = await waiting(sessions)
        await session.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        with pytest.raises(DATABASE_ERRORS) as lost:
            await other
        assert is_passing(lost.value)
    assert await stored(sessions) == packed(b"shared")
    await store(sessions, packed(b"later"))
    assert await stored(sessions) == packed(b"shared", b"later")
