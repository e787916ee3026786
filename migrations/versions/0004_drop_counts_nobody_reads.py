"""Drop the counts copied into finished batches: reads sum the tallies, which bytes and outcomes need all the same."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.drop_constraint("batch_finished_adds_up", "batch")
    for name in ("succeeded", "failed", "cancelled"):
        op.drop_column("batch", name)


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    for name in ("succeeded", "failed", "cancelled"):
        op.add_column("batch", sa.Column(name, sa.Integer()))
    op.execute("""
        UPDATE batch SET succeeded = counted.succeeded, failed = counted.failed, cancelled = counted.cancelled
        FROM (
            SELECT finished.id, coalesce(sum(tally.succeeded), 0) AS succeeded,
                coalesce(sum(tally.failed), 0) AS failed,
                coalesce(sum(tally.cancelled), 0) AS cancelled
            FROM batch AS finished LEFT JOIN tally ON tally.batch_id = finished.id
            WHERE finished.finished_at IS NOT NULL GROUP BY finished.id
        ) AS counted
        WHERE batch.id = counted.id
    """)
    op.create_check_constraint(
        "batch_finished_adds_up", "batch", "finished_at IS NULL OR succeeded + failed + cancelled = total"
    )
