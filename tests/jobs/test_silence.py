"""Connections that are in use for long: ended when their server waits, left alone when it works."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
from sqlalchemy import text

from app.jobs import silence
from app.jobs.database import APPLICATION, DATABASE_ERRORS, Sessions, driver, make_engine, make_sessions
from app.jobs.migration import LOCK, migrate
from app.jobs.silence import IN_USE_S, end_unfinished, watching
from tests.databases import connect
from tests.waiting import until


async def test_a_statement_that_takes_long_is_left_to_work(database_url: str) -> None:
    engine = make_engine(database_url)
    async with watching(engine, database_url), make_sessions(engine).begin() as session:
        assert await session.scalar(text("SELECT pg_sleep(:s) IS NULL"), {"s": IN_USE_S + 2}) is False
    await engine.dispose()


async def test_a_copy_whose_rows_come_slowly_is_left_to_come(database_url: str) -> None:
    async def rows() -> AsyncIterator[bytes]:
        yield b"1\n"
        await asyncio.sleep(IN_USE_S + 2)
        yield b"2\n"

    engine = make_engine(database_url)
    async with watching(engine, database_url), make_sessions(engine).begin() as session:
        await session.execute(text("CREATE TEMPORARY TABLE number (number int)"))
        await (await driver(session)).copy_to_table("number", source=rows())
        assert await session.scalar(text("SELECT sum(number) FROM number")) == 3
    await engine.dispose()


async def test_a_connection_whose_server_waits_for_us_is_ended(database_url: str) -> None:
    """As when what we sent never arrived: the server waits for it, and we for the answer."""
    engine = make_engine(database_url)
    async with watching(engine, database_url), make_sessions(engine)() as session:
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        await _has_ended(database_url, pid)
        with pytest.raises(DATABASE_ERRORS):
            await session.scalar(text("SELECT 1"))
        await session.rollback()
        assert await session.scalar(text("SELECT 1")) == 1
    await engine.dispose()


async def test_a_connection_whose_server_waits_for_the_rest_of_a_statement_is_ended(database_url: str) -> None:
    """As when a worker's line went dead between a statement and its values: the server calls itself active."""
    engine = make_engine(database_url)
    async with watching(engine, database_url), make_sessions(engine)() as session:
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        await (await driver(session)).prepare("SELECT 1")
        assert await _state(database_url, pid) == "active"
        await _has_ended(database_url, pid)
        await session.invalidate()
    await engine.dispose()


async def test_a_start_that_is_held_up_ends_a_transaction_whose_client_stopped_within_a_statement(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a program that is frozen, or whose machine is gone, while its line seems to live."""
    monkeypatch.setattr(silence, "UNFINISHED_S_MAX", 1.0)
    async with stopped_within_a_statement(database_url, f"SELECT pg_advisory_xact_lock({LOCK})"), asyncio.timeout(20):
        await migrate(database_url)


async def test_upkeep_ends_such_a_transaction_when_it_is_old_and_nothing_else(
    sessions: Sessions, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def end() -> None:
        async with sessions() as session:
            await end_unfinished(session)

    async with (
        stopped_within_a_statement(database_url, "LOCK TABLE host") as stopped,
        stopped_within_a_statement(database_url, "SELECT 1", application="another") as of_another,
        sessions.begin() as held_up,
    ):
        answer = asyncio.create_task(held_up.scalar(text("SELECT count(*) FROM host")))
        await end()
        assert not answer.done()
        monkeypatch.setattr(silence, "UNFINISHED_S_MAX", 0.0)
        await end()
        assert await answer == 0
        await until(stopped.is_closed)
        assert await _state(database_url, of_another.get_server_pid()) == "active"


async def test_nothing_is_ended_where_no_server_can_be_told(database_url: str) -> None:
    """As behind a proxy that gives pids of its own: none is found."""
    connection = await connect(database_url)
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f'ALTER DATABASE "{name}" SET track_activities = off')
    await connection.close()
    engine = make_engine(database_url)
    async with watching(engine, database_url), make_sessions(engine).begin() as session:
        for _ in range(4):
            assert await session.scalar(text("SELECT pg_sleep(:s) IS NULL"), {"s": IN_USE_S}) is False
    await engine.dispose()


@asynccontextmanager
async def stopped_within_a_statement(
    url: str, before: str, *, application: str = APPLICATION
) -> AsyncIterator[asyncpg.Connection]:
    """A client that has sent the first half of a statement, in a transaction."""
    connection = await asyncpg.connect(url, server_settings={"application_name": application})
    try:
        await connection.execute(f"BEGIN; {before}")
        await connection.prepare("SELECT 1")
        yield connection
    finally:
        connection.terminate()


async def _state(url: str, pid: int) -> str:
    connection = await connect(url)
    try:
        return str(await connection.fetchval("SELECT state FROM pg_stat_activity WHERE pid = $1", pid))
    finally:
        await connection.close()


async def _has_ended(url: str, pid: int) -> None:
    connection = await connect(url)
    try:
        gone = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)"
        await until(lambda: connection.fetchval(gone, pid))
    finally:
        await connection.close()
