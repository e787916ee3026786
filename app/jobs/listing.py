"""The jobs of a batch in the order the client gave: keys, written once with the batch, a hundred a row.

Instead of an index on the jobs, to which each change of a job would add an entry (docs/decisions/0011). Reads and
writes no job itself.
"""

from collections.abc import Iterator, Sequence
from uuid import UUID

from app.jobs import copying

LISTED_MAX = 100
"""Keys in a row, which is then 1.8 KB: not compressed, and kept in its page."""

IN_ORDER = "listed.first_position, listed.number"
"""The order of the client, of a subquery named `listed`, which has the first of it: so it takes a sort of each row's
keys only, and a page ends with the row it ends in. Within the subquery the planner, which ignores the page's limit
there, might read and sort the whole list."""

COLUMNS = ("batch_id", "first_position", "shards", "ids")


def rows(batch_id: UUID, *, shards: Sequence[int], ids: Sequence[bytes]) -> Iterator[bytes]:
    """Make the rows of a batch's list, for COPY; the keys are in the client's order."""
    start = copying.row(len(COLUMNS)) + copying.field(batch_id.bytes)
    for first in range(0, len(ids), LISTED_MAX):
        some = slice(first, first + LISTED_MAX)
        yield start + copying.integer(first) + copying.smallints(shards[some]) + copying.uuids(ids[some])


def list_keys(*, since: str = "0", before: str | None = None) -> str:
    """Return SQL of the keys of the jobs of `:batch_id`, from about the position `since` to `before`, with `IN_ORDER`.

    The arguments are SQL. Rows are given whole, so up to `LISTED_MAX` jobs more on either side: the jobs themselves
    have their positions. Some of them may be erased. Look the jobs up one by one, LATERAL and with OFFSET 0: without
    it the planner makes a join of that, and may read all jobs there are.
    """
    until = "" if before is None else f"AND batch_jobs.first_position < {before}"
    return f"""
        SELECT key.shard, key.id, batch_jobs.first_position, key.number
        FROM batch_jobs CROSS JOIN LATERAL unnest(shards, ids) WITH ORDINALITY AS key(shard, id, number)
        WHERE batch_jobs.batch_id = :batch_id AND batch_jobs.first_position > {since} - {LISTED_MAX} {until}
        ORDER BY batch_jobs.first_position
    """
