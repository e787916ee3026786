"""Have running jobs of a host found from the oldest unfinished batch on (docs/decisions/0005)."""

from alembic import op
from sqlalchemy import text

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.drop_index("job_running", "job")
    op.create_index("job_running", "job", ["shard", "host", "batch_id"], postgresql_where=text("status = 'running'"))


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.drop_index("job_running", "job")
    op.create_index("job_running", "job", ["shard", "host"], postgresql_where=text("status = 'running'"))
