"""Jobs from their enqueuing to their result; every change of a job's status is one guarded statement here.

Functions take a session and never commit; the caller's `async with sessions.begin()` is the transaction. Locks are
taken in one order everywhere (host, job, attempt, body, body_shared, tally, histogram, batch) and in key order within
each, so that they cannot deadlock. Decides nothing about retries: it stores what the worker decided.
"""

import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from http import HTTPStatus
from operator import itemgetter
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.engine import Row
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs import bodies, copying, leases, listing, tallies
from app.jobs.ids import new_job_ids, shard_of_hash
from app.jobs.leases import BEING_CANCELLED, OLDEST_UNFINISHED, waiting_batches
from app.jobs.listing import list_keys
from app.jobs.tallies import Change, HistogramKey
from app.jobs.values import (
    CRASHES_OF_SUSPECT,
    ClaimedJob,
    Extras,
    Lease,
    Lost,
    NewBatch,
    NewJobs,
    Recorded,
    Result,
    Returned,
    to_json,
)
from app.outcome import SAFE_METHODS

IDS_MAX = 10_000
"""Ids made at once: 5 ms, in which nothing else runs."""
NEIGHBOURS_MAX = 1_000
"""Jobs of which those of a host are put down together, for they are claimed together: a claim then reads half as many
pages. Sorting more at once would hold an event loop for long."""

BATCHES_PER_TURN_MIN = 8
BATCHES_PER_TURN_MAX = 100
STATEMENTS_PER_DETOUR = 16
DETOUR_BATCHES_MAX = 100
"""A claim shares a host out among the oldest batches with jobs due, as many as it wants jobs but at least eight, and
the newest. It looks at no more, for each of them costs it what a job does. Once in so many times it makes a detour: it
begins at a random one of the first hundred batches, so that none of these waits for the others to end."""

ACCUSED_S_MIN = 5.0
"""Shortest time that a worker lost with a suspect has to be heard of again: it may have slept, and be reconnecting."""


INSERT_BATCH = text("""
    INSERT INTO batch (id, name, metadata, options, skipped, idempotency_key, request_sha256, status, total,
        finished_at)
    VALUES (:id, :name, CAST(:metadata AS jsonb), CAST(:options AS jsonb), CAST(:skipped AS jsonb), :idempotency_key,
        :request_sha256, :status, :total, CASE WHEN :status = 'completed' THEN now() END)
    RETURNING CAST(extract(epoch FROM now() - TIMESTAMPTZ '2000-01-01 00:00:00+00') * 1000000 AS bigint)
""")

JOB_COLUMNS = (
    *("shard", "id", "batch_id", "position", "repeatable", "status", "run_at"),
    *("host", "url", "request", "custom_id", "metadata"),
)

_START_OF_JOB = struct.Struct("!h ih i16s i16s ii i? i6s iq")
"""The count of the columns, then the first seven of them, each as its size and its value: field by field a row took
almost twice as long."""
_NO_EXTRAS = 3 * copying.NULL

INSERT_TALLIES = text("""
    INSERT INTO tally (shard, batch_id, total, queued)
    SELECT t.shard, :batch_id, t.total, t.total
    FROM unnest(CAST(:shards AS smallint[]), CAST(:totals AS int[])) AS t(shard, total)
""")

# A leased host is only locked: whoever holds it looks for new jobs before letting go, and must wait for this commit.
# Lease numbers begin at the clock: those of a host that was forgotten and comes again (jobs/hosts) are new as well.
WAKE_HOSTS = text("""
    INSERT INTO host (shard, host, lease, next_at)
    SELECT h.shard, h.host, CAST(extract(epoch FROM now()) * 1000 AS bigint), now()
    FROM unnest(CAST(:shards AS smallint[]), CAST(:hosts AS text[])) AS h(shard, host)
    ORDER BY h.shard, h.host COLLATE "C"
    ON CONFLICT (shard, host) DO UPDATE SET next_at = greatest(host.not_before, least(host.next_at, excluded.next_at))
    WHERE host.owner IS NULL AND host.next_at > excluded.next_at
""")


async def enqueue(session: AsyncSession, batch: NewBatch, jobs: NewJobs) -> None:
    """Store a batch and its jobs in the caller's transaction.

    The host rows come last and in key order, just before the commit: they are what claims and renewals wait for.
    """
    now_us = await _insert_batch(session, batch, len(jobs))
    ids: list[bytes] = []
    for start in range(0, len(jobs), IDS_MAX):
        positions = range(start, min(start + IDS_MAX, len(jobs)))
        ids += new_job_ids(jobs.host_hashes[positions.start : positions.stop])
        job_rows = _job_rows(batch, jobs, ids=ids, positions=positions, first_run_at_us=now_us - len(jobs))
        await copying.copy(session, "job", columns=JOB_COLUMNS, rows=job_rows, pauses=True)
    shards = list(map(shard_of_hash, jobs.host_hashes))
    list_rows = listing.rows(batch.id, shards=shards, ids=ids)
    await copying.copy(session, "batch_jobs", columns=listing.COLUMNS, rows=list_rows, pauses=True)
    totals = Counter(shards)
    await session.execute(
        INSERT_TALLIES, {"batch_id": batch.id, "shards": list(totals), "totals": list(totals.values())}
    )
    hosts = dict(zip(jobs.hosts, jobs.host_hashes, strict=True))
    await session.execute(WAKE_HOSTS, {"shards": list(map(shard_of_hash, hosts.values())), "hosts": list(hosts)})


async def _insert_batch(session: AsyncSession, batch: NewBatch, total: int) -> int:
    """Return the transaction's time: microseconds since the year 2000, as PostgreSQL keeps it."""
    now_us: int = await session.scalar(
        INSERT_BATCH,
        {
            "id": batch.id,
            "name": batch.name,
            "metadata": to_json(batch.metadata),
            "options": to_json(batch.options),
            "skipped": to_json(batch.skipped),
            "idempotency_key": batch.idempotency_key,
            "request_sha256": batch.request_sha256,
            "status": "queued" if total else "completed",
            "total": total,
        },
    )
    return now_us


def _job_rows(
    batch: NewBatch, jobs: NewJobs, *, ids: Sequence[bytes], positions: range, first_run_at_us: int
) -> Iterator[bytes]:
    """Make the rows of the jobs at these positions, for COPY.

    Their `run_at` is a microsecond apart, and all of them are due: what a claim's index gives first is then what the
    client gave first.
    """
    urls, hosts, hashes, batch_id = jobs.urls, jobs.hosts, jobs.host_hashes, batch.id.bytes
    shared_is_repeatable = _is_repeatable(batch, None)
    pack, count = _START_OF_JOB.pack, len(JOB_COLUMNS)
    last_host, host_field = "", b""
    for at in _neighbours_together(jobs, positions):
        if hosts[at] is not last_host:  # one object for each host: see NewJobs.add
            last_host, host_field = hosts[at], copying.text(hosts[at])
        shard, run_at_us = shard_of_hash(hashes[at]), first_run_at_us + at
        repeatable, last_fields = shared_is_repeatable, _NO_EXTRAS
        if (extras := jobs.extras.get(at)) is not None:
            repeatable, last_fields = _is_repeatable(batch, extras.method), _extra_fields(extras)
        start = pack(count, 2, shard, 16, ids[at], 16, batch_id, 4, at, 1, repeatable, 6, b"queued", 8, run_at_us)
        yield b"".join((start, host_field, copying.text(urls[at]), last_fields))


def _is_repeatable(batch: NewBatch, method: str | None) -> bool:
    """Whether a request may be sent again; `method` is the job's own, if it has one."""
    if batch.options.get("retry_unsafe", False):
        return True
    return (method or batch.options.get("method", "GET")) in SAFE_METHODS


def _extra_fields(extras: Extras) -> bytes:
    return copying.jsonb(extras.request) + copying.text(extras.custom_id) + copying.jsonb(extras.metadata)


def _neighbours_together(jobs: NewJobs, positions: range) -> Iterator[int]:
    """Go through positions host by host, a part after the other; hosts of one hash, which are few, come mixed."""
    for start in range(positions.start, positions.stop, NEIGHBOURS_MAX):
        part = range(start, min(start + NEIGHBOURS_MAX, positions.stop))
        yield from sorted(part, key=jobs.host_hashes.__getitem__)


# The last batch that waits at a host, with its first job as in `waiting_batches`, found from the end of the index;
# nothing when it is among the `chosen`. Stands where these and `turn` are in scope.
NEWEST_BATCH = f"""
    SELECT newest.batch_id, earliest.run_at, earliest.place, earliest.id FROM (
        SELECT batch_id FROM job WHERE status = 'queued' AND shard = turn.shard AND host = turn.host
            AND batch_id > (SELECT batch_id FROM chosen ORDER BY batch_id DESC LIMIT 1)
        ORDER BY batch_id DESC, run_at DESC LIMIT 1
    ) AS newest
    CROSS JOIN LATERAL (
        SELECT run_at, ctid AS place, id FROM job WHERE status = 'queued' AND shard = turn.shard AND host = turn.host
            AND batch_id = newest.batch_id ORDER BY run_at LIMIT 1
    ) AS earliest
    WHERE newest.batch_id NOT IN {BEING_CANCELLED}
"""

# Where all turns of a statement begin, or nothing: drawn once for all, so that most statements do not look.
DETOUR = f"""(
    SELECT id FROM (
        SELECT id FROM batch WHERE finished_at IS NULL ORDER BY id LIMIT {DETOUR_BATCHES_MAX}
    ) AS first
    WHERE (SELECT random() * {STATEMENTS_PER_DETOUR} < 1)
    ORDER BY random() LIMIT 1
)"""
FROM_START = waiting_batches(since=f"coalesce(turn.detour, {OLDEST_UNFINISHED})")
SKIPPED_BY_DETOUR = waiting_batches(before="batch_id < turn.detour")

CLAIMED_COLUMNS = ", ".join(f"job.{name}" for name in ClaimedJob.__struct_fields__)
"""In the order of the fields, for jobs are made of rows by position."""

WANTED = """
    unnest(CAST(:shards AS smallint[]), CAST(:hosts AS text[]), CAST(:leases AS bigint[]), CAST(:wanted AS int[]))
        AS t(shard, host, lease, wanted)
"""


def _taking(turns: str) -> str:
    """The common table expressions up to `taken`: jobs of the hosts in `turns`, as `WANTED`, which become running.

    Each is found by the claim's index, then by place (ctid), row by row (LATERAL), and the status it leaves is that of
    the locked row. By key, the planner went by way of that index again and read all of the host's jobs for
    each. Joined, it read all queued jobs there are, once statistics of a quiet moment said that these are hardly any:
    1.1 ms of CPU for each of 10,000 jobs instead of 0.14. A row that somebody moves meanwhile is passed over, like a
    locked one.

    The first job of each batch comes with its batch. Where these are fewer than wanted the later ones are looked for,
    past the first (OFFSET 1).
    """
    return f"""
    turn AS MATERIALIZED (
        SELECT t.shard, t.host, t.lease, t.wanted,
            least(greatest(wanted, {BATCHES_PER_TURN_MIN}), {BATCHES_PER_TURN_MAX}) AS sharing,
            {DETOUR} AS detour
        FROM {turns}
    ), picked AS MATERIALIZED (
        SELECT due.place, turn.shard, due.id, turn.lease
        FROM turn CROSS JOIN LATERAL (
            WITH chosen AS MATERIALIZED (
                SELECT * FROM (
                    SELECT * FROM ({FROM_START}) AS waits WHERE run_at <= now()
                    UNION ALL
                    SELECT * FROM ({SKIPPED_BY_DETOUR}) AS waits WHERE run_at <= now() AND turn.detour IS NOT NULL
                ) AS waits
                LIMIT turn.sharing
            ), first_jobs AS MATERIALIZED (
                SELECT * FROM chosen
                UNION ALL
                SELECT * FROM ({NEWEST_BATCH}) AS waits WHERE run_at <= now()
            )
            SELECT due.place, due.id
            FROM (
                SELECT place, id, 0 AS number FROM first_jobs
                UNION ALL
                SELECT later.place, later.id, later.number FROM first_jobs
                CROSS JOIN LATERAL (
                    SELECT place, id, row_number() OVER (ORDER BY run_at) AS number FROM (
                        SELECT ctid AS place, id, run_at FROM job
                        WHERE status = 'queued' AND shard = turn.shard AND host = turn.host
                            AND batch_id = first_jobs.batch_id AND run_at BETWEEN first_jobs.run_at AND now()
                        ORDER BY run_at OFFSET 1 LIMIT turn.wanted - 1
                    ) AS after_first
                ) AS later
                WHERE (SELECT count(*) FROM first_jobs) < turn.wanted
            ) AS due
            ORDER BY due.number, random() LIMIT turn.wanted
        ) AS due
        LIMIT :jobs_max
    ), locked AS MATERIALIZED (
        SELECT picked.place, picked.lease, job.left_status
        FROM (SELECT * FROM picked ORDER BY shard, id) AS picked
        CROSS JOIN LATERAL (
            SELECT status AS left_status FROM job WHERE job.ctid = picked.place FOR UPDATE SKIP LOCKED
        ) AS job
    ), taken AS (
        UPDATE job SET status = 'running', attempt = attempt + 1, lease = locked.lease, started_at = now()
        FROM locked WHERE job.ctid = locked.place AND locked.left_status = 'queued'
        RETURNING {CLAIMED_COLUMNS}, job.run_at
    )
    """


TAKE_JOBS = text(f"WITH {_taking(WANTED)} SELECT * FROM taken")

# Of hosts that are held, in one statement with what it counts: each costs its worker and PostgreSQL 0.2 ms to begin.
# For the order in which it locks tallies see `tallies.CHANGE`.
REFILL = text(f"""
    WITH held AS MATERIALIZED ({leases.LOCKED_IF_HELD}), {_taking(f"{WANTED} JOIN held USING (shard, host)")},
    counted AS MATERIALIZED (
        SELECT batch_id, shard, count(*) AS n FROM taken GROUP BY batch_id, shard ORDER BY batch_id, shard
    ), changed AS (
        UPDATE tally SET queued = tally.queued - counted.n, running = tally.running + counted.n
        FROM counted WHERE tally.batch_id = counted.batch_id AND tally.shard = counted.shard
    )
    SELECT * FROM taken
""")


async def claim(
    session: AsyncSession, owner: UUID, *, hosts_max: int, jobs_max: int, jobs_per_host: int, lease_s: float
) -> dict[Lease, list[ClaimedJob]]:
    """Lease due hosts, the longest waiting first, and mark up to `jobs_max` of their jobs running.

    A host with nothing to run now is parked until its next retry, or for good; one that found no room stays due. A
    host that rests is not claimed, though its lease was lost: back-offs outlive the worker that met them.
    """
    rows = await leases.lock_due(session, hosts_max=hosts_max)
    if not rows:
        return {}
    lost = [Lost(shard=row.shard, host=row.host, was_leased=row.was_leased) for row in rows if row.was_lost]
    rescued = await _rescue(session, lost, lease_s=lease_s)
    offered = {
        (row.shard, row.host): Lease(
            shard=row.shard,
            host=row.host,
            number=row.lease + 1,
            back_offs=row.back_offs,
            connect_failures=row.connect_failures,
        )
        for row in rows
        if not row.is_resting
    }
    wanted = [(lease, lease.first_jobs(jobs_per_host)) for lease in offered.values()]
    jobs = await _take(session, wanted, jobs_max=jobs_max)
    await _count(session, rescued, taken=jobs)
    claimed: dict[Lease, list[ClaimedJob]] = defaultdict(list)
    for job in jobs:
        claimed[offered[job.shard, job.host]].append(job)
    had_room = len(jobs) < jobs_max
    left = [
        (row.shard, row.host)
        for row in rows
        if offered.get((row.shard, row.host)) not in claimed and (had_room or row.is_resting or row.was_lost)
    ]
    await leases.lease(session, owner, list(claimed), lease_s=lease_s)
    await leases.rest(session, dict.fromkeys(left, 0.0))
    return claimed


async def refill(
    session: AsyncSession, owner: UUID, wanted: Sequence[tuple[Lease, int]], *, jobs_max: int
) -> list[ClaimedJob]:
    """Take more jobs of hosts that `owner` holds, at most the wanted number of each, in the same lease.

    One statement, which may be a transaction of its own.
    """
    result = await session.execute(REFILL, {"owner": owner, **_wanted(wanted, jobs_max=jobs_max)})
    return _in_order(result.all())


async def _take(session: AsyncSession, wanted: Sequence[tuple[Lease, int]], *, jobs_max: int) -> list[ClaimedJob]:
    if not wanted:
        return []
    result = await session.execute(TAKE_JOBS, _wanted(wanted, jobs_max=jobs_max))
    return _in_order(result.all())


def _wanted(wanted: Sequence[tuple[Lease, int]], *, jobs_max: int) -> dict[str, Any]:
    return {
        "shards": [lease.shard for lease, _ in wanted],
        "hosts": [lease.host for lease, _ in wanted],
        "leases": [lease.number for lease, _ in wanted],
        # no more than there is room for: of few batches it reads as many jobs of each before it chooses
        "wanted": [min(count, jobs_max) for _, count in wanted],
        "jobs_max": jobs_max,
    }


def _in_order(rows: Sequence[Sequence[Any]]) -> list[ClaimedJob]:
    return [ClaimedJob(*row[:-1]) for row in sorted(rows, key=itemgetter(-1))]  # the last is `run_at`


# Results come in the order of the keys, and each finds its row by the key, in a nested loop: that is what locks the
# rows in key order. Two things keep the planner to it: each array is the value of a SELECT, so that it does not know
# how many there are and join tables read whole; and IS NOT DISTINCT FROM, not =, which it would match with
# `job_running`, by host. A table of a few hundred jobs, or one said to be so by statistics of a quiet moment, it may
# read whole all the same, but by the index of its keys (database.BY_INDEX).
UPDATE_JOBS = """
    UPDATE job SET
        status = result.status, alone = false, accused = false,
        run_at = CASE WHEN result.status = 'queued' THEN now() + make_interval(secs => result.delay_s) ELSE run_at END,
        finished_at = CASE WHEN result.status <> 'queued' THEN now() END,
        error = result.error, error_detail = result.detail, http_status = result.http_status,
        evidence = CAST(result.evidence AS json), body_sha256 = result.sha256
    FROM unnest(
        (SELECT CAST(:shards AS smallint[])), (SELECT CAST(:ids AS uuid[])), (SELECT CAST(:leases AS bigint[])),
        (SELECT CAST(:attempts AS smallint[])), (SELECT CAST(:statuses AS text[])),
        (SELECT CAST(:delays_s AS float8[])), (SELECT CAST(:errors AS text[])), (SELECT CAST(:details AS text[])),
        (SELECT CAST(:http_statuses AS smallint[])), (SELECT CAST(:evidences AS text[])),
        (SELECT CAST(:sha256s AS bytea[]))
    ) WITH ORDINALITY AS result(
        shard, id, lease, attempt, status, delay_s, error, detail, http_status, evidence, sha256, number
    )
    WHERE job.shard = result.shard AND job.id = result.id
        AND job.lease = result.lease AND job.attempt = result.attempt AND job.status IS NOT DISTINCT FROM 'running'
"""
NUMBERS = """
    SELECT ARRAY(SELECT number FROM recorded) AS recorded, ARRAY(
        SELECT number FROM unnest(CAST(:shards AS smallint[]), CAST(:sha256s AS bytea[])) WITH ORDINALITY
            AS content(shard, sha256, number)
        WHERE (SELECT true FROM body WHERE body.shard = content.shard AND body.sha256 = content.sha256)
    ) AS bodies_seen
"""
RECORD_FINISHED = text(f"WITH recorded AS ({UPDATE_JOBS} RETURNING result.number) {NUMBERS}")
"""For results of which none is tried again: to collect the rows of those costs 0.8 us a job, even if there are none."""
RECORD_WITH_RETRIES = text(f"""
    WITH recorded AS (
        {UPDATE_JOBS} RETURNING result.number, job.shard, job.id, job.attempt, job.status, job.started_at, job.error,
            job.error_detail, job.http_status, CASE WHEN job.status = 'queued' THEN job.evidence END AS evidence
    ), earlier AS (
        INSERT INTO attempt (shard, job_id, number, started_at, finished_at, error, error_detail, http_status, evidence)
        SELECT shard, id, attempt, started_at, now(), error, error_detail, http_status, evidence
        FROM recorded WHERE status = 'queued'
    ) {NUMBERS}
""")

# For results that found no row. OFFSET 0 keeps the planner from a join, as in `listing.list_keys`.
RECORDED_BEFORE = text("""
    SELECT result.number FROM unnest(
        CAST(:shards AS smallint[]), CAST(:ids AS uuid[]), CAST(:leases AS bigint[]), CAST(:attempts AS smallint[])
    ) WITH ORDINALITY AS result(shard, id, lease, attempt, number)
    CROSS JOIN LATERAL (
        SELECT lease, attempt, status FROM job WHERE job.shard = result.shard AND job.id = result.id OFFSET 0
    ) AS job
    WHERE job.lease = result.lease AND job.attempt = result.attempt AND job.status <> 'running'
""")


async def record(session: AsyncSession, results: Sequence[Result], *, by_copy: bool = True) -> Recorded:
    """Store results whose lease and attempt still stand; drop the others, and change nothing for them.

    A result that this caller stored before (its commit was not confirmed) counts as stored. Raises `bodies.Conflict`
    when the transaction must be had anew, without `by_copy`.
    """
    results = sorted(results, key=_job_key)  # the order in which jobs are locked
    statement = RECORD_WITH_RETRIES if any(result.status == "queued" for result in results) else RECORD_FINISHED
    numbers = (await session.execute(statement, _result_arrays(results))).one()
    stored = [results[number - 1] for number in numbers.recorded]
    wanted = _bodies(stored)
    seen = wanted.keys() & {_body_key(results[number - 1]) for number in numbers.bodies_seen}
    counts = Counter(_body_key(result) for result in stored if result.body is not None)
    await bodies.store(session, wanted, seen=seen, counts=counts, by_copy=by_copy)
    changes: dict[tallies.Key, Change] = defaultdict(Change)
    for result in stored:
        _add_to_change(changes[result.job.shard, result.job.batch_id], result)
    maybe_finished = await tallies.change(session, changes)
    await tallies.count_outcomes(session, Counter(key for result in stored for key in _histogram_keys(result)))
    known = set(numbers.recorded)
    others = [result.job for number, result in enumerate(results, start=1) if number not in known]
    return Recorded(maybe_finished=maybe_finished, dropped=await _not_recorded_before(session, others))


async def _not_recorded_before(session: AsyncSession, jobs: Sequence[ClaimedJob]) -> list[ClaimedJob]:
    """Return the jobs that are no longer the caller's; the others it stored before, in a commit not confirmed."""
    if not jobs:
        return []
    rows = await session.execute(RECORDED_BEFORE, _claimed_arrays(jobs))
    recorded = set(rows.scalars())
    return [job for number, job in enumerate(jobs, start=1) if number not in recorded]


def _job_key(result: Result) -> tuple[int, UUID]:
    return result.job.shard, result.job.id


def _result_arrays(results: Sequence[Result]) -> dict[str, list[Any]]:
    return _claimed_arrays([result.job for result in results]) | {
        "statuses": [result.status for result in results],
        "delays_s": [result.delay_s for result in results],
        "errors": _unless_null([result.error for result in results]),
        "details": _unless_null([result.error_detail for result in results]),
        "http_statuses": [result.http_status for result in results],
        "evidences": [result.evidence for result in results],
        "sha256s": [result.body_sha256 for result in results],
    }


def _claimed_arrays(jobs: Sequence[ClaimedJob]) -> dict[str, list[Any]]:
    return {
        "shards": [job.shard for job in jobs],
        "ids": [job.id for job in jobs],
        "leases": [job.lease for job in jobs],
        "attempts": [job.attempt for job in jobs],
    }


def _unless_null(column: list[str | None]) -> list[str | None]:
    """`unnest` fills up shorter columns with NULLs: one that is empty costs nothing."""
    return column if any(value is not None for value in column) else []


def _bodies(results: Iterable[Result]) -> dict[bodies.Key, bodies.Packed]:
    return {_body_key(result): (result.body, result.encoding) for result in results if result.body is not None}


def _body_key(result: Result) -> bodies.Key:
    assert result.body_sha256 is not None
    return result.job.shard, result.body_sha256


def _add_to_change(change: Change, result: Result) -> None:
    change.move("running", result.status)
    change.http_200 += result.http_status == HTTPStatus.OK and result.status != "queued"
    change.wire_bytes += result.wire_bytes
    change.body_bytes += result.body_bytes


def _histogram_keys(result: Result) -> Iterator[HistogramKey]:
    if result.status == "queued":
        return
    if result.error is not None:
        yield result.job.shard, result.job.batch_id, "error", result.error
    if result.http_status not in (None, HTTPStatus.OK):
        yield result.job.shard, result.job.batch_id, "http_status", str(result.http_status)


GIVE_BACK = text("""
    WITH mine AS MATERIALIZED (
        SELECT job.shard, job.id, job.attempt, job.started_at, mine.error, mine.detail,
            job.status = 'running' AND job.lease = mine.lease AND job.attempt = mine.attempt AS is_held
        FROM job
        JOIN unnest(CAST(:shards AS smallint[]), CAST(:ids AS uuid[]), CAST(:leases AS bigint[]),
            CAST(:attempts AS smallint[]), CAST(:errors AS text[]), CAST(:details AS text[]))
            AS mine(shard, id, lease, attempt, error, detail)
        ON job.shard = mine.shard AND job.id = mine.id
        ORDER BY job.shard, job.id FOR UPDATE OF job
    ), traces AS (
        INSERT INTO attempt (shard, job_id, number, started_at, finished_at, error, error_detail)
        SELECT shard, id, attempt, started_at, now(), error, detail FROM mine WHERE is_held AND error IS NOT NULL
    )
    UPDATE job SET status = 'queued', lost = lost + 1, alone = false
    FROM mine WHERE job.shard = mine.shard AND job.id = mine.id AND mine.is_held AND job.status = 'running'
    RETURNING job.shard, job.batch_id
""")

# Of jobs that GIVE_BACK has locked. Once for each attempt, however often its worker tells of it.
CLEAR_OF_CRASH = text("""
    WITH forgiven AS (
        UPDATE attempt SET charged = false
        FROM unnest(CAST(:shards AS smallint[]), CAST(:ids AS uuid[]), CAST(:attempts AS smallint[]))
            AS mine(shard, id, number)
        WHERE attempt.shard = mine.shard AND attempt.job_id = mine.id AND attempt.number = mine.number
            AND attempt.charged
        RETURNING attempt.shard, attempt.job_id
    )
    UPDATE job SET crashes = crashes - cleared.count, accused = false
    FROM (SELECT shard, job_id, count(*) FROM forgiven GROUP BY shard, job_id) AS cleared
    WHERE job.shard = cleared.shard AND job.id = cleared.job_id AND job.finished_at IS NULL
""")


async def give_back(session: AsyncSession, returned: Sequence[Returned]) -> None:
    """Put claimed jobs back into the queue without charging the attempt: they had not started, or were cut off.

    A job that was rescued from this worker meanwhile is cleared of the crash it was charged with: the worker lives, and
    only slept, or could not reach the database.
    """
    jobs = [one.job for one in returned]
    result = await session.execute(
        GIVE_BACK,
        _claimed_arrays(jobs)
        | {"errors": [one.error for one in returned], "details": [one.error_detail for one in returned]},
    )
    keys = [(row.shard, row.batch_id) for row in result]
    if len(keys) < len(jobs):
        await session.execute(
            CLEAR_OF_CRASH,
            {
                "shards": [job.shard for job in jobs],
                "ids": [job.id for job in jobs],
                "attempts": [job.attempt for job in jobs],
            },
        )
    await _count_moves(session, keys, leaving="running", entering="queued")


RUN_ALONE = text("""
    UPDATE job SET alone = true
    WHERE shard = :shard AND id = :id AND status = 'running' AND lease = :lease AND attempt = :attempt
    RETURNING true
""")


async def run_alone(session: AsyncSession, job: ClaimedJob) -> bool:
    """Note that a suspect now runs with no other fetch open; `False` when it is no longer this worker's.

    Should its lease be lost from here on, nothing else can be to blame, unless its worker is heard of again.
    """
    values = {"shard": job.shard, "id": job.id, "lease": job.lease, "attempt": job.attempt}
    return bool(await session.scalar(RUN_ALONE, values))


CRASHED_DETAIL = (
    "The worker was lost while it may have sent this request. "
    "Set the option retry_unsafe to have such methods sent again."
)

# A lease that ended with the server it was on says nothing about its worker.
RESCUE = text(f"""
    WITH stranded AS MATERIALIZED (
        SELECT job.shard, job.id, job.repeatable, crash.is_one,
            crash.is_one AND job.alone AND job.crashes >= :suspect AS is_accused
        FROM job
        JOIN unnest(CAST(:shards AS smallint[]), CAST(:hosts AS text[]), CAST(:leased AS boolean[]))
            AS lost(shard, host, was_leased)
        ON job.shard = lost.shard AND job.host = lost.host
        CROSS JOIN LATERAL (SELECT lost.was_leased AND job.started_at > pg_postmaster_start_time()) AS crash(is_one)
        WHERE job.status = 'running' AND job.batch_id >= {OLDEST_UNFINISHED}
        ORDER BY job.shard, job.id FOR UPDATE OF job
    ), rescued AS (
        UPDATE job SET
            lost = lost + 1, crashes = crashes + CAST(stranded.is_one AS int), alone = false, lease = NULL,
            accused = job.accused OR stranded.is_accused,
            run_at = CASE WHEN stranded.is_accused THEN now() + make_interval(secs => :accused_s) ELSE run_at END,
            status = CASE WHEN stranded.repeatable THEN 'queued' ELSE 'failed' END,
            finished_at = CASE WHEN stranded.repeatable THEN NULL ELSE now() END,
            error = CASE WHEN stranded.repeatable THEN NULL ELSE 'worker_crashed' END,
            error_detail = CASE WHEN stranded.repeatable THEN NULL ELSE :crashed END,
            http_status = NULL, evidence = NULL
        FROM stranded WHERE job.shard = stranded.shard AND job.id = stranded.id AND job.status = 'running'
        RETURNING job.shard, job.id, job.batch_id, job.status, job.attempt, job.started_at, job.error, job.error_detail,
            stranded.is_one
    ), traces AS (
        INSERT INTO attempt (shard, job_id, number, started_at, finished_at, error, error_detail, charged)
        SELECT shard, id, attempt, started_at, now(), coalesce(error, 'lease_lost'),
            coalesce(error_detail, 'The worker was lost while it had this job, which it may have fetched.'), is_one
        FROM rescued
    )
    SELECT shard, batch_id, status, error FROM rescued
""")


async def rescue(session: AsyncSession, lost: Sequence[Lost], *, lease_s: float) -> None:
    """Give the jobs of lost leases back; the caller has locked these hosts and found their leases at an end.

    A job whose request must not be repeated fails instead: it may have been sent. A suspect that ran alone is accused:
    unless its worker is heard of within another lease, whoever claims it next convicts it.
    """
    await _count(session, await _rescue(session, lost, lease_s=lease_s), taken=())


async def _rescue(session: AsyncSession, lost: Sequence[Lost], *, lease_s: float) -> Sequence[Row[Any]]:
    if not lost:
        return ()
    values = {
        "shards": [host.shard for host in lost],
        "hosts": [host.host for host in lost],
        "leased": [host.was_leased for host in lost],
        "suspect": CRASHES_OF_SUSPECT,
        "accused_s": max(lease_s, ACCUSED_S_MIN),
        "crashed": CRASHED_DETAIL,
    }
    return (await session.execute(RESCUE, values)).all()


async def _count(session: AsyncSession, rescued: Sequence[Row[Any]], *, taken: Sequence[ClaimedJob]) -> None:
    """Count what a claim did, in one change: of two in a row, the second would lock tallies out of order."""
    changes: dict[tallies.Key, Change] = defaultdict(Change)
    outcomes: Counter[HistogramKey] = Counter()
    for row in rescued:
        changes[row.shard, row.batch_id].move("running", row.status)
        if row.status == "failed":
            outcomes[row.shard, row.batch_id, "error", row.error] += 1
    for job in taken:
        changes[job.shard, job.batch_id].move("queued", "running")
    await tallies.change(session, changes)
    await tallies.count_outcomes(session, outcomes)


# The status is asked of the rows found by their keys, then of those that are locked: named on `job` itself, it led the
# planner to read all queued jobs for each of the chosen ones, when statistics said that there are hardly any.
CANCEL_QUEUED = text(f"""
    WITH part AS MATERIALIZED (
        SELECT listed.shard, listed.id, job.status
        FROM ({list_keys(since=":start", before=":stop")}) AS listed
        CROSS JOIN LATERAL (
            SELECT status, position FROM job WHERE job.shard = listed.shard AND job.id = listed.id OFFSET 0
        ) AS job
        WHERE job.position >= :start AND job.position < :stop
    ), locked AS MATERIALIZED (
        SELECT waiting.shard, waiting.id, job.left_status
        FROM (SELECT * FROM part WHERE status = 'queued' ORDER BY shard, id) AS waiting
        CROSS JOIN LATERAL (
            SELECT status AS left_status FROM job
            WHERE job.shard = waiting.shard AND job.id = waiting.id FOR UPDATE SKIP LOCKED
        ) AS job
    )
    UPDATE job SET status = 'cancelled', finished_at = now(), error = 'cancelled', error_detail = NULL,
        http_status = NULL, evidence = NULL
    FROM locked WHERE job.shard = locked.shard AND job.id = locked.id AND locked.left_status = 'queued'
    RETURNING job.shard
""")


async def cancel_queued(session: AsyncSession, batch_id: UUID, *, start: int, stop: int) -> int:
    """Cancel a batch's queued jobs at positions `start` to `stop - 1`; return how many.

    A job that somebody is changing at this moment is passed over: come again.
    """
    result = await session.execute(CANCEL_QUEUED, {"batch_id": batch_id, "start": start, "stop": stop})
    shards = [row.shard for row in result]
    outcomes = Counter((shard, batch_id, "error", "cancelled") for shard in shards)
    await _count_moves(session, ((shard, batch_id) for shard in shards), leaving="queued", entering="cancelled")
    await tallies.count_outcomes(session, outcomes)
    return len(shards)


async def _count_moves(session: AsyncSession, keys: Iterable[tallies.Key], *, leaving: str, entering: str) -> None:
    changes: dict[tallies.Key, Change] = defaultdict(Change)
    for key in keys:
        changes[key].move(leaving, entering)
    await tallies.change(session, changes)
