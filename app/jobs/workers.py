"""The heartbeat of worker processes, for people and metrics; no lease depends on it."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

FORGET_AFTER_S = 3600
SILENT_AFTER_S = 50
"""A worker that missed three beats of one at rest is no longer counted as one that runs anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One worker process; `id` is new at every start, so that a restart is never taken for its predecessor."""

    id: UUID
    machine: str
    pid: int
    version: str
    slots: int


BEAT = text("""
    INSERT INTO worker (id, machine, pid, version, slots, running, dropped)
    VALUES (:id, :machine, :pid, :version, :slots, :running, :dropped)
    ON CONFLICT (id) DO UPDATE SET beat_at = now(), running = excluded.running, dropped = excluded.dropped
""")

# Passes over one that beats just now: after an hour's sleep of the machine, two would wait for each other's row.
FORGET = text("""
    DELETE FROM worker WHERE id IN (
        SELECT id FROM worker WHERE beat_at < now() - make_interval(secs => :after_s) FOR UPDATE SKIP LOCKED
    )
""")

# By the driver alone, for a process at rest: what it costs is the memory that is touched for the first time in a while.
# Hosts are read in order, so that it stays on the index even when most are parked.
BEAT_AND_LOOK = """
    WITH beat AS (UPDATE worker SET beat_at = now(), running = $2 WHERE id = $1 RETURNING id)
    SELECT coalesce(
        (SELECT true WHERE NOT EXISTS (SELECT FROM beat)),
        (SELECT true FROM host WHERE next_at < 'infinity' ORDER BY next_at LIMIT 1),
        (SELECT true FROM batch WHERE finished_at IS NULL ORDER BY id LIMIT 1),
        (SELECT true FROM batch WHERE deleted_at IS NOT NULL ORDER BY id LIMIT 1),
        false
    )
"""

LEAVE = text("DELETE FROM worker WHERE id = :id")

LIST = text("""
    SELECT id, machine, pid, version, slots, started_at, running, dropped,
        beat_at > now() - make_interval(secs => :silent_after_s) AS is_heard
    FROM worker ORDER BY id LIMIT :limit
""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What one worker said last; `dropped` counts its results that came after their leases."""

    id: UUID
    machine: str
    pid: int
    version: str
    slots: int
    started_at: datetime
    running: int
    dropped: int
    is_heard: bool


async def beat(session: AsyncSession, worker: Identity, *, running: int, dropped: int) -> None:
    """Say that the worker lives, how many fetches it runs and results it dropped; forget workers long silent."""
    await session.execute(
        BEAT,
        {
            "id": worker.id,
            "machine": worker.machine,
            "pid": worker.pid,
            "version": worker.version,
            "slots": worker.slots,
            "running": running,
            "dropped": dropped,
        },
    )
    await session.execute(FORGET, {"after_s": FORGET_AFTER_S})


async def beat_and_look(connection: asyncpg.Connection, worker: Identity, *, running: int) -> bool:
    """Say that the worker lives; return whether there is a host that may have work, or a batch to follow up.

    True as well if the worker is not on the list, where `beat` puts it.
    """
    found: bool = await connection.fetchval(BEAT_AND_LOOK, worker.id, running)
    return found


async def list_workers(session: AsyncSession, *, limit: int) -> list[Heartbeat]:
    """List the workers of the last hour, those included that went without a word."""
    rows = await session.execute(LIST, {"silent_after_s": SILENT_AFTER_S, "limit": limit})
    return [Heartbeat(**row) for row in rows.mappings()]


async def leave(session: AsyncSession, worker: Identity) -> None:
    """Take a worker that ends in good order off the list."""
    await session.execute(LEAVE, {"id": worker.id})
