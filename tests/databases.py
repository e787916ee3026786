"""Making and dropping whole databases, and the embedded server that the tests run on."""

import asyncio
import threading
from pathlib import Path

import asyncpg
from sqlalchemy import make_url

from app.jobs import embedded


class ServerThread:
    """The embedded PostgreSQL, kept by a loop of its own while the tests come and go with theirs."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.url = ""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        self._ready.wait(60)
        return self.url

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            async with embedded.running(self.data_dir) as self.url:
                self._ready.set()
                await self._stop.wait()
        finally:
            self._ready.set()


def with_database(url: str, name: str) -> str:
    """The same server's URL, for another of its databases."""
    return make_url(url).set(database=name).render_as_string(hide_password=False)


async def connect(url: str) -> asyncpg.Connection:
    """A plain connection, beside the product's own."""
    return await asyncpg.connect(url)


async def recreate(server_url: str, name: str, *, template: str) -> None:
    await drop(server_url, name)
    await _administer(server_url, f'CREATE DATABASE "{name}" TEMPLATE "{template}"')


async def drop(server_url: str, name: str) -> None:
    await _administer(server_url, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


async def _administer(server_url: str, statement: str) -> None:
    connection = await connect(server_url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
