"""What clients read: batches with their counts, jobs, bodies. Changes nothing.

Returns plain values. A deleted batch, and every job of it, is not there. Counts come from the tallies, never from
counting jobs, so that a batch of a million costs what one of ten does.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import asyncpg
from msgspec import Raw, Struct, json
from sqlalchemy import text
from sqlalchemy.engine import Result, Row, RowMapping
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs import bodies
from app.jobs.ids import shard_of_job
from app.jobs.listing import IN_ORDER, list_keys

CONTENT_TYPE_CHARS_MAX = 255
"""A stranger wrote it; the response's headers show all of it."""
ROWS_PER_TURN = 100
"""Of jobs, read at once in some 3 ms, in which nothing else runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Jobs of a batch by status."""

    total: int
    queued: int
    running: int
    succeeded: int
    failed: int
    cancelled: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch as clients see it; `errors` and `http_statuses` count finished jobs."""

    id: UUID
    name: str | None
    metadata: dict[str, Any] | None
    options: dict[str, Any]
    skipped: list[dict[str, Any]]
    status: str
    counts: Counts
    errors: dict[str, int]
    http_statuses: dict[str, int]
    wire_bytes: int
    body_bytes: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    cancel_requested_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as lists show it; `attempts` are those charged to the client, `run_at` is given while it waits.

    `headers` are those of the response, their values as JSON text: only where they were asked for, and one came.
    """

    id: UUID
    batch_id: UUID
    position: int
    url: str
    host: str
    method: str
    custom_id: str | None
    metadata: dict[str, Any] | None
    status: str
    attempts: int
    run_at: datetime | None
    error: str | None
    error_detail: str | None
    http_status: int | None
    final_url: str | None
    body_sha256: str | None
    body_bytes: int | None
    wire_bytes: int | None
    total_ms: float | None
    content_type: str | None
    headers: list[tuple[str, Raw]] | None = None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try of a job; `evidence` has those fields of `outcome.Evidence` that are known and not empty."""

    number: int
    error: str | None
    error_detail: str | None
    http_status: int | None
    started_at: datetime
    finished_at: datetime
    evidence: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDetail(Job):
    """Everything known of a job; request headers by name only, for their values may be secrets."""

    request_header_names: list[str]
    response_headers: list[list[str]] | None
    evidence: dict[str, Any] | None
    attempts_made: list[Attempt]


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """The decoded bytes of a response; `sha256` in hex."""

    content: bytes
    content_type: str | None
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """Which jobs to list; `None` means any."""

    status: str | None = None
    error: str | None = None
    http_status: int | None = None
    host: str | None = None
    custom_id: str | None = None


# All of a batch in one statement, for a poll is one round trip: at most 256 rows of counts, and as many of each
# distinct outcome, whatever the batch's size.
BATCH_WITH_COUNTS = """
    SELECT batch.id, batch.name, batch.metadata, batch.options, batch.skipped, batch.status, batch.total,
        batch.created_at, batch.started_at, batch.finished_at, batch.cancel_requested_at, counted.*, outcomes.*
    FROM batch
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(queued), 0) AS queued, coalesce(sum(running), 0) AS running,
            coalesce(sum(succeeded), 0) AS succeeded, coalesce(sum(failed), 0) AS failed,
            coalesce(sum(cancelled), 0) AS cancelled, coalesce(sum(http_200), 0) AS http_200,
            CAST(coalesce(sum(wire_bytes), 0) AS bigint) AS wire_bytes,
            CAST(coalesce(sum(body_bytes), 0) AS bigint) AS body_bytes
        FROM tally WHERE tally.batch_id = batch.id
    ) AS counted
    CROSS JOIN LATERAL (
        SELECT coalesce(json_object_agg(key, n ORDER BY key) FILTER (WHERE kind = 'error'), '{}') AS errors,
            coalesce(json_object_agg(key, n ORDER BY key) FILTER (WHERE kind = 'http_status'), '{}') AS http_statuses
        FROM (
            SELECT kind, key, CAST(sum(n) AS bigint) AS n
            FROM histogram WHERE histogram.batch_id = batch.id GROUP BY kind, key
            UNION ALL SELECT 'http_status', '200', http_200 WHERE http_200 > 0
        ) AS outcome
    ) AS outcomes
"""

ONE_BATCH = text(f"{BATCH_WITH_COUNTS} WHERE batch.id = :id AND batch.deleted_at IS NULL")

POLLED_BATCH = ONE_BATCH.text.replace(":id", "$1")

MANY_BATCHES = text(f"""
    {BATCH_WITH_COUNTS}
    WHERE batch.deleted_at IS NULL AND (CAST(:before AS uuid) IS NULL OR batch.id < :before)
        AND (CAST(:status AS text) IS NULL OR batch.status = :status)
        AND (CAST(:name AS text) IS NULL OR batch.name = :name)
    ORDER BY batch.id DESC LIMIT :limit
""")


async def get_batch(session: AsyncSession, batch_id: UUID) -> Batch | None:
    """Return a batch with its counts of this moment, `None` when there is none."""
    row = (await session.execute(ONE_BATCH, {"id": batch_id})).mappings().first()
    return _batch(row) if row is not None else None


async def poll_batch(driver: asyncpg.Connection, batch_id: UUID) -> Batch | None:
    """Return the same as `get_batch`, without SQLAlchemy: of all reads this one is asked for most."""
    row = await driver.fetchrow(POLLED_BATCH, batch_id)
    return _batch(row) if row is not None else None


async def list_batches(
    session: AsyncSession,
    *,
    limit: int,
    before: UUID | None = None,
    status: str | None = None,
    name: str | None = None,
) -> list[Batch]:
    """List batches, newest first; `before` is the id of the last one of the page before."""
    values = {"limit": limit, "before": before, "status": status, "name": name}
    rows = await session.execute(MANY_BATCHES, values)
    return [_batch(row) for row in rows.mappings()]


def _batch(row: RowMapping | asyncpg.Record) -> Batch:
    return Batch(
        id=row["id"],
        name=row["name"],
        metadata=row["metadata"],
        options=row["options"],
        skipped=row["skipped"],
        status=row["status"],
        counts=Counts(
            total=row["total"],
            queued=row["queued"],
            running=row["running"],
            succeeded=row["succeeded"],
            failed=row["failed"],
            cancelled=row["cancelled"],
        ),
        errors=row["errors"],
        http_statuses=row["http_statuses"],
        wire_bytes=row["wire_bytes"],
        body_bytes=row["body_bytes"],
        created_at=row["created_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        cancel_requested_at=row["cancel_requested_at"],
    )


# What makes a `Job`, named as there, and `evidence`, which has the rest of it: as text, for SQLAlchemy takes several
# times as long to read it as msgspec.
JOB_COLUMNS = """
    job.id, job.batch_id, job.position, job.url, job.host,
    coalesce(job.request ->> 'method', batch.options ->> 'method', 'GET') AS method,
    job.custom_id, job.metadata, job.status, job.attempt - job.lost AS attempts,
    CASE WHEN job.status = 'queued' THEN greatest(job.run_at, (
        SELECT not_before FROM host WHERE host.shard = job.shard AND host.host = job.host
    )) END AS run_at,
    job.error, job.error_detail, job.http_status, encode(job.body_sha256, 'hex') AS body_sha256,
    batch.created_at, job.started_at, job.finished_at,
    CAST(job.evidence AS text) AS evidence
"""

# Job by job (LATERAL), in the order of the list, so that it stops at the last one wanted; so the batch comes last.
MANY_JOBS = text(f"""
    SELECT {JOB_COLUMNS} FROM ({list_keys(since=":after")}) AS listed
    CROSS JOIN LATERAL (
        SELECT * FROM job WHERE job.shard = listed.shard AND job.id = listed.id AND job.position > :after
            AND (CAST(:status AS text) IS NULL OR job.status = :status)
            AND (CAST(:error AS text) IS NULL OR job.error = :error)
            AND (CAST(:http_status AS int) IS NULL OR job.http_status = :http_status)
            AND (CAST(:host AS text) IS NULL OR job.host = :host)
            AND (CAST(:custom_id AS text) IS NULL OR job.custom_id = :custom_id)
        OFFSET 0
    ) AS job
    CROSS JOIN LATERAL (SELECT * FROM batch WHERE batch.id = job.batch_id AND deleted_at IS NULL OFFSET 0) AS batch
    ORDER BY {IN_ORDER} LIMIT :limit
""")

FINISHED_JOBS = text(f"""
    SELECT {JOB_COLUMNS} FROM ({list_keys(since=":start", before=":stop")}) AS listed
    CROSS JOIN LATERAL (
        SELECT * FROM job WHERE job.shard = listed.shard AND job.id = listed.id
            AND job.position >= :start AND job.position < :stop AND job.finished_at IS NOT NULL
            AND (CAST(:status AS text) IS NULL OR job.status = :status)
        OFFSET 0
    ) AS job
    CROSS JOIN LATERAL (SELECT * FROM batch WHERE batch.id = job.batch_id AND deleted_at IS NULL OFFSET 0) AS batch
    ORDER BY {IN_ORDER}
""")

ONE_JOB = text(f"""
    SELECT {JOB_COLUMNS}, job.request, batch.options
    FROM job JOIN batch ON batch.id = job.batch_id AND batch.deleted_at IS NULL
    WHERE job.shard = :shard AND job.id = :id
""")

ATTEMPTS = text("""
    SELECT error, error_detail, http_status, started_at, finished_at, CAST(evidence AS text) AS evidence
    FROM attempt WHERE shard = :shard AND job_id = :id ORDER BY number
""")


async def list_jobs(
    session: AsyncSession, batch_id: UUID, *, after: int = -1, limit: int, where: JobFilter
) -> list[Job]:
    """List a batch's jobs in the order they were given; `after` is the position of the last one seen."""
    values = {"batch_id": batch_id, "after": after, "limit": limit, **asdict(where)}
    return await _jobs(await session.execute(MANY_JOBS, values))


async def list_finished(
    session: AsyncSession,
    batch_id: UUID,
    *,
    start: int,
    stop: int,
    status: str | None = None,
    with_headers: bool = False,
) -> list[Job]:
    """List the finished jobs at positions `start` to `stop - 1`, in order. Where few are finished it costs little."""
    values = {"batch_id": batch_id, "start": start, "stop": stop, "status": status}
    return await _jobs(await session.execute(FINISHED_JOBS, values), with_headers=with_headers)


async def _jobs(rows: Result[Any], *, with_headers: bool = False) -> list[Job]:
    jobs: list[Job] = []
    for some in rows.partitions(ROWS_PER_TURN):
        jobs += [Job(**_job_fields(row, with_headers=with_headers)) for row in some]
        if len(some) == ROWS_PER_TURN:
            await asyncio.sleep(0)
    return jobs


async def get_job(session: AsyncSession, job_id: UUID) -> JobDetail | None:
    """Return everything known of a job, `None` when there is none."""
    keys = {"shard": shard_of_job(job_id), "id": job_id}
    row = (await session.execute(ONE_JOB, keys)).first()
    if row is None:
        return None
    attempts = [*await session.execute(ATTEMPTS, keys)]
    if row.finished_at is not None and row.evidence is not None:  # it was fetched; that attempt is on the job's own row
        attempts.append(row)
    fields, evidence = _job_fields(row), _all_evidence(row)
    return JobDetail(
        request_header_names=_header_names(fields.pop("request"), fields.pop("options")),
        response_headers=evidence.get("headers"),
        evidence=_fetch_evidence(evidence) if row.finished_at and evidence else None,
        attempts_made=[_attempt(each, number) for number, each in enumerate(attempts, start=1)],
        **fields,
    )


def _job_fields(row: Row[Any], *, with_headers: bool = False) -> dict[str, Any]:
    """Put what was selected, and more, under the names of a `Job`'s fields."""
    fields = dict(zip(row._fields, row, strict=True))  # attribute by attribute takes three times as long
    evidence = _shown_evidence(fields.pop("evidence"))
    is_finished = row.finished_at is not None
    fields["body_bytes"] = evidence.body_bytes if is_finished else None
    fields["wire_bytes"] = evidence.wire_bytes if is_finished else None
    fields["total_ms"] = evidence.total_ms if is_finished else None
    fields["content_type"] = _content_type(evidence)
    fields["headers"] = evidence.headers if with_headers else None  # they keep all of the evidence in memory
    # stored only where it is not the job's own
    fields["final_url"] = evidence.final_url or (row.url if row.http_status is not None else None)
    return fields


class _ShownEvidence(Struct):
    """What lists show of a job's evidence. Its values of header fields, which may be long, are read when asked for."""

    final_url: str | None = None
    body_bytes: int | None = None
    wire_bytes: int | None = None
    total_ms: float | None = None
    headers: list[tuple[str, Raw]] | None = None


_SHOWN = json.Decoder(_ShownEvidence)
_NOTHING = _ShownEvidence()


def _shown_evidence(stored: str | None) -> _ShownEvidence:
    return _NOTHING if stored is None else _SHOWN.decode(stored)


def _all_evidence(row: Row[Any]) -> dict[str, Any]:
    evidence: dict[str, Any] = {} if row.evidence is None else json.decode(row.evidence)
    return evidence


def _content_type(evidence: _ShownEvidence) -> str | None:
    value = next((value for name, value in evidence.headers or () if name.lower() == "content-type"), None)
    return None if value is None else json.decode(value, type=str)[:CONTENT_TYPE_CHARS_MAX]


def _header_names(request: dict[str, Any] | None, options: dict[str, Any]) -> list[str]:
    own = [name for name, _ in (request or {}).get("headers", ())]
    shared = [name for name, _ in options.get("headers", ())]
    return sorted({*own, *shared}, key=str.lower)


def _attempt(row: Row[Any], number: int) -> Attempt:
    """Put an attempt down; clients count from 1 those they are told of, without what was put back unsent."""
    return Attempt(
        number=number,
        error=row.error,
        error_detail=row.error_detail,
        http_status=row.http_status,
        started_at=row.started_at,
        finished_at=row.finished_at,
        evidence=_fetch_evidence(_all_evidence(row)),
    )


def _fetch_evidence(stored: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in stored.items() if name not in ("headers", "final_url")}


ONE_BODY = text("""
    SELECT job.finished_at, CAST(job.evidence AS text) AS evidence, body.sha256, body.encoding, body.content
    FROM job JOIN batch ON batch.id = job.batch_id AND batch.deleted_at IS NULL
    LEFT JOIN body ON body.shard = job.shard AND body.sha256 = job.body_sha256
    WHERE job.shard = :shard AND job.id = :id
""")


async def get_body(session: AsyncSession, job_id: UUID) -> Body | Literal["missing", "unfinished", "none"]:
    """Return a job's body, or why there is none: no such job, not finished, or nothing was received."""
    row = (await session.execute(ONE_BODY, {"shard": shard_of_job(job_id), "id": job_id})).first()
    if row is None:
        return "missing"
    if row.finished_at is None:
        return "unfinished"
    if row.content is None:
        return "none"
    return Body(
        content=await asyncio.to_thread(_content, row),
        content_type=_content_type(_shown_evidence(row.evidence)),
        sha256=row.sha256.hex(),
    )


MANY_BODIES = text("""
    SELECT body.* FROM unnest(CAST(:shards AS smallint[]), CAST(:sha256s AS bytea[])) AS wanted(shard, sha256)
    CROSS JOIN LATERAL (
        SELECT shard, sha256, encoding, content FROM body
        WHERE body.shard = wanted.shard AND body.sha256 = wanted.sha256 OFFSET 0
    ) AS body
""")


class BatchGone(Exception):
    """The batch was deleted while it was read."""


async def list_bodies(session: AsyncSession, jobs: Iterable[Job]) -> dict[UUID, bytes]:
    """Return the bodies of those jobs that have one, by the jobs' ids. Raises `BatchGone` when one is erased."""
    keys = {job.id: (shard_of_job(job.id), bytes.fromhex(job.body_sha256)) for job in jobs if job.body_sha256}
    wanted = set(keys.values())
    values = {"shards": [shard for shard, _ in wanted], "sha256s": [sha256 for _, sha256 in wanted]}
    rows = (await session.execute(MANY_BODIES, values)).all()
    if len(rows) < len(wanted):
        raise BatchGone
    contents = await asyncio.to_thread(lambda: {(row.shard, row.sha256): _content(row) for row in rows})
    return {job_id: contents[key] for job_id, key in keys.items()}


def _content(row: Row[Any]) -> bytes:
    return bodies.unpack(row.content, row.encoding)
