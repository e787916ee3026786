"""Create the first tables."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.create_table(
        "attempt",
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.SmallInteger(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("error_detail", sa.Text(), nullable=True),
        sa.Column("http_status", sa.SmallInteger(), nullable=True),
        sa.Column("evidence", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.PrimaryKeyConstraint("shard", "job_id", "number", name=op.f("attempt_pkey")),
    )
    op.create_table(
        "batch",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=True),
        sa.Column("metadata", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("options", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("skipped", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("request_sha256", sa.LargeBinary(), nullable=True),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("succeeded", sa.Integer(), nullable=True),
        sa.Column("failed", sa.Integer(), nullable=True),
        sa.Column("cancelled", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancel_requested_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(status IN ('completed', 'cancelled')) = (finished_at IS NOT NULL)", name=op.f("batch_finished_has_time")
        ),
        sa.CheckConstraint(
            "status <> 'cancelled' OR cancel_requested_at IS NOT NULL", name=op.f("batch_cancelled_was_requested")
        ),
        sa.CheckConstraint(
            "status IN ('queued', 'running', 'completed', 'cancelled')", name=op.f("batch_status_known")
        ),
        sa.CheckConstraint("deleted_at IS NULL OR finished_at IS NOT NULL", name=op.f("batch_deleted_was_finished")),
        sa.CheckConstraint(
            "finished_at IS NULL OR succeeded + failed + cancelled = total", name=op.f("batch_finished_adds_up")
        ),
        sa.CheckConstraint("idempotency_key IS NULL OR request_sha256 IS NOT NULL", name=op.f("batch_key_has_request")),
        sa.PrimaryKeyConstraint("id", name=op.f("batch_pkey")),
    )
    op.create_index("batch_deleted", "batch", ["id"], unique=False, postgresql_where=sa.text("deleted_at IS NOT NULL"))
    op.create_index(
        "batch_key", "batch", ["idempotency_key"], unique=True, postgresql_where=sa.text("idempotency_key IS NOT NULL")
    )
    op.create_index("batch_unfinished", "batch", ["id"], unique=False, postgresql_where=sa.text("finished_at IS NULL"))
    op.create_table(
        "body",
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.Column("encoding", sa.Text(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint("encoding IN ('identity', 'zstd')", name=op.f("body_encoding_known")),
        sa.CheckConstraint("octet_length(sha256) = 32", name=op.f("body_sha256_whole")),
        sa.PrimaryKeyConstraint("shard", "sha256", name=op.f("body_pkey")),
    )
    op.execute("ALTER TABLE body ALTER COLUMN content SET STORAGE EXTERNAL")
    op.create_table(
        "histogram",
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("batch_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("kind IN ('error', 'http_status')", name=op.f("histogram_kind_known")),
        sa.PrimaryKeyConstraint("shard", "batch_id", "kind", "key", name=op.f("histogram_pkey")),
        postgresql_with={
            "fillfactor": "50",
            "autovacuum_vacuum_scale_factor": "0.02",
            "autovacuum_vacuum_cost_delay": "1",
        },
    )
    op.create_index("histogram_batch", "histogram", ["batch_id"], unique=False)
    op.create_table(
        "host",
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("host", sa.Text(collation="C"), nullable=False),
        sa.Column("next_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("not_before", sa.DateTime(timezone=True), server_default=sa.text("'-infinity'"), nullable=False),
        sa.Column("lease", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("owner", sa.Uuid(), nullable=True),
        sa.Column("back_offs", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.CheckConstraint("owner IS NULL OR next_at < 'infinity'", name=op.f("host_leased_ends")),
        sa.PrimaryKeyConstraint("shard", "host", name=op.f("host_pkey")),
        postgresql_with={
            "fillfactor": "50",
            "autovacuum_vacuum_scale_factor": "0.02",
            "autovacuum_vacuum_cost_delay": "1",
        },
    )
    op.create_index("host_due", "host", ["next_at"], unique=False, postgresql_where=sa.text("next_at < 'infinity'"))
    op.create_table(
        "job",
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("batch_id", sa.Uuid(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("host", sa.Text(collation="C"), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("request", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("custom_id", sa.Text(), nullable=True),
        sa.Column("metadata", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("repeatable", sa.Boolean(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("run_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("attempt", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("lost", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("crashes", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("alone", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("lease", sa.BigInteger(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("error_detail", sa.Text(), nullable=True),
        sa.Column("http_status", sa.SmallInteger(), nullable=True),
        sa.Column("evidence", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("body_sha256", sa.LargeBinary(), nullable=True),
        sa.CheckConstraint(
            "(status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)",
            name=op.f("job_finished_has_time"),
        ),
        sa.CheckConstraint("NOT alone OR status = 'running'", name=op.f("job_alone_is_running")),
        sa.CheckConstraint("status <> 'failed' OR error IS NOT NULL", name=op.f("job_failed_has_error")),
        sa.CheckConstraint(
            "status <> 'running' OR (lease IS NOT NULL AND started_at IS NOT NULL)", name=op.f("job_running_is_leased")
        ),
        sa.CheckConstraint(
            "status <> 'succeeded' OR (error IS NULL AND http_status IS NOT NULL)",
            name=op.f("job_succeeded_has_status"),
        ),
        sa.CheckConstraint(
            "status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name=op.f("job_status_known")
        ),
        sa.CheckConstraint("0 <= crashes AND crashes <= lost", name=op.f("job_crashes_were_lost")),
        sa.CheckConstraint("0 <= lost AND lost <= attempt", name=op.f("job_lost_was_attempted")),
        sa.PrimaryKeyConstraint("shard", "id", name=op.f("job_pkey")),
        postgresql_with={"autovacuum_vacuum_scale_factor": "0.02", "autovacuum_vacuum_cost_delay": "1"},
    )
    op.create_index("job_batch", "job", ["batch_id", "position"], unique=False)
    op.create_index(
        "job_body", "job", ["shard", "body_sha256"], unique=False, postgresql_where=sa.text("body_sha256 IS NOT NULL")
    )
    op.create_index(
        "job_claim",
        "job",
        ["shard", "host", "batch_id", "run_at"],
        unique=False,
        postgresql_where=sa.text("status = 'queued'"),
    )
    op.create_index(
        "job_running", "job", ["shard", "host"], unique=False, postgresql_where=sa.text("status = 'running'")
    )
    op.create_table(
        "tally",
        sa.Column("shard", sa.SmallInteger(), nullable=False),
        sa.Column("batch_id", sa.Uuid(), nullable=False),
        sa.Column("total", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("queued", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("running", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("succeeded", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("failed", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("cancelled", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("wire_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("body_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("cancel_requested", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.CheckConstraint(
            "least(queued, running, succeeded, failed, cancelled) >= 0", name=op.f("tally_counts_not_negative")
        ),
        sa.CheckConstraint(
            "queued + running + succeeded + failed + cancelled = total", name=op.f("tally_counts_add_up")
        ),
        sa.PrimaryKeyConstraint("shard", "batch_id", name=op.f("tally_pkey")),
        postgresql_with={
            "fillfactor": "50",
            "autovacuum_vacuum_scale_factor": "0.02",
            "autovacuum_vacuum_cost_delay": "1",
        },
    )
    op.create_index("tally_batch", "tally", ["batch_id"], unique=False)
    op.create_table(
        "worker",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("machine", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("running", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("beat_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("worker_pkey")),
    )


def downgrade() -> None:
    for table in ("worker", "histogram", "tally", "body", "attempt", "job", "host", "batch"):
        op.drop_table(table)
