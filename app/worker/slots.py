"""The slots of one worker: which of the claimed jobs runs next, and what becomes of each that has ended.

Decided in memory, without waiting: nothing here asks the database. Does not fetch and does not judge.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any
from uuid import UUID

from msgspec import structs

from app.fetch.http import FetchRequest
from app.fetch.limits import Limits
from app.fetch.transport import Transport
from app.jobs.ids import shard_of_host
from app.jobs.values import ClaimedJob, Result, Returned
from app.outcome import Failure, FailureCode, Outcome
from app.worker import attempt, options, retry
from app.worker.holds import Hold, Holds, Places, Seat
from app.worker.options import SharedOptions
from app.worker.recorder import Recorder
from app.worker.retry import SharedFailure

BATCH_OPTIONS_MAX = 1_000
TRY_S = 0.5
"""A host without any connection since its claim is likely silent once a fetch there has run for so long."""
SILENT_SHARE_MAX = 0.75
"""Of the slots, what silent hosts may keep for as long as a connection may take. Those beyond it are put off."""
PUT_OFF_S = 10.0
"""How long a host is put off. With less, a thousand silent ones are due again before other work has had its turn."""

logger = logging.getLogger(__name__)


class Slots:
    """Room for `count` fetches, and the jobs that wait for it or for their host.

    `wake` is called when the pool has something to do: to learn options, to claim, or to give a host back.
    """

    def __init__(
        self,
        *,
        count: int,
        host_concurrency: int,
        limits: Limits,
        holds: Holds,
        transport: Transport,
        recorder: Recorder,
        wake: Callable[[], None],
    ) -> None:
        self._count = count
        self._limits = limits
        self._holds = holds
        self._transport = transport
        self._recorder = recorder
        self._wake = wake
        self._loop = asyncio.get_running_loop()  # kept, for to ask which loop runs is a system call (getpid)
        self._ready: deque[Hold] = deque()
        self._places = Places(host_concurrency, self._place_is_free)
        self._options: dict[UUID, SharedOptions] = {}
        self._cancelled: set[UUID] = set()
        self._suspect: Hold | None = None
        self._silent: set[asyncio.Task[None]] = set()
        self.unknown: set[UUID] = set()
        """Batches whose options are to be learned; their jobs wait for it."""
        self.returned: list[tuple[Hold, Returned]] = []
        """Jobs that are to be given back, and where they are from."""
        self.running_count = 0
        self.waiting_count = 0

    @property
    def is_full(self) -> bool:
        """Whether each slot has a fetch."""
        return self.running_count >= self._count

    @property
    def are_mostly_silent(self) -> bool:
        """Whether silent hosts have all the slots that they may keep."""
        return len(self._silent) >= max(1, int(self._count * SILENT_SHARE_MAX))

    # Jobs that come, and that go again before they started

    def supply(self, hold: Hold, jobs: Sequence[ClaimedJob]) -> None:
        """Take jobs in that were claimed at a host; they are given back if it was lost while they were asked for."""
        if hold.is_lost:
            self._return(hold, [Returned(job=job) for job in jobs])
            return
        hold.waiting.extend(jobs)
        self.waiting_count += len(jobs)
        self.unknown |= {job.batch_id for job in jobs if job.batch_id not in self._options}
        self.make_ready(hold)
        self._hurry_the_last()

    def learn_options(self, learned: Mapping[UUID, dict[str, Any]]) -> None:
        """Take the options of unknown batches in; their jobs may start."""
        while len(self._options) > BATCH_OPTIONS_MAX:
            del self._options[next(iter(self._options))]
        self._options |= {batch_id: options.for_batch(asked, self._limits) for batch_id, asked in learned.items()}
        self.unknown.clear()
        for hold in self._holds.values():
            self.make_ready(hold)

    def return_waiting(self, hold: Hold) -> None:
        """Have the host's jobs given back that have not started."""
        self._return(hold, [Returned(job=job) for job in self._drop_waiting(hold)])

    def stop_running(self, hold: Hold) -> None:
        """Cancel what runs at the host; each job is given back, or fails if it must not be repeated."""
        for task in hold.running:
            task.cancel()

    def present_batches(self) -> set[UUID]:
        """Return the batches of all jobs that run or wait here."""
        return {job.batch_id for hold in self._holds.values() for job in (*hold.waiting, *hold.running.values())}

    def cancel(self, batch_ids: Iterable[UUID]) -> None:
        """End the jobs of batches that their clients cancelled."""
        self._cancelled = set(batch_ids)
        if self._cancelled:
            for hold in self._holds.values():
                self._cancel_at(hold)

    def _cancel_at(self, hold: Hold) -> None:
        waiting = self._drop_waiting(hold)
        self.supply(hold, [job for job in waiting if job.batch_id not in self._cancelled])
        for job in waiting:
            if job.batch_id in self._cancelled:
                self._offer(hold, attempt.cancelled(job, was_running=False))
        for task, job in hold.running.items():
            if job.batch_id in self._cancelled:
                task.cancel()

    def _drop_waiting(self, hold: Hold) -> list[ClaimedJob]:
        jobs = list(hold.waiting)
        hold.waiting.clear()
        self.waiting_count -= len(jobs)
        return jobs

    def _return(self, hold: Hold, returned: Sequence[Returned]) -> None:
        hold.unrecorded += len(returned)
        self.returned += [(hold, one) for one in returned]

    # What starts next

    def start_ready(self) -> None:
        """Start fetches, one of each host in turn, while there are slots."""
        while self._ready and self._may_start():
            hold = self._ready.popleft()
            hold.is_ready = False
            if self._start_one(hold):
                self.make_ready(hold)

    def next_suspect(self) -> tuple[Hold, ClaimedJob] | None:
        """Return the suspect to start once nothing else runs; until it has ended nothing else starts.

        The one before it is noted as alone until its result is stored, and must not be blamed for what this one does.
        """
        hold = self._suspect
        if hold is None or any(job.is_suspect for job in hold.running.values()):
            return None
        if hold.is_lost or not hold.waiting or not self._is_startable_suspect(hold.waiting[0]):
            self._suspect = None
            self.make_ready(hold)
            return None
        if self.running_count or not self._recorder.is_empty:
            return None
        return hold, hold.waiting[0]

    def start_suspect(self, hold: Hold, *, is_ours: bool) -> None:
        """Start the suspect at the head of this host, or have it cleared when it is another worker's by now."""
        if hold.is_lost or not hold.waiting:
            return
        if not is_ours:
            self.waiting_count -= 1
            self._return(hold, [Returned(job=hold.waiting.popleft())])
        elif self._places.try_enter(hold.host):
            self._start_job(hold, time.monotonic())

    @property
    def is_reserved(self) -> bool:
        """Whether nothing may start, for a suspect is to run alone or does."""
        return self._suspect is not None

    def make_ready(self, hold: Hold) -> None:
        """Let the host's next job start when it may."""
        if not hold.is_ready and hold.waiting and not hold.is_lost:
            hold.is_ready = True
            self._ready.append(hold)

    def _place_is_free(self, host: str) -> None:
        hold = self._holds.get((shard_of_host(host), host))
        if hold is not None:
            self.make_ready(hold)
            self.start_ready()

    def _may_start(self) -> bool:
        return not (self.is_full or self._recorder.is_full or self.is_reserved)

    def _is_startable_suspect(self, job: ClaimedJob) -> bool:
        return job.is_suspect and job.batch_id in self._options  # which may have been forgotten while it waited

    def _start_one(self, hold: Hold) -> bool:
        """Start the host's next job if it may; what holds it back makes the host ready again when it is over."""
        now = time.monotonic()
        if not hold.waiting or hold.is_lost or now >= hold.stops_at:
            return False
        if (failure := hold.failure_to_share(now)) is not None:
            self._share(hold, failure, delay_s=hold.sharing_delay_s(now))
            return hold.shared_failure is None  # those that are left wait for the timer
        if hold.next_start_at > now:
            hold.is_ready = True  # by the timer, and no other way before
            self._loop.call_later(hold.next_start_at - now, self._resume, hold)
            return False
        if (batch_id := hold.waiting[0].batch_id) not in self._options:
            self.unknown.add(batch_id)
            self._wake()
            return False
        if hold.running and (hold.back_offs or not hold.is_tried):
            return False  # one at a time, until one gets through
        if hold.waiting[0].is_suspect:
            return self._convict_or_await(hold)
        if not self._places.try_enter(hold.host):
            return False
        self._start_job(hold, now)
        return True

    def _share(self, hold: Hold, shared: SharedFailure, *, delay_s: float) -> None:
        """Charge each waiting job an attempt that failed as the host's last try did; start none.

        Jobs of another kind stay, and end the sharing, for more of them would only pile up. Those whose options are not
        known yet wait for these.
        """
        kept = []
        for job in self._drop_waiting(hold):
            batch = self._options.get(job.batch_id)
            if job.accused:
                self._offer(hold, attempt.poisoned(job))
            elif batch is None:
                self.unknown.add(job.batch_id)
                kept.append(job)
            elif shared.applies_to((asked := options.for_job(job, batch)).request):
                self._offer(hold, attempt.shared(job, asked, shared.failure, delay_s=delay_s))
            else:
                hold.shared_failure = None
                kept.append(job)
        hold.waiting.extend(kept)
        self.waiting_count += len(kept)
        self._wake()

    def _convict_or_await(self, hold: Hold) -> bool:
        if not hold.waiting[0].accused:
            self._suspect = hold
            if not self.running_count:
                self._wake()  # or the last to end does
            return False
        self.waiting_count -= 1
        self._offer(hold, attempt.poisoned(hold.waiting.popleft()))
        return True

    def _start_job(self, hold: Hold, now: float) -> None:
        """Start the first waiting job; its place at the host is taken."""
        job = hold.waiting.popleft()
        self.waiting_count -= 1
        self.running_count += 1
        hold.note_start(now)
        seat = Seat(self._places, hold.host)
        task = self._loop.create_task(self._run_job(hold, job, self._options[job.batch_id], seat))
        hold.running[task] = job
        task.add_done_callback(lambda task: self._end_job(hold, seat, task))
        if not hold.is_connected:
            self._loop.call_later(TRY_S, self._note_silence, hold, task)

    def _note_connection(self, hold: Hold) -> None:
        """The host is there: others may start beside its first fetch, though not within it."""
        hold.is_connected = hold.is_tried = True
        self._silent.difference_update(hold.running)
        self.make_ready(hold)
        self._loop.call_soon(self.start_ready)
        self._wake()  # more of its jobs may be claimed now

    def _note_silence(self, hold: Hold, task: asyncio.Task[None]) -> None:
        """Let go of what waits for a host that seems to be silent, so that others may be claimed in its place.

        Where too many are silent, let go of what runs there as well, and try again later.
        """
        if hold.is_connected or task.done():
            return
        if self.are_mostly_silent:
            hold.put_off(time.monotonic(), PUT_OFF_S)
            self.stop_running(hold)
        else:
            self._silent.add(task)
        if hold.waiting and not hold.is_tried:
            self.return_waiting(hold)
            hold.is_dry = False
        self._wake()

    def _resume(self, hold: Hold) -> None:
        hold.is_ready = False
        self.make_ready(hold)
        self.start_ready()

    # What becomes of it

    async def _run_job(self, hold: Hold, job: ClaimedJob, batch: SharedOptions, seat: Seat) -> None:
        started_at = time.monotonic()
        asked = options.for_job(job, batch)
        on_connection = None if hold.is_connected else partial(self._note_connection, hold)
        outcome, result = await attempt.run(
            job, asked, transport=self._transport, move=seat.move, on_connection=on_connection
        )
        self._note_host(hold, outcome, asked.request, started_at=started_at)
        if hold.shared_failure is not None:  # not to share what it has met itself
            delay_s = max(result.delay_s, hold.sharing_delay_s(time.monotonic()))
            result = structs.replace(result, delay_s=delay_s)
        self._offer(hold, result)

    def _end_job(self, hold: Hold, seat: Seat, task: asyncio.Task[None]) -> None:
        """Account for a fetch that ended, in whatever way: also one that was cancelled before its first step."""
        job = hold.running.pop(task)
        if job.is_suspect:
            self._suspect = None
            self.make_ready(hold)
        self._silent.discard(task)
        hold.ended_count += 1
        hold.is_tried = hold.is_tried or not task.cancelled()
        self.make_ready(hold)
        self.running_count -= 1
        seat.leave()
        if task.cancelled():
            self._settle_cancelled(hold, job)
        elif (bug := task.exception()) is not None:
            logger.error("Attempt %d of job %s broke", job.attempt, job.id, exc_info=bug)
            self._offer(hold, attempt.broken(job))
        self.start_ready()
        if not self.is_full:
            self._wake()
        self._hurry_the_last()

    def _hurry_the_last(self) -> None:
        """Once nothing runs here, waits, or is known to come, results need not wait for more of them."""
        if not (self.running_count or self.waiting_count) and all(hold.is_dry for hold in self._holds.values()):
            self._recorder.hurry()

    def _settle_cancelled(self, hold: Hold, job: ClaimedJob) -> None:
        """This worker cut the fetch off: for the client, as the lease is lost, after the grace, or to put it off."""
        code = FailureCode.LEASE_LOST if hold.is_lost else FailureCode.SHUTDOWN_INTERRUPTED
        if job.batch_id in self._cancelled:
            self._offer(hold, attempt.cancelled(job, was_running=True))
        elif not hold.is_connected:
            self._return(hold, [Returned(job=job)])  # nothing was sent
        elif job.repeatable:
            self._return(hold, [attempt.returned(job, code)])
        else:
            self._offer(hold, attempt.interrupted(job, code))

    def _note_host(self, hold: Hold, outcome: Outcome, request: FetchRequest, *, started_at: float) -> None:
        """Have the host rest, or end its back-off; what began before its last back-off tells nothing new."""
        if started_at < hold.backed_off_at:
            return
        delay_s = retry.back_off_s(outcome, back_offs=hold.back_offs)
        if delay_s is not None:
            now = time.monotonic()
            hold.note_back_off(now, delay_s, answered=outcome.status is not None)
            failure = retry.shared_failure(outcome, request, connect_failures=hold.connect_failures)
            if failure is not None:
                hold.share(now, failure)
        elif hold.back_offs and retry.got_through(outcome):
            hold.end_back_off()
        elif hold.connect_failures and isinstance(outcome, Failure) and outcome.sent:
            hold.forget_connect_failures()
        else:
            return
        self._recorder.add_back_off(hold.back_off(delay_s or 0.0))

    def _offer(self, hold: Hold, result: Result) -> None:
        hold.unrecorded += 1
        self._recorder.add(result)
