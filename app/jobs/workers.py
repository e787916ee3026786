"""The heartbeat of worker processes, for people and metrics; no lease depends on it."""

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

FORGET_AFTER_S = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One worker process; `id` is new at every start, so that a restart is never taken for its predecessor."""

    id: UUID
    machine: str
    pid: int
    version: str
    slots: int


BEAT = text("""
    INSERT INTO worker (id, machine, pid, version, slots, running)
    VALUES (:id, :machine, :pid, :version, :slots, :running)
    ON CONFLICT (id) DO UPDATE SET beat_at = now(), running = excluded.running
""")

# Passes over one that beats just now: after an hour's sleep of the machine, two would wait for each other's row.
FORGET = text("""
    DELETE FROM worker WHERE id IN (
        SELECT id FROM worker WHERE beat_at < now() - make_interval(secs => :after_s) FOR UPDATE SKIP LOCKED
    )
""")

LEAVE = text("DELETE FROM worker WHERE id = :id")


async def beat(session: AsyncSession, worker: Identity, *, running: int) -> None:
    """Say that the worker lives and how many fetches it runs, and forget those long silent."""
    await session.execute(
        BEAT,
        {
            "id": worker.id,
            "machine": worker.machine,
            "pid": worker.pid,
            "version": worker.version,
            "slots": worker.slots,
            "running": running,
        },
    )
    await session.execute(FORGET, {"after_s": FORGET_AFTER_S})


async def leave(session: AsyncSession, worker: Identity) -> None:
    """Take a worker that ends in good order off the list."""
    await session.execute(LEAVE, {"id": worker.id})
