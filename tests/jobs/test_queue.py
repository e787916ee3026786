"""The queue on a real PostgreSQL: who may claim, what is stored, and what is refused."""

import asyncio
from uuid import UUID

import pytest
from msgspec import structs
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from app.jobs import batches, hosts, leases, queue, reads
from app.jobs.database import Sessions
from app.jobs.ids import shard_of_host, shard_of_job
from app.jobs.leases import BackOff
from app.jobs.values import ClaimedJob, Recorded, Returned
from tests.jobs.actors import LEASE_S, Client, Worker, failure, retry, success, waiting
from tests.waiting import until


@pytest.fixture
def client(sessions: Sessions) -> Client:
    return Client(sessions)


@pytest.fixture
def worker(sessions: Sessions) -> Worker:
    return Worker(sessions)


async def execute(sessions: Sessions, statement: str, **values: object) -> None:
    async with sessions.begin() as session:
        await session.execute(text(statement), values)


async def fetch(sessions: Sessions, statement: str, **values: object) -> list[tuple[object, ...]]:
    async with sessions.begin() as session:
        return [tuple(row) for row in await session.execute(text(statement), values)]


async def end_leases(sessions: Sessions) -> None:
    """As if the lease time had passed."""
    await execute(sessions, "UPDATE host SET next_at = now() WHERE owner IS NOT NULL")


async def make_due(sessions: Sessions) -> None:
    """As if the time of every retry and rest had come."""
    await execute(sessions, "UPDATE job SET run_at = now() WHERE status = 'queued'")
    await execute(sessions, "UPDATE host SET not_before = '-infinity', next_at = now() WHERE owner IS NULL")


async def tallies_equal_the_rows(sessions: Sessions) -> bool:
    differences = await fetch(
        sessions,
        """
        SELECT * FROM (
            SELECT shard, batch_id, count(*) AS total, count(*) FILTER (WHERE status = 'queued') AS queued,
                count(*) FILTER (WHERE status = 'running') AS running,
                count(*) FILTER (WHERE status = 'succeeded') AS succeeded,
                count(*) FILTER (WHERE status = 'failed') AS failed,
                count(*) FILTER (WHERE status = 'cancelled') AS cancelled
            FROM job GROUP BY shard, batch_id
        ) AS counted
        FULL JOIN tally USING (shard, batch_id, total, queued, running, succeeded, failed, cancelled)
        WHERE counted IS NULL OR tally IS NULL
        """,
    )
    return not differences


async def test_a_job_goes_from_enqueue_to_its_result(client: Client, worker: Worker) -> None:
    batch_id = await client.submit("h")
    lease, [job] = await worker.claim_one()
    recorded = await worker.record(success(job))
    assert recorded == Recorded(maybe_finished={batch_id}, dropped=[])
    assert await client.finish(batch_id) == {batch_id}
    await worker.release(lease)
    batch = await client.read(batch_id)
    assert (batch.status, batch.counts.succeeded, batch.http_statuses, batch.body_bytes) == (
        "completed",
        1,
        {"200": 1},
        5,
    )
    detail = await client.job(job.id)
    assert (detail.status, detail.attempts, detail.content_type) == ("succeeded", 1, "text/plain")
    async with client.sessions.begin() as session:
        body = await reads.get_body(session, job.id)
    assert isinstance(body, reads.Body)
    assert body.content == b"hello"
    assert await tallies_equal_the_rows(client.sessions)


async def test_an_empty_batch_completes_at_submit(client: Client) -> None:
    batch = await client.read(await client.submit())
    assert (batch.status, batch.counts.total) == ("completed", 0)
    assert batch.finished_at is not None


async def test_a_host_is_held_by_one_worker_at_a_time(client: Client, worker: Worker, sessions: Sessions) -> None:
    await client.submit("h", "h")
    await worker.claim_one()
    assert await Worker(sessions).claim() == {}


async def test_many_claimers_claim_each_job_once(client: Client, sessions: Sessions) -> None:
    names = [f"h{number % 40}" for number in range(400)]
    batch_id = await client.submit(*names)

    async def work() -> list[UUID]:
        worker, done = Worker(sessions), []
        while claimed := await worker.claim(hosts_max=3, jobs_max=10, jobs_per_host=4):
            jobs = [job for some in claimed.values() for job in some]
            await worker.record(*(success(job) for job in jobs))
            await worker.release(*claimed)
            done += [job.id for job in jobs]
        return done

    done = [job_id for some in await asyncio.gather(*(work() for _ in range(8))) for job_id in some]
    assert len(done) == len(set(done)) == 400
    assert (await client.read(batch_id)).counts.succeeded == 400
    assert await tallies_equal_the_rows(sessions)


async def test_a_claim_takes_no_more_than_there_is_room_for(client: Client, worker: Worker, sessions: Sessions) -> None:
    await client.submit(*(f"h{number % 10}" for number in range(100)))
    claimed = await worker.claim(hosts_max=10, jobs_max=12, jobs_per_host=8)
    assert sum(len(jobs) for jobs in claimed.values()) == 12
    assert len(await Worker(sessions).claim()) == 10 - len(claimed)


async def test_batches_take_turns_at_a_host(client: Client, worker: Worker) -> None:
    first = await client.submit(*["h"] * 50)
    second = await client.submit(*["h"] * 50)
    [jobs] = (await worker.claim(jobs_per_host=10)).values()
    assert [sum(job.batch_id == batch_id for job in jobs) for batch_id in (first, second)] == [5, 5]


async def test_a_new_batch_has_its_turn_however_many_older_ones_wait(client: Client, worker: Worker) -> None:
    for _ in range(queue.BATCHES_PER_TURN_MAX + 1):
        await client.submit("h", "h")
    newest = await client.submit("h", "h")
    lease, jobs = await worker.claim_one()
    for _ in range(9):
        jobs += await worker.refill(lease, 8)
    assert newest in {job.batch_id for job in jobs}


async def test_none_of_many_batches_waits_for_the_others_to_end(
    client: Client, worker: Worker, sessions: Sessions
) -> None:
    waiting = {await client.submit(*["h"] * 9) for _ in range(20)}
    lease, _ = await worker.claim_one()
    served: set[UUID] = set()
    for _ in range(1_000):
        async with sessions() as session:  # taken back, so that each turn finds what the one before it found
            served |= {job.batch_id for job in await queue.refill(session, worker.id, [(lease, 8)], jobs_max=8)}
        if served == waiting:
            return
    raise AssertionError(f"{len(waiting - served)} batches never had a turn")


async def test_a_cancelled_batch_has_no_turn_though_it_is_the_newest(client: Client, worker: Worker) -> None:
    kept = await client.submit(*["h"] * 4)
    await client.cancel(await client.submit(*["h"] * 4))
    _, jobs = await worker.claim_one()
    assert [job.batch_id for job in jobs] == [kept] * 4


async def test_a_refill_stays_within_the_lease(client: Client, worker: Worker, sessions: Sessions) -> None:
    await client.submit(*["h"] * 20)
    lease, first = await worker.claim_one()
    more = await worker.refill(lease, 5)
    assert (len(first), len(more), {job.lease for job in more}) == (8, 5, {lease.number})
    await end_leases(sessions)
    await Worker(sessions).claim_one()
    assert await worker.refill(lease, 5) == []


async def test_a_stale_worker_cannot_record(client: Client, worker: Worker, sessions: Sessions) -> None:
    batch_id = await client.submit("h")
    _, [job] = await worker.claim_one()
    await end_leases(sessions)
    _, [again] = await Worker(sessions).claim_one()
    assert (await worker.record(success(job))).dropped == [job]
    detail = await client.job(job.id)
    assert (detail.status, again.attempt, again.lost) == ("running", 2, 1)
    assert (await client.read(batch_id)).counts.running == 1


async def test_a_stale_attempt_of_the_same_lease_cannot_record(client: Client, worker: Worker) -> None:
    await client.submit("h")
    lease, [job] = await worker.claim_one()
    await worker.record(retry(job, delay_s=0))
    [again] = await worker.refill(lease, 1)
    assert (await worker.record(success(job))).dropped == [job]
    assert (await worker.record(success(again))).dropped == []


async def test_a_record_repeated_after_an_unknown_commit_counts_as_stored(client: Client, worker: Worker) -> None:
    batch_id = await client.submit("h")
    _, [job] = await worker.claim_one()
    assert [(await worker.record(success(job))).dropped for _ in range(2)] == [[], []]
    assert (await client.read(batch_id)).http_statuses == {"200": 1}


async def test_a_retry_waits_and_keeps_its_evidence(client: Client, worker: Worker, sessions: Sessions) -> None:
    await client.submit("h")
    lease, [job] = await worker.claim_one()
    await worker.record(retry(job, delay_s=60))
    await worker.release(lease)
    assert await worker.claim() == {}
    waiting = await client.job(job.id)
    assert (waiting.status, waiting.error, waiting.attempts) == ("queued", "read_timeout", 1)
    assert waiting.run_at is not None
    await make_due(sessions)
    _, [again] = await worker.claim_one()
    await worker.record(success(again))
    assert [attempt.error for attempt in (await client.job(job.id)).attempts_made] == ["read_timeout", None]


async def test_a_released_host_is_due_when_its_next_job_is(client: Client, worker: Worker) -> None:
    await client.submit(*["h"] * 9)
    lease, jobs = await worker.claim_one()
    await worker.record(*(success(job) for job in jobs))
    await worker.release(lease)
    [left] = (await worker.claim()).values()
    assert len(left) == 1


async def test_an_enqueue_during_a_release_is_not_lost(client: Client, worker: Worker, sessions: Sessions) -> None:
    await client.submit("h")
    lease, [job] = await worker.claim_one()
    await worker.record(success(job))
    async with sessions.begin() as session:
        await leases.lock_held(session, worker.id, [lease])
        submitting = asyncio.create_task(client.submit("h"))
        await until(lambda: waiting(sessions))
        await leases.release(session, worker.id, {lease: 0.0})
    await submitting
    assert len(await worker.claim()) == 1


async def test_jobs_given_back_are_not_charged(client: Client, worker: Worker) -> None:
    await client.submit("h")
    lease, jobs = await worker.claim_one()
    await worker.give_back(jobs)
    await worker.release(lease)
    _, [job] = await worker.claim_one()
    assert (job.attempt, job.lost) == (2, 1)
    assert await tallies_equal_the_rows(client.sessions)


async def test_the_jobs_of_a_lost_lease_are_rescued_uncharged(
    client: Client, worker: Worker, sessions: Sessions
) -> None:
    await client.submit("h", "h")
    await worker.claim_one()
    await end_leases(sessions)
    _, jobs = await Worker(sessions).claim_one()
    assert {(job.attempt, job.lost) for job in jobs} == {(2, 1)}
    detail = await client.job(jobs[0].id)
    assert (detail.attempts, [attempt.error for attempt in detail.attempts_made]) == (1, ["lease_lost"])
    assert await tallies_equal_the_rows(sessions)


async def test_a_request_that_may_not_be_repeated_fails_with_its_worker(
    client: Client, worker: Worker, sessions: Sessions
) -> None:
    batch_id = await client.submit("h", method="POST")
    repeated = await client.submit("h", method="POST", options={"retry_unsafe": True})
    await worker.claim_one()
    await end_leases(sessions)
    _, jobs = await Worker(sessions).claim_one()
    assert [job.batch_id for job in jobs] == [repeated]
    [lost] = await client.jobs(batch_id)
    assert (lost.status, lost.error) == ("failed", "worker_crashed")
    assert (await client.read(batch_id)).errors == {"worker_crashed": 1}
    assert await tallies_equal_the_rows(sessions)


async def test_a_job_is_accused_only_by_a_crash_while_it_ran_alone(client: Client, sessions: Sessions) -> None:
    await client.submit("h", "h")
    for crashes in range(4):
        _, jobs = await Worker(sessions).claim_one()
        assert [(job.crashes, job.is_suspect) for job in jobs] == [(crashes, crashes >= 2)] * 2
        await end_leases(sessions)
    _, [guilty, innocent] = await Worker(sessions).claim_one()
    async with sessions.begin() as session:
        assert await queue.run_alone(session, guilty)
    await end_leases(sessions)
    _, [left] = await Worker(sessions).claim_one()
    assert (left.id, left.accused) == (innocent.id, False)
    await execute(sessions, "UPDATE job SET run_at = now() WHERE status = 'queued'")
    await end_leases(sessions)
    jobs = [job for some in (await Worker(sessions).claim()).values() for job in some]
    assert {job.id: job.accused for job in jobs} == {guilty.id: True, innocent.id: False}
    assert await tallies_equal_the_rows(sessions)


async def test_a_late_result_that_is_offered_with_the_next_attempts_counts_for_nothing(
    client: Client, worker: Worker, sessions: Sessions
) -> None:
    """As by a worker that slept past its lease, claimed the same host again, and then stores what it had and has."""
    batch_id = await client.submit("h", "h", "h")
    _, early = await worker.claim_one()
    await end_leases(sessions)
    _, late = await worker.claim_one()
    recorded = await worker.record(failure(early[0]), success(early[1], b"old"), *(success(job) for job in late[:2]))
    assert set(recorded.dropped) == set(early[:2])
    seen = await client.read(batch_id)
    assert (seen.counts.succeeded, seen.counts.running, seen.errors) == (2, 1, {})
    assert await tallies_equal_the_rows(sessions)
    async with sessions.begin() as session:
        assert await session.scalar(text("SELECT count(*) FROM body")) == 1


async def test_a_suspect_that_is_cleared_while_it_runs_alone_is_not_poisoned(
    client: Client, sessions: Sessions
) -> None:
    """One of its two crashes was none: its worker had only been cut off, as says what it gives back, late."""
    batch_id = await client.submit("h")
    cut_off = Worker(sessions)
    _, early = await cut_off.claim_one()
    await end_leases(sessions)
    await Worker(sessions).claim_one()
    await end_leases(sessions)
    _, [suspect] = await Worker(sessions).claim_one()
    async with sessions.begin() as session:
        assert await queue.run_alone(session, suspect)
    await cut_off.give_back(early)
    await end_leases(sessions)
    _, [again] = await Worker(sessions).claim_one()
    assert (again.id, again.crashes) == (suspect.id, 2)
    assert (await client.read(batch_id)).counts.running == 1


async def accuse(client: Client, sessions: Sessions) -> ClaimedJob:
    """Have the only job lose three workers, the last one while it ran alone; return it as that one had it."""
    await client.submit("h")
    for _ in range(2):
        await Worker(sessions).claim_one()
        await end_leases(sessions)
    _, [suspect] = await Worker(sessions).claim_one()
    async with sessions.begin() as session:
        assert await queue.run_alone(session, suspect)
    await end_leases(sessions)
    assert await Worker(sessions).claim() == {}
    return suspect


async def claim_later(sessions: Sessions) -> ClaimedJob:
    """Claim the only job after the time for which an accused one waits."""
    await execute(sessions, "UPDATE job SET run_at = now()")
    await execute(sessions, "UPDATE host SET next_at = now()")
    _, [job] = await Worker(sessions).claim_one()
    return job


async def test_an_accused_job_stays_so_until_somebody_convicts_it(client: Client, sessions: Sessions) -> None:
    await accuse(client, sessions)
    claimed = await claim_later(sessions)
    assert (claimed.accused, claimed.crashes) == (True, 3)
    await end_leases(sessions)
    claimed = await claim_later(sessions)
    assert claimed.accused
    await Worker(sessions).record(failure(claimed, "poisoned"))
    assert (await client.job(claimed.id)).error == "poisoned"


async def test_a_worker_that_is_heard_of_again_clears_the_accused(client: Client, sessions: Sessions) -> None:
    suspect = await accuse(client, sessions)
    await Worker(sessions).give_back([suspect])
    claimed = await claim_later(sessions)
    assert (claimed.accused, claimed.crashes) == (False, 2)


async def test_a_convicted_job_keeps_its_crashes(client: Client, sessions: Sessions) -> None:
    """What is told of a job's end does not change after it, even when the worker comes back."""
    suspect = await accuse(client, sessions)
    await Worker(sessions).record(failure(await claim_later(sessions), "poisoned"))
    await Worker(sessions).give_back([suspect])
    async with sessions.begin() as session:
        assert (await session.execute(text("SELECT error, crashes FROM job"))).all() == [("poisoned", 3)]


async def test_a_lease_that_ended_with_the_server_is_no_crash(client: Client, sessions: Sessions) -> None:
    await client.submit("h")
    await Worker(sessions).claim_one()
    await execute(sessions, "UPDATE job SET started_at = pg_postmaster_start_time() - interval '1 second'")
    await end_leases(sessions)
    _, [job] = await Worker(sessions).claim_one()
    assert (job.crashes, job.lost) == (0, 1)


async def test_jobs_that_their_worker_never_knew_of_are_charged_with_no_crash(
    client: Client, sessions: Sessions
) -> None:
    """The commit of a refill was not confirmed, and the host was given back by a worker that lives."""
    await client.submit("h")
    await Worker(sessions).claim_one()
    await execute(sessions, "UPDATE host SET owner = NULL, next_at = now()")
    _, [job] = await Worker(sessions).claim_one()
    assert (job.crashes, job.lost) == (0, 1)


async def test_a_fetch_that_was_cut_off_leaves_a_trace_and_one_that_had_not_started_none(
    client: Client, worker: Worker, sessions: Sessions
) -> None:
    batch_id = await client.submit("h", "h")
    _, [cut, waiting] = await worker.claim_one()
    async with sessions.begin() as session:
        await queue.give_back(
            session, [Returned(job=cut, error="shutdown_interrupted", error_detail="Cut."), Returned(job=waiting)]
        )
    assert (await client.read(batch_id)).counts.queued == 2
    traces = {job.id: (await client.job(job.id)).attempts_made for job in (cut, waiting)}
    assert [(trace.number, trace.error, trace.error_detail) for trace in traces[cut.id]] == [
        (1, "shutdown_interrupted", "Cut.")
    ]
    assert traces[waiting.id] == []


async def test_a_worker_that_was_only_cut_off_clears_its_jobs_of_the_crash(client: Client, sessions: Sessions) -> None:
    await client.submit("h")
    cut_off, other = Worker(sessions), Worker(sessions)
    _, jobs = await cut_off.claim_one()
    await end_leases(sessions)
    lease, [rescued] = await other.claim_one()
    assert rescued.crashes == 1
    await cut_off.give_back(jobs)
    assert (await client.job(rescued.id)).status == "running"
    await other.give_back([rescued])
    await other.release(lease)
    _, [again] = await other.claim_one()
    assert (again.crashes, again.lost, again.attempt) == (0, 2, 3)


async def test_a_worker_clears_only_the_crash_it_was_charged_with_and_that_once(
    client: Client, sessions: Sessions
) -> None:
    await client.submit("h")
    slept, crashed, other = Worker(sessions), Worker(sessions), Worker(sessions)
    _, early = await slept.claim_one()
    await end_leases(sessions)
    await crashed.claim_one()
    await end_leases(sessions)
    _, [job] = await other.claim_one()
    assert job.crashes == 2
    for _ in range(2):  # the first commit was not confirmed
        await slept.give_back(early)
    assert await fetch(sessions, "SELECT crashes FROM job") == [(1,)]


async def test_a_rescue_that_charged_no_crash_leaves_none_to_be_cleared_of(client: Client, sessions: Sessions) -> None:
    await client.submit("h")
    _, early = await Worker(sessions).claim_one()
    await execute(sessions, "UPDATE host SET owner = NULL, next_at = now()")
    crashed = Worker(sessions)
    await crashed.claim_one()
    await end_leases(sessions)
    await Worker(sessions).claim_one()
    await crashed.give_back(early)
    assert await fetch(sessions, "SELECT crashes FROM job") == [(1,)]


async def test_a_job_whose_two_attempts_are_given_back_at_once_is_put_back(client: Client, sessions: Sessions) -> None:
    batch_id = await client.submit("h")
    worker = Worker(sessions)
    _, early = await worker.claim_one()
    await end_leases(sessions)
    _, late = await worker.claim_one()
    await worker.give_back([*early, *late])
    assert (await client.read(batch_id)).counts.queued == 1
    assert await fetch(sessions, "SELECT crashes, lost FROM job") == [(0, 2)]
    assert await tallies_equal_the_rows(sessions)


async def test_an_idempotency_key_names_one_batch_for_a_day(client: Client, sessions: Sessions) -> None:
    batch_id = await client.submit("h")
    sha256 = b"r" * 32
    await execute(sessions, "UPDATE batch SET idempotency_key = 'k', request_sha256 = :sha256", sha256=sha256)
    async with sessions.begin() as session:
        assert await batches.lock_key(session, "k")
        assert await batches.find_by_key(session, "k") == (batch_id, sha256)
        async with sessions.begin() as other:
            assert not await batches.lock_key(other, "k")
    await execute(sessions, "UPDATE batch SET created_at = now() - interval '25 hours'")
    async with sessions.begin() as session:
        assert await batches.find_by_key(session, "k") is None


async def test_running_jobs_that_no_lease_covers_are_found(client: Client, worker: Worker, sessions: Sessions) -> None:
    await client.submit("h")
    await worker.claim_one()
    await execute(sessions, "UPDATE host SET owner = NULL, next_at = 'infinity'")
    async with sessions.begin() as session:
        await queue.rescue(session, await hosts.lock_stranded(session, limit=10), lease_s=LEASE_S)
    _, [job] = await worker.claim_one()
    assert job.lost == 1


async def test_a_renewal_tells_which_leases_are_lost(client: Client, worker: Worker, sessions: Sessions) -> None:
    await client.submit("a", "b")
    first, second = await worker.claim()
    await execute(sessions, "UPDATE host SET next_at = now() WHERE host = :host", host=second.host)
    await Worker(sessions).claim_one()
    assert await worker.renew(first, second) == {(first.shard, first.host)}


async def test_a_lease_that_has_ended_is_not_renewed(client: Client, worker: Worker, sessions: Sessions) -> None:
    """Its worker has given it up by its own clock, and would leave it to nobody for as long as it lasts again."""
    await client.submit("h")
    lease, _ = await worker.claim_one()
    await execute(sessions, "UPDATE host SET next_at = now()")
    assert await worker.renew(lease) == set()
    assert len((await Worker(sessions).claim_one())[1]) == 1


async def test_a_host_that_backs_off_is_left_alone_by_every_batch(
    client: Client, worker: Worker, sessions: Sessions
) -> None:
    await client.submit("h", "h")
    lease, jobs = await worker.claim_one()
    async with sessions.begin() as session:
        await leases.back_off(session, [BackOff(lease=lease, delay_s=60, count=2, connect_failures=1)])
    await worker.give_back(jobs)
    await worker.release(lease)
    await client.submit("h")
    assert await worker.claim() == {}
    await make_due(sessions)
    [again] = await worker.claim()
    assert (again.back_offs, again.connect_failures) == (2, 1)


async def test_the_delay_of_a_host_outlives_the_lease(client: Client, worker: Worker) -> None:
    await client.submit(*["h"] * 9)
    lease, jobs = await worker.claim_one()
    await worker.record(*(success(job) for job in jobs))
    await worker.release(lease, rest_s=60)
    assert await worker.claim() == {}


async def test_nothing_of_a_cancelled_batch_is_claimed(client: Client, worker: Worker, sessions: Sessions) -> None:
    batch_id = await client.submit(*["h"] * 20)
    other = await client.submit("h")
    lease, jobs = await worker.claim_one()
    await client.cancel(batch_id)
    assert {job.batch_id for job in await worker.refill(lease, 50)} <= {other}
    async with sessions.begin() as session:
        assert await queue.cancel_queued(session, batch_id, start=0, stop=20) == 20 - sum(
            job.batch_id == batch_id for job in jobs
        )
    await worker.record(*(success(job) for job in jobs))
    assert await client.finish(batch_id) == {batch_id}
    batch = await client.read(batch_id)
    assert (batch.status, batch.counts.queued, batch.counts.running) == ("cancelled", 0, 0)
    assert await tallies_equal_the_rows(sessions)


async def test_a_job_cancelled_while_it_waits_for_a_retry_shows_its_attempt_once(
    client: Client, worker: Worker, sessions: Sessions
) -> None:
    batch_id = await client.submit("h")
    lease, [job] = await worker.claim_one()
    await worker.record(structs.replace(retry(job, code="http_status"), http_status=503))
    await worker.release(lease)
    await client.cancel(batch_id)
    async with sessions.begin() as session:
        await queue.cancel_queued(session, batch_id, start=0, stop=1)
    detail = await client.job(job.id)
    assert (detail.status, detail.error, detail.http_status) == ("cancelled", "cancelled", None)
    assert [(attempt.number, attempt.http_status) for attempt in detail.attempts_made] == [(1, 503)]


async def test_cancelling_is_idempotent_and_spares_what_is_finished(client: Client, worker: Worker) -> None:
    batch_id = await client.submit("h")
    _, [job] = await worker.claim_one()
    await worker.record(success(job))
    await client.finish(batch_id)
    await client.cancel(batch_id)
    batch = await client.read(batch_id)
    assert (batch.status, batch.cancel_requested_at) == ("completed", None)


async def test_a_batch_finishes_once_and_only_when_nothing_is_left(client: Client, worker: Worker) -> None:
    batch_id = await client.submit("a", "b")
    jobs = [job for some in (await worker.claim()).values() for job in some]
    await worker.record(success(jobs[0]))
    assert await client.finish(batch_id) == set()
    await worker.record(failure(jobs[1]))
    assert [await client.finish(batch_id) for _ in range(2)] == [{batch_id}, set()]
    batch = await client.read(batch_id)
    assert (batch.counts.succeeded, batch.counts.failed, batch.errors) == (1, 1, {"read_timeout": 1})


async def test_deleting_hides_at_once_and_erases_only_unshared_bodies(
    client: Client, worker: Worker, sessions: Sessions
) -> None:
    doomed, kept = await client.submit("h", "h"), await client.submit("h")
    assert await client.delete(doomed) == "unfinished"
    _, jobs = await worker.claim_one()
    own = next(job for job in jobs if job.batch_id == doomed)
    await worker.record(*(success(job, b"own" if job is own else b"shared") for job in jobs))
    await client.finish(doomed)
    assert await client.delete(doomed) == "deleted"
    assert await client.delete(doomed) == "missing"
    async with sessions.begin() as session:
        assert await reads.get_batch(session, doomed) is None
        assert await reads.get_job(session, own.id) is None
    for left in (1, 1, 0):
        async with sessions.begin() as session:
            assert await batches.erase(session, doomed, limit=1) == left
    assert await fetch(sessions, "SELECT content FROM body") == [(b"shared",)]
    [job] = await client.jobs(kept)
    async with sessions.begin() as session:
        assert isinstance(await reads.get_body(session, job.id), reads.Body)
    assert await fetch(sessions, "SELECT id FROM batch") == [(kept,)]


async def test_large_bodies_are_erased_a_few_at_a_time(client: Client, worker: Worker, sessions: Sessions) -> None:
    batch_id = await client.submit(*["h"] * 6)
    _, jobs = await worker.claim_one()
    # in the order of their positions: what is within the bound, and one more
    for job, kib in zip(sorted(jobs, key=lambda job: job.url), (3, 3, 3, 20, 1, 0), strict=True):
        await worker.record(success(job, bytes([kib]) * kib * 1024 + job.id.bytes))
    await client.finish(batch_id)
    await client.delete(batch_id)
    for count in (2, 2, 2, 0):
        async with sessions.begin() as session:
            assert await batches.erase(session, batch_id, limit=100, bytes_max=5 * 1024) == count
    assert await fetch(sessions, "SELECT 1 FROM body") == []
    assert await fetch(sessions, "SELECT 1 FROM batch") == []


async def test_a_body_stored_while_it_is_erased_is_not_lost(client: Client, sessions: Sessions) -> None:
    doomed, kept = await client.submit("h"), await client.submit("h")
    worker = Worker(sessions)
    _, jobs = await worker.claim_one()
    first, second = sorted(jobs, key=lambda job: job.batch_id != doomed)
    await worker.record(success(first))
    await client.finish(doomed)
    await client.delete(doomed)
    async with sessions.begin() as session:
        await queue.record(session, [success(second)])
        erasing = asyncio.create_task(_erase(sessions, doomed))
        await until(lambda: waiting(sessions))
    await erasing
    [job] = await client.jobs(kept)
    async with sessions.begin() as session:
        assert isinstance(await reads.get_body(session, job.id), reads.Body)


async def _erase(sessions: Sessions, batch_id: UUID) -> None:
    async with sessions.begin() as session:
        await batches.erase(session, batch_id, limit=100)


async def test_parked_hosts_without_jobs_are_forgotten(client: Client, worker: Worker, sessions: Sessions) -> None:
    await client.submit("done", "waiting")
    claimed = await worker.claim()
    for lease, [job] in claimed.items():
        await worker.record(success(job) if lease.host == "done" else retry(job))
    await worker.release(*claimed)
    async with sessions.begin() as session:
        await hosts.forget_parked(session, after=(-1, ""), limit=10)
    assert await fetch(sessions, "SELECT host FROM host") == [("waiting",)]


async def test_a_host_that_was_forgotten_is_not_leased_under_an_old_number(
    client: Client, worker: Worker, sessions: Sessions
) -> None:
    numbers = []
    for _ in range(2):
        await client.submit("h")
        [(lease, [job])] = (await worker.claim()).items()
        numbers.append(lease.number)
        await worker.record(success(job))
        await worker.release(lease)
        async with sessions.begin() as session:
            await hosts.forget_parked(session, after=(-1, ""), limit=10)
        assert not await fetch(sessions, "SELECT 1 FROM host")
    assert numbers[0] < numbers[1]


async def test_a_job_id_tells_its_shard(client: Client) -> None:
    batch_id = await client.submit("example.com", "127.0.0.1:8081")
    for job in await client.jobs(batch_id):
        assert shard_of_job(job.id) == shard_of_host(job.host)
        assert job.id.version == 8


@pytest.mark.parametrize(
    "change",
    [
        "status = 'sleeping'",
        "status = 'running'",
        "status = 'succeeded'",
        "status = 'failed', finished_at = now()",
        "finished_at = now()",
        "lost = 1",
    ],
)
async def test_the_schema_refuses_a_wrong_job(client: Client, sessions: Sessions, change: str) -> None:
    await client.submit("h")
    with pytest.raises(IntegrityError):
        await execute(sessions, f"UPDATE job SET {change}")


@pytest.mark.parametrize("change", ["queued = 0", "queued = -1, running = 2", "total = 5"])
async def test_the_schema_refuses_a_tally_that_does_not_add_up(client: Client, sessions: Sessions, change: str) -> None:
    await client.submit("h")
    with pytest.raises(IntegrityError):
        await execute(sessions, f"UPDATE tally SET {change}")
