"""The counts of a batch, kept per shard in the same transaction as the jobs they count.

Never counts jobs by reading them. Rows are locked in key order (batch, shard), after the jobs and bodies of the same
transaction.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

Key = tuple[int, UUID]
"""(shard, batch id)."""


@dataclass(slots=True)
class Change:
    """What one transaction adds to one tally row; negative where jobs left a status."""

    queued: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    http_200: int = 0
    wire_bytes: int = 0
    body_bytes: int = 0

    def move(self, leaving: str, entering: str) -> None:
        """Count one job that left one status for another."""
        setattr(self, leaving, getattr(self, leaving) - 1)
        setattr(self, entering, getattr(self, entering) + 1)


# A column that is empty is one of zeros: of ten, a claim changes two. Rows are locked as they are changed, one look-up
# for each instead of two, and in key order whatever the plan: either the changes find their rows one by one, and come
# in that order, or the rows are read in the order of their only index, for no session reads them as they lie
# (database.BY_INDEX).
CHANGE = text("""
    WITH changed AS (
        UPDATE tally SET
            queued = tally.queued + coalesce(change.queued, 0),
            running = tally.running + coalesce(change.running, 0),
            succeeded = tally.succeeded + coalesce(change.succeeded, 0),
            failed = tally.failed + coalesce(change.failed, 0),
            cancelled = tally.cancelled + coalesce(change.cancelled, 0),
            http_200 = tally.http_200 + coalesce(change.http_200, 0),
            wire_bytes = tally.wire_bytes + coalesce(change.wire_bytes, 0),
            body_bytes = tally.body_bytes + coalesce(change.body_bytes, 0)
        FROM (
            SELECT * FROM unnest(
                CAST(:shards AS smallint[]), CAST(:batch_ids AS uuid[]), CAST(:queued AS int[]),
                CAST(:running AS int[]), CAST(:succeeded AS int[]), CAST(:failed AS int[]), CAST(:cancelled AS int[]),
                CAST(:http_200 AS int[]), CAST(:wire_bytes AS bigint[]), CAST(:body_bytes AS bigint[])
            ) AS c(shard, batch_id, queued, running, succeeded, failed, cancelled, http_200, wire_bytes, body_bytes)
            ORDER BY batch_id, shard
        ) AS change
        WHERE tally.batch_id = change.batch_id AND tally.shard = change.shard
        RETURNING tally.batch_id, tally.queued + tally.running AS unfinished
    )
    SELECT DISTINCT batch_id FROM changed WHERE unfinished = 0
""")


async def change(session: AsyncSession, changes: Mapping[Key, Change]) -> set[UUID]:
    """Add the changes to their tally rows; return the batches of which a row has nothing left to run."""
    if not changes:
        return set()
    rows = list(changes.values())
    result = await session.execute(
        CHANGE,
        {
            "shards": [shard for shard, _ in changes],
            "batch_ids": [batch_id for _, batch_id in changes],
            "queued": _unless_zero([row.queued for row in rows]),
            "running": _unless_zero([row.running for row in rows]),
            "succeeded": _unless_zero([row.succeeded for row in rows]),
            "failed": _unless_zero([row.failed for row in rows]),
            "cancelled": _unless_zero([row.cancelled for row in rows]),
            "http_200": _unless_zero([row.http_200 for row in rows]),
            "wire_bytes": _unless_zero([row.wire_bytes for row in rows]),
            "body_bytes": _unless_zero([row.body_bytes for row in rows]),
        },
    )
    return set(result.scalars())


def _unless_zero(column: list[int]) -> list[int]:
    return column if any(column) else []


HistogramKey = tuple[int, UUID, str, str]
"""(shard, batch id, kind, key), where kind is `error` or `http_status`; but status 200 is in the tallies."""

COUNT_OUTCOMES = text("""
    INSERT INTO histogram (shard, batch_id, kind, key, n)
    SELECT * FROM unnest(
        CAST(:shards AS smallint[]), CAST(:batch_ids AS uuid[]), CAST(:kinds AS text[]), CAST(:keys AS text[]),
        CAST(:counts AS bigint[])
    )
    ON CONFLICT (shard, batch_id, kind, key) DO UPDATE SET n = histogram.n + excluded.n
""")


async def count_outcomes(session: AsyncSession, outcomes: Counter[HistogramKey]) -> None:
    """Add finished jobs to the histograms of errors and HTTP statuses."""
    if not outcomes:
        return
    keys = sorted(outcomes)
    await session.execute(
        COUNT_OUTCOMES,
        {
            "shards": [key[0] for key in keys],
            "batch_ids": [key[1] for key in keys],
            "kinds": [key[2] for key in keys],
            "keys": [key[3] for key in keys],
            "counts": [outcomes[key] for key in keys],
        },
    )
