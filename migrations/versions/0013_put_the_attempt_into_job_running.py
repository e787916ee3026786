"""Let each claim change a column of the index of running jobs, which spares PostgreSQL a search (docs/decisions/0014).

Reads all jobs once, about a second for a million; nothing is stored meanwhile.
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
    """Make the new index before the old one goes, so that readers wait for no more than the exchange."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute(f"CREATE INDEX job_running_next ON job ({columns}) WHERE status = 'running'")
    op.execute("DROP INDEX job_running")
    op.execute("ALTER INDEX job_running_next RENAME TO job_running")
