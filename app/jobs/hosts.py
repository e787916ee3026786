"""Upkeep of the host rows: finding jobs that no lease covers, and forgetting hosts that have nothing left."""

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs.leases import OLDEST_UNFINISHED
from app.jobs.values import Lost

# A host that nobody leases, or whose lease ended, yet has running jobs: the next claim would rescue them, but a parked
# host has no next claim.
STRANDED = text(f"""
    SELECT host.shard, host.host, host.owner IS NOT NULL AS was_leased FROM host
    WHERE EXISTS (
            SELECT 1 FROM job WHERE job.status = 'running' AND job.shard = host.shard AND job.host = host.host
                AND job.batch_id >= {OLDEST_UNFINISHED}
        )
        AND (host.owner IS NULL OR host.next_at <= now())
    ORDER BY host.shard, host.host LIMIT :limit FOR UPDATE SKIP LOCKED
""")

WAKE = text("""
    UPDATE host SET owner = NULL, next_at = greatest(not_before, now())
    FROM unnest(CAST(:shards AS smallint[]), CAST(:hosts AS text[])) AS stranded(shard, host)
    WHERE host.shard = stranded.shard AND host.host = stranded.host
""")


async def lock_stranded(session: AsyncSession, *, limit: int) -> list[Lost]:
    """Lock hosts whose running jobs no lease covers and make them due; return them for `queue.rescue`."""
    rows = await session.execute(STRANDED, {"limit": limit})
    lost = [Lost(shard=row.shard, host=row.host, was_leased=row.was_leased) for row in rows]
    if lost:
        await session.execute(WAKE, {"shards": [each.shard for each in lost], "hosts": [each.host for each in lost]})
    return lost


# Job rows are looked for in a later statement than the lock, for the reason given at leases.REST_HOSTS.
LOCK_PARKED = text("""
    SELECT shard, host FROM host
    WHERE owner IS NULL AND next_at = 'infinity' AND not_before <= now() AND (shard, host) > (:shard, :host)
    ORDER BY shard, host LIMIT :limit FOR UPDATE SKIP LOCKED
""")

FORGET = text(f"""
    DELETE FROM host
    USING unnest(CAST(:shards AS smallint[]), CAST(:hosts AS text[])) AS parked(shard, host)
    WHERE host.shard = parked.shard AND host.host = parked.host AND NOT EXISTS (
        SELECT 1 FROM job WHERE job.status = 'queued' AND job.shard = parked.shard AND job.host = parked.host
            AND job.batch_id >= {OLDEST_UNFINISHED}
    ) AND NOT EXISTS (
        SELECT 1 FROM job WHERE job.status = 'running' AND job.shard = parked.shard AND job.host = parked.host
            AND job.batch_id >= {OLDEST_UNFINISHED}
    )
""")


async def forget_parked(session: AsyncSession, *, after: tuple[int, str], limit: int) -> tuple[int, str] | None:
    """Delete parked hosts that have no jobs left, in key order; return the last key looked at, `None` at the end.

    Finished jobs do not keep a host: its row would be made anew by the next enqueue.
    """
    rows = await session.execute(LOCK_PARKED, {"shard": after[0], "host": after[1], "limit": limit})
    hosts = [(row.shard, row.host) for row in rows]
    if not hosts:
        return None
    await session.execute(FORGET, {"shards": [shard for shard, _ in hosts], "hosts": [host for _, host in hosts]})
    return hosts[-1]
