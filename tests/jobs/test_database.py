"""Connections of the driver that are lent: whole again, or made anew, whatever happened to the one before."""

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from app.jobs.database import LendDriver, make_engine, make_lender

PID = "SELECT pg_backend_pid()"


@pytest.fixture(params=[False, True], ids=["direct", "pgbouncer"])
def pgbouncer(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
async def lend(database_url: str, pgbouncer: bool) -> AsyncIterator[LendDriver]:
    engine = make_engine(database_url, pgbouncer=pgbouncer, pool_size=1)
    yield make_lender(engine)
    await engine.dispose()


async def test_a_lent_connection_is_lent_again(lend: LendDriver) -> None:
    pids = set()
    for _ in range(3):
        async with lend() as driver:
            pids.add(await driver.fetchval(PID))
    assert len(pids) == 1


async def test_only_behind_pgbouncer_it_is_in_a_transaction(lend: LendDriver, pgbouncer: bool) -> None:
    async with lend() as driver:
        assert driver.is_in_transaction() == pgbouncer


async def test_a_statement_that_is_cancelled_ends_its_connection(lend: LendDriver) -> None:
    """And the next use has another: with the first it would wait for what came of the statement."""

    async def sleep(begun: asyncio.Future[int]) -> None:
        async with lend() as driver:
            begun.set_result(await driver.fetchval(PID))
            await driver.execute("SELECT pg_sleep(10)")

    for _ in range(3):
        begun = asyncio.get_running_loop().create_future()
        sleeping = asyncio.create_task(sleep(begun))
        pid = await begun
        sleeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sleeping
        async with asyncio.timeout(5), lend() as driver:
            assert await driver.fetchval(PID) != pid


async def test_a_statement_that_fails_costs_its_connection_and_no_place(lend: LendDriver) -> None:
    async def divide() -> None:
        async with lend() as driver:
            pids.add(await driver.fetchval(PID))
            await driver.fetchval("SELECT 1 / 0")

    pids: set[int] = set()
    for _ in range(3):
        with pytest.raises(asyncpg.DivisionByZeroError):
            await divide()
    assert len(pids) == 3


async def test_one_lost_connection_is_a_sign_that_all_are(database_url: str) -> None:
    engine = make_engine(database_url, pool_size=5)
    lend = make_lender(engine)

    async def ask(driver_is_lost: bool = False) -> int:
        async with lend() as driver:
            pid: int = await driver.fetchval(PID)
            if driver_is_lost:
                driver.terminate()
            await driver.fetchval("SELECT pg_sleep(0.1)")  # so that each has one of its own
            return pid

    before = set(await asyncio.gather(*(ask() for _ in range(5))))
    with pytest.raises(asyncpg.InterfaceError):
        await ask(driver_is_lost=True)
    after = set(await asyncio.gather(*(ask() for _ in range(5))))
    assert len(before) == len(after) == 5
    assert not before & after
    await engine.dispose()
