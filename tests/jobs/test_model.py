"""The queue under a random play of clients, workers, crashes and time: its rules hold after every step.

Hypothesis chooses the steps and, when a rule breaks, finds a shortest play that breaks it. At the end of each play
honest workers take over: whatever happened before, they must be able to bring every job to an end.
"""

import asyncio
import math
import os
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

import asyncpg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlalchemy import make_url

from app.jobs import batches, hosts, leases, queue
from app.jobs.database import make_engine, make_sessions
from app.jobs.ids import shard_of_host
from app.jobs.leases import BackOff
from app.jobs.tables import metadata
from app.jobs.values import ClaimedJob, Lease, Result
from tests.databases import connect
from tests.jobs.actors import LEASE_S, Client, Worker, failure, retry, success

WORKERS = 3
HOSTS = ("a", "b", "c.example", "d:8080")
"""Few, so that everything meets; each in a shard of its own."""
RETRY_S = REST_S = 2 * LEASE_S
FINISHED = ("succeeded", "failed", "cancelled")
STATUSES = ("queued", "running", *FINISHED)
ROUNDS_TO_THE_END_MAX = 60

PICK = st.integers(0, 99)
"""Which of the things that are there to act on, whose number must not decide what hypothesis draws: a claim takes the
batches of a host by chance."""

Row = dict[str, Any]
Item = TypeVar("Item")
HostKey = tuple[int, str]


class Stage:
    """One event loop and a few connections, for all the plays of a test."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._engine = make_engine(url, pool_size=2)
        self.sessions = make_sessions(self._engine)
        self._connection: asyncpg.Connection = self.run(connect(url))
        # Nothing is to outlive the server here, and waiting for the disk is most of a play's time.
        self.run(self._connection.execute(f'ALTER DATABASE "{make_url(url).database}" SET synchronous_commit = off'))

    def run(self, step: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(step, 30))

    def change(self, function: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any, **named: Any) -> Any:
        """Call one of the product's functions in a transaction of its own."""

        async def transaction() -> Any:
            async with self.sessions.begin() as session:
                return await function(session, *arguments, **named)

        return self.run(transaction())

    def clear(self) -> None:
        self.run(self._connection.execute(f"TRUNCATE {', '.join(metadata.tables)}"))

    def let_pass(self, seconds: float) -> None:
        """Move every time that is stored into the past, which is what waiting comes to."""
        self.run(self._connection.execute(PASS.replace(":seconds", str(seconds))))

    def look(self) -> "Picture":
        picture: Picture = self.run(_look(self._connection))
        return picture

    def close(self) -> None:
        self.run(self._connection.close())
        self.run(self._engine.dispose())
        self._loop.close()


BODIES = """
    SELECT shard, sha256, CASE WHEN content IS NULL THEN 0 ELSE 1 + coalesce(more, 0) END AS jobs
    FROM body FULL JOIN body_shared USING (shard, sha256)
"""
LISTED = """
    SELECT batch_id, first_position + CAST(number AS int) - 1 AS position, id
    FROM batch_jobs CROSS JOIN LATERAL unnest(ids) WITH ORDINALITY AS key(id, number)
"""
PASS = """
    UPDATE host SET next_at = next_at - interval ':seconds s', not_before = not_before - interval ':seconds s';
    UPDATE job SET run_at = run_at - interval ':seconds s', started_at = started_at - interval ':seconds s',
        finished_at = finished_at - interval ':seconds s';
"""


@dataclass(frozen=True)
class Picture:
    """All rows at one moment."""

    now: float
    hosts: dict[HostKey, Row]
    jobs: dict[UUID, Row]
    batches: dict[UUID, Row]
    tallies: dict[tuple[int, UUID], Row]
    histogram: dict[tuple[int, UUID, str, str], int]
    bodies: dict[tuple[int, bytes], int]
    listed: list[tuple[UUID, int, UUID]]
    attempts: list[Row]

    def is_running(self, job: ClaimedJob) -> bool:
        """Whether this very attempt still runs."""
        row = self.jobs.get(job.id)
        return row is not None and (row["status"], row["lease"], row["attempt"]) == ("running", job.lease, job.attempt)

    def holds(self, owner: UUID, lease: Lease) -> bool:
        row = self.hosts.get((lease.shard, lease.host))
        return row is not None and (row["owner"], row["lease"]) == (owner, lease.number)

    def is_leased(self, host: HostKey) -> bool:
        row = self.hosts.get(host)
        return row is not None and row["owner"] is not None and row["next_at"] > self.now


async def _look(connection: asyncpg.Connection) -> Picture:
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        rows = {
            table: [
                {name: _seconds(value) for name, value in row.items()}
                for row in await connection.fetch(f"SELECT * FROM {table}")
            ]
            for table in ("host", "job", "batch", "tally", "histogram", "attempt")
        }
        return Picture(
            now=_seconds(await connection.fetchval("SELECT now()")),
            hosts={(row["shard"], row["host"]): row for row in rows["host"]},
            jobs={row["id"]: row for row in rows["job"]},
            batches={row["id"]: row for row in rows["batch"]},
            tallies={(row["shard"], row["batch_id"]): row for row in rows["tally"]},
            histogram={(row["shard"], row["batch_id"], row["kind"], row["key"]): row["n"] for row in rows["histogram"]}
            | {
                (row["shard"], row["batch_id"], "http_status", "200"): row["http_200"]
                for row in rows["tally"]
                if row["http_200"]
            },
            bodies={(row["shard"], row["sha256"]): row["jobs"] for row in await connection.fetch(BODIES)},
            listed=[(row["batch_id"], row["position"], row["id"]) for row in await connection.fetch(LISTED)],
            attempts=rows["attempt"],
        )


def _seconds(value: Any) -> Any:
    """Times as numbers, since asyncpg gives infinite ones as others of another kind."""
    if not isinstance(value, datetime):
        return value
    if value.tzinfo is None:
        return math.inf if value == datetime.max else -math.inf
    return value.timestamp()


# The rules of one picture. Each yields what breaks it.


def tallies_equal_the_rows(picture: Picture) -> Iterator[object]:
    counted: dict[tuple[int, UUID], Counter[str]] = {key: Counter() for key in picture.tallies}
    for job in picture.jobs.values():
        counted.setdefault((job["shard"], job["batch_id"]), Counter())[job["status"]] += 1
    for key, counts in counted.items():
        tally = picture.tallies.get(key)
        if _is_deleted(picture, key[1]):
            continue
        if tally is None or any(tally[status] != counts[status] for status in STATUSES):
            yield tally, counts


def histograms_equal_the_finished_rows(picture: Picture) -> Iterator[object]:
    counted: Counter[tuple[int, UUID, str, str]] = Counter()
    for job in picture.jobs.values():
        for kind in ("error", "http_status"):
            if job["status"] in FINISHED and job[kind] is not None:
                counted[job["shard"], job["batch_id"], kind, str(job[kind])] += 1
    for key in counted.keys() | picture.histogram.keys():
        if not _is_deleted(picture, key[1]) and counted[key] != picture.histogram.get(key):
            yield key, counted[key], picture.histogram.get(key)


def what_runs_is_covered_by_a_lease_or_will_be_rescued(picture: Picture) -> Iterator[object]:
    for job in picture.jobs.values():
        if job["status"] == "running":
            host = (job["shard"], job["host"])
            if host not in picture.hosts or (picture.is_leased(host) and picture.hosts[host]["lease"] != job["lease"]):
                yield job, picture.hosts.get(host)


def no_wake_up_is_lost(picture: Picture) -> Iterator[object]:
    """A host with something to run is leased, or due as soon as it may be."""
    for job in picture.jobs.values():
        batch = picture.batches.get(job["batch_id"])
        if job["status"] != "queued" or batch is None or batch["cancel_requested_at"] is not None:
            continue
        host = picture.hosts.get((job["shard"], job["host"]))
        if host is None or (
            host["owner"] is None and host["next_at"] > max(picture.now, job["run_at"], host["not_before"])
        ):
            yield job, host


def a_finished_batch_has_nothing_left(picture: Picture) -> Iterator[object]:
    for job in picture.jobs.values():
        batch = picture.batches.get(job["batch_id"])
        if batch is None or (batch["finished_at"] is not None and job["status"] not in FINISHED):
            yield job, batch


def a_batch_has_as_many_jobs_as_its_tallies(picture: Picture) -> Iterator[object]:
    for batch in picture.batches.values():
        tallies = [tally for tally in picture.tallies.values() if tally["batch_id"] == batch["id"]]
        if batch["deleted_at"] is None and sum(tally["total"] for tally in tallies) != batch["total"]:
            yield batch, tallies


def tallies_belong_to_batches(picture: Picture) -> Iterator[object]:
    yield from (tally for tally in picture.tallies.values() if tally["batch_id"] not in picture.batches)


def bodies_are_there_as_long_as_jobs_want_them(picture: Picture) -> Iterator[object]:
    wanted = Counter(
        (job["shard"], job["body_sha256"]) for job in picture.jobs.values() if job["body_sha256"] is not None
    )
    yield from wanted.items() ^ picture.bodies.items()


def jobs_are_listed_in_their_places(picture: Picture) -> Iterator[object]:
    there = {(job["batch_id"], job["position"], job["id"]) for job in picture.jobs.values()}
    yield from there ^ {place for place in picture.listed if place[2] in picture.jobs}
    yield from (place for place in picture.listed if place[0] not in picture.batches)


def earlier_attempts_belong_to_jobs(picture: Picture) -> Iterator[object]:
    for attempt in picture.attempts:
        job = picture.jobs.get(attempt["job_id"])
        if job is None or attempt["number"] > job["attempt"]:
            yield attempt, job


def the_accused_lost_three_workers(picture: Picture) -> Iterator[object]:
    for job in picture.jobs.values():
        if job["accused"] and job["crashes"] < 3:
            yield job


def each_crash_is_that_of_an_attempt(picture: Picture) -> Iterator[object]:
    charged = Counter(attempt["job_id"] for attempt in picture.attempts if attempt["charged"])
    for job in picture.jobs.values():
        if job["status"] not in FINISHED and job["crashes"] != charged[job["id"]]:
            yield job


def _is_deleted(picture: Picture, batch_id: UUID) -> bool:
    return batch_id in picture.batches and picture.batches[batch_id]["deleted_at"] is not None


STATE_RULES = (
    tallies_equal_the_rows,
    histograms_equal_the_finished_rows,
    what_runs_is_covered_by_a_lease_or_will_be_rescued,
    no_wake_up_is_lost,
    a_finished_batch_has_nothing_left,
    a_batch_has_as_many_jobs_as_its_tallies,
    tallies_belong_to_batches,
    bodies_are_there_as_long_as_jobs_want_them,
    jobs_are_listed_in_their_places,
    earlier_attempts_belong_to_jobs,
    the_accused_lost_three_workers,
    each_crash_is_that_of_an_attempt,
)


# The rules of one step, from picture to picture.


def jobs_end_once_and_for_all(before: Picture, after: Picture) -> Iterator[object]:
    for job_id, job in before.jobs.items():
        now = after.jobs.get(job_id)
        lasting = ("status", "attempt", "lost", "error", "http_status", "body_sha256")
        if now is not None and job["status"] in FINISHED and any(job[name] != now[name] for name in lasting):
            yield job, now


def jobs_are_never_lost(before: Picture, after: Picture) -> Iterator[object]:
    for job_id, job in before.jobs.items():
        if job_id not in after.jobs and not _is_deleted(before, job["batch_id"]):
            yield job


def attempts_never_go_down(before: Picture, after: Picture) -> Iterator[object]:
    for job_id in before.jobs.keys() & after.jobs.keys():
        if any(before.jobs[job_id][name] > after.jobs[job_id][name] for name in ("attempt", "lost")):
            yield before.jobs[job_id], after.jobs[job_id]


def lease_numbers_only_go_up(before: Picture, after: Picture) -> Iterator[object]:
    for key in before.hosts.keys() & after.hosts.keys():
        if before.hosts[key]["lease"] > after.hosts[key]["lease"]:
            yield before.hosts[key], after.hosts[key]


def batches_end_once_and_for_all(before: Picture, after: Picture) -> Iterator[object]:
    for batch_id, batch in before.batches.items():
        now = after.batches.get(batch_id)
        if now is None and batch["deleted_at"] is None:
            yield batch
        if now is not None and batch["finished_at"] is not None and batch["finished_at"] != now["finished_at"]:
            yield batch, now


STEP_RULES = (
    jobs_end_once_and_for_all,
    jobs_are_never_lost,
    attempts_never_go_down,
    lease_numbers_only_go_up,
    batches_end_once_and_for_all,
)


@dataclass
class Actor:
    """A worker and what it believes to hold, rightly or not."""

    worker: Worker
    holds: dict[Lease, list[ClaimedJob]] = field(default_factory=dict)


class Play(RuleBasedStateMachine):
    """The steps. What a worker may do follows from what it believes, as in the pool; the database knows better."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.stage.clear()
        self.client = Client(stage.sessions)
        self.actors = [Actor(Worker(stage.sessions)) for _ in range(WORKERS)]
        self.stale: list[ClaimedJob] = []
        """Jobs of workers that crashed or lost a lease; their results may still come."""
        self.batch_ids: list[UUID] = []
        self.stored: set[tuple[UUID, int]] = set()
        """(job, attempt) of the results that were accepted."""
        self.picture = stage.look()

    # Clients

    @rule(
        batch_count=st.integers(1, 2),
        names=st.lists(st.sampled_from(HOSTS), min_size=1, max_size=3),
        method=st.sampled_from(["GET", "POST"]),
        retry_unsafe=st.booleans(),
    )
    def submit(self, batch_count: int, names: list[str], method: str, retry_unsafe: bool) -> None:
        for _ in range(batch_count):
            options = {"retry_unsafe": True} if retry_unsafe else {}
            self.batch_ids.append(self.stage.run(self.client.submit(*names, method=method, options=options)))

    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        for batch_id in _one(pick, self.batch_ids):
            self.stage.run(self.client.cancel(batch_id))

    @rule(pick=PICK)
    def delete(self, pick: int) -> None:
        for batch_id in _one(pick, self.batch_ids):
            self.stage.run(self.client.delete(batch_id))

    # Workers

    @rule(
        actor=st.integers(0, WORKERS - 1),
        hosts_max=st.integers(1, 3),
        jobs_max=st.integers(1, 5),
        jobs_per_host=st.integers(1, 3),
    )
    def claim(self, actor: int, hosts_max: int, jobs_max: int, jobs_per_host: int) -> None:
        self._claim(self.actors[actor], hosts_max=hosts_max, jobs_max=jobs_max, jobs_per_host=jobs_per_host)

    def _claim(self, actor: Actor, **bounds: int) -> None:
        claimed = self.stage.run(actor.worker.claim(**bounds))
        assert len(claimed) <= bounds["hosts_max"]
        assert sum(len(jobs) for jobs in claimed.values()) <= bounds["jobs_max"]
        for lease, jobs in claimed.items():
            assert 0 < len(jobs) <= bounds["jobs_per_host"]
            assert not self.picture.is_leased((lease.shard, lease.host)), "two leases of one host"
            assert self.picture.hosts[lease.shard, lease.host]["not_before"] <= self.picture.now, "no rest for the host"
            self._take(jobs)
            # A worker that claims a host again has seen its own lease end.
            for old in [old for old in actor.holds if (old.shard, old.host) == (lease.shard, lease.host)]:
                self.stale += actor.holds.pop(old)
            actor.holds[lease] = jobs

    def _take(self, jobs: list[ClaimedJob]) -> None:
        for job in jobs:
            assert self.picture.jobs[job.id]["status"] in ("queued", "running")
            assert self.picture.batches[job.batch_id]["cancel_requested_at"] is None, "claimed though cancelled"

    @rule(pick=PICK, count=st.integers(1, 3), is_known=st.booleans())
    def refill(self, pick: int, count: int, is_known: bool) -> None:
        """Top a host up; `is_known` is false where the connection broke after the commit."""
        for actor, lease in _one(pick, self._holds()):
            jobs = self.stage.run(actor.worker.refill(lease, count))
            assert not jobs or self.picture.holds(actor.worker.id, lease)
            assert len(jobs) <= count
            self._take(jobs)
            if is_known:
                actor.holds[lease] += jobs

    @rule(actor=st.integers(0, WORKERS - 1))
    def renew(self, actor: int) -> None:
        """Prolong all leases, and learn which are lost."""
        worker, holds = self.actors[actor].worker, self.actors[actor].holds
        kept = self.stage.run(worker.renew(*holds))
        mine = {(lease.shard, lease.host) for lease in holds if self.picture.holds(worker.id, lease)}
        assert kept == set(filter(self.picture.is_leased, mine))
        for lease in [lease for lease in holds if (lease.shard, lease.host) not in kept]:
            self.stale += holds.pop(lease)

    @rule(pick=PICK, outcome=st.sampled_from(["success", "failure", "retry", "retry at once", "cancelled"]))
    def record(self, pick: int, outcome: str) -> None:
        for actor, lease, job in _one(pick, self._jobs()):
            self._record(_result(job, outcome))
            actor.holds[lease].remove(job)

    @rule(pick=PICK, outcome=st.sampled_from(["success", "retry"]))
    def record_late(self, pick: int, outcome: str) -> None:
        for job in _one(pick, self.stale):
            self._record(_result(job, outcome))

    @rule(pick=PICK)
    def record_again(self, pick: int) -> None:
        """As after a commit that was not confirmed, however much later."""
        for job_id, number in _one(pick, sorted(self.stored)):
            if (row := self.picture.jobs.get(job_id)) is not None and row["attempt"] == number:
                job = _claimed(row)
                assert not self.stage.run(self.actors[0].worker.record(success(job))).dropped

    def _record(self, result: Result) -> None:
        """A result is stored if its attempt still runs, and only then."""
        job = result.job
        is_accepted = self.picture.is_running(job)
        recorded = self.stage.run(self.actors[0].worker.record(result))
        if is_accepted:
            self.stored.add((job.id, job.attempt))
        row = self.picture.jobs.get(job.id)
        is_own = row is not None and (job.id, job.attempt) in self.stored and row["attempt"] == job.attempt
        assert recorded.dropped == ([] if is_own else [job])
        after = self.stage.look().jobs.get(job.id)
        assert after == row if not is_accepted else after is not None and after["status"] == result.status

    @rule(pick=PICK)
    def give_back(self, pick: int) -> None:
        for actor, lease, job in _one(pick, self._jobs()):
            is_held = self.picture.is_running(job)
            self.stage.run(actor.worker.give_back([job]))
            actor.holds[lease].remove(job)
            if is_held:
                assert self.stage.look().jobs[job.id]["status"] == "queued"

    @rule(pick=PICK)
    def give_back_late(self, pick: int) -> None:
        for job in _one(pick, self.stale):
            self.stage.run(self.actors[0].worker.give_back([job]))
            self.stale.remove(job)

    @rule(pick=PICK)
    def run_alone(self, pick: int) -> None:
        for _, _, job in _one(pick, self._jobs()):
            assert self.stage.change(queue.run_alone, job) == self.picture.is_running(job)

    @rule(pick=PICK, count=st.integers(0, 2))
    def back_off(self, pick: int, count: int) -> None:
        for _, lease in _one(pick, self._holds()):
            back_off = BackOff(lease=lease, delay_s=REST_S, count=count)
            self.stage.change(leases.back_off, [back_off])

    @rule(pick=PICK, rest_s=st.sampled_from([0.0, REST_S]))
    def release(self, pick: int, rest_s: float) -> None:
        for actor, lease in _one(pick, self._idle()):
            self.stage.run(actor.worker.release(lease, rest_s=rest_s))
            del actor.holds[lease]

    @rule(actor=st.integers(0, WORKERS - 1))
    def crash(self, actor: int) -> None:
        """A worker is gone, or stopped for so long that it finds everything changed."""
        self.stale += [job for jobs in self.actors[actor].holds.values() for job in jobs]
        self.actors[actor] = Actor(Worker(self.stage.sessions))

    # Time and upkeep

    @rule(seconds=st.sampled_from([LEASE_S * 2 / 3, LEASE_S * 4 / 3, 3600.0]))
    def time_passes(self, seconds: float) -> None:
        self.stage.let_pass(seconds)

    @rule()
    def rescue_stranded(self) -> None:
        self.stage.change(_rescue_stranded)

    @rule(pick=PICK, start=st.integers(0, 2), length=st.integers(1, 3))
    def cancel_queued(self, pick: int, start: int, length: int) -> None:
        for batch_id in _one(pick, self.batch_ids):
            batch = self.picture.batches.get(batch_id)
            if batch is not None and batch["cancel_requested_at"] is not None:
                self.stage.change(queue.cancel_queued, batch_id, start=start, stop=start + length)

    @rule(pick=PICK)
    def finish(self, pick: int) -> None:
        for batch_id in _one(pick, self.batch_ids):
            self.stage.run(self.client.finish(batch_id))

    @rule(limit=st.integers(1, 2))
    def erase(self, limit: int) -> None:
        for batch_id in self.stage.change(batches.list_deleted, limit=1):
            self.stage.change(batches.erase, batch_id, limit=limit)

    @rule()
    def forget_parked(self) -> None:
        self.stage.change(hosts.forget_parked, after=(-1, ""), limit=10)

    # What must hold

    @invariant()
    def the_rules_hold(self) -> None:
        before, self.picture = self.picture, self.stage.look()
        for state_rule in STATE_RULES:
            assert not list(state_rule(self.picture)), state_rule.__name__
        for step_rule in STEP_RULES:
            assert not list(step_rule(before, self.picture)), step_rule.__name__

    def teardown(self) -> None:
        """Every worker is gone; new ones must be able to finish what there is."""
        self.stale += [job for _, _, job in self._jobs()]
        self.actors = [Actor(Worker(self.stage.sessions))]
        rounds = 0
        while any(batch["finished_at"] is None for batch in self.picture.batches.values()):
            assert (rounds := rounds + 1) < ROUNDS_TO_THE_END_MAX, "stuck"
            self._finish_what_can_be()
            self.the_rules_hold()

    def _finish_what_can_be(self) -> None:
        """One round of an honest worker and of upkeep, an hour after the last."""
        self.stage.let_pass(3600)
        self.the_rules_hold()
        [actor] = self.actors
        self._claim(actor, hosts_max=len(HOSTS), jobs_max=100, jobs_per_host=50)
        for lease, jobs in actor.holds.items():
            for job in jobs:
                self.stage.run(actor.worker.record(success(job)))
            self.stage.run(actor.worker.release(lease))
        actor.holds.clear()
        self.stage.change(_rescue_stranded)
        for batch_id, total in self.stage.change(batches.list_cancelling, limit=100):
            self.stage.change(queue.cancel_queued, batch_id, start=0, stop=total)
        for batch_id in self.stage.change(batches.find_finishable, limit=100):
            self.stage.run(self.client.finish(batch_id))

    def _holds(self) -> list[tuple[Actor, Lease]]:
        return [(actor, lease) for actor in self.actors for lease in actor.holds]

    def _idle(self) -> list[tuple[Actor, Lease]]:
        return [(actor, lease) for actor, lease in self._holds() if not actor.holds[lease]]

    def _jobs(self) -> list[tuple[Actor, Lease, ClaimedJob]]:
        return [(actor, lease, job) for actor, lease in self._holds() for job in actor.holds[lease]]


async def _rescue_stranded(session: Any) -> None:
    if stranded := await hosts.lock_stranded(session, limit=10):
        await queue.rescue(session, stranded, lease_s=LEASE_S)


def _result(job: ClaimedJob, outcome: str) -> Result:
    match outcome:
        case "success":
            return success(job, content=job.url.encode())  # the same bytes for the same URL: bodies are shared
        case "failure":
            return failure(job)
        case "cancelled":
            return Result(job=job, status="cancelled", error="cancelled")
        case _:
            return retry(job, delay_s=RETRY_S if outcome == "retry" else 0.0)


def _one(pick: int, items: Sequence[Item]) -> Sequence[Item]:
    """The one picked, or none where there is none."""
    return [items[pick % len(items)]] if items else []


def _claimed(row: Row) -> ClaimedJob:
    names = ("shard", "id", "batch_id", "host", "url", "repeatable", "attempt", "lost", "crashes", "lease")
    return ClaimedJob(request=None, **{name: row[name] for name in names})


def play(url: str, *, plays: int, steps: int, derandomize: bool) -> None:
    stage = Stage(url)
    try:
        run_state_machine_as_test(
            lambda: Play(stage),  # type: ignore[arg-type]  # any maker will do
            settings=settings(
                max_examples=plays,
                stateful_step_count=steps,
                derandomize=derandomize,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        stage.close()


def test_the_hosts_of_the_model_are_in_different_shards() -> None:
    assert len({shard_of_host(name) for name in HOSTS}) == len(HOSTS)


def test_the_rules_hold_whatever_happens(database_url: str) -> None:
    play(database_url, plays=20, steps=30, derandomize=True)


@pytest.mark.long
def test_the_rules_hold_whatever_happens_for_long(database_url: str) -> None:
    play(database_url, plays=int(os.environ.get("FETCHPOOL_TEST_PLAYS", "400")), steps=60, derandomize=False)
