"""A client and a worker for tests of the queue: what each would do, one transaction a step."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import text

from app.jobs import batches, bodies, leases, queue, reads
from app.jobs.database import Sessions
from app.jobs.ids import new_batch_id
from app.jobs.values import ClaimedJob, Lease, NewBatch, NewJobs, Recorded, Result, Returned

LEASE_S = 30.0
WAITING = text("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()")


async def waiting(sessions: Sessions) -> list[int]:
    """The processes of PostgreSQL that wait for one another here."""
    async with sessions.begin() as session:
        return [row.pid for row in await session.execute(WAITING)]


@dataclass(frozen=True)
class Client:
    """Submits, cancels and reads."""

    sessions: Sessions

    async def submit(self, *hosts: str, options: dict[str, Any] | None = None, method: str | None = None) -> UUID:
        """Submit a batch with one job for each host named."""
        batch = NewBatch(id=new_batch_id(), name=None, metadata=None, options=options or {}, skipped=[])
        request = {"method": method} if method else None
        jobs = NewJobs()
        for number, host in enumerate(hosts):
            jobs.add(f"http://{host}/{number}", host, request=request)
        async with self.sessions.begin() as session:
            await queue.enqueue(session, batch, jobs)
        return batch.id

    async def read(self, batch_id: UUID) -> reads.Batch:
        async with self.sessions.begin() as session:
            batch = await reads.get_batch(session, batch_id)
        assert batch is not None
        return batch

    async def jobs(self, batch_id: UUID, **where: Any) -> list[reads.Job]:
        async with self.sessions.begin() as session:
            return await reads.list_jobs(session, batch_id, limit=1000, where=reads.JobFilter(**where))

    async def job(self, job_id: UUID) -> reads.JobDetail:
        async with self.sessions.begin() as session:
            job = await reads.get_job(session, job_id)
        assert job is not None
        return job

    async def cancel(self, batch_id: UUID) -> None:
        async with self.sessions.begin() as session:
            await batches.cancel(session, batch_id)

    async def delete(self, batch_id: UUID) -> str:
        async with self.sessions.begin() as session:
            return await batches.delete(session, batch_id)

    async def finish(self, batch_id: UUID) -> set[UUID]:
        async with self.sessions.begin() as session:
            return await batches.finish(session, [batch_id])


@dataclass(frozen=True)
class Worker:
    """Claims, records and releases, under an identity of its own."""

    sessions: Sessions
    id: UUID = field(default_factory=uuid4)

    async def claim(
        self, *, hosts_max: int = 100, jobs_max: int = 1000, jobs_per_host: int = 8, lease_s: float = LEASE_S
    ) -> dict[Lease, list[ClaimedJob]]:
        async with self.sessions.begin() as session:
            return await queue.claim(
                session,
                self.id,
                hosts_max=hosts_max,
                jobs_max=jobs_max,
                jobs_per_host=jobs_per_host,
                lease_s=lease_s,
            )

    async def claim_one(self, *, lease_s: float = LEASE_S) -> tuple[Lease, list[ClaimedJob]]:
        """Claim, where exactly one host is due."""
        [(lease, jobs)] = (await self.claim(lease_s=lease_s)).items()
        return lease, jobs

    async def refill(self, lease: Lease, count: int) -> list[ClaimedJob]:
        async with self.sessions.begin() as session:
            return await queue.refill(session, self.id, [(lease, count)], jobs_max=1000)

    async def record(self, *results: Result) -> Recorded:
        try:
            async with self.sessions.begin() as session:
                return await queue.record(session, results)
        except bodies.Conflict:
            async with self.sessions.begin() as session:
                return await queue.record(session, results, by_copy=False)

    async def release(self, *released: Lease, rest_s: float = 0.0) -> None:
        async with self.sessions.begin() as session:
            await leases.release(session, self.id, dict.fromkeys(released, rest_s))

    async def renew(self, *held: Lease, lease_s: float = LEASE_S) -> set[tuple[int, str]]:
        async with self.sessions.begin() as session:
            return await leases.renew(session, self.id, held, lease_s=lease_s)

    async def give_back(self, jobs: Sequence[ClaimedJob]) -> None:
        async with self.sessions.begin() as session:
            await queue.give_back(session, [Returned(job=job) for job in jobs])


def success(job: ClaimedJob, content: bytes = b"hello") -> Result:
    """A result as of a 200."""
    return Result(
        job=job,
        status="succeeded",
        http_status=200,
        evidence='{"headers":[["Content-Type","text/plain"]],"body_bytes":5,"wire_bytes":5}',
        body=content,
        body_sha256=hashlib.sha256(content).digest(),
        wire_bytes=len(content),
        body_bytes=len(content),
    )


def failure(job: ClaimedJob, code: str = "read_timeout") -> Result:
    """A result for good."""
    return Result(job=job, status="failed", error=code, error_detail="It failed.", evidence="{}")


def retry(job: ClaimedJob, *, delay_s: float = 60.0, code: str = "read_timeout") -> Result:
    """A result that puts the job back for another attempt."""
    return Result(job=job, status="queued", delay_s=delay_s, error=code, error_detail="It failed.", evidence="{}")
