"""The hosts this worker holds, and the places its fetches take at each. State only: nothing here waits or does I/O."""

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from app.jobs.leases import BackOff
from app.jobs.values import ClaimedJob, Lease
from app.worker.retry import SharedFailure

TURN_S = 5.0
TURN_JOBS_MAX = 200
"""While other hosts are due, a host is given back after this long or this many jobs."""

AHEAD_S = 2.0
"""A host's jobs are claimed this far ahead of their start, by the host's recent rate; one that rests longer is given
back, with the jobs that wait for it."""

SHARED_EARLY_S = AHEAD_S / 2
"""Jobs that shared a failure are due this long before the host's next try, so as not to miss what that one meets; by
then nothing is shared any more."""

RATE_OVER_S = 0.2
"""Shortest time over which a host's rate is judged, so that a first few quick answers promise nothing."""


@dataclass(slots=True, eq=False)
class Hold:
    """One leased host; times are of the monotonic clock.

    At `stops_at`, a moment before an unrenewed lease ends, nothing starts any more and what runs is cancelled.
    `unrecorded` counts results not yet stored: releasing the host before them would have their jobs rescued.
    `shared_failure` is what the last try met, where it applies to other jobs that are due before the next one.
    `is_connected` once a connection stood: until then nothing was sent. `is_tried` once it is, or a fetch has ended
    that was not cut off: until then there is one at a time.
    """

    lease: Lease
    stops_at: float
    began_at: float
    concurrency: int
    delay_s: float
    waiting: deque[ClaimedJob] = field(default_factory=deque)
    running: dict[asyncio.Task[None], ClaimedJob] = field(default_factory=dict)
    unrecorded: int = 0
    started_count: int = 0
    ended_count: int = 0
    next_start_at: float = 0.0
    backed_off_at: float = 0.0
    back_offs: int = 0
    connect_failures: int = 0
    shared_failure: SharedFailure | None = None
    is_connected: bool = False
    is_tried: bool = False
    is_dry: bool = False
    is_ready: bool = False
    is_ending: bool = False
    is_lost: bool = False

    @property
    def host(self) -> str:
        """The politeness key."""
        return self.lease.host

    @property
    def key(self) -> tuple[int, str]:
        """(shard, host)."""
        return self.lease.shard, self.lease.host

    @property
    def is_idle(self) -> bool:
        """Nothing waits, runs or is still to be stored: the host may be released."""
        return not self.waiting and not self.running and not self.unrecorded

    def demand(self, now: float) -> int:
        """Slots in which this host's jobs run or may start now."""
        running = len(self.running)
        if self.next_start_at > now:
            return running
        most = 1 if self.back_offs else min(self.concurrency, running + 1) if self.delay_s else self.concurrency
        return max(running, min(most, running + len(self.waiting)))

    def wanted(self, now: float) -> int:
        """How many more jobs to claim: those to start within `AHEAD_S`, at least one a place; 0 when well supplied.

        Of a host that rests long, or is just being tried, none; where they share what the last one met, at most
        `TURN_JOBS_MAX`, those not yet stored included.
        """
        if self.is_dry or self.is_ending or self.is_lost:
            return 0
        if self.failure_to_share(now) is not None:
            return TURN_JOBS_MAX - len(self.waiting) - self.unrecorded
        if self.is_asleep(now) or (self.running and not self.is_tried):
            return 0
        ahead = self._expected_starts(now)
        have = len(self.waiting)
        return 0 if have > ahead // 2 else ahead - have

    def is_asleep(self, now: float) -> bool:
        """Whether nothing starts or is shared here for so long that the host is better given back."""
        return self._rests_long(now) and self.shared_failure is None

    def failure_to_share(self, now: float) -> SharedFailure | None:
        """Return what the jobs that wait here have met without a try of their own, while the host rests."""
        return self.shared_failure if self._rests_long(now) else None

    def sharing_delay_s(self, now: float) -> float:
        """Seconds until a job that has its part in `shared_failure` may be claimed again."""
        return max(0.0, self.rest_s(now) - SHARED_EARLY_S)

    def is_turn_over(self, now: float) -> bool:
        """Whether the host had its share for now; not while its first and only try runs, which may take longer."""
        is_trying = self.back_offs > 0 and bool(self.running) and self.started_count <= 1
        return not is_trying and (now - self.began_at >= TURN_S or self.started_count >= TURN_JOBS_MAX)

    def begin_turn(self, now: float) -> None:
        """Start counting the host's share anew."""
        self.began_at = now
        self.started_count = self.ended_count = 0

    def rest_s(self, now: float) -> float:
        """Seconds for which the next holder must not start a fetch here."""
        return max(0.0, self.next_start_at - now)

    def note_start(self, now: float) -> None:
        """Account for a fetch that starts now."""
        self.started_count += 1
        self.shared_failure = None
        self.next_start_at = max(self.next_start_at, now + self.delay_s)

    def note_back_off(self, now: float, delay_s: float, *, answered: bool) -> None:
        """Leave the host alone; those that were under way together count as one back-off."""
        self.next_start_at = max(self.next_start_at, now + delay_s)
        self.backed_off_at = now
        self.back_offs += 1
        self.connect_failures = 0 if answered else self.connect_failures + 1

    def put_off(self, now: float, delay_s: float) -> None:
        """Start nothing here for a while; unlike a back-off, it is not the host's doing, and is not counted."""
        self.next_start_at = max(self.next_start_at, now + delay_s)

    def share(self, now: float, failure: SharedFailure) -> None:
        """Have the jobs that are due share a failure, for a turn at least, until the host's next try."""
        self.shared_failure = failure
        self.begin_turn(now)

    def forget_connect_failures(self) -> None:
        """The host could be connected to, though what came of it does not end the back-off."""
        self.connect_failures = 0

    def end_back_off(self) -> None:
        """Something got through."""
        self.back_offs = self.connect_failures = 0

    def back_off(self, delay_s: float) -> BackOff:
        """What is to be stored of the back-off, or of its end."""
        return BackOff(lease=self.lease, delay_s=delay_s, count=self.back_offs, connect_failures=self.connect_failures)

    def _rests_long(self, now: float) -> bool:
        return self.next_start_at > now + AHEAD_S

    def _expected_starts(self, now: float) -> int:
        if self.back_offs:
            return 1
        if self.delay_s > 0:
            return max(1, int(AHEAD_S / self.delay_s))
        rate = self.ended_count / max(now - self.began_at, RATE_OVER_S)
        return max(self.concurrency, min(TURN_JOBS_MAX, int(rate * AHEAD_S)))


Holds = dict[tuple[int, str], Hold]
"""What one worker holds, by (shard, host)."""


class Places:
    """How many fetches of this worker talk to each host, redirects into it included; each host has `limit` places."""

    def __init__(self, limit: int, on_leave: Callable[[str], None]) -> None:
        self._limit = limit
        self._on_leave = on_leave
        self._taken: Counter[str] = Counter()
        self._queues: dict[str, deque[asyncio.Future[None]]] = defaultdict(deque)

    def try_enter(self, host: str) -> bool:
        """Take a place if one is free."""
        if self._taken[host] >= self._limit:
            return False
        self._taken[host] += 1
        return True

    async def enter(self, host: str) -> None:
        """Take a place, waiting for one; the fetch's deadline bounds the wait."""
        if self.try_enter(host):
            return
        turn = asyncio.get_running_loop().create_future()
        self._queues[host].append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            self._give_up(host, turn)
            raise

    def leave(self, host: str) -> None:
        """Give a place back: to the first in the queue, or to whoever the host's next job is."""
        while queue := self._queues.get(host):
            turn = queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._queues.pop(host, None)
        self._taken[host] -= 1
        if self._taken[host] <= 0:
            del self._taken[host]
        self._on_leave(host)

    def _give_up(self, host: str, turn: asyncio.Future[None]) -> None:
        if turn.done() and not turn.cancelled():
            self.leave(host)


class Seat:
    """The one place that a fetch has at a time, as its redirects lead it from host to host."""

    def __init__(self, places: Places, host: str) -> None:
        self._places = places
        self._host: str | None = host

    async def move(self, host: str) -> None:
        """Give the present place back and take one at another host; never two at once, which could deadlock."""
        self.leave()
        await self._places.enter(host)
        self._host = host

    def leave(self) -> None:
        """Give the place back, if there is one."""
        if self._host is not None:
            host, self._host = self._host, None
            self._places.leave(host)
