"""The pool of one worker: claims hosts and jobs, fills its slots with them, gives back what is left, drains at the end.

One loop does all that asks the database about leases and jobs, one step after the other: leases are the keeper's, what
starts next is decided by the slots, results go by way of the recorder. Does not fetch and does not judge.
"""

import asyncio
import logging
import random
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import asyncpg

from app.fetch.limits import Limits
from app.fetch.transport import Transport
from app.jobs import batches, database, leases, queue, workers
from app.jobs.database import DATABASE_ERRORS, Sessions
from app.jobs.hints import Listener
from app.jobs.values import ClaimedJob, Lease, Result
from app.jobs.workers import Identity
from app.worker.holds import Hold, Holds
from app.worker.keeper import Keeper
from app.worker.recorder import Recorder
from app.worker.slots import Slots

POLL_S = 1.0
"""Longest pause between two looks for work; a random part of it is left out, so that workers do not look together."""
REST_S = 180.0
"""The same while hints are heard and no host has work: the listener asks then. Firewalls forget connections later."""
STEP_PAUSE_S = 0.005
"""Shortest pause between two steps: each fetch that ends may ask for one."""
FULL_PAUSE_S = 0.1
"""Longest pause between two steps while all slots are full; none asks for one then, so that each refill takes many."""
CLAIM_PAUSE_S = 0.02
"""Shortest pause between two claims, so that each claims many jobs."""
BEATEN_PAUSE_S = 0.005
"""The same, once, when another worker had just locked all that is due, only to leave most of it milliseconds later."""
ASK_CANCELLED_S = 1.0
BEAT_S = 10.0
FAILED_PAUSE_S = 1.0
DRAIN_LAST_S = 5.0
"""After the grace, how long to try to put jobs and hosts back into a database that does not answer."""
AHEAD_PER_SLOT_MAX = 4
"""Jobs claimed at hosts that are held, for each slot; so one more for each slot is the most a worker ever has."""

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

    def __init__(
        self,
        *,
        sessions: Sessions,
        autocommit: Sessions,
        transport: Transport,
        listener: Listener,
        identity: Identity,
        settings: PoolSettings,
    ) -> None:
        self._sessions = sessions
        self._autocommit = autocommit
        self._listener = listener
        self._identity = identity
        self._settings = settings
        self._woken = asyncio.Event()
        self._holds: Holds = {}
        self._recorder = Recorder(
            sessions,
            autocommit=autocommit,
            on_stored=self._note_stored,
            present_batches=lambda: self._slots.present_batches(),
        )
        self._slots = Slots(
            count=settings.slots,
            host_concurrency=settings.host_concurrency,
            limits=settings.limits,
            holds=self._holds,
            transport=transport,
            recorder=self._recorder,
            wake=self._woken.set,
        )
        self._keeper = Keeper(
            sessions=sessions,
            owner=identity.id,
            lease_s=settings.lease_s,
            holds=self._holds,
            slots=self._slots,
            transport=transport,
        )
        self._drain_by: float | None = None
        self._claimed_at = self._asked_at = self._looked_at = self._beat_at = float("-inf")
        self._may_claim_at = 0.0
        self._is_hinted = self._is_all_parked = self._was_beaten = False
        self._dropped_told = 0

    async def run(self) -> None:
        """Work until drained. Raises what only a bug raises: the process should then end and be started anew."""
        async with asyncio.TaskGroup() as group:
            beside = [group.create_task(self._recorder.run()), group.create_task(self._keeper.watch())]
            while not self._is_drained():
                await self._step_or_wait_for_database()
                await self._pause()
            for task in beside:
                task.cancel()
        with suppress(*DATABASE_ERRORS):
            async with self._sessions.begin() as session:
                await workers.leave(session, self._identity)

    def wake(self) -> None:
        """Look for work now: there may be some."""
        self._is_hinted = True
        self._may_claim_at = min(self._may_claim_at, self._claimed_at + CLAIM_PAUSE_S)
        self._look_again()
        self._woken.set()

    async def ask(self, connection: asyncpg.Connection) -> bool:
        """Beat, and say, as the listener's question, whether pool and upkeep should end a rest."""
        return await workers.beat_and_look(connection, self._identity, running=self._slots.running_count)

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
        await self._keeper.renew()
        self._look_again_in_time()
        await self._drop_cancelled()
        await self._beat()
        await self._give_back()
        if self._drain_by is None:
            await self._refill()
        # right after the look for more, which hints of new work would otherwise ask for again
        await self._keeper.release(everything=self._drain_by is not None)
        if self._drain_by is None:
            await self._claim()
        await self._learn_options()
        await self._start_suspect()
        self._slots.start_ready()

    async def _pause(self) -> None:
        await asyncio.sleep(STEP_PAUSE_S)
        now = time.monotonic()
        pause_s = self._poll_s()
        if not self._is_at_rest:
            pause_s = min(pause_s, self._beat_at + BEAT_S - now)
        if self._has_room():
            pause_s = min(pause_s, self._may_claim_at - now)
        if self._drain_by is not None and now < self._drain_by:
            pause_s = min(pause_s, self._drain_by - now)
        if self._holds:
            pause_s = min(pause_s, self._keeper.renews_at - now)
        if self._slots.is_full:
            pause_s = min(pause_s, FULL_PAUSE_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._woken.wait()
        self._woken.clear()

    def _poll_s(self) -> float:
        return (REST_S if self._is_at_rest else POLL_S) * random.uniform(0.8, 1.0)

    @property
    def _is_at_rest(self) -> bool:
        """Whether the listener may do all the looking, and beat."""
        return self._is_all_parked and self._listener.is_hearing and self._drain_by is None

    def _is_drained(self) -> bool:
        """Nothing is held any more, or the database has been away for so long that the leases end by themselves."""
        if self._drain_by is None:
            return False
        slots = self._slots
        is_empty = not (self._holds or slots.returned or slots.running_count) and self._recorder.is_empty
        return is_empty or time.monotonic() >= self._drain_by + DRAIN_LAST_S

    # Jobs: claimed, refilled, put back

    def _has_room(self) -> bool:
        return self._drain_by is None and self._may_take() and self._room() > 0

    def _may_take(self) -> bool:
        """Whether jobs that are taken now could start: else they, and their hosts, are left to other workers."""
        return not (self._recorder.is_full or self._slots.is_reserved)

    def _room(self) -> int:
        """Jobs that may be claimed at other hosts: for the slots that those held cannot fill."""
        now = time.monotonic()
        free = self._settings.slots - sum(hold.demand(now) for hold in self._holds.values())
        return min(free, self._settings.slots + self._refill_room())

    def _refill_room(self) -> int:
        """Jobs that may be claimed ahead at held hosts; other hosts find their room all the same."""
        return self._settings.slots * AHEAD_PER_SLOT_MAX - self._slots.running_count - self._slots.waiting_count

    async def _claim(self) -> None:
        now = time.monotonic()
        room = self._room()
        if now < self._may_claim_at or room <= 0 or not self._may_take():
            return
        settings, jobs_each = self._settings, self._first_of_each
        self._is_hinted = False
        # at rest: finding nothing takes one round trip like this, and three by a claim
        due_s = 0.0 if self._holds else await self._find_next_due_s()
        claimed = await self._claim_due(room, jobs_each) if due_s <= 0 else {}
        if due_s <= 0 and not claimed:
            due_s = await self._find_next_due_s()
        shortest_s = self._shortest_pause_s(is_beaten=due_s <= 0 and not claimed)
        self._claimed_at = time.monotonic()
        self._is_all_parked = due_s == float("inf")
        # a hint that came meanwhile may be of what was not there yet
        pause_s = 0.0 if self._is_hinted else min(due_s, self._poll_s())
        self._may_claim_at = self._claimed_at + max(shortest_s, pause_s)
        was_cut = sum(len(jobs) for jobs in claimed.values()) >= room
        for lease, jobs in claimed.items():
            hold = self._keeper.hold(lease, now, concurrency=settings.host_concurrency, delay_s=settings.host_delay_s)
            hold.is_dry = _found_all(jobs, wanted=lease.first_jobs(jobs_each)) and not was_cut
            self._slots.supply(hold, jobs)

    def _shortest_pause_s(self, *, is_beaten: bool) -> float:
        """Return the pause after a claim; `is_beaten`: hosts are due and it got none, for others had locked them."""
        was_beaten, self._was_beaten = self._was_beaten, is_beaten
        return BEATEN_PAUSE_S if is_beaten and not was_beaten else CLAIM_PAUSE_S

    @property
    def _first_of_each(self) -> int:
        """Jobs to claim together with a host: those that can start at once, or the one that tries it."""
        if self._settings.host_delay_s or self._slots.are_mostly_silent:
            return 1
        return self._settings.host_concurrency

    async def _claim_due(self, room: int, jobs_each: int) -> dict[Lease, list[ClaimedJob]]:
        settings = self._settings
        async with self._sessions.begin() as session:
            return await queue.claim(
                session,
                self._identity.id,
                hosts_max=room,
                jobs_max=room,
                jobs_per_host=jobs_each,
                lease_s=settings.lease_s,
            )

    async def _find_next_due_s(self) -> float:
        async with self._autocommit() as session:
            return await leases.find_next_due_s(session)

    async def _refill(self) -> None:
        now = time.monotonic()
        room = self._refill_room()
        wanted = [(hold, count) for hold in self._holds.values() if (count := hold.wanted(now)) > 0]
        if not wanted:
            return
        if room <= 0 or not self._may_take():
            self._end_idle(hold for hold, _ in wanted if hold.failure_to_share(now) is None)
            return
        # fair shares: the first few hosts would take all the room, and the others leave slots empty
        share = max(1, room // len(wanted))
        wanted = [(hold, min(count, share)) for hold, count in wanted]
        jobs = await self._refill_held(wanted, room)
        taken: dict[tuple[int, str], list[ClaimedJob]] = {}
        for job in jobs:
            taken.setdefault((job.shard, job.host), []).append(job)
        for hold, count in wanted:
            found = taken.get(hold.key, [])
            hold.is_dry = _found_all(found, wanted=count) and len(jobs) < room
            self._slots.supply(hold, found)

    def _end_idle(self, holds: Iterable[Hold]) -> None:
        """Give hosts back of which nothing runs or waits here, and nothing can: another worker may have room."""
        for hold in holds:
            hold.is_ending = hold.is_ending or hold.is_idle

    async def _refill_held(self, wanted: Sequence[tuple[Hold, int]], room: int) -> list[ClaimedJob]:
        try:
            async with self._autocommit.begin() as session:
                return await queue.refill(
                    session, self._identity.id, [(hold.lease, count) for hold, count in wanted], jobs_max=room
                )
        except DATABASE_ERRORS:
            # Should it have been committed, these jobs run nowhere, and are rescued once their host is given back.
            for hold, _ in wanted:
                hold.is_ending = True
            raise

    async def _learn_options(self) -> None:
        """Read the options of batches met for the first time; their jobs wait for it."""
        if unknown := self._slots.unknown:
            async with self._autocommit.begin() as session:
                learned = await batches.start(session, unknown)
            self._slots.learn_options(learned)

    async def _start_suspect(self) -> None:
        """Once nothing else runs, start a job that may have brought workers down."""
        if (suspect := self._slots.next_suspect()) is not None:
            hold, job = suspect
            async with self._sessions.begin() as session:
                is_ours = await queue.run_alone(session, job)
            self._slots.start_suspect(hold, is_ours=is_ours)

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
            if hold.is_asleep(now) and (hold.waiting or hold.is_idle):
                self._slots.return_waiting(hold)
                hold.is_ending = True
        if returned := list(self._slots.returned):
            async with self._sessions.begin() as session:
                await queue.give_back(session, [one for _, one in returned])
            del self._slots.returned[: len(returned)]
            for hold, _ in returned:
                hold.unrecorded -= 1

    def _empty(self, drain_by: float) -> None:
        """Put back what has not started; after the grace, cancel what runs, which puts it back too."""
        for hold in self._holds.values():
            self._slots.return_waiting(hold)
            if time.monotonic() >= drain_by:
                self._slots.stop_running(hold)

    # Results stored, cancelled batches, and the heartbeat

    def _note_stored(self, results: Sequence[Result]) -> None:
        for result in results:
            hold = self._holds.get((result.job.shard, result.job.host))
            if hold is not None and hold.lease.number == result.job.lease:
                hold.unrecorded -= 1
        self._woken.set()

    async def _drop_cancelled(self) -> None:
        now = time.monotonic()
        if now < self._asked_at + ASK_CANCELLED_S:
            return
        self._asked_at = now
        if present := self._slots.present_batches():
            async with self._autocommit() as session:
                cancelled = await batches.find_cancelled(session, present)
            self._slots.cancel(cancelled)

    async def _beat(self) -> None:
        dropped = self._recorder.dropped_count
        if time.monotonic() >= self._beat_at + BEAT_S or dropped > self._dropped_told:
            async with self._sessions.begin() as session:
                await workers.beat(session, self._identity, running=self._slots.running_count, dropped=dropped)
            self._beat_at = time.monotonic()
            self._dropped_told = dropped


def _found_all(jobs: Sequence[ClaimedJob], *, wanted: int) -> bool:
    """Whether a host has no more jobs due: a turn that looked at as many batches as it may has left some out."""
    return len(jobs) < min(wanted, queue.BATCHES_PER_TURN_MAX)
