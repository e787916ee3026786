"""Workers in this process, on a real database, fetching from a real local web server."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from app.fetch.policy import check_url
from app.fetch.resolver import Resolver
from app.fetch.transport import Transport
from app.jobs import queue, reads
from app.jobs.database import Sessions
from app.jobs.hints import Listener
from app.jobs.ids import new_batch_id
from app.jobs.values import NewBatch, NewJobs
from app.jobs.workers import Identity
from app.worker.pool import Pool, PoolSettings
from app.worker.upkeep import Upkeep
from tests.fetch.servers import LIMITS, LOOPBACK
from tests.waiting import until


@dataclass(frozen=True)
class Service:
    """Submits to the database and starts workers on it, as the API and `fetchpool worker` do."""

    sessions: Sessions

    @asynccontextmanager
    async def worker(self, *, hears_at: str | None = None, **changes: Any) -> AsyncIterator[Pool]:
        """Run one worker, hearing hints of the database `hears_at`; it is stopped without grace at the end."""
        resolver = Resolver()
        transport = Transport(policy=LOOPBACK, resolver=resolver, user_agent="Fetchpool tests")
        identity = Identity(id=uuid4(), machine="test", pid=os.getpid(), version="0", slots=100)
        values = {"slots": 20, "host_concurrency": 4, "host_delay_s": 0.0, "lease_s": 30.0, "drain_grace_s": 10.0}
        settings = PoolSettings(limits=LIMITS, **{**values, **changes})
        listener = Listener()
        pool = Pool(
            sessions=self.sessions,
            autocommit=self.sessions,
            transport=transport,
            listener=listener,
            identity=identity,
            settings=settings,
        )
        upkeep = Upkeep(self.sessions, autocommit=self.sessions, listener=listener, lease_s=settings.lease_s)
        running = asyncio.create_task(pool.run())
        beside = [asyncio.create_task(upkeep.run())]
        if hears_at is not None:
            wakes = (lambda _: pool.wake(), lambda _: upkeep.wake())
            beside.append(asyncio.create_task(listener.hear(hears_at, *wakes, ask=pool.ask)))
            await until(lambda: listener.is_hearing)
        try:
            yield pool
        finally:
            pool.stop()
            await running
            for task in beside:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await transport.aclose()
            await resolver.aclose()

    async def submit(self, *urls: str, request: dict[str, Any] | None = None, crashes: int = 0, **options: Any) -> UUID:
        """Submit a batch of jobs that were running at so many crashes."""
        batch = NewBatch(id=new_batch_id(), name=None, metadata=None, options=options, skipped=[])
        jobs = NewJobs()
        for target in [check_url(url, LOOPBACK) for url in urls]:
            jobs.add(target.url, target.host, request=request)
        async with self.sessions.begin() as session:
            await queue.enqueue(session, batch, jobs)
            crashed = "UPDATE job SET attempt = :crashes, lost = :crashes, crashes = :crashes WHERE batch_id = :id"
            await session.execute(text(crashed), {"crashes": crashes, "id": batch.id})
        return batch.id

    async def read(self, batch_id: UUID) -> reads.Batch:
        async with self.sessions.begin() as session:
            batch = await reads.get_batch(session, batch_id)
        assert batch is not None
        return batch

    async def jobs(self, batch_id: UUID) -> list[reads.Job]:
        async with self.sessions.begin() as session:
            return await reads.list_jobs(session, batch_id, limit=10_000, where=reads.JobFilter())

    async def job(self, job_id: UUID) -> reads.JobDetail:
        async with self.sessions.begin() as session:
            job = await reads.get_job(session, job_id)
        assert job is not None
        return job

    async def until(self, batch_id: UUID, condition: Callable[[reads.Batch], bool]) -> reads.Batch:
        """Poll, as clients do, until the batch is as wanted."""
        async with asyncio.timeout(30):
            while not condition(batch := await self.read(batch_id)):
                await asyncio.sleep(0.02)
        return batch

    async def finished(self, batch_id: UUID) -> reads.Batch:
        return await self.until(batch_id, lambda batch: batch.finished_at is not None)


@pytest.fixture
def service(sessions: Sessions) -> Service:
    return Service(sessions)
