"""What keeps the store in order while the pool works: batches finished, cancelled and erased, stranded jobs found.

Every worker does it, none is needed for it: each step is safe to run anywhere, any number of times.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable

from app.jobs import batches, database, hints, hosts, queue, silence
from app.jobs.batches import Chores
from app.jobs.database import DATABASE_ERRORS, Sessions
from app.jobs.hints import Listener

PAUSE_S = 1.0
"""Between two rounds."""
REST_S = 180.0
"""In its place, while there is no batch to follow up and hints are heard: the hint of a new batch ends it, or the
listener, which asks whether there is one."""
FINISH_EVERY_S = 5.0
"""Between two looks for batches to finish."""
SWEEP_EVERY_S = 15.0
"""Between two looks for what the vanished left: open transactions, stranded jobs, and hosts to forget."""
BATCHES_PER_ROUND_MAX = 1_000
CANCEL_CHUNK = 10_000
ERASE_CHUNK = 2_000
ERASE_S_MAX = 5.0
"""A million jobs take longer to erase; cancels and finishes come in between."""
HOSTS_CHUNK = 1_000

logger = logging.getLogger(__name__)


class Upkeep:
    """A loop beside the pool."""

    def __init__(self, sessions: Sessions, *, autocommit: Sessions, listener: Listener, lease_s: float) -> None:
        self._sessions = sessions
        self._autocommit = autocommit
        self._listener = listener
        self._lease_s = lease_s
        self._woken = asyncio.Event()
        self._is_resting = False
        now = time.monotonic()
        self._finish_at = now + random.uniform(0, FINISH_EVERY_S)
        self._sweep_at = now + random.uniform(0, SWEEP_EVERY_S)

    async def run(self) -> None:
        """Keep the store in order, for ever."""
        while True:
            await self._pause()
            try:
                await self._round()
            except DATABASE_ERRORS as error:
                database.log_failure(logger, "Upkeep waits for the database", error)

    def wake(self) -> None:
        """End a rest: there may be a batch that is not finished."""
        self._woken.set()

    async def _pause(self) -> None:
        is_at_rest = self._is_resting and self._listener.is_hearing
        if is_at_rest and not await self._is_woken_within(REST_S * random.uniform(0.8, 1.0)):
            return
        await asyncio.sleep(PAUSE_S * random.uniform(0.75, 1.25))
        self._woken.clear()

    async def _is_woken_within(self, rest_s: float) -> bool:
        try:
            async with asyncio.timeout(rest_s):
                return await self._woken.wait()
        except TimeoutError:
            return False

    async def _round(self) -> None:
        self._is_resting = False
        async with self._autocommit() as session:
            chores = await batches.find_chores(session)
        for chore in self._due(chores):
            try:
                await chore()
            except DATABASE_ERRORS as error:  # one that always fails must not keep the others undone
                database.log_failure(logger, "Upkeep leaves a chore for later", error)
        self._is_resting = not (chores.has_unfinished or chores.has_deleted)

    def _due(self, chores: Chores) -> list[Callable[[], Awaitable[None]]]:
        now = time.monotonic()
        is_finish_due, is_sweep_due = now >= self._finish_at, now >= self._sweep_at
        if is_finish_due:
            self._finish_at = now + FINISH_EVERY_S
        if is_sweep_due:
            self._sweep_at = now + SWEEP_EVERY_S
        due = (
            (self._cancel_batches, chores.has_unfinished),
            (self._finish_batches, chores.has_unfinished and is_finish_due),
            (self._erase_batches, chores.has_deleted),
            (self._end_unfinished, chores.has_unfinished and is_sweep_due),
            (self._rescue_stranded, chores.has_unfinished and is_sweep_due),
            (self._forget_hosts, is_sweep_due),
        )
        return [chore for chore, is_due in due if is_due]

    async def _cancel_batches(self) -> None:
        """Cancel what is still in the queue of cancelled batches, chunk by chunk."""
        async with self._autocommit() as session:
            cancelling = await batches.list_cancelling(session, limit=BATCHES_PER_ROUND_MAX)
        for batch_id, total in cancelling:
            for start in range(0, total, CANCEL_CHUNK):
                async with self._sessions.begin() as session:
                    await queue.cancel_queued(session, batch_id, start=start, stop=start + CANCEL_CHUNK)
            async with self._sessions.begin() as session:
                await batches.finish(session, [batch_id])

    async def _finish_batches(self) -> None:
        """Finish what nobody did: recorders do when they have no more of one, but may die first."""
        async with self._autocommit() as session:
            finishable = await batches.find_finishable(session, limit=BATCHES_PER_ROUND_MAX)
        if finishable:
            async with self._sessions.begin() as session:
                await batches.finish(session, finishable)

    async def _erase_batches(self) -> None:
        async with self._autocommit() as session:
            deleted = await batches.list_deleted(session, limit=BATCHES_PER_ROUND_MAX)
        gives_way_at = time.monotonic() + ERASE_S_MAX
        for batch_id in deleted:
            is_left = True
            while is_left and time.monotonic() < gives_way_at:
                async with self._sessions.begin() as session:
                    is_left = await batches.erase(session, batch_id, limit=ERASE_CHUNK) > 0

    async def _end_unfinished(self) -> None:
        async with self._autocommit() as session:
            await silence.end_unfinished(session)

    async def _rescue_stranded(self) -> None:
        async with self._sessions.begin() as session:
            if stranded := await hosts.lock_stranded(session, limit=HOSTS_CHUNK):
                await queue.rescue(session, stranded, lease_s=self._lease_s)
        if stranded:
            async with self._sessions.begin() as session:
                await hints.give(session)

    async def _forget_hosts(self) -> None:
        after: tuple[int, str] | None = (-1, "")
        while after is not None:
            async with self._sessions.begin() as session:
                after = await hosts.forget_parked(session, after=after, limit=HOSTS_CHUNK)
