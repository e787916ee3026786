"""Procrastinate: an asynchronous task, and what submits to it, many at once."""

import asyncio
import functools
import os
from collections.abc import Sequence

from pages import Pages
from procrastinate import App, PsycopgConnector

app = App(connector=PsycopgConnector(conninfo=os.environ["DATABASE_URL"]))


@functools.cache
def opening() -> asyncio.Task[Pages]:
    """The clients of this process, opened with its first job."""
    return asyncio.create_task(Pages.open())


@app.task
async def keep_page(url: str) -> None:
    await (await opening()).keep(url)


async def submit(urls: Sequence[str]) -> None:
    async with app.open_async():
        await keep_page.batch_defer_async(*({"url": url} for url in urls))
