"""Long polls: `Prefer: wait=N` (RFC 7240), by looking again and again, with no connection or transaction held between.

A wait is a few cheap reads, and how many there are at once is bounded. Hints, as far as they are heard, say when to
look for the end of a batch; they are trusted with nothing else.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Annotated, TypeVar
from uuid import UUID

from fastapi import Header
from starlette.requests import Request

from app.jobs.hints import FINISHED, Listener

WAIT_S_MAX = 60
WAITERS_MAX = 200
LOOK_S_MIN = 0.02
LOOK_S_MAX = 0.5
LOOK_SHARE = 0.05
"""The pause between two looks grows with the time waited already, of which it wastes at most this share."""
HINTED_LOOK_S = 1.0
"""The pause while hints of what is waited for are heard: the longest that a lost one keeps a client waiting."""

_WAIT = re.compile(r"wait\s*=\s*\"?(\d{1,9})\"?", re.IGNORECASE)

T = TypeVar("T")


class Waits:
    """The waiting requests of one process; beyond `waiters_max` a request is answered at once."""

    def __init__(self) -> None:
        self.waiters_max = WAITERS_MAX
        self.waiter_count = 0
        self.listener = Listener(FINISHED)
        self._closing = asyncio.Event()
        self._hints: dict[str, list[asyncio.Event]] = {}

    async def hear(self, url: str) -> None:
        """Hear of finished batches, for ever, and look then; not through PgBouncer."""
        await self.listener.hear(url, self._wake)

    def _wake(self, batch_id: str) -> None:
        """Have the waits for the end of this batch look now; with an empty string, all waits."""
        for hinted in self._hints.get(batch_id, ()) if batch_id else chain.from_iterable(self._hints.values()):
            hinted.set()

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
        end_of: UUID | None = None,
    ) -> T:
        """Return the first `look` that is `done`, or the last one after `wait_s`, or when the client has gone.

        `end_of`: nothing but the end of this batch is waited for. The request's body must have been read: what else it
        receives is taken for its end.
        """
        if wait_s <= 0 or self.waiter_count >= self.waiters_max:
            return await look()
        self.waiter_count += 1
        ends: list[asyncio.Task[object]] = [
            asyncio.create_task(_gone(request)),
            asyncio.create_task(self._closing.wait()),
        ]
        try:
            with self._hinted(end_of) as hinted:  # before the first look, or the end might come between them
                seen = await look()
                began = time.monotonic()
                while not done(seen) and (left_s := began + wait_s - time.monotonic()) > 0:
                    pause_s = self._pause_s(time.monotonic() - began, end_of)
                    if await _ended(ends, hinted, within_s=min(pause_s, left_s)):
                        break
                    seen = await look()
                return seen
        finally:
            self.waiter_count -= 1
            for end in ends:
                end.cancel()

    def _pause_s(self, waited_s: float, end_of: UUID | None) -> float:
        if end_of is not None and self.listener.is_hearing:
            return HINTED_LOOK_S
        return min(LOOK_S_MAX, LOOK_S_MIN + LOOK_SHARE * waited_s)

    @contextmanager
    def _hinted(self, batch_id: UUID | None) -> Iterator[asyncio.Event]:
        """Yield what is set at each hint that this batch is finished."""
        key, hinted = str(batch_id), asyncio.Event()
        self._hints.setdefault(key, []).append(hinted)
        try:
            yield hinted
        finally:
            self._hints[key].remove(hinted)
            if not self._hints[key]:
                del self._hints[key]


Prefer = Annotated[
    str | None,
    Header(
        alias="Prefer",
        description="`wait=N`: answer when the batch is finished (with If-None-Match: when it has changed), "
        f"after N seconds at the latest, at most {WAIT_S_MAX} (RFC 7240).",
    ),
]


def wait_asked_s(prefer: str | None) -> int | None:
    """Return the seconds that the client is ready to wait, None when it did not say; other preferences are not ours."""
    for preference in (prefer or "").split(","):
        if match := _WAIT.fullmatch(preference.split(";")[0].strip()):
            return min(int(match[1]), WAIT_S_MAX)
    return None


def applied(wait_s: int | None) -> dict[str, str]:
    """Say in the answer which wait was honoured."""
    return {} if wait_s is None else {"Preference-Applied": f"wait={wait_s}"}


async def _ended(ends: Sequence[asyncio.Task[object]], hinted: asyncio.Event, *, within_s: float) -> bool:
    """Wait for a hint or an end, at most `within_s`; say whether an end came."""
    hint = asyncio.create_task(hinted.wait())
    try:
        await asyncio.wait([*ends, hint], timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        hint.cancel()
    hinted.clear()
    return any(end.done() for end in ends)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
