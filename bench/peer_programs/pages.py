"""What each asynchronous peer does with a URL: fetch the page with aiohttp, store its status and body in PostgreSQL.

One session and one pool of connections a process: the cheapest that their documentation recommends.
"""

import os

import aiohttp
import asyncpg

SAVE = "INSERT INTO page (url, status, body) VALUES ($1, $2, $3)"


class Pages:
    """The clients of one process."""

    def __init__(self, session: aiohttp.ClientSession, database: asyncpg.Pool) -> None:
        self._session = session
        self._database = database

    @classmethod
    async def open(cls) -> "Pages":
        """Connect to the database of `DATABASE_URL`."""
        return cls(aiohttp.ClientSession(), await asyncpg.create_pool(os.environ["DATABASE_URL"]))

    async def keep(self, url: str) -> None:
        """Fetch one page and store it."""
        async with self._session.get(url) as response:
            body = await response.read()
        await self._database.execute(SAVE, url, response.status, body)

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()
        await self._database.close()
