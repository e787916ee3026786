"""Keep bodies of up to 8 KB in their row: a page of 3.7 KB was two chunks of TOAST, each with an entry in an index."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("ALTER TABLE body SET (toast_tuple_target = 8160)")


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("ALTER TABLE body RESET (toast_tuple_target)")
