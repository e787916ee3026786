"""arq: a worker as in its documentation (a session opened at start-up), and what submits to it."""

import os
from collections.abc import Sequence
from typing import Any

from arq import create_pool
from arq.connections import RedisSettings
from pages import Pages

REDIS = RedisSettings(port=int(os.environ["REDIS_PORT"]))


async def startup(ctx: dict[str, Any]) -> None:
    ctx["pages"] = await Pages.open()


async def shutdown(ctx: dict[str, Any]) -> None:
    await ctx["pages"].close()


async def keep_page(ctx: dict[str, Any], url: str) -> None:
    await ctx["pages"].keep(url)


class WorkerSettings:
    """What `arq` runs."""

    functions = (keep_page,)
    on_startup = startup
    on_shutdown = shutdown
    redis_settings = REDIS
    max_jobs = int(os.environ["IN_FLIGHT"])


async def submit(urls: Sequence[str]) -> None:
    redis = await create_pool(REDIS)
    for url in urls:
        await redis.enqueue_job("keep_page", url)
    await redis.aclose()
