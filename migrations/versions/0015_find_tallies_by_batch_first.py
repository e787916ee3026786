"""Find tallies by batch and shard, of which their one index is the order (docs/decisions/0018)."""

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("ALTER TABLE tally DROP CONSTRAINT tally_pkey, ADD PRIMARY KEY (batch_id, shard)")
    op.drop_index("tally_batch", "tally")


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.create_index("tally_batch", "tally", ["batch_id"])
    op.execute("ALTER TABLE tally DROP CONSTRAINT tally_pkey, ADD PRIMARY KEY (shard, batch_id)")
