"""Let each claim change a column of the index of running jobs, which spares PostgreSQL a search (docs/decisions/0014).

Reads all jobs once, about a second for a million; nothing is read or stored meanwhile.
"""

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _replace("shard, host, batch_id, attempt")


def downgrade() -> None:
    _replace("shard, host, batch_id")


def _replace(columns: str) -> None:
    """The old index goes first: that locks all others out at once. To lock writers out first would be a deadlock with
    every claim at work, which has read the table before it writes to it."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("DROP INDEX job_running")
    op.execute(f"CREATE INDEX job_running ON job ({columns}) WHERE status = 'running'")
