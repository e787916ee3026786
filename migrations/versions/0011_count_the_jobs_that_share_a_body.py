"""Count the jobs that share a body, instead of looking for them in an index of all jobs' bodies."""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Read all jobs, which takes about a second for each million; nothing is stored or erased meanwhile."""
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("LOCK TABLE job IN SHARE MODE")
    op.execute("""
        CREATE TABLE body_shared (
            shard smallint NOT NULL,
            sha256 bytea NOT NULL,
            more integer NOT NULL,
            CONSTRAINT body_shared_pkey PRIMARY KEY (shard, sha256),
            CONSTRAINT body_shared_more_not_negative CHECK (more >= 0)
        ) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 1)
    """)
    op.execute("""
        INSERT INTO body_shared (shard, sha256, more)
        SELECT shard, body_sha256, count(*) - 1 FROM job WHERE body_sha256 IS NOT NULL
        GROUP BY shard, body_sha256 HAVING count(*) > 1
    """)
    op.execute("DROP INDEX job_body")


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.execute("CREATE INDEX job_body ON job (shard, body_sha256) WHERE body_sha256 IS NOT NULL")
    op.execute("DROP TABLE body_shared")
