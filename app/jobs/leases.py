"""Leases: the time-limited, exclusive right of one worker to talk to a host and to run its jobs.

A host's row says when it may next be claimed, which is also when its lease ends. Functions take a session and never
commit. Locks hosts in key order, before any job.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.engine import Row
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs.values import Lease

# Where to start in an index of jobs. Entries of jobs that are done stay, and are stepped over one by one, until a
# vacuum may remove them: with somebody's transaction open for long there are millions (docs/decisions/0005).
OLDEST_UNFINISHED = "(SELECT id FROM batch WHERE finished_at IS NULL ORDER BY id LIMIT 1)"

# Something runs on a host that nobody leases when the commit of a refill was not confirmed: its worker never knew.
LOCK_DUE_HOSTS = text(f"""
    SELECT shard, host, lease, back_offs, connect_failures, not_before > now() AS is_resting,
        owner IS NOT NULL AS was_leased,
        owner IS NOT NULL OR EXISTS (
            SELECT 1 FROM job WHERE job.status = 'running' AND job.shard = host.shard AND job.host = host.host
                AND job.batch_id >= {OLDEST_UNFINISHED}
        ) AS was_lost
    FROM host
    WHERE next_at <= now() AND next_at < 'infinity'
    ORDER BY next_at LIMIT :hosts_max FOR UPDATE SKIP LOCKED
""")

LOCKED_IF_HELD = """
    SELECT host.shard, host.host FROM host
    JOIN unnest(CAST(:shards AS smallint[]), CAST(:hosts AS text[]), CAST(:leases AS bigint[]))
        AS held(shard, host, lease)
    ON host.shard = held.shard AND host.host = held.host AND host.lease = held.lease
    WHERE host.owner = :owner
    ORDER BY host.shard, host.host FOR UPDATE OF host
"""
LOCK_HELD_HOSTS = text(LOCKED_IF_HELD)

LEASE_HOSTS = text("""
    UPDATE host SET lease = host.lease + 1, owner = :owner, next_at = now() + make_interval(secs => :lease_s)
    FROM unnest(CAST(:shards AS smallint[]), CAST(:hosts AS text[])) AS claimed(shard, host)
    WHERE host.shard = claimed.shard AND host.host = claimed.host
""")

# Nothing of these is claimed any more. Few, and hashed once where they are asked for (IN, not EXISTS): to ask each by
# its key was a tenth of what a claim at many batches cost.
BEING_CANCELLED = "(SELECT id FROM batch WHERE finished_at IS NULL AND cancel_requested_at IS NOT NULL)"


def waiting_batches(since: str = OLDEST_UNFINISHED, before: str = "true") -> str:
    """Make a query for the batches that wait at a host from one on, in order, each with its first job.

    Stands where `turn` is in scope, a row with shard and host; `before` is a condition on `batch_id` that ends it.
    Jumps from one to the next in the index: a cancelled million costs one step. Not a DISTINCT, which would read every
    entry.
    """
    return f"""
    WITH RECURSIVE waiting(batch_id, run_at, place, id) AS (
        (SELECT batch_id, run_at, ctid, id FROM job
         WHERE status = 'queued' AND shard = turn.shard AND host = turn.host AND batch_id >= {since} AND {before}
         ORDER BY batch_id, run_at LIMIT 1)
        UNION ALL
        SELECT following.* FROM waiting CROSS JOIN LATERAL (
            SELECT batch_id, run_at, ctid, id FROM job
            WHERE status = 'queued' AND shard = turn.shard AND host = turn.host AND batch_id > waiting.batch_id
                AND {before}
            ORDER BY batch_id, run_at LIMIT 1
        ) AS following
    )
    SELECT batch_id, run_at, place, id FROM waiting WHERE batch_id NOT IN {BEING_CANCELLED}
    """


WAITING_BATCHES = waiting_batches()

# Reads with a snapshot newer than its lock on the host, and enqueue locks the host last: a job that this does not see
# is committed by an enqueue that still waits for the host and will set `next_at` itself. So no wake-up is lost.
# EXISTS stops at the first batch with a job due, of many thousands that may wait.
REST_HOSTS = text(f"""
    UPDATE host SET owner = NULL, not_before = greatest(host.not_before, now() + make_interval(secs => turn.rest_s)),
        next_at = greatest(host.not_before, now() + make_interval(secs => turn.rest_s), CASE
            WHEN EXISTS (SELECT 1 FROM ({WAITING_BATCHES}) AS claimable WHERE run_at <= now()) THEN now()
            ELSE coalesce((SELECT min(run_at) FROM ({WAITING_BATCHES}) AS claimable), 'infinity')
        END)
    FROM unnest(CAST(:shards AS smallint[]), CAST(:hosts AS text[]), CAST(:rests_s AS float8[]))
        AS turn(shard, host, rest_s)
    WHERE host.shard = turn.shard AND host.host = turn.host
""")


async def lock_due(session: AsyncSession, *, hosts_max: int) -> Sequence[Row[Any]]:
    """Lock hosts that are due, the longest waiting first, passing over those that others lock just now."""
    return (await session.execute(LOCK_DUE_HOSTS, {"hosts_max": hosts_max})).all()


async def lock_held(session: AsyncSession, owner: UUID, leases: Sequence[Lease]) -> set[tuple[int, str]]:
    """Lock those of the hosts that `owner` still holds under these leases; return their (shard, host)."""
    result = await session.execute(LOCK_HELD_HOSTS, {"owner": owner, **_lease_arrays(leases)})
    return {(row.shard, row.host) for row in result}


async def lease(session: AsyncSession, owner: UUID, leases: Sequence[Lease], *, lease_s: float) -> None:
    """Lease locked hosts to `owner`, under new lease numbers."""
    if leases:
        keys = {"shards": [lease.shard for lease in leases], "hosts": [lease.host for lease in leases]}
        await session.execute(LEASE_HOSTS, {"owner": owner, "lease_s": lease_s, **keys})


async def rest(session: AsyncSession, rests_s: Mapping[tuple[int, str], float]) -> None:
    """Leave locked hosts to nobody: due with their next job, parked without one, and not before their rest is over."""
    if rests_s:
        keys = {"shards": [shard for shard, _ in rests_s], "hosts": [host for _, host in rests_s]}
        await session.execute(REST_HOSTS, {"rests_s": list(rests_s.values()), **keys})


async def release(session: AsyncSession, owner: UUID, rests_s: Mapping[Lease, float]) -> None:
    """Give hosts back, none of whose jobs is running: due when their next job is, or parked.

    Each is left alone for the seconds given, which is how the delay between fetches outlives a lease.
    """
    rests = {(lease.shard, lease.host): rest_s for lease, rest_s in rests_s.items()}
    held = await lock_held(session, owner, list(rests_s))
    await rest(session, {key: rests[key] for key in held})


# In order, so that it stays on the index even when most hosts are due.
NEXT_DUE = text("""
    SELECT extract(epoch FROM next_at - now())::float8 FROM host WHERE next_at < 'infinity' ORDER BY next_at LIMIT 1
""")


async def find_next_due_s(session: AsyncSession) -> float:
    """Return in how many seconds a host may next be claimed: 0 when one is due, infinity when all are parked."""
    due_s = await session.scalar(NEXT_DUE)
    return float("inf") if due_s is None else max(0.0, due_s)


# A lease that has ended stays so: its worker, by its own clock, has given it up, and would never give back what it does
# not know that it got again.
RENEW = text(f"""
    WITH mine AS MATERIALIZED ({LOCKED_IF_HELD})
    UPDATE host SET next_at = now() + make_interval(secs => :lease_s)
    FROM mine WHERE host.shard = mine.shard AND host.host = mine.host AND host.next_at > now()
    RETURNING host.shard, host.host
""")


async def renew(session: AsyncSession, owner: UUID, leases: Sequence[Lease], *, lease_s: float) -> set[tuple[int, str]]:
    """Prolong leases; return the (shard, host) still held. The others are lost: nothing of theirs may be stored."""
    result = await session.execute(RENEW, {"owner": owner, "lease_s": lease_s, **_lease_arrays(leases)})
    return {(row.shard, row.host) for row in result}


BACK_OFF = text("""
    WITH held AS MATERIALIZED (
        SELECT host.shard, host.host, b.delay_s, b.back_offs, b.connect_failures FROM host
        JOIN unnest(CAST(:shards AS smallint[]), CAST(:hosts AS text[]), CAST(:leases AS bigint[]),
            CAST(:delays_s AS float8[]), CAST(:back_offs AS int[]), CAST(:connect_failures AS int[]))
            AS b(shard, host, lease, delay_s, back_offs, connect_failures)
        ON host.shard = b.shard AND host.host = b.host AND host.lease = b.lease
        WHERE host.owner IS NOT NULL
        ORDER BY host.shard, host.host FOR UPDATE OF host
    )
    UPDATE host SET back_offs = held.back_offs, connect_failures = held.connect_failures,
        not_before = CASE WHEN held.back_offs = 0 THEN '-infinity'
        ELSE greatest(host.not_before, now() + make_interval(secs => held.delay_s)) END
    FROM held WHERE host.shard = held.shard AND host.host = held.host
""")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackOff:
    """Leave a host alone for `delay_s` seconds, for every batch; `count` 0 ends the back-off instead.

    The counts are those of the next `Lease`.
    """

    lease: Lease
    delay_s: float
    count: int
    connect_failures: int = 0


async def back_off(session: AsyncSession, back_offs: Sequence[BackOff]) -> None:
    """Set or end the back-off of hosts, as far as their leases still stand."""
    await session.execute(
        BACK_OFF,
        {
            **_lease_arrays([back_off.lease for back_off in back_offs]),
            "delays_s": [back_off.delay_s for back_off in back_offs],
            "back_offs": [back_off.count for back_off in back_offs],
            "connect_failures": [back_off.connect_failures for back_off in back_offs],
        },
    )


def _lease_arrays(leases: Sequence[Lease]) -> dict[str, list[Any]]:
    return {
        "shards": [lease.shard for lease in leases],
        "hosts": [lease.host for lease in leases],
        "leases": [lease.number for lease in leases],
    }
