"""Ends connections that died without a word: a machine lost its power, or a firewall forgot them.

Such a connection is never closed, so a statement on it waits for its whole deadline, though a new one would be answered
at once. So one that is in use for long is asked after on another. Where PostgreSQL cannot be reached at all, nothing is
ended: there is nothing better to be had.

PostgreSQL does not know either. It keeps the locks of a transaction whose client stopped in the middle of a statement,
and no time-out of its own ends that. Where such locks are passed over nobody waits for them, so upkeep looks too.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from app.jobs.database import APPLICATION, COMMAND_TIMEOUT_S, DATABASE_ERRORS, connect

LOOK_EVERY_S = 0.5
IN_USE_S = 1.5
"""Transactions take milliseconds; one that lasts this long is asked after."""
ASK_TIMEOUT_S = 2.0

# A server that works on a statement is active; one that has just ended it may have its answer on the way. A statement
# of which only the first message came is active too, while its server waits for us. So it is all through a COPY, which
# is therefore left to the time of a statement.
AT_WORK = """
    SELECT pid FROM pg_stat_activity
    WHERE pid = ANY($1::int[]) AND (
        state_change > now() - interval '1 second'
        OR state = 'active' AND (wait_event IS DISTINCT FROM 'ClientRead' OR query LIKE 'COPY %')
    )
"""

# $1 have just been given up. The others should long have sent the rest of a statement, or taken its answer; whoever
# should is frozen or cut off.
END = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE application_name = $3 AND usename = current_user AND datname = current_database() AND (
        pid = ANY($1::int[]) AND state <> 'idle' AND state_change < now() - interval '1 second'
        OR state = 'active' AND wait_event IN ('ClientRead', 'ClientWrite')
            AND state_change < now() - make_interval(secs => $2)
    )
"""
UNFINISHED_S_MAX = COMMAND_TIMEOUT_S + 5.0


async def end_unfinished(session: AsyncSession) -> None:
    """End the transactions of clients that stopped in the middle of a statement; behind PgBouncer none can be told."""
    await (await session.connection()).exec_driver_sql(END, ([], UNFINISHED_S_MAX, APPLICATION))


@asynccontextmanager
async def watching(engine: AsyncEngine, url: str) -> AsyncIterator[None]:
    """Watch the engine's connections to this URL; not behind PgBouncer, where no server is a connection's own."""
    watch = asyncio.create_task(_Watch(engine, url).run())
    try:
        yield
    finally:
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch


class _Watch:
    """A timer for each use, so that a process at rest is not woken to look."""

    def __init__(self, engine: AsyncEngine, url: str) -> None:
        self._url = url
        self._in_use: dict[asyncpg.Connection, asyncio.TimerHandle] = {}
        self._long_in_use: set[asyncpg.Connection] = set()
        self._is_due = asyncio.Event()
        event.listen(engine.sync_engine, "checkout", self._note_checkout)
        event.listen(engine.sync_engine, "checkin", self._note_checkin)

    async def run(self) -> None:
        """Look for ever, while anything is in use for long."""
        while True:
            await self._is_due.wait()
            if long_in_use := self._find_long_in_use():
                with suppress(TimeoutError, *DATABASE_ERRORS):
                    await self._end_silent(long_in_use)
                await asyncio.sleep(LOOK_EVERY_S)
            else:
                self._is_due.clear()

    def _find_long_in_use(self) -> dict[asyncpg.Connection, asyncio.TimerHandle]:
        """Return the connections, each with its present use."""
        for each in [each for each in self._in_use if each.is_closed()]:
            self._end_use(each)
        return {each: use for each, use in self._in_use.items() if each in self._long_in_use}

    async def _end_silent(self, uses: Mapping[asyncpg.Connection, asyncio.TimerHandle]) -> None:
        pids = {each: each.get_server_pid() for each in uses}  # which a connection that has ended does not tell
        async with asyncio.timeout(ASK_TIMEOUT_S):
            connection = await connect(self._url)
            silent = []
            try:
                at_work = await _find_at_work(connection, pids.values())
                silent = [each for each in uses if self._in_use.get(each) is uses[each] and pids[each] not in at_work]
                await connection.execute(END, [pids[each] for each in silent], UNFINISHED_S_MAX, APPLICATION)
            finally:
                connection.terminate()
                for each in silent:
                    if self._in_use.get(each) is uses[each]:
                        each.terminate()  # its user has an error now, and the engine makes all its connections anew

    def _note_checkout(self, adapted: Any, *_: object) -> None:
        connection = adapted.driver_connection
        self._in_use[connection] = asyncio.get_running_loop().call_later(IN_USE_S, self._note_long_use, connection)

    def _note_long_use(self, connection: asyncpg.Connection) -> None:
        self._long_in_use.add(connection)
        self._is_due.set()

    def _note_checkin(self, adapted: Any, *_: object) -> None:
        if adapted is not None:  # it was given up
            self._end_use(adapted.driver_connection)

    def _end_use(self, connection: asyncpg.Connection) -> None:
        if (use := self._in_use.pop(connection, None)) is not None:
            use.cancel()
            self._long_in_use.discard(connection)


async def _find_at_work(connection: asyncpg.Connection, pids: Collection[int]) -> set[int]:
    own = connection.get_server_pid()
    at_work = {row["pid"] for row in await connection.fetch(AT_WORK, [*pids, own])}
    # Where not even this one is seen (a proxy with pids of its own, no tracking), nothing can be told.
    return at_work if own in at_work else {*pids}
