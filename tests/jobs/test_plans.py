"""Every hot statement stays on its index, however large the tables are."""

import re
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import TextClause, text
from sqlalchemy.dialects.postgresql import asyncpg

from app.jobs import batches, bodies, leases, queue, reads, tallies
from app.jobs.database import Sessions
from app.jobs.ids import shard_of_host
from app.jobs.tables import metadata
from tests.jobs.actors import Client

JOBS = 50_000
HOSTS = 5_000

FILL = """
    WITH made AS (
        SELECT n, (n % 256)::smallint AS shard, 'host' || (n % :hosts) AS host,
            ('00000000-0000-7000-8000-' || lpad(to_hex(n % 2000), 12, '0'))::uuid AS batch_id
        FROM generate_series(1, :jobs) AS n
    ), jobs AS (
        INSERT INTO job
            (shard, id, batch_id, position, host, url, repeatable, status, run_at, attempt, lease, started_at)
        SELECT shard, gen_random_uuid(), batch_id, n, host, 'http://' || host || '/', true,
            CASE WHEN n % 50 = 0 THEN 'running' ELSE 'queued' END, now(), 1, 1, now() FROM made
        RETURNING shard, id, batch_id, position
    ), listed AS (
        INSERT INTO batch_jobs (batch_id, first_position, shards, ids)
        SELECT batch_id, position / 100 * 100, array_agg(shard), array_agg(id) FROM jobs GROUP BY 1, 2
    ), hosts AS (
        INSERT INTO host (shard, host, next_at) SELECT DISTINCT ON (shard, host) shard, host, now() FROM made
    ), tallies AS (
        INSERT INTO tally (shard, batch_id, total, queued)
        SELECT shard, batch_id, count(*), count(*) FROM made GROUP BY 1, 2
    ), bodies AS (
        INSERT INTO body (shard, sha256, encoding, content)
        SELECT DISTINCT ON (n) shard, sha256(n::text::bytea), 'identity', '' FROM made
    ), shared AS (
        INSERT INTO body_shared (shard, sha256, more) SELECT DISTINCT ON (n) shard, sha256(n::text::bytea), 1 FROM made
    ), attempts AS (
        INSERT INTO attempt (shard, job_id, number, started_at, finished_at, error)
        SELECT shard, gen_random_uuid(), 1, now(), now(), 'read_timeout' FROM made
    ), batches AS (
        INSERT INTO batch (id, options, skipped, status, total, idempotency_key, request_sha256)
        SELECT DISTINCT batch_id, '{}'::jsonb, '[]'::jsonb, 'running', 1, batch_id::text, sha256('') FROM made
    ), finished AS (
        INSERT INTO batch (id, options, skipped, status, total, finished_at)
        SELECT gen_random_uuid(), '{}', '[]', 'completed', 1, now() FROM generate_series(1, 20000)
    )
    INSERT INTO histogram (shard, batch_id, kind, key, n)
    SELECT DISTINCT shard, batch_id, 'error', 'read_timeout', 1 FROM made
"""


@pytest.fixture
async def filled(sessions: Sessions) -> Sessions:
    async with sessions.begin() as session:
        await session.execute(text(FILL), {"jobs": JOBS, "hosts": HOSTS})
    await vacuum(sessions)
    return sessions


async def vacuum(sessions: Sessions) -> None:
    async with sessions() as session:
        connection = await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        await connection.execute(text("VACUUM ANALYZE"))


QUIET = "UPDATE job SET status = 'cancelled', finished_at = now()"
BUSY = "UPDATE job SET status = 'queued', finished_at = NULL"


ANY_WAY = text("SELECT set_config('enable_seqscan', 'on', true), set_config('enable_bitmapscan', 'on', true)")
"""Sessions read by index only; but a statement that has to be kept to it would sooner or later read a whole index."""


async def plan(sessions: Sessions, statement: TextClause, values: Mapping[str, Any]) -> str:
    async with sessions.begin() as session:
        await session.execute(ANY_WAY)
        rows = await session.execute(text(f"EXPLAIN {statement.text}"), dict(values))
        return "\n".join(row[0] for row in rows)


async def generic_plan(sessions: Sessions, statement: TextClause) -> str:
    """The plan for whatever values, as a worker's connections make it (`make_engine(generic_plans=True)`)."""
    compiled = statement.compile(dialect=asyncpg.dialect())  # type: ignore[no-untyped-call]
    nulls = ", ".join(["NULL"] * len(compiled.params))
    async with sessions.begin() as session:
        await session.execute(ANY_WAY)
        connection = await session.connection()
        await connection.exec_driver_sql("SET LOCAL plan_cache_mode = force_generic_plan")
        await connection.exec_driver_sql(f"PREPARE planned AS {compiled}")
        rows = await connection.exec_driver_sql(
            f"EXPLAIN EXECUTE planned({nulls})" if nulls else "EXPLAIN EXECUTE planned"
        )
        steps = "\n".join(row[0] for row in rows)
        await connection.exec_driver_sql("DEALLOCATE planned")
    return steps


HOST = {"shards": [shard_of_host("h")], "hosts": ["h"]}
HELD = {**HOST, "leases": [1], "owner": uuid4()}
JOB = {"shards": [1], "ids": [uuid4()], "leases": [1], "attempts": [1]}
COUNTED = ("queued", "running", "succeeded", "failed", "cancelled", "http_200", "wire_bytes", "body_bytes")
TALLIES = {"shards": [1], "batch_ids": [uuid4()], **{name: [1] for name in COUNTED}}


PAGE = {
    "batch_id": uuid4(),
    "after": -1,
    "limit": 100,
    "status": None,
    "error": None,
    "http_status": None,
    "host": None,
    "custom_id": None,
}
BATCHES = {"ids": [uuid4() for _ in range(20)]}


def many_hosts(count: int) -> dict[str, list[Any]]:
    """So many leased hosts."""
    return {"shards": [1] * count, "hosts": [f"host{n}" for n in range(count)], "leases": [1] * count}


def many_jobs(count: int) -> dict[str, list[Any]]:
    """So many jobs as a worker has them."""
    return {
        "shards": [1] * count,
        "ids": [uuid4() for _ in range(count)],
        "leases": [1] * count,
        "attempts": [1] * count,
    }


def results(count: int) -> dict[str, list[Any]]:
    """So many results to record."""
    return many_jobs(count) | {
        "statuses": ["failed"] * count,
        "delays_s": [0.0] * count,
        "errors": ["read_timeout"] * count,
        "details": [None] * count,
        "http_statuses": [None] * count,
        "evidences": [None] * count,
        "sha256s": [None] * count,
    }


STATEMENTS: list[tuple[str, TextClause, Mapping[str, Any]]] = [
    ("lock due hosts", leases.LOCK_DUE_HOSTS, {"hosts_max": 40}),
    ("lock held hosts", leases.LOCK_HELD_HOSTS, HELD),
    ("lease", leases.LEASE_HOSTS, {**HOST, "owner": uuid4(), "lease_s": 30.0}),
    ("rest", leases.REST_HOSTS, {**HOST, "rests_s": [0.0]}),
    ("renew", leases.RENEW, {**HELD, "lease_s": 30.0}),
    ("next due", leases.NEXT_DUE, {}),
    ("take jobs", queue.TAKE_JOBS, {**HOST, "leases": [1], "wanted": [8], "jobs_max": 100}),
    ("take many jobs", queue.TAKE_JOBS, {**many_hosts(100), "wanted": [200] * 100, "jobs_max": 2_000}),
    ("refill", queue.REFILL, {**HELD, "wanted": [8], "jobs_max": 100}),
    ("refill many", queue.REFILL, {**many_hosts(100), "wanted": [200] * 100, "owner": uuid4(), "jobs_max": 2_000}),
    ("record", queue.RECORD_FINISHED, results(1)),
    ("record many", queue.RECORD_FINISHED, results(500)),
    ("record retries", queue.RECORD_WITH_RETRIES, results(500)),
    ("find recorded", queue.RECORDED_BEFORE, many_jobs(500)),
    ("give back", queue.GIVE_BACK, {**JOB, "errors": [None], "details": [None]}),
    ("rescue", queue.RESCUE, {**HOST, "leased": [True], "suspect": 2, "accused_s": 5.0, "crashed": "lost"}),
    ("cancel", queue.CANCEL_QUEUED, {"batch_id": uuid4(), "start": 0, "stop": 100}),
    ("run alone", queue.RUN_ALONE, {"shard": 1, "id": uuid4(), "lease": 1, "attempt": 1}),
    ("clear of a crash", queue.CLEAR_OF_CRASH, {"shards": [1], "ids": [uuid4()], "attempts": [1]}),
    ("change tallies", tallies.CHANGE, TALLIES),
    ("find by key", batches.BY_KEY, {"key": "k", "kept_s": 60.0}),
    ("chores", batches.CHORES, {}),
    ("start batches", batches.START, BATCHES),
    ("find cancelled", batches.CANCELLED, BATCHES),
    ("cancel a batch", batches.CANCEL, {"id": uuid4()}),
    ("finish batches", batches.FINISH, BATCHES),
    ("find finishable", batches.FINISHABLE, {"limit": 100}),
    ("find those being cancelled", batches.CANCELLING, {"limit": 100}),
    *((f"erase the rest ({number})", each, {"batch_id": uuid4()}) for number, each in enumerate(batches.ERASE_REST)),
    ("erase jobs", batches.ERASE_JOBS, {"batch_id": uuid4(), "limit": 100, "bytes_max": 2**20}),
    ("unlist", batches.UNLIST, {"batch_id": uuid4(), "erased_position": 1_000}),
    ("has jobs", batches.HAS_JOBS, {"batch_id": uuid4()}),
    ("keep bodies", bodies.KEEP, {"shards": [1], "sha256s": [b"1" * 32]}),
    ("share bodies", bodies.SHARE, {"shards": [1], "sha256s": [b"1" * 32], "more": [1]}),
    ("lock bodies", batches.LOCK_BODIES, {"shards": [1], "sha256s": [b"1" * 32]}),
    ("erase bodies", batches.ERASE_BODIES, {"shards": [1], "sha256s": [b"1" * 32], "counts": [1]}),
    ("read a batch", reads.ONE_BATCH, {"id": uuid4()}),
    ("list batches", reads.MANY_BATCHES, {"limit": 50, "before": uuid4(), "status": None, "name": None}),
    ("list jobs", reads.MANY_JOBS, PAGE),
    ("list finished jobs", reads.FINISHED_JOBS, {"batch_id": uuid4(), "start": 0, "stop": 500, "status": None}),
    ("read a job", reads.ONE_JOB, {"shard": 1, "id": uuid4()}),
    ("read attempts", reads.ATTEMPTS, {"shard": 1, "id": uuid4()}),
    ("read a body", reads.ONE_BODY, {"shard": 1, "id": uuid4()}),
    ("read bodies", reads.MANY_BODIES, {"shards": [1], "sha256s": [b"1" * 32]}),
]


CLIENTS_STATEMENTS = (batches.BY_KEY, reads.MANY_BATCHES, reads.MANY_JOBS)
"""Only the API has these; their plans fit the values."""


async def test_no_hot_statement_reads_a_whole_table(filled: Sessions) -> None:
    for name, statement, values in STATEMENTS:
        plans = [await plan(filled, statement, values)]
        if statement not in CLIENTS_STATEMENTS:
            plans.append(await generic_plan(filled, statement))
        for steps in plans:
            for table in metadata.tables:
                assert f"Seq Scan on {table}" not in steps, f"{name} reads all of {table}:\n{steps}"


async def test_the_claim_stays_on_its_indexes(filled: Sessions) -> None:
    assert "host_due" in await plan(filled, leases.LOCK_DUE_HOSTS, {"hosts_max": 40})
    take = {**HOST, "leases": [1], "wanted": [8], "jobs_max": 100}
    steps = await plan(filled, queue.TAKE_JOBS, take)
    assert steps.count("job_claim") >= 2, steps


async def test_results_find_their_jobs_in_the_order_of_the_keys(filled: Sessions) -> None:
    """Which is that of the results: so rows are locked in it."""
    for statement in (queue.RECORD_FINISHED, queue.RECORD_WITH_RETRIES):
        for steps in (await plan(filled, statement, results(500)), await generic_plan(filled, statement)):
            update = steps.split("Update on job")[1]
            way = r"Nested Loop .*\n *->  Function Scan on .*\n *->  Index Scan using job_pkey"
            assert re.search(way, update), steps
            assert not re.search(r"Hash|Merge|Sort", update), steps


async def test_rows_are_locked_in_the_order_of_an_index_though_the_tables_are_small(sessions: Sessions) -> None:
    """Read as they lie, they were locked so, and two statements that do it otherwise were a deadlock."""
    await Client(sessions).submit("h", "i")
    await vacuum(sessions)
    statements: list[tuple[TextClause, dict[str, Any]]] = [
        (queue.REFILL, HELD | {"wanted": [8], "jobs_max": 100}),
        (queue.RECORD_FINISHED, results(2)),
        (tallies.CHANGE, TALLIES),
    ]
    for statement, values in statements:
        async with sessions.begin() as session:
            rows = await session.execute(text(f"EXPLAIN {statement.text}"), values)
            steps = "\n".join(row[0] for row in rows)
        assert not re.search(r"(Seq|Bitmap Heap) Scan on (job|tally)\b", steps), steps
        assert set(re.findall(r"using (\w+) on tally\b", steps)) <= {"tally_pkey"}, steps


async def test_a_release_looks_no_further_than_the_first_batch_that_is_due(filled: Sessions) -> None:
    async with filled.begin() as session:
        await session.execute(text("UPDATE job SET shard = 1, host = 'h'"))
        await session.execute(text("INSERT INTO host (shard, host, next_at) VALUES (1, 'h', now())"))
    rest = text(f"(ANALYZE, BUFFERS) {leases.REST_HOSTS.text}")
    steps = await plan(filled, rest, {"shards": [1], "hosts": ["h"], "rests_s": [0.0]})
    [read] = [int(count) for count in re.findall(r"shared hit=(\d+)", steps.splitlines()[1])]
    assert read < 100, steps


async def test_a_page_of_jobs_ends_with_the_last_one_wanted(filled: Sessions) -> None:
    """They come in the order of the list, and are not all read to be sorted."""
    page = PAGE | {"limit": 5}  # of 25
    for steps in (await plan(filled, reads.MANY_JOBS, page), await generic_plan(filled, reads.MANY_JOBS)):
        assert steps.count("Sort  (") == steps.count("Incremental Sort  (") == 1, steps
        assert "Presorted Key: batch_jobs.first_position" in steps


async def test_a_finish_reads_tallies_up_to_the_first_with_work_left(filled: Sessions) -> None:
    """Found one by one: most batches that are asked about have many more tallies, and work left in most of them."""
    for steps in (await plan(filled, batches.FINISH, BATCHES), await generic_plan(filled, batches.FINISH)):
        assert "Index Scan using tally_pkey on tally" in steps, steps
        assert "Bitmap" not in steps


async def test_a_finish_reads_no_batches_but_those_asked_about(filled: Sessions) -> None:
    for steps in (await plan(filled, batches.FINISH, BATCHES), await generic_plan(filled, batches.FINISH)):
        assert steps.count("batch_unfinished") <= 1, steps  # where it first looks without locks, by id
        assert steps.count("Index Scan using batch_pkey") >= 2, steps


async def test_queued_jobs_are_not_all_read_though_the_statistics_are_of_a_quiet_moment(filled: Sessions) -> None:
    async with filled.begin() as session:
        await session.execute(text(QUIET))
    await vacuum(filled)
    async with filled.begin() as session:
        await session.execute(text(BUSY))
    take = {**many_hosts(100), "wanted": [8] * 100, "jobs_max": 100}
    for steps in (await plan(filled, queue.TAKE_JOBS, take), await generic_plan(filled, queue.TAKE_JOBS)):
        assert steps.count("Tid Scan on job") == 2, steps
    cancel = {"batch_id": uuid4(), "start": 0, "stop": 10_000}
    for steps in (await plan(filled, queue.CANCEL_QUEUED, cancel), await generic_plan(filled, queue.CANCEL_QUEUED)):
        assert "job_claim" not in steps
