"""What happens to a batch as a whole: it starts, is cancelled, finishes, is deleted and erased.

Functions take a session and never commit. The jobs themselves change in `queue`.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs.hints import FINISHED
from app.jobs.listing import IN_ORDER, LISTED_MAX, list_keys

IDEMPOTENCY_KEPT_S = 24 * 3600
ERASE_BYTES_MAX = 64 * 2**20
"""Of bodies in one statement, some 32,000 rows of TOAST: far within its time."""

LOCK_KEY = text("SELECT pg_try_advisory_xact_lock(hashtextextended(:key, 0))")
FREE_OLD_KEY = text("""
    UPDATE batch SET idempotency_key = NULL
    WHERE idempotency_key = :key AND (created_at < now() - make_interval(secs => :kept_s) OR deleted_at IS NOT NULL)
""")
BY_KEY = text("""
    SELECT id, request_sha256 FROM batch
    WHERE idempotency_key = :key AND created_at >= now() - make_interval(secs => :kept_s) AND deleted_at IS NULL
""")


async def lock_key(session: AsyncSession, key: str) -> bool:
    """Take an Idempotency-Key for the rest of the transaction, from a batch that no longer has a right to it too.

    `False` when another request is at it just now.
    """
    if not await session.scalar(LOCK_KEY, {"key": key}):
        return False
    await session.execute(FREE_OLD_KEY, {"key": key, "kept_s": IDEMPOTENCY_KEPT_S})
    return True


async def find_by_key(session: AsyncSession, key: str) -> tuple[UUID, bytes] | None:
    """Return the batch made under this key in the last 24 hours, and the hash of its request."""
    row = (await session.execute(BY_KEY, {"key": key, "kept_s": IDEMPOTENCY_KEPT_S})).first()
    return (row.id, row.request_sha256) if row is not None else None


START = text("""
    WITH chosen AS MATERIALIZED (
        SELECT id FROM batch WHERE id = ANY(CAST(:ids AS uuid[])) AND status = 'queued'
        ORDER BY id FOR UPDATE
    ), started AS (
        UPDATE batch SET status = 'running', started_at = now()
        FROM chosen WHERE batch.id = chosen.id AND batch.status = 'queued'
    )
    SELECT id, options FROM batch WHERE id = ANY(CAST(:ids AS uuid[]))
""")


async def start(session: AsyncSession, ids: Collection[UUID]) -> dict[UUID, dict[str, Any]]:
    """Mark queued batches as running, now that jobs of them were claimed; return the options of each.

    One statement, which may be a transaction of its own.
    """
    return {row.id: row.options for row in await session.execute(START, {"ids": list(ids)})}


CANCEL = text("""
    UPDATE batch SET cancel_requested_at = now()
    WHERE id = :id AND finished_at IS NULL AND cancel_requested_at IS NULL
""")
EXISTS = text("SELECT true FROM batch WHERE id = :id AND deleted_at IS NULL")


async def cancel(session: AsyncSession, batch_id: UUID) -> None:
    """Ask for a batch to be cancelled, if it is there.

    No claim that begins after the commit takes any of it; workers close what runs, and upkeep cancels the rows.
    Idempotent, and a finished batch stays as it is.
    """
    await session.execute(CANCEL, {"id": batch_id})


CANCELLED = text("""
    SELECT id FROM batch WHERE id = ANY(CAST(:ids AS uuid[])) AND cancel_requested_at IS NOT NULL
""")


async def find_cancelled(session: AsyncSession, ids: Collection[UUID]) -> set[UUID]:
    """Return those of the batches whose cancelling was asked for."""
    return {row.id for row in await session.execute(CANCELLED, {"ids": list(ids)})}


# Mostly there is nothing to finish: batches that wait at many hosts are asked about with nearly every result. So it
# first looks without locks, up to the first tally with work left (LIMIT: joined, it read all tallies of each batch).
# Once nothing is left, nothing comes any more: what was found is not to be asked again under the lock. Found by key
# (LATERAL), and whether it is finished asked of the locked row: named on `batch` itself, that led the planner to read
# all unfinished batches there are, twice.
FINISH = text(f"""
    WITH chosen AS MATERIALIZED (
        SELECT id FROM batch WHERE id = ANY(CAST(:ids AS uuid[])) AND finished_at IS NULL AND (
            SELECT true FROM tally WHERE tally.batch_id = batch.id AND tally.queued + tally.running > 0 LIMIT 1
        ) IS NULL
    ), locked AS MATERIALIZED (
        SELECT chosen.id, batch.was_finished_at FROM (SELECT id FROM chosen ORDER BY id) AS chosen
        CROSS JOIN LATERAL (
            SELECT finished_at AS was_finished_at FROM batch WHERE batch.id = chosen.id FOR UPDATE
        ) AS batch
    ), finished AS (
        UPDATE batch SET
            status = CASE WHEN cancel_requested_at IS NULL THEN 'completed' ELSE 'cancelled' END,
            started_at = coalesce(started_at, now()), finished_at = now()
        FROM locked WHERE batch.id = locked.id AND locked.was_finished_at IS NULL
        RETURNING batch.id
    )
    SELECT id, pg_notify('{FINISHED}', CAST(id AS text)) FROM finished
""")


async def finish(session: AsyncSession, ids: Collection[UUID]) -> set[UUID]:
    """Finish those of the batches that have nothing left to run, and hint at it; return which.

    One statement, which may be a transaction of its own. Call it later than the transaction that recorded the last job:
    two that record the last jobs of two shards at once do not see each other.
    """
    return {row.id for row in await session.execute(FINISH, {"ids": list(ids)})}


# Without locks: most batches that are not finished have work left, and nothing is to wait for this.
FINISHABLE = text("""
    SELECT id FROM batch WHERE finished_at IS NULL AND NOT EXISTS (
        SELECT 1 FROM tally WHERE tally.batch_id = batch.id AND tally.queued + tally.running > 0
    ) ORDER BY id LIMIT :limit
""")


async def find_finishable(session: AsyncSession, *, limit: int) -> list[UUID]:
    """Find unfinished batches that have nothing left to run, for `finish` to look at under its locks."""
    return [row.id for row in await session.execute(FINISHABLE, {"limit": limit})]


CANCELLING = text("""
    SELECT id, total FROM batch WHERE finished_at IS NULL AND cancel_requested_at IS NOT NULL AND EXISTS (
        SELECT 1 FROM tally WHERE tally.batch_id = batch.id AND tally.queued > 0
    ) ORDER BY id LIMIT :limit
""")


async def list_cancelling(session: AsyncSession, *, limit: int) -> list[tuple[UUID, int]]:
    """List (id, number of jobs) of batches that are to be cancelled and have jobs in the queue."""
    return [(row.id, row.total) for row in await session.execute(CANCELLING, {"limit": limit})]


HIDE = text("""
    UPDATE batch SET deleted_at = now() WHERE id = :id AND finished_at IS NOT NULL AND deleted_at IS NULL RETURNING id
""")


async def delete(session: AsyncSession, batch_id: UUID) -> Literal["deleted", "missing", "unfinished"]:
    """Hide a finished batch and its jobs from every reader at once; upkeep erases the rows."""
    if await session.scalar(HIDE, {"id": batch_id}):
        return "deleted"
    return "unfinished" if await session.scalar(EXISTS, {"id": batch_id}) else "missing"


DELETED = text("SELECT id FROM batch WHERE deleted_at IS NOT NULL ORDER BY id LIMIT :limit")


async def list_deleted(session: AsyncSession, *, limit: int) -> list[UUID]:
    """List batches whose rows are to be erased."""
    return [row.id for row in await session.execute(DELETED, {"limit": limit})]


# With a generic plan the planner takes the limit for a tenth of the batch, and may read all jobs there are.
PLAN_FOR_VALUES = text("SELECT set_config('plan_cache_mode', 'force_custom_plan', true)")

# The size of a body is on its row, wherever its content is.
ERASE_JOBS = text(f"""
    WITH first AS MATERIALIZED (
        SELECT job.shard, job.id, job.body_sha256, job.position
        FROM ({list_keys()}) AS listed
        CROSS JOIN LATERAL (
            SELECT * FROM job WHERE job.shard = listed.shard AND job.id = listed.id OFFSET 0
        ) AS job
        ORDER BY {IN_ORDER} LIMIT :limit
    ), sized AS (
        SELECT first.*, size_bytes, sum(size_bytes) OVER (ORDER BY position) AS sum_bytes
        FROM first CROSS JOIN LATERAL (
            SELECT coalesce((
                SELECT octet_length(content) FROM body
                WHERE body.shard = first.shard AND body.sha256 = first.body_sha256
            ), 0) AS size_bytes
        ) AS content
    ), chosen AS MATERIALIZED (
        SELECT shard, id FROM sized WHERE sum_bytes - size_bytes < :bytes_max
    ), locked AS MATERIALIZED (
        SELECT job.shard, job.id FROM job JOIN chosen ON job.shard = chosen.shard AND job.id = chosen.id
        ORDER BY job.shard, job.id FOR UPDATE OF job
    ), erased AS (
        DELETE FROM job USING locked WHERE job.shard = locked.shard AND job.id = locked.id
        RETURNING job.shard, job.id, job.body_sha256, job.position
    ), attempts AS (
        DELETE FROM attempt USING erased WHERE attempt.shard = erased.shard AND attempt.job_id = erased.id
    )
    SELECT shard, body_sha256, position FROM erased
""")

# Jobs are erased in the order of the list, so rows that end before the last one erased are done with.
UNLIST = text(f"""
    DELETE FROM batch_jobs WHERE batch_id = :batch_id AND first_position <= :erased_position - {LISTED_MAX - 1}
""")

# In a statement of its own before the deletion: whoever was storing the same bytes has then committed, and the next
# statement's snapshot shows that their jobs were counted.
LOCK_BODIES = text("""
    SELECT body.shard, body.sha256 FROM body
    JOIN unnest(CAST(:shards AS smallint[]), CAST(:sha256s AS bytea[])) AS old(shard, sha256) USING (shard, sha256)
    ORDER BY body.shard, body.sha256 FOR UPDATE OF body
""")

ERASE_BODIES = text("""
    WITH old AS MATERIALIZED (
        SELECT * FROM unnest(CAST(:shards AS smallint[]), CAST(:sha256s AS bytea[]), CAST(:counts AS int[]))
            AS o(shard, sha256, n)
    ), kept AS (
        UPDATE body_shared SET more = more - old.n FROM old
        WHERE body_shared.shard = old.shard AND body_shared.sha256 = old.sha256 AND body_shared.more >= old.n
        RETURNING body_shared.shard, body_shared.sha256
    ), unshared AS (
        DELETE FROM body_shared USING old
        WHERE body_shared.shard = old.shard AND body_shared.sha256 = old.sha256 AND body_shared.more < old.n
    )
    DELETE FROM body USING old
    WHERE body.shard = old.shard AND body.sha256 = old.sha256 AND NOT EXISTS (
        SELECT 1 FROM kept WHERE kept.shard = old.shard AND kept.sha256 = old.sha256
    )
""")

HAS_JOBS = text(f"""
    SELECT true FROM ({list_keys()}) AS listed
    CROSS JOIN LATERAL (SELECT FROM job WHERE job.shard = listed.shard AND job.id = listed.id OFFSET 0) AS job
    LIMIT 1
""")

ERASE_REST = (
    text("DELETE FROM batch_jobs WHERE batch_id = :batch_id"),
    text("DELETE FROM tally WHERE batch_id = :batch_id"),
    text("DELETE FROM histogram WHERE batch_id = :batch_id"),
    text("DELETE FROM batch WHERE id = :batch_id AND deleted_at IS NOT NULL"),
)


async def erase(session: AsyncSession, batch_id: UUID, *, limit: int, bytes_max: int = ERASE_BYTES_MAX) -> int:
    """Erase up to `limit` jobs of a deleted batch with the bodies no other job has; return how many.

    Fewer once their bodies exceed `bytes_max`: a statement of thousands of large ones would not end in time, ever.

    When none was left, the batch itself is erased. Of two that do this at once, one finds nothing of what it looked
    for, though there may be more: it leaves the rest to the other, or to the next round.
    """
    await session.execute(PLAN_FOR_VALUES)
    rows = (await session.execute(ERASE_JOBS, {"batch_id": batch_id, "limit": limit, "bytes_max": bytes_max})).all()
    if not rows:
        if not await session.scalar(HAS_JOBS, {"batch_id": batch_id}):
            for statement in ERASE_REST:
                await session.execute(statement, {"batch_id": batch_id})
        return 0
    if counts := Counter((row.shard, row.body_sha256) for row in rows if row.body_sha256 is not None):
        keys = {"shards": [shard for shard, _ in counts], "sha256s": [sha256 for _, sha256 in counts]}
        await session.execute(LOCK_BODIES, keys)
        await session.execute(ERASE_BODIES, keys | {"counts": list(counts.values())})
    await session.execute(UNLIST, {"batch_id": batch_id, "erased_position": max(row.position for row in rows)})
    return len(rows)


# By the first of each in order, so that it stays on their indexes, whatever the statistics say.
CHORES = text("""
    SELECT (SELECT id FROM batch WHERE finished_at IS NULL ORDER BY id LIMIT 1) IS NOT NULL AS has_unfinished,
        (SELECT id FROM batch WHERE deleted_at IS NOT NULL ORDER BY id LIMIT 1) IS NOT NULL AS has_deleted
""")


@dataclass(frozen=True, slots=True)
class Chores:
    """Whether there are batches that upkeep may have something to do for."""

    has_unfinished: bool
    has_deleted: bool


async def find_chores(session: AsyncSession) -> Chores:
    """Say in one statement whether some batch is unfinished, and whether one waits to be erased."""
    return Chores(**(await session.execute(CHORES)).mappings().one())
