"""Hints by NOTIFY: to workers that there is work, to the API that a batch is finished.

They may be lost: looks find the same, for work a quarter of a minute later at most.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs.database import DATABASE_ERRORS, connect

WORK = "fetchpool_jobs"
FINISHED = "fetchpool_finished"
"""Channels; on the latter `batches.finish` says the id of the batch."""
LISTEN_AGAIN_S = 5.0
ASK_S = 15.0
"""Longest pause between two questions whether there is work: the longest that a lost hint keeps a job waiting."""
PING_S = 180.0
"""The same where whoever waits looks for himself too, so that a lost hint costs little: as long as other rests."""
ANSWER_S = 5.0
"""For the answer; without one the connection has died, or something else is wrong, and nobody may rest on hints."""

Ask = Callable[[asyncpg.Connection], Awaitable[bool]]
"""A question, over the listener's connection, whether there is anything that a hint should have told of."""


async def give(session: AsyncSession) -> None:
    """Hint to the workers that there is work; a transaction of its own, for NOTIFY commits under a global lock."""
    await session.execute(text("SELECT pg_notify(:channel, '')"), {"channel": WORK})


class Listener:
    """One process's ear for hints. `is_hearing`: a hint given now would arrive, so that polls may be rare."""

    def __init__(self, channel: str = WORK) -> None:
        self._channel = channel
        self.is_hearing = False

    async def hear(self, url: str, *wakes: Callable[[str], None], ask: Ask | None = None) -> None:
        """Call `wakes` with what every hint says, for ever, over a connection of its own.

        With an empty string when hearing begins or ends, and when the answer to `ask`, put every `ASK_S`, is yes:
        anything may have been missed. Not through PgBouncer, which has no LISTEN.
        """

        def wake_all(hint: str) -> None:
            for wake in wakes:
                wake(hint)

        while True:
            with suppress(*DATABASE_ERRORS):
                await self._hear_until_lost(url, wake_all, ask)
            await asyncio.sleep(LISTEN_AGAIN_S)

    async def _hear_until_lost(self, url: str, wake_all: Callable[[str], None], ask: Ask | None) -> None:
        """Ask now and then: a connection that died silently would just never hint again, and a hint may be lost."""
        connection = await connect(url)
        closed = asyncio.Event()
        connection.add_termination_listener(lambda _: closed.set())
        try:
            await connection.add_listener(self._channel, lambda _connection, _pid, _channel, hint: wake_all(hint))
            self.is_hearing = True
            wake_all("")
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout((ASK_S if ask else PING_S) * random.uniform(0.85, 1.0)):
                        await closed.wait()
                async with asyncio.timeout(ANSWER_S):
                    may_have_missed = await (ask or _ping)(connection)
                if may_have_missed:
                    wake_all("")
        finally:
            self.is_hearing = False
            wake_all("")
            connection.terminate()


async def _ping(connection: asyncpg.Connection) -> bool:
    await connection.execute("SELECT 1")
    return False
