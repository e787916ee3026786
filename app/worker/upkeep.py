"""What keeps the store in order while the pool works: batches finished, cancelled and erased, stranded jobs found.

Every worker does it, none is needed for it: each step is safe to run anywhere, any number of times.
"""

import asyncio
import logging
import random
from uuid import UUID

from app.jobs import batches, database, hosts, queue
from app.jobs.database import DATABASE_ERRORS, Sessions

PAUSE_S = 1.0
STRANDED_EVERY = 15
"""Rounds between two looks for stranded jobs and for hosts to forget."""
BATCHES_PER_ROUND_MAX = 1_000
CANCEL_CHUNK = 10_000
ERASE_CHUNK = 2_000
HOSTS_CHUNK = 1_000

logger = logging.getLogger(__name__)


class Upkeep:
    """A loop beside the pool."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def run(self) -> None:
        """Keep the store in order, for ever."""
        round_number = random.randrange(STRANDED_EVERY)
        while True:
            await asyncio.sleep(PAUSE_S * random.uniform(0.75, 1.25))
            round_number += 1
            try:
                await self._round(is_full=round_number % STRANDED_EVERY == 0)
            except DATABASE_ERRORS as error:
                logger.debug("Upkeep waits for the database: %s", database.reason(error))

    async def _round(self, *, is_full: bool) -> None:
        await self._finish_batches()
        await self._erase_batches()
        if is_full:
            await self._rescue_stranded()
            await self._forget_hosts()

    async def _finish_batches(self) -> None:
        """Carry on with the cancelling of batches, and finish those that have nothing left to run."""
        after = UUID(int=0)
        while unfinished := await self._list_unfinished(after):
            for batch_id, total, is_cancelled in unfinished:
                if is_cancelled:
                    await self._cancel_queued(batch_id, total)
            async with self._sessions.begin() as session:
                await batches.finish(session, [batch_id for batch_id, _, _ in unfinished])
            after = unfinished[-1][0]

    async def _list_unfinished(self, after: UUID) -> list[tuple[UUID, int, bool]]:
        async with self._sessions.begin() as session:
            return await batches.list_unfinished(session, after=after, limit=BATCHES_PER_ROUND_MAX)

    async def _cancel_queued(self, batch_id: UUID, total: int) -> None:
        for start in range(0, total, CANCEL_CHUNK):
            async with self._sessions.begin() as session:
                await queue.cancel_queued(session, batch_id, start=start, stop=start + CANCEL_CHUNK)

    async def _erase_batches(self) -> None:
        async with self._sessions.begin() as session:
            deleted = await batches.list_deleted(session, limit=BATCHES_PER_ROUND_MAX)
        for batch_id in deleted:
            is_left = True
            while is_left:
                async with self._sessions.begin() as session:
                    is_left = await batches.erase(session, batch_id, limit=ERASE_CHUNK) > 0

    async def _rescue_stranded(self) -> None:
        async with self._sessions.begin() as session:
            if stranded := await hosts.lock_stranded(session, limit=HOSTS_CHUNK):
                await queue.rescue(session, stranded)

    async def _forget_hosts(self) -> None:
        after: tuple[int, str] | None = (-1, "")
        while after is not None:
            async with self._sessions.begin() as session:
                after = await hosts.forget_parked(session, after=after, limit=HOSTS_CHUNK)
