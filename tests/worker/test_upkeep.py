"""What upkeep does beside the pool, also while one of its chores fails again and again."""

import asyncio
from contextlib import suppress

import pytest
from sqlalchemy import text

from app.jobs import batches
from app.jobs.database import Sessions
from app.jobs.hints import Listener
from app.worker import upkeep
from tests.jobs.actors import Client, Worker, success
from tests.waiting import until


async def test_a_chore_that_always_fails_leaves_no_other_undone(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> int:
        raise OSError("canceling statement due to statement timeout")

    async def is_rescued() -> bool:
        return (await client.jobs(stranded))[0].status == "queued"

    monkeypatch.setattr(batches, "erase", fail)
    monkeypatch.setattr(upkeep, "SWEEP_EVERY_S", 0.1)
    client, worker = Client(sessions), Worker(sessions)
    doomed = await client.submit("done")
    _, [job] = await worker.claim_one()
    await worker.record(success(job))
    await client.finish(doomed)
    await client.delete(doomed)
    stranded = await client.submit("h")
    await worker.claim_one()
    async with sessions.begin() as session:  # as after a refill whose commit was not confirmed
        await session.execute(text("UPDATE host SET owner = NULL, next_at = 'infinity' WHERE host = 'h'"))
    keeping = asyncio.create_task(upkeep.Upkeep(sessions, autocommit=sessions, listener=Listener(), lease_s=30.0).run())
    await until(is_rescued)
    keeping.cancel()
    with suppress(asyncio.CancelledError):
        await keeping
