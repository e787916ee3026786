"""Hints of new work, by NOTIFY. They may be lost: polling finds the work all the same, a second later at most."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs.database import DATABASE_ERRORS, connect

CHANNEL = "fetchpool_jobs"
LISTEN_AGAIN_S = 5.0
ASK_S = 10.0


async def give(session: AsyncSession) -> None:
    """Hint to the workers that there is work; a transaction of its own, for NOTIFY commits under a global lock."""
    await session.execute(text("SELECT pg_notify(:channel, '')"), {"channel": CHANNEL})


async def hear(url: str, wake: Callable[[], None]) -> None:
    """Call `wake` at every hint, for ever, over a connection of its own; not through PgBouncer, which has no LISTEN."""
    while True:
        with suppress(*DATABASE_ERRORS):
            await _hear_until_lost(url, wake)
        await asyncio.sleep(LISTEN_AGAIN_S)


async def _hear_until_lost(url: str, wake: Callable[[], None]) -> None:
    """Ask now and then whether the connection lives: one that died silently would just never hint again."""
    connection = await connect(url)
    try:
        await connection.add_listener(CHANNEL, lambda *_: wake())
        wake()
        while True:
            await asyncio.sleep(ASK_S)
            await connection.execute("SELECT 1")
    finally:
        connection.terminate()
