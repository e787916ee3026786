"""The stories again, through a real PgBouncer in transaction mode, and what must not stay in its connections."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from app.jobs.database import Sessions, make_engine, make_lender, make_sessions
from app.jobs.migration import migrate
from tests import debian, web
from tests.databases import connect, drop, recreate, with_database
from tests.services import data_folder, serving
from tests.test_path import answer, follow_a_batch
from tests.waiting import until

pytestmark = debian.needs_pgbouncer

BOUNCED: dict[str, Any] = {"FETCHPOOL_PGBOUNCER": "1"}


@pytest.fixture
def data_dir() -> Iterator[Path]:
    with data_folder() as folder:
        yield folder


@pytest.fixture
async def bounced_url(database_url: str, data_dir: Path) -> AsyncIterator[str]:
    """The way through PgBouncer to a fresh, migrated database."""
    async with debian.pgbouncer(database_url, data_dir.parent) as url:
        yield url


@pytest.fixture
async def bounced(bounced_url: str) -> AsyncIterator[Sessions]:
    engine = make_engine(bounced_url, pgbouncer=True, pool_size=20)
    yield make_sessions(engine)
    await engine.dispose()


async def test_the_path_of_a_batch_through_pgbouncer(bounced_url: str, data_dir: Path) -> None:
    async with (
        web.serving(answer) as site,
        serving(data_dir, workers=2, DATABASE_URL=bounced_url, **BOUNCED) as service,
    ):
        await follow_a_batch(service, site)


async def test_a_batch_survives_the_kill_of_a_worker_through_pgbouncer(bounced_url: str, data_dir: Path) -> None:
    settings = BOUNCED | {"DATABASE_URL": bounced_url, "FETCHPOOL_LEASE_S": "2"}
    async with web.serving() as site, serving(data_dir, workers=2, **settings) as service:
        killed = min(await service.worker_is_up(2))
        urls = [site.url(f"/held/{n}", address=f"127.0.0.{n % 10 + 1}") for n in range(200)]
        batch = await service.post(urls)
        await site.wait_for_hits(80)
        os.kill(killed, signal.SIGKILL)
        site.gate.set()
        finished = await service.finished(batch["id"])
        assert finished["counts"]["succeeded"] == 200
        jobs = await service.jobs(batch["id"])
        assert [job["url"] for job in jobs] == urls
        assert {job["attempts"] for job in jobs} == {1}
        await until(lambda: len(service.worker_pids() - {killed}) == 2)


async def test_many_may_migrate_at_once_through_pgbouncer(server_url: str, data_dir: Path) -> None:
    name = f"fetchpool_bounced_{uuid4().hex}"
    await recreate(server_url, name, template="template0")
    async with debian.pgbouncer(with_database(server_url, name), data_dir.parent) as url:
        await asyncio.gather(*(migrate(url, pgbouncer=True) for _ in range(5)))
    connection = await connect(with_database(server_url, name))
    assert await connection.fetchval("SELECT count(*) FROM job") == 0
    await connection.close()
    await drop(server_url, name)


async def test_statements_through_pgbouncer_have_their_deadlines(bounced_url: str, bounced: Sessions) -> None:
    """Of the transaction only: the connection serves others next, such as those of an operator with psql."""
    settings = "SELECT current_setting('statement_timeout'), current_setting('lock_timeout'), " + (
        "current_setting('idle_in_transaction_session_timeout')"
    )
    async with bounced.begin() as session:
        assert tuple((await session.execute(text(settings))).one()) == ("15s", "10s", "5s")
    async with make_lender(bounced.kw["bind"])() as driver:
        assert tuple(await driver.fetchrow(settings)) == ("15s", "10s", "5s")
    others = await connect(bounced_url)
    assert tuple(await others.fetchrow(settings)) == ("0", "0", "0")
    await others.close()


async def test_no_prepared_statement_stays_behind_in_pgbouncers_connections(bounced: Sessions) -> None:
    """A driver closes one on whatever connection it has next, and the server keeps it on the other for ever."""

    async def ask() -> None:
        for _ in range(20):
            async with bounced.begin() as session:
                assert await session.scalar(text("SELECT CAST(:n AS int)"), {"n": 1}) == 1

    await asyncio.gather(*(ask() for _ in range(20)))
    async with bounced.begin() as session:
        assert await session.scalar(text("SELECT count(*) FROM pg_prepared_statements")) == 0
