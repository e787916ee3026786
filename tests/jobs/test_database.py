"""Connections of the driver that are lent: whole again, or made anew, whatever happened to the one before."""

import asyncio

import asyncpg
import pytest

from app.jobs.database import make_engine, make_lender
from tests.waiting import until


async def test_a_lent_connection_is_lent_again(database_url: str) -> None:
    engine = make_engine(database_url, pool_size=1)
    lend = make_lender(engine)
    pids = set()
    for _ in range(3):
        async with lend() as driver:
            assert not driver.is_in_transaction()
            pids.add(await driver.fetchval("SELECT pg_backend_pid()"))
    assert len(pids) == 1
    await engine.dispose()


async def test_a_statement_that_is_cancelled_ends_its_connection(database_url: str) -> None:
    """And the next use has another: with the first it would wait for what came of the statement."""
    engine = make_engine(database_url, pool_size=1)
    lend = make_lender(engine)

    async def sleep() -> None:
        async with lend() as driver:
            pids.append(await driver.fetchval("SELECT pg_backend_pid()"))
            await driver.execute("SELECT pg_sleep(10)")

    pids: list[int] = []
    for _ in range(3):
        pids.clear()
        sleeping = asyncio.create_task(sleep())
        await until(lambda: pids)
        sleeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sleeping
        async with asyncio.timeout(5), lend() as driver:
            assert await driver.fetchval("SELECT pg_backend_pid()") != pids[0]
    await engine.dispose()


async def test_a_statement_that_fails_costs_its_connection_and_no_place(database_url: str) -> None:
    engine = make_engine(database_url, pool_size=1)
    lend = make_lender(engine)
    for _ in range(3):
        with pytest.raises(asyncpg.DivisionByZeroError):
            async with lend() as driver:
                await driver.fetchval("SELECT 1 / 0")
    async with lend() as driver:
        assert await driver.fetchval("SELECT 1") == 1
    await engine.dispose()
