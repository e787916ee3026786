"""What keeps the store in order while the pool works: batches finished, cancelled and erased, stranded jobs found.

Every worker does it, none is needed for it: each step is safe to run anywhere, any number of times.
"""

import asyncio
import logging
import random

from app.jobs import batches, database, hosts, queue
from app.jobs.database import DATABASE_ERRORS, Sessions

PAUSE_S = 1.0
FINISH_EVERY = 5
"""Rounds between two looks for batches to finish or erase."""
SWEEP_EVERY = 15
"""Rounds between two looks for stranded jobs and for hosts to forget."""
BATCHES_PER_ROUND_MAX = 1_000
CANCEL_CHUNK = 10_000
ERASE_CHUNK = 2_000
HOSTS_CHUNK = 1_000

logger = logging.getLogger(__name__)


class Upkeep:
    """A loop beside the pool."""

    def __init__(self, sessions: Sessions, *, readers: Sessions, lease_s: float) -> None:
        self._sessions = sessions
        self._readers = readers
        self._lease_s = lease_s

    async def run(self) -> None:
        """Keep the store in order, for ever."""
        number = random.randrange(SWEEP_EVERY)
        while True:
            await asyncio.sleep(PAUSE_S * random.uniform(0.75, 1.25))
            number += 1
            try:
                await self._round(number)
            except DATABASE_ERRORS as error:
                database.log_failure(logger, "Upkeep waits for the database", error)

    async def _round(self, number: int) -> None:
        await self._cancel_batches()
        if number % FINISH_EVERY == 0:
            await self._finish_batches()
            await self._erase_batches()
        if number % SWEEP_EVERY == 0:
            await self._rescue_stranded()
            await self._forget_hosts()

    async def _cancel_batches(self) -> None:
        """Cancel what is still in the queue of cancelled batches, chunk by chunk."""
        async with self._readers() as session:
            cancelling = await batches.list_cancelling(session, limit=BATCHES_PER_ROUND_MAX)
        for batch_id, total in cancelling:
            for start in range(0, total, CANCEL_CHUNK):
                async with self._sessions.begin() as session:
                    await queue.cancel_queued(session, batch_id, start=start, stop=start + CANCEL_CHUNK)
            async with self._sessions.begin() as session:
                await batches.finish(session, [batch_id])

    async def _finish_batches(self) -> None:
        """Finish what nobody did: recorders finish batches at once, but may die between the record and that."""
        async with self._readers() as session:
            finishable = await batches.find_finishable(session, limit=BATCHES_PER_ROUND_MAX)
        if finishable:
            async with self._sessions.begin() as session:
                await batches.finish(session, finishable)

    async def _erase_batches(self) -> None:
        async with self._readers() as session:
            deleted = await batches.list_deleted(session, limit=BATCHES_PER_ROUND_MAX)
        for batch_id in deleted:
            is_left = True
            while is_left:
                async with self._sessions.begin() as session:
                    is_left = await batches.erase(session, batch_id, limit=ERASE_CHUNK) > 0

    async def _rescue_stranded(self) -> None:
        async with self._sessions.begin() as session:
            if stranded := await hosts.lock_stranded(session, limit=HOSTS_CHUNK):
                await queue.rescue(session, stranded, lease_s=self._lease_s)

    async def _forget_hosts(self) -> None:
        after: tuple[int, str] | None = (-1, "")
        while after is not None:
            async with self._sessions.begin() as session:
                after = await hosts.forget_parked(session, after=after, limit=HOSTS_CHUNK)
