"""A real PostgreSQL for every test that asks for one, and a fresh migrated database in it for each test."""

import asyncio
import itertools
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import uvloop
from sqlalchemy import make_url

from app.jobs.database import Sessions, make_engine, make_sessions
from app.jobs.migration import migrate
from tests.databases import ServerThread, drop, recreate, with_database

NUMBERS = itertools.count(1)
FOLDERS_ON_UVLOOP = ("fetch", "jobs", "worker")
"""Of tests of what workers run."""
FILES_ON_ASYNCIO = ("test_database.py", "test_embedded.py", "test_processes.py")
"""In them, of tests of what the service runs."""


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Give each test the event loop of the process that runs what it tests."""
    if item.path.parent.name in FOLDERS_ON_UVLOOP and item.path.name not in FILES_ON_ASYNCIO:
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """A server to make databases in: `FETCHPOOL_TEST_DATABASE_URL`, or an embedded one for this run."""
    if (url := os.environ.get("FETCHPOOL_TEST_DATABASE_URL")) is not None:
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="fetchpool-test-") as folder:
        # As root the server runs as a user of its own, who must be let in; pytest's own folders keep others out.
        Path(folder).chmod(0o755)
        with ServerThread(Path(folder)) as url:
            yield url


@pytest.fixture(scope="session")
def template_url(server_url: str) -> Iterator[str]:
    """A migrated database that is copied for each test; its name carries the process, for several may run at once."""
    name = f"fetchpool_template_{os.getpid()}"
    asyncio.run(recreate(server_url, name, template="template0"))
    url = with_database(server_url, name)
    asyncio.run(migrate(url))
    yield url
    asyncio.run(drop(server_url, name))


@pytest.fixture
async def database_url(server_url: str, template_url: str) -> AsyncIterator[str]:
    """The URL of a fresh, migrated, empty database."""
    name = f"fetchpool_test_{os.getpid()}_{next(NUMBERS)}"
    await recreate(server_url, name, template=make_url(template_url).database or "")
    yield with_database(server_url, name)
    await drop(server_url, name)


@pytest.fixture
async def sessions(database_url: str) -> AsyncIterator[Sessions]:
    """Sessions on a fresh database."""
    engine = make_engine(database_url, pool_size=10)
    yield make_sessions(engine)
    await engine.dispose()
