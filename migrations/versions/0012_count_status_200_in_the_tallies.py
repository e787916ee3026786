"""Count HTTP status 200 in the tallies, whose rows change with each result anyhow; the histogram has the others."""

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("ALTER TABLE tally ADD COLUMN http_200 integer NOT NULL DEFAULT 0")
    op.execute("""
        UPDATE tally SET http_200 = n FROM histogram
        WHERE histogram.shard = tally.shard AND histogram.batch_id = tally.batch_id
            AND kind = 'http_status' AND key = '200'
    """)
    op.execute("DELETE FROM histogram WHERE kind = 'http_status' AND key = '200'")


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("""
        INSERT INTO histogram (shard, batch_id, kind, key, n)
        SELECT shard, batch_id, 'http_status', '200', http_200 FROM tally WHERE http_200 > 0
    """)
    op.execute("ALTER TABLE tally DROP COLUMN http_200")
