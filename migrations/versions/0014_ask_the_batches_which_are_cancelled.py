"""Ask the batches which of them are cancelled, not each tally: there is an index of these few (docs/decisions/0018)."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.create_index(
        "batch_cancelling",
        "batch",
        ["id"],
        postgresql_where=sa.text("finished_at IS NULL AND cancel_requested_at IS NOT NULL"),
    )
    op.drop_column("tally", "cancel_requested")


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.drop_index("batch_cancelling", "batch")
    op.add_column("tally", sa.Column("cancel_requested", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.execute("""
        UPDATE tally SET cancel_requested = true FROM batch
        WHERE batch.id = tally.batch_id AND batch.cancel_requested_at IS NOT NULL
    """)
