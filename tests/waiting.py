"""Waiting, in tests, for what happens in its own time."""

import asyncio
import inspect
from collections.abc import Callable

PAUSE_S = 0.01


async def until(condition: Callable[[], object], *, within_s: float = 30.0) -> None:
    """Ask again and again until the condition is true; it may be an asynchronous one."""
    async with asyncio.timeout(within_s):
        while True:
            holds = condition()
            if await holds if inspect.isawaitable(holds) else holds:
                return
            await asyncio.sleep(PAUSE_S)
