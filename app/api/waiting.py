"""Long polls: `Prefer: wait=N` (RFC 7240), by looking again and again, with no connection or transaction held between.

Does not listen to the database: a wait is a few cheap reads, and how many there are at once is bounded.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, TypeVar

from fastapi import Depends, Header
from starlette.requests import Request

WAIT_S_MAX = 60
WAITERS_MAX = 200
LOOK_S_MIN = 0.02
LOOK_S_MAX = 0.5
LOOK_SHARE = 0.05
"""The pause between two looks grows with the time waited already, of which it wastes at most this share."""

_WAIT = re.compile(r"wait\s*=\s*\"?(\d{1,9})\"?", re.IGNORECASE)

T = TypeVar("T")


class Waits:
    """The waiting requests of one process; beyond `waiters_max` a request is answered at once."""

    def __init__(self, *, waiters_max: int = WAITERS_MAX) -> None:
        self.waiters_max = waiters_max
        self.waiter_count = 0
        self._closing = asyncio.Event()

    def close(self) -> None:
        """End all waits: each is answered with what is known, and later ones at once. For a service that stops."""
        self._closing.set()

    async def until(
        self,
        look: Callable[[], Awaitable[T]],
        done: Callable[[T], bool],
        *,
        wait_s: float,
        request: Request,
    ) -> T:
        """Return the first `look` that is `done`, or the last one after `wait_s`, or when the client has gone.

        The request's body must have been read: what else it receives is taken for its end.
        """
        seen = await look()
        if done(seen) or wait_s <= 0 or self.waiter_count >= self.waiters_max:
            return seen
        self.waiter_count += 1
        ends: list[asyncio.Task[object]] = [
            asyncio.create_task(_gone(request)),
            asyncio.create_task(self._closing.wait()),
        ]
        try:
            return await _look_again(look, done, seen, wait_s=wait_s, ends=ends)
        finally:
            self.waiter_count -= 1
            for end in ends:
                end.cancel()


async def _wait_asked(
    prefer: Annotated[
        str | None,
        Header(
            alias="Prefer",
            description="`wait=N`: answer when the batch is finished (with If-None-Match: when it has changed), "
            f"after N seconds at the latest, at most {WAIT_S_MAX} (RFC 7240).",
        ),
    ] = None,
) -> int | None:
    """Read the seconds of `Prefer: wait=N`; None without one. Other preferences are not ours."""
    for preference in (prefer or "").split(","):
        if match := _WAIT.fullmatch(preference.split(";")[0].strip()):
            return min(int(match[1]), WAIT_S_MAX)
    return None


WaitAsked = Annotated[int | None, Depends(_wait_asked)]
"""Seconds the client is ready to wait, None when it did not say."""


def applied(wait_s: int | None) -> dict[str, str]:
    """Say in the answer which wait was honoured."""
    return {} if wait_s is None else {"Preference-Applied": f"wait={wait_s}"}


async def _look_again(
    look: Callable[[], Awaitable[T]],
    done: Callable[[T], bool],
    seen: T,
    *,
    wait_s: float,
    ends: Sequence[asyncio.Task[object]],
) -> T:
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not done(seen) and (left_s := began + wait_s - loop.time()) > 0:
        interval_s = min(LOOK_S_MAX, LOOK_S_MIN + LOOK_SHARE * (loop.time() - began))
        ended, _ = await asyncio.wait(ends, timeout=min(interval_s, left_s), return_when=asyncio.FIRST_COMPLETED)
        if ended:
            break
        seen = await look()
    return seen


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
