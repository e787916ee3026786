"""The tables. Their named CHECKs carry the status rules, so that a wrong program cannot store a wrong row.

Every table but those of whole batches and of workers has `shard` in its key, the top 8 bits of the host's hash, so that
it could be spread over many servers; no foreign key, sequence, trigger or unique constraint crosses a shard. Each index
says what for.
"""

from sqlalchemy import (
    ARRAY,
    DDL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    Uuid,
    event,
    text,
)
from sqlalchemy.dialects.postgresql import JSON, JSONB

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "ck": "%(table_name)s_%(constraint_name)s",
        "ix": "%(column_0_label)s",
    }
)

HOST_NAME = Text(collation="C")
"""Sorted by bytes whatever the database's locale, as Python sorts: the order in which hosts are locked is one."""

HOT_ROWS = {"fillfactor": "50", "autovacuum_vacuum_scale_factor": "0.02", "autovacuum_vacuum_cost_delay": "1"}
"""For tables whose rows change again and again: room for the next version, and a vacuum that keeps up."""


def _time(name: str, *, nullable: bool = True, default: str | None = None) -> Column[object]:
    return Column(name, DateTime(timezone=True), nullable=nullable, server_default=text(default) if default else None)


def _count(name: str) -> Column[int]:
    return Column(name, Integer, nullable=False, server_default=text("0"))


batch = Table(
    "batch",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text),
    Column("metadata", JSONB),
    Column("options", JSONB, nullable=False),
    Column("skipped", JSONB, nullable=False),
    Column("idempotency_key", Text),
    Column("request_sha256", LargeBinary),
    Column("status", Text, nullable=False),
    Column("total", Integer, nullable=False),
    _time("created_at", nullable=False, default="now()"),
    _time("started_at"),
    _time("finished_at"),
    _time("cancel_requested_at"),
    _time("deleted_at"),
    CheckConstraint("status IN ('queued', 'running', 'completed', 'cancelled')", name="status_known"),
    CheckConstraint("(status IN ('completed', 'cancelled')) = (finished_at IS NOT NULL)", name="finished_has_time"),
    CheckConstraint("status <> 'cancelled' OR cancel_requested_at IS NOT NULL", name="cancelled_was_requested"),
    CheckConstraint("deleted_at IS NULL OR finished_at IS NOT NULL", name="deleted_was_finished"),
    CheckConstraint("idempotency_key IS NULL OR request_sha256 IS NOT NULL", name="key_has_request"),
    # batches.find_by_key, and the last guard against two batches of one key
    Index("batch_key", "idempotency_key", unique=True, postgresql_where=text("idempotency_key IS NOT NULL")),
    # claims: the oldest; upkeep: those that may be finished
    Index("batch_unfinished", "id", postgresql_where=text("finished_at IS NULL")),
    # claims and releases: batches of which nothing runs any more; upkeep: those that have rows to cancel
    Index("batch_cancelling", "id", postgresql_where=text("finished_at IS NULL AND cancel_requested_at IS NOT NULL")),
    # upkeep: batches whose rows are to be erased
    Index("batch_deleted", "id", postgresql_where=text("deleted_at IS NOT NULL")),
)

host = Table(
    "host",
    metadata,
    Column("shard", SmallInteger, nullable=False),
    Column("host", HOST_NAME, nullable=False),
    # when it may next be claimed: due time, or end of the lease; infinity: parked
    _time("next_at", nullable=False),
    # back-off, kept apart from the due time so that an enqueue cannot shorten it
    _time("not_before", nullable=False, default="'-infinity'"),
    Column("lease", BigInteger, nullable=False, server_default=text("0")),
    Column("owner", Uuid),
    # back-offs in a row, and how many of the latest of them were failures to connect
    _count("back_offs"),
    _count("connect_failures"),
    PrimaryKeyConstraint("shard", "host"),
    CheckConstraint("owner IS NULL OR next_at < 'infinity'", name="leased_ends"),
    # leases and workers.beat_and_look: hosts that are due, the longest waiting first, and when the next one is
    Index("host_due", "next_at", postgresql_where=text("next_at < 'infinity'")),
    postgresql_with=HOT_ROWS,
)

job = Table(
    "job",
    metadata,
    Column("shard", SmallInteger, nullable=False),
    Column("id", Uuid, nullable=False),
    Column("batch_id", Uuid, nullable=False),
    Column("position", Integer, nullable=False),
    Column("host", HOST_NAME, nullable=False),
    Column("url", Text, nullable=False),
    Column("request", JSONB),
    Column("custom_id", Text),
    Column("metadata", JSONB),
    # may be fetched again when a request of it may have been sent
    Column("repeatable", Boolean, nullable=False),
    Column("status", Text, nullable=False),
    _time("run_at", nullable=False),
    Column("attempt", SmallInteger, nullable=False, server_default=text("0")),
    Column("lost", SmallInteger, nullable=False, server_default=text("0")),
    # leases lost while it ran, by a worker that was not heard of again
    Column("crashes", SmallInteger, nullable=False, server_default=text("0")),
    # a suspect that its worker runs with no other fetch open
    Column("alone", Boolean, nullable=False, server_default=text("false")),
    Column("lease", BigInteger),
    _time("started_at"),
    _time("finished_at"),
    Column("error", Text),
    Column("error_detail", Text),
    Column("http_status", SmallInteger),
    # read whole and never looked into
    Column("evidence", JSON),
    Column("body_sha256", LargeBinary),
    # a suspect whose worker was lost while it ran alone: convicted by whoever claims it next, cleared by that worker
    Column("accused", Boolean, nullable=False, server_default=text("false")),
    PrimaryKeyConstraint("shard", "id"),
    CheckConstraint("status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="status_known"),
    CheckConstraint("status <> 'running' OR (lease IS NOT NULL AND started_at IS NOT NULL)", name="running_is_leased"),
    CheckConstraint(
        "(status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)", name="finished_has_time"
    ),
    CheckConstraint(
        "status <> 'succeeded' OR (error IS NULL AND http_status IS NOT NULL)", name="succeeded_has_status"
    ),
    CheckConstraint("status <> 'failed' OR error IS NOT NULL", name="failed_has_error"),
    CheckConstraint("0 <= lost AND lost <= attempt", name="lost_was_attempted"),
    CheckConstraint("0 <= crashes AND crashes <= lost", name="crashes_were_lost"),
    CheckConstraint("NOT alone OR status = 'running'", name="alone_is_running"),
    # queue.claim and refill: what a host has to run, by turns over its batches
    Index("job_claim", "shard", "host", "batch_id", "run_at", postgresql_where=text("status = 'queued'")),
    # queue.rescue, leases, hosts: what ran under a lost lease, or runs at all. No statement asks for `attempt`: it is
    # there because each claim changes it. An entry whose columns are unchanged PostgreSQL takes for a sign of garbage,
    # and searches a full page for it
    Index("job_running", "shard", "host", "batch_id", "attempt", postgresql_where=text("status = 'running'")),
    postgresql_with={"autovacuum_vacuum_scale_factor": "0.02", "autovacuum_vacuum_cost_delay": "1"},
)

batch_jobs = Table(
    "batch_jobs",
    metadata,
    Column("batch_id", Uuid, nullable=False),
    Column("first_position", Integer, nullable=False),
    Column("shards", ARRAY(SmallInteger), nullable=False),
    Column("ids", ARRAY(Uuid), nullable=False),
    PrimaryKeyConstraint("batch_id", "first_position"),
    CheckConstraint("cardinality(shards) = cardinality(ids)", name="keys_whole"),
)
"""The keys of a batch's jobs in the order the client gave, `listing.LISTED_MAX` a row: for reads.list_jobs, and chunks
of a batch that is cancelled or erased. Written once; an index of jobs had one more entry for each of their changes."""

attempt = Table(
    "attempt",
    metadata,
    Column("shard", SmallInteger, nullable=False),
    Column("job_id", Uuid, nullable=False),
    Column("number", SmallInteger, nullable=False),
    _time("started_at", nullable=False),
    _time("finished_at", nullable=False),
    Column("error", Text, nullable=False),
    Column("error_detail", Text),
    Column("http_status", SmallInteger),
    Column("evidence", JSON),
    # a crash of the job was counted for it, which its worker takes off again should it be heard of
    Column("charged", Boolean, nullable=False, server_default=text("false")),
    PrimaryKeyConstraint("shard", "job_id", "number"),
)

body = Table(
    "body",
    metadata,
    Column("shard", SmallInteger, nullable=False),
    Column("sha256", LargeBinary, nullable=False),
    Column("encoding", Text, nullable=False),
    Column("content", LargeBinary, nullable=False),
    PrimaryKeyConstraint("shard", "sha256"),
    CheckConstraint("encoding IN ('identity', 'gzip', 'zstd')", name="encoding_known"),
    CheckConstraint("octet_length(sha256) = 32", name="sha256_whole"),
    postgresql_with={"toast_tuple_target": "8160"},
)
"""`content` is compressed by the worker where that helps, so PostgreSQL keeps it as it is, and in the row where a page
can hold it: 3.7 KB were two chunks of TOAST, each with an entry in an index."""
BODY_STORAGE = "ALTER TABLE body ALTER COLUMN content SET STORAGE EXTERNAL"
event.listen(body, "after_create", DDL(BODY_STORAGE))  # type: ignore[no-untyped-call]  # SQLAlchemy 2.1 leaves it without types

body_shared = Table(
    "body_shared",
    metadata,
    Column("shard", SmallInteger, nullable=False),
    Column("sha256", LargeBinary, nullable=False),
    # jobs that have the body beside the first
    Column("more", Integer, nullable=False),
    PrimaryKeyConstraint("shard", "sha256"),
    CheckConstraint("more >= 0", name="more_not_negative"),
    postgresql_with=HOT_ROWS,
)
"""How many jobs have the same body, where there are several: it is erased with the last of them. Most bodies have one;
an index on the jobs' bodies was an entry more for each, at a random place of it."""

tally = Table(
    "tally",
    metadata,
    Column("shard", SmallInteger, nullable=False),
    Column("batch_id", Uuid, nullable=False),
    _count("total"),
    _count("queued"),
    _count("running"),
    _count("succeeded"),
    _count("failed"),
    _count("cancelled"),
    Column("wire_bytes", BigInteger, nullable=False, server_default=text("0")),
    Column("body_bytes", BigInteger, nullable=False, server_default=text("0")),
    # finished with HTTP status 200, as most are; the histogram has all other statuses
    _count("http_200"),
    # the only index, and so the order in which tallies are locked (tallies.CHANGE); by batch, of which reads.get_batch
    # adds up the at most 256
    PrimaryKeyConstraint("batch_id", "shard"),
    CheckConstraint("least(queued, running, succeeded, failed, cancelled) >= 0", name="counts_not_negative"),
    CheckConstraint("queued + running + succeeded + failed + cancelled = total", name="counts_add_up"),
    postgresql_with=HOT_ROWS,
)

histogram = Table(
    "histogram",
    metadata,
    Column("shard", SmallInteger, nullable=False),
    Column("batch_id", Uuid, nullable=False),
    Column("kind", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("n", BigInteger, nullable=False),
    PrimaryKeyConstraint("shard", "batch_id", "kind", "key"),
    # of HTTP statuses all but 200, which tally.http_200 counts
    CheckConstraint("kind IN ('error', 'http_status')", name="kind_known"),
    # reads.get_batch
    Index("histogram_batch", "batch_id"),
    postgresql_with=HOT_ROWS,
)

worker = Table(
    "worker",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("machine", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("version", Text, nullable=False),
    Column("slots", Integer, nullable=False),
    Column("running", Integer, nullable=False),
    _time("started_at", nullable=False, default="now()"),
    _time("beat_at", nullable=False, default="now()"),
    # results that came after their leases
    Column("dropped", BigInteger, nullable=False, server_default=text("0")),
)
"""A heartbeat per process, for people and metrics; nothing depends on it."""
