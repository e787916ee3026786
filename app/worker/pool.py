"""The pool of one worker: holds hosts, fills its slots with their jobs, gives hosts back, and drains at the end.

One loop does all that talks to the database about leases, one step after the other; results go by way of the recorder.
Fetches are tasks; what starts next is decided in memory, without waiting. Does not fetch and does not judge.
"""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from app.fetch.limits import Limits
from app.fetch.transport import Transport
from app.jobs import batches, database, leases, queue, workers
from app.jobs.database import DATABASE_ERRORS, Sessions
from app.jobs.ids import shard_of_host
from app.jobs.leases import BackOff
from app.jobs.values import ClaimedJob, Lease, Result
from app.jobs.workers import Identity
from app.outcome import Outcome, Response
from app.worker import attempt, options, retry
from app.worker.holds import STOP_BEFORE_S, Hold, Places, Seat
from app.worker.recorder import Recorder

POLL_S = 1.0
"""Longest pause between two looks for work; a random part of it is left out, so that workers do not look together."""
PAUSE_S_MIN = 0.001
CLAIM_PAUSE_S = 0.02
"""Shortest pause between two claims, so that each claims many jobs."""
ASK_CANCELLED_S = 1.0
BEAT_S = 10.0
FAILED_PAUSE_S = 1.0
DRAIN_LAST_S = 5.0
"""After the grace, how long to try to put jobs and hosts back into a database that does not answer."""
AHEAD_PER_SLOT_MAX = 4
"""Jobs claimed at hosts that are held, for each slot; so one more for each slot is the most a worker ever has."""
BATCH_OPTIONS_MAX = 1_000
GIVE_BACK_WAIT_S = 2.0
"""A host that rests longer than this has its waiting jobs put back."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """What the pool must keep to; seconds and counts."""

    slots: int
    host_concurrency: int
    host_delay_s: float
    lease_s: float
    drain_grace_s: float
    limits: Limits


class Pool:
    """The jobs of one worker process, from claim to record."""

    def __init__(self, *, sessions: Sessions, transport: Transport, identity: Identity, settings: PoolSettings) -> None:
        self._sessions = sessions
        self._transport = transport
        self._identity = identity
        self._settings = settings
        self._holds: dict[tuple[int, str], Hold] = {}
        self._ready: deque[Hold] = deque()
        self._places = Places(settings.host_concurrency, self._place_is_free)
        self._recorder = Recorder(sessions, self._note_stored)
        self._options: dict[UUID, dict[str, Any]] = {}
        self._cancelled: set[UUID] = set()
        self._unknown: set[UUID] = set()
        self._suspect: Hold | None = None
        self._to_give_back: list[tuple[Hold, ClaimedJob]] = []
        self._running_count = 0
        self._waiting_count = 0
        self._woken = asyncio.Event()
        self._drain_by: float | None = None
        self._renewed_at = self._claimed_at = self._asked_at = self._looked_at = self._beat_at = float("-inf")
        self._may_claim_at = 0.0
        self._margin_s = min(STOP_BEFORE_S, settings.lease_s / 4)

    async def run(self) -> None:
        """Work until drained. Raises what only a bug raises: the process should then end and be started anew."""
        async with asyncio.TaskGroup() as group:
            beside = [group.create_task(self._recorder.run()), group.create_task(self._watch_leases())]
            while not self._is_drained():
                await self._step_or_wait_for_database()
                await self._pause()
            for task in beside:
                task.cancel()
        if self._recorder.dropped_count:
            logger.warning("Dropped %d results that came after their leases", self._recorder.dropped_count)
        with suppress(*DATABASE_ERRORS):
            async with self._sessions.begin() as session:
                await workers.leave(session, self._identity)

    def wake(self) -> None:
        """Look for work now: there may be some."""
        self._may_claim_at = min(self._may_claim_at, self._claimed_at + CLAIM_PAUSE_S)
        self._look_again()
        self._woken.set()

    def drain(self, *, grace_s: float | None = None) -> None:
        """Claim no more, put back what has not started, and end when what runs has finished or the grace is over."""
        grace_s = self._settings.drain_grace_s if grace_s is None else grace_s
        self._drain_by = min(self._drain_by or float("inf"), time.monotonic() + grace_s)
        self._woken.set()

    def stop(self) -> None:
        """Drain without grace: what runs is cancelled and put back."""
        self.drain(grace_s=0.0)

    async def _step_or_wait_for_database(self) -> None:
        if self._drain_by is not None:
            self._empty(self._drain_by)
        try:
            await self._step()
        except DATABASE_ERRORS as error:
            database.log_failure(logger, "The pool waits for the database", error)
            await asyncio.sleep(FAILED_PAUSE_S * random.uniform(0.5, 1.5))

    async def _step(self) -> None:
        """Everything that is due now, what keeps leases first."""
        await self._renew()
        self._look_again_in_time()
        await self._drop_cancelled()
        await self._beat()
        await self._give_back()
        if self._drain_by is None:
            await self._refill()
        await self._release()  # right after the look for more, which hints of new work would otherwise ask for again
        if self._drain_by is None:
            await self._claim()
        await self._learn_options()
        await self._start_suspect()
        self._start_ready()

    async def _pause(self) -> None:
        now = time.monotonic()
        pause_s = POLL_S * random.uniform(0.5, 1.0)
        if self._has_room():
            pause_s = min(pause_s, self._may_claim_at - now)
        if self._drain_by is not None and now < self._drain_by:
            pause_s = min(pause_s, self._drain_by - now)
        if self._holds:
            pause_s = min(pause_s, self._renewed_at + self._settings.lease_s / 3 - now)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(pause_s, PAUSE_S_MIN)):
                await self._woken.wait()
        self._woken.clear()

    def _is_drained(self) -> bool:
        """Nothing is held any more, or the database has been away for so long that the leases end by themselves."""
        if self._drain_by is None:
            return False
        is_empty = not self._holds and not self._to_give_back
        return is_empty or time.monotonic() >= self._drain_by + DRAIN_LAST_S

    # Leases: renewed, lost, released

    async def _renew(self) -> None:
        now = time.monotonic()
        if not self._holds or now < self._renewed_at + self._settings.lease_s / 3:
            return
        holds = list(self._holds.values())
        async with self._sessions.begin() as session:
            kept = await leases.renew(
                session, self._identity.id, [hold.lease for hold in holds], lease_s=self._settings.lease_s
            )
        self._renewed_at = now
        for hold in holds:
            if hold.key in kept:
                hold.ends_at = now + self._settings.lease_s
            else:
                self._lose(hold)

    async def _watch_leases(self) -> None:
        """Stop what runs on an ending lease even while the loop waits for a database that does not answer."""
        while True:
            await asyncio.sleep(self._margin_s / 2)
            self._stop_expired()

    def _stop_expired(self) -> None:
        now = time.monotonic()
        for hold in [hold for hold in self._holds.values() if now >= hold.ends_at - self._margin_s]:
            self._lose(hold)

    def _lose(self, hold: Hold) -> None:
        """Stop at once what runs on a lease that is gone. The next holder rescues its jobs, if it is not us."""
        if hold.is_lost:
            return
        logger.warning("Lost the lease of host %s with %d fetches running", hold.host, len(hold.running))
        hold.is_lost = True
        self._return(hold, self._drop_waiting(hold))
        for task in hold.running:
            task.cancel()
        self._forget(hold)

    def _forget(self, hold: Hold) -> None:
        """Hold it no longer; it may have been lost, and even claimed anew, while the database was asked."""
        if self._holds.get(hold.key) is hold:
            del self._holds[hold.key]

    async def _release(self) -> None:
        now = time.monotonic()
        await self._end_turns(now)
        finished = [hold for hold in self._holds.values() if hold.is_idle and self._may_release(hold)]
        if not finished:
            return
        async with self._sessions.begin() as session:
            await leases.release(session, self._identity.id, {hold.lease: hold.rest_s(now) for hold in finished})
        for hold in finished:
            self._forget(hold)
            self._transport.close_idle(hold.host)

    def _may_release(self, hold: Hold) -> bool:
        return hold.is_dry or hold.is_ending or self._drain_by is not None

    async def _end_turns(self, now: float) -> None:
        over = [hold for hold in self._holds.values() if not hold.is_ending and hold.is_turn_over(now)]
        if not over:
            return
        async with self._sessions.begin() as session:
            others_wait = await leases.is_any_due(session)
        for hold in over:
            hold.is_ending = others_wait
            hold.begin_turn(now)

    # Jobs: claimed, refilled, put back

    def _has_room(self) -> bool:
        return self._drain_by is None and not self._recorder.is_full and self._room() > 0

    def _room(self) -> int:
        """Slots that the held hosts cannot fill."""
        return self._settings.slots - sum(hold.demand() for hold in self._holds.values())

    def _refill_room(self) -> int:
        """Jobs that may be claimed ahead at held hosts; other hosts find their room all the same."""
        return self._settings.slots * AHEAD_PER_SLOT_MAX - self._running_count - self._waiting_count

    async def _claim(self) -> None:
        now = time.monotonic()
        room = self._room()
        if now < self._may_claim_at or room <= 0 or self._recorder.is_full:
            return
        async with self._sessions.begin() as session:
            claimed = await queue.claim(
                session,
                self._identity.id,
                hosts_max=room,
                jobs_max=room,
                jobs_per_host=1 if self._settings.host_delay_s else self._settings.host_concurrency,
                lease_s=self._settings.lease_s,
            )
        self._claimed_at = time.monotonic()
        self._may_claim_at = self._claimed_at + (CLAIM_PAUSE_S if claimed else POLL_S * random.uniform(0.5, 1.0))
        was_cut = sum(len(jobs) for jobs in claimed.values()) >= room
        for lease, jobs in claimed.items():
            hold = self._hold(lease, now)
            hold.is_dry = len(jobs) < self._settings.host_concurrency and not was_cut
            self._supply(hold, jobs)

    def _hold(self, lease: Lease, claimed_at: float) -> Hold:
        hold = Hold(
            lease=lease,
            ends_at=claimed_at + self._settings.lease_s,
            began_at=claimed_at,
            concurrency=self._settings.host_concurrency,
            delay_s=self._settings.host_delay_s,
            back_offs=lease.back_offs,
        )
        if (expired := self._holds.get(hold.key)) is not None:
            self._lose(expired)
        self._holds[hold.key] = hold
        return hold

    async def _refill(self) -> None:
        now = time.monotonic()
        room = self._refill_room()
        wanted = [(hold, count) for hold in self._holds.values() if (count := hold.wanted(now)) > 0]
        if not wanted or room <= 0 or self._recorder.is_full:
            return
        async with self._sessions.begin() as session:
            jobs = await queue.refill(
                session, self._identity.id, [(hold.lease, count) for hold, count in wanted], jobs_max=room
            )
        taken: dict[tuple[int, str], list[ClaimedJob]] = {}
        for job in jobs:
            taken.setdefault((job.shard, job.host), []).append(job)
        for hold, count in wanted:
            found = taken.get(hold.key, [])
            hold.is_dry = len(found) < count and len(jobs) < room
            self._supply(hold, found)

    async def _learn_options(self) -> None:
        """Read the options of batches met for the first time; their jobs wait for it."""
        if not self._unknown:
            return
        while len(self._options) > BATCH_OPTIONS_MAX:
            del self._options[next(iter(self._options))]
        async with self._sessions.begin() as session:
            self._options |= await batches.start(session, self._unknown)
        self._unknown.clear()
        for hold in self._holds.values():
            self._make_ready(hold)

    def _supply(self, hold: Hold, jobs: Sequence[ClaimedJob]) -> None:
        hold.waiting.extend(jobs)
        self._waiting_count += len(jobs)
        self._unknown |= {job.batch_id for job in jobs} - self._options.keys()
        self._make_ready(hold)

    def _look_again_in_time(self) -> None:
        if time.monotonic() >= self._looked_at + POLL_S:
            self._look_again()

    def _look_again(self) -> None:
        """New jobs may have come, or retries be due, at hosts that had nothing more."""
        self._looked_at = time.monotonic()
        for hold in self._holds.values():
            hold.is_dry = False

    async def _give_back(self) -> None:
        """Put back what will not start here soon: at hosts that rest, at the end, and what was cut off."""
        now = time.monotonic()
        for hold in self._holds.values():
            if hold.next_start_at > now + GIVE_BACK_WAIT_S and hold.waiting:
                self._return(hold, self._drop_waiting(hold))
                hold.is_ending = True
        if returned := list(self._to_give_back):
            async with self._sessions.begin() as session:
                await queue.give_back(session, [job for _, job in returned])
            del self._to_give_back[: len(returned)]
            for hold, _ in returned:
                hold.unrecorded -= 1

    def _return(self, hold: Hold, jobs: Sequence[ClaimedJob]) -> None:
        hold.unrecorded += len(jobs)
        self._to_give_back += [(hold, job) for job in jobs]

    def _drop_waiting(self, hold: Hold) -> list[ClaimedJob]:
        jobs = list(hold.waiting)
        hold.waiting.clear()
        self._waiting_count -= len(jobs)
        return jobs

    def _empty(self, drain_by: float) -> None:
        """Put back what has not started; after the grace, cancel what runs, which puts it back too."""
        for hold in self._holds.values():
            self._return(hold, self._drop_waiting(hold))
            if time.monotonic() >= drain_by:
                for task in hold.running:
                    task.cancel()

    # Cancelled batches, and the heartbeat

    async def _drop_cancelled(self) -> None:
        now = time.monotonic()
        if now < self._asked_at + ASK_CANCELLED_S:
            return
        self._asked_at = now
        present = {job.batch_id for hold in self._holds.values() for job in (*hold.waiting, *hold.running.values())}
        if not present:
            return
        async with self._sessions.begin() as session:
            self._cancelled = await batches.find_cancelled(session, present)
        if self._cancelled:
            for hold in self._holds.values():
                self._drop_cancelled_of(hold)

    def _drop_cancelled_of(self, hold: Hold) -> None:
        waiting = self._drop_waiting(hold)
        self._supply(hold, [job for job in waiting if job.batch_id not in self._cancelled])
        for job in waiting:
            if job.batch_id in self._cancelled:
                self._offer(hold, attempt.cancelled(job))
        for task, job in hold.running.items():
            if job.batch_id in self._cancelled:
                task.cancel()

    async def _beat(self) -> None:
        if time.monotonic() >= self._beat_at + BEAT_S:
            async with self._sessions.begin() as session:
                await workers.beat(session, self._identity, running=self._running_count)
            self._beat_at = time.monotonic()

    # What starts next: decided in memory

    def _make_ready(self, hold: Hold) -> None:
        if not hold.is_ready and hold.waiting and not hold.is_lost:
            hold.is_ready = True
            self._ready.append(hold)

    def _place_is_free(self, host: str) -> None:
        hold = self._holds.get((shard_of_host(host), host))
        if hold is not None:
            self._make_ready(hold)

    def _start_ready(self) -> None:
        """Start fetches, one of each host in turn, while there are slots."""
        while self._ready and self._may_start():
            hold = self._ready.popleft()
            hold.is_ready = False
            if self._start_one(hold):
                self._make_ready(hold)

    def _may_start(self) -> bool:
        return self._running_count < self._settings.slots and not self._recorder.is_full and self._suspect is None

    def _start_one(self, hold: Hold) -> bool:
        """Start the host's next job if it may; what holds it back makes the host ready again when it is over."""
        now = time.monotonic()
        if not hold.waiting or hold.is_lost or now >= hold.ends_at - self._margin_s:
            return False
        if hold.next_start_at > now:
            hold.is_ready = True  # by the timer, and no other way before
            asyncio.get_running_loop().call_later(hold.next_start_at - now, self._resume, hold)
            return False
        if (batch_id := hold.waiting[0].batch_id) not in self._options:
            self._unknown.add(batch_id)
            self._woken.set()
            return False
        if hold.back_offs and hold.running:
            return False  # one at a time, until one gets through
        if hold.waiting[0].is_suspect:
            self._suspect = hold
            return False
        if not self._places.try_enter(hold.host):
            return False
        self._start_job(hold, now)
        return True

    def _start_job(self, hold: Hold, now: float) -> None:
        """Start the first waiting job; its place at the host is taken."""
        job = hold.waiting.popleft()
        self._waiting_count -= 1
        self._running_count += 1
        hold.note_start(now)
        seat = Seat(self._places, hold.host)
        task = asyncio.create_task(self._run_job(hold, job, self._options[job.batch_id], seat))
        hold.running[task] = job
        task.add_done_callback(lambda task: self._end_job(hold, seat, task))

    async def _start_suspect(self) -> None:
        """Once nothing else runs, start a job that may have brought workers down; nothing starts until it ended."""
        hold = self._suspect
        if hold is None or self._running_count:
            return
        if hold.is_lost or not hold.waiting or not hold.waiting[0].is_suspect:
            self._suspect = None
            self._make_ready(hold)
            return
        job = hold.waiting[0]
        async with self._sessions.begin() as session:
            is_ours = await queue.run_alone(session, job)
        if hold.is_lost or not hold.waiting:
            return
        if not is_ours:
            hold.waiting.popleft()
            self._waiting_count -= 1
        elif self._places.try_enter(hold.host):
            self._start_job(hold, time.monotonic())

    def _resume(self, hold: Hold) -> None:
        hold.is_ready = False
        self._make_ready(hold)
        self._start_ready()

    async def _run_job(self, hold: Hold, job: ClaimedJob, batch_options: dict[str, Any], seat: Seat) -> None:
        started_at = time.monotonic()
        asked = options.for_job(job, batch_options, self._settings.limits)
        outcome, result = await attempt.run(job, asked, transport=self._transport, move=seat.move)
        self._note_host(hold, outcome, started_at)
        self._offer(hold, result)

    def _end_job(self, hold: Hold, seat: Seat, task: asyncio.Task[None]) -> None:
        """Account for a fetch that ended, in whatever way: also one that was cancelled before its first step."""
        job = hold.running.pop(task)
        if job.is_suspect:
            self._suspect = None
            self._make_ready(hold)
        hold.ended_count += 1
        self._make_ready(hold)
        self._running_count -= 1
        seat.leave()
        if task.cancelled():
            self._settle_cancelled(hold, job)
        elif (bug := task.exception()) is not None:
            logger.error("Attempt %d of job %s broke", job.attempt, job.id, exc_info=bug)
            self._offer(hold, attempt.broken(job))
        self._start_ready()
        if self._running_count * 2 < self._settings.slots or (not hold.is_dry and len(hold.waiting) < hold.concurrency):
            self._woken.set()

    def _settle_cancelled(self, hold: Hold, job: ClaimedJob) -> None:
        """This worker cancelled the fetch: for the client, because the lease is lost, or at the end of the grace."""
        if job.batch_id in self._cancelled:
            self._offer(hold, attempt.cancelled(job))
        elif job.repeatable:
            self._return(hold, [job])
        else:
            self._offer(hold, attempt.interrupted(job, is_lease_lost=hold.is_lost))

    def _note_host(self, hold: Hold, outcome: Outcome, started_at: float) -> None:
        delay_s = retry.back_off_s(outcome, back_offs=hold.back_offs)
        if delay_s is not None and started_at >= hold.backed_off_at:
            hold.note_back_off(time.monotonic(), delay_s)
            self._recorder.add_back_off(BackOff(lease=hold.lease, delay_s=delay_s, count=hold.back_offs))
        elif isinstance(outcome, Response) and delay_s is None and hold.back_offs and started_at >= hold.backed_off_at:
            hold.back_offs = 0
            self._recorder.add_back_off(BackOff(lease=hold.lease, delay_s=0.0, count=0))

    def _offer(self, hold: Hold, result: Result) -> None:
        hold.unrecorded += 1
        self._recorder.add(result)

    def _note_stored(self, results: Sequence[Result]) -> None:
        for result in results:
            hold = self._holds.get((result.job.shard, result.job.host))
            if hold is not None and hold.lease.number == result.job.lease:
                hold.unrecorded -= 1
        self._woken.set()
