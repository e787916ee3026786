"""Hints by NOTIFY: to workers that there is work, to the API that a batch is finished.

They may be lost: polling finds the same, some seconds later at most.
"""

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs.database import DATABASE_ERRORS, connect

WORK = "fetchpool_jobs"
FINISHED = "fetchpool_finished"
"""Channels; on the latter `batches.finish` says the id of the batch."""
LISTEN_AGAIN_S = 5.0
ASK_S = 15.0
"""Longest pause between two questions whether hints are heard: the longest that a lost one keeps a job waiting."""


async def give(session: AsyncSession) -> None:
    """Hint to the workers that there is work; a transaction of its own, for NOTIFY commits under a global lock."""
    await session.execute(text("SELECT pg_notify(:channel, '')"), {"channel": WORK})


class Listener:
    """One process's ear for hints. `is_hearing`: a hint given now would arrive, so that polls may be rare.

    `asks_at`, of `time.monotonic`, is when it makes sure of that next, and all else that a process at rest looks at is
    best looked at just then: to wake is what costs.
    """

    def __init__(self, channel: str = WORK) -> None:
        self._channel = channel
        self.is_hearing = False
        self.asks_at = 0.0

    async def hear(self, url: str, *wakes: Callable[[str], None]) -> None:
        """Call `wakes` with what every hint says, for ever, over a connection of its own.

        With an empty string when hearing begins or ends: anything may have been missed. Not through PgBouncer, which
        has no LISTEN.
        """

        def wake_all(hint: str) -> None:
            for wake in wakes:
                wake(hint)

        while True:
            with suppress(*DATABASE_ERRORS):
                await self._hear_until_lost(url, wake_all)
            await asyncio.sleep(LISTEN_AGAIN_S)

    async def _hear_until_lost(self, url: str, wake_all: Callable[[str], None]) -> None:
        """Ask now and then whether the connection lives: one that died silently would just never hint again."""
        connection = await connect(url)
        closed = asyncio.Event()
        connection.add_termination_listener(lambda _: closed.set())
        try:
            await connection.add_listener(self._channel, lambda _connection, _pid, _channel, hint: wake_all(hint))
            self._plan_ask()
            self.is_hearing = True
            wake_all("")
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self.asks_at - time.monotonic()):
                        await closed.wait()
                self._plan_ask()
                await connection.execute("SELECT 1")
        finally:
            self.is_hearing = False
            wake_all("")
            connection.terminate()

    def _plan_ask(self) -> None:
        self.asks_at = time.monotonic() + ASK_S * random.uniform(0.85, 1.0)
