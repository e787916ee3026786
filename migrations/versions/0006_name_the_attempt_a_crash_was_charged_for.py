"""Keep at a job's attempt whether its loss was charged as a crash, so that just this one can be taken off again."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.add_column("attempt", sa.Column("charged", sa.Boolean(), nullable=False, server_default=sa.text("false")))


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.drop_column("attempt", "charged")
