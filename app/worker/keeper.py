"""Keeps the leases of the hosts this worker holds: renews them, gives them up in time, gives hosts back.

Does not claim, and knows no job but by way of the slots.
"""

import asyncio
import logging
import time
from uuid import UUID

from app.fetch.transport import Transport
from app.jobs import leases
from app.jobs.database import Sessions
from app.jobs.values import Lease
from app.worker.holds import Hold, Holds
from app.worker.slots import Slots

STOP_BEFORE_S = 2.0
"""What runs at a host is cancelled this long before an unrenewed lease ends, and nothing more starts there."""

logger = logging.getLogger(__name__)


class Keeper:
    """The leases of one worker, on its own monotonic clock: each counts from before it was asked for."""

    def __init__(
        self, *, sessions: Sessions, owner: UUID, lease_s: float, holds: Holds, slots: Slots, transport: Transport
    ) -> None:
        self._sessions = sessions
        self._owner = owner
        self._lease_s = lease_s
        self._holds = holds
        self._slots = slots
        self._transport = transport
        self._margin_s = min(STOP_BEFORE_S, lease_s / 4)
        self._renewed_at = float("-inf")
        self._held = asyncio.Event()

    @property
    def renews_at(self) -> float:
        """When leases are to be renewed next."""
        return self._renewed_at + self._lease_s / 3

    async def renew(self) -> None:
        """Prolong all leases when it is time; what is held no longer is given up."""
        now = time.monotonic()
        if not self._holds or now < self.renews_at:
            return
        holds = list(self._holds.values())
        async with self._sessions.begin() as session:
            kept = await leases.renew(session, self._owner, [hold.lease for hold in holds], lease_s=self._lease_s)
        self._renewed_at = now
        for hold in holds:
            if hold.key in kept:
                hold.stops_at = self._stops_at(now)
                self._slots.make_ready(hold)  # nothing was started there if the lease seemed to be ending
            else:
                self._lose(hold)

    async def watch(self) -> None:
        """Stop what runs on an ending lease, for ever, even while the pool waits for a database that is silent."""
        while True:
            await self._held.wait()
            await asyncio.sleep(self._margin_s / 2)
            now = time.monotonic()
            for hold in [hold for hold in self._holds.values() if now >= hold.stops_at]:
                self._lose(hold)
            if not self._holds:
                self._held.clear()

    def hold(self, lease: Lease, claimed_at: float, *, concurrency: int, delay_s: float) -> Hold:
        """Hold a host whose claim was sent at `claimed_at`."""
        hold = Hold(
            lease=lease,
            stops_at=self._stops_at(claimed_at),
            began_at=claimed_at,
            concurrency=concurrency,
            delay_s=delay_s,
            back_offs=lease.back_offs,
            connect_failures=lease.connect_failures,
        )
        if (expired := self._holds.get(hold.key)) is not None:
            self._lose(expired)
        self._holds[hold.key] = hold
        self._held.set()
        return hold

    async def release(self, *, everything: bool) -> None:
        """Give back the idle hosts that have nothing more to run or had their turn, or all that are idle."""
        now = time.monotonic()
        await self._end_turns(now)
        finished = [
            hold for hold in self._holds.values() if hold.is_idle and (hold.is_dry or hold.is_ending or everything)
        ]
        if not finished:
            return
        async with self._sessions.begin() as session:
            await leases.release(session, self._owner, {hold.lease: hold.rest_s(now) for hold in finished})
        for hold in finished:
            self._forget(hold)
            self._transport.close_idle(hold.host)

    async def _end_turns(self, now: float) -> None:
        over = [hold for hold in self._holds.values() if not hold.is_ending and hold.is_turn_over(now)]
        if not over:
            return
        async with self._sessions.begin() as session:
            others_wait = await leases.find_next_due_s(session) == 0
        for hold in over:
            hold.is_ending = others_wait
            hold.begin_turn(now)

    def _lose(self, hold: Hold) -> None:
        """Stop at once what runs on a lease that is gone. The next holder rescues its jobs, if it is not us."""
        if hold.is_lost:
            return
        logger.warning("Lost the lease of host %s with %d fetches running", hold.host, len(hold.running))
        hold.is_lost = True
        self._slots.return_waiting(hold)
        self._slots.stop_running(hold)
        self._forget(hold)

    def _forget(self, hold: Hold) -> None:
        """Hold it no longer; it may have been lost, and even claimed anew, while the database was asked."""
        if self._holds.get(hold.key) is hold:
            del self._holds[hold.key]

    def _stops_at(self, asked_at: float) -> float:
        return asked_at + self._lease_s - self._margin_s
