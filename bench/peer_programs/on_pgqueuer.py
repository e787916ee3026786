"""PgQueuer: an entrypoint with shared resources as in its documentation, and what submits to it, many at once."""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import asyncpg
from pages import Pages
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Context, Job
from pgqueuer.queries import Queries


@asynccontextmanager
async def main() -> AsyncIterator[PgQueuer]:
    """What `pgq run` runs."""
    connection = await asyncpg.connect(os.environ["DATABASE_URL"])
    pages = await Pages.open()
    pgq = PgQueuer(AsyncpgDriver(connection), resources={"pages": pages})

    @pgq.entrypoint("keep_page", accepts_context=True)
    async def keep_page(job: Job, context: Context) -> None:
        assert job.payload is not None
        await context.resources["pages"].keep(job.payload.decode())

    yield pgq
    await pages.close()
    await connection.close()


async def submit(urls: Sequence[str]) -> None:
    connection = await asyncpg.connect(os.environ["DATABASE_URL"])
    queries = Queries(AsyncpgDriver(connection))
    count = len(urls)
    await queries.enqueue(["keep_page"] * count, [url.encode() for url in urls], [0] * count)
    await connection.close()
