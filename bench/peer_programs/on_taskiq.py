"""taskiq: a task on Redis streams with its clients in the broker's state, and what submits to it."""

import os
from collections.abc import Sequence
from typing import Annotated

from pages import Pages
from taskiq import Context, TaskiqDepends, TaskiqEvents, TaskiqState
from taskiq_redis import RedisStreamBroker

broker = RedisStreamBroker(url=f"redis://127.0.0.1:{os.environ['REDIS_PORT']}")


@broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def startup(state: TaskiqState) -> None:
    state.pages = await Pages.open()


@broker.on_event(TaskiqEvents.WORKER_SHUTDOWN)
async def shutdown(state: TaskiqState) -> None:
    await state.pages.close()


@broker.task
async def keep_page(url: str, context: Annotated[Context, TaskiqDepends()]) -> None:
    await context.state.pages.keep(url)


async def submit(urls: Sequence[str]) -> None:
    await broker.startup()
    for url in urls:
        await keep_page.kiq(url)
    await broker.shutdown()
