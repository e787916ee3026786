"""Clients that submit, poll, cancel and delete while all goes wrong, and what they were promised: the first ledger."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx2

from chaos.target import Target, Way

HOSTS = 20
BATCH_JOBS_MAX = 200
WAYS = (*[Way.FINE] * 6, *[Way.SLOW] * 3, *[Way.POST] * 2, Way.FLAKY, Way.GONE)
FOLLOWS = 0.6
CANCELS = 0.2
DELETES = 0.1
TIMEOUT_S = 10.0
PAUSE_S = 0.2
ENDED = frozenset({"completed", "cancelled"})
EXCUSED = frozenset({503})


@dataclass
class Promise:
    """A batch as its client knows it; without an `id` the client does not know whether it was accepted."""

    name: str
    urls: list[str]
    id: str | None = None
    cancelled_at: float | None = None
    must_be_cancelled: bool = False
    cancel_was_sent: bool = False
    is_deleted: bool = False
    delete_was_sent: bool = False
    ended: dict[str, Any] | None = None
    ended_count: int = 0

    def paths(self) -> list[str]:
        """The path of each URL, as the target knows it."""
        return [urlsplit(url).path for url in self.urls]


@dataclass
class Ledger:
    """Every promise, every kind of answer, and what no client should have seen."""

    promises: list[Promise] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    @property
    def job_count(self) -> int:
        """How many jobs were submitted, accepted or not."""
        return sum(len(promise.urls) for promise in self.promises)


class Client:
    """One client; its choices come from its own seed."""

    def __init__(self, number: int, seed: int, *, url: str, target: Target, ledger: Ledger) -> None:
        self._number = number
        self._dice = random.Random(f"{seed}/{number}")
        self._http = httpx2.AsyncClient(base_url=url, timeout=TIMEOUT_S)
        self._target = target
        self._ledger = ledger

    async def run(self, *, until: float, jobs_max: int) -> None:
        """Submit batches one after the other until that time or number of jobs, and follow most of them."""
        async with self._http:
            job_count = batch_count = 0
            while time.monotonic() < until and job_count < jobs_max:
                promise = self._make(batch_count, jobs_max - job_count)
                batch_count, job_count = batch_count + 1, job_count + len(promise.urls)
                await self._submit(promise)
                if promise.id is not None and self._dice.random() < FOLLOWS:
                    await self._follow(promise, until=until)

    def _make(self, number: int, jobs_max: int) -> Promise:
        name = f"{self._number}-{number}"
        count = min(jobs_max, self._dice.randint(1, BATCH_JOBS_MAX))
        ways = self._dice.choices(WAYS, k=count)
        urls = [
            self._target.url(f"/{name}/{position}/{way}", host=self._dice.randint(1, HOSTS))
            for position, way in enumerate(ways)
        ]
        promise = Promise(name, urls)
        self._ledger.promises.append(promise)
        return promise

    async def _submit(self, promise: Promise) -> None:
        jobs = [{"url": url, "method": "POST" if url.endswith(Way.POST) else "GET"} for url in promise.urls]
        answer = await self._call("POST", "/v1/batches", expects=202, json={"name": promise.name, "jobs": jobs})
        if answer is not None:
            promise.id = answer.json()["id"]

    async def _follow(self, promise: Promise, *, until: float) -> None:
        """Poll until it has ended, or the run has; cancel some on the way, delete some at the end."""
        cancels_after_s = self._dice.uniform(0, 3) if self._dice.random() < CANCELS else None
        submitted_at = time.monotonic()
        while promise.ended is None and time.monotonic() < until:
            if cancels_after_s is not None and time.monotonic() >= submitted_at + cancels_after_s:
                cancels_after_s = None
                await self._cancel(promise)
            await self.poll(promise)
            await asyncio.sleep(self._dice.uniform(0, 2 * PAUSE_S))
        if promise.ended is not None and self._dice.random() < DELETES:
            await self._delete(promise)

    async def poll(self, promise: Promise) -> None:
        """Look once, and compare with what was seen before."""
        answer = await self._call("GET", f"/v1/batches/{promise.id}", expects=200)
        if answer is None:
            return
        seen = answer.json()
        counts = dict(seen["counts"])
        total = counts.pop("total")
        ended_count = counts["succeeded"] + counts["failed"] + counts["cancelled"]
        if total != len(promise.urls) or sum(counts.values()) != total or ended_count < promise.ended_count:
            self._ledger.faults.append(f"{promise.name}: counts do not add up, or went back: {seen['counts']}")
        promise.ended_count = ended_count
        if seen["status"] in ENDED:
            promise.ended = seen

    async def _cancel(self, promise: Promise) -> None:
        promise.cancel_was_sent = True
        answer = await self._call("POST", f"/v1/batches/{promise.id}/cancel", expects=202)
        if answer is not None:
            promise.cancelled_at = time.monotonic()
            promise.must_be_cancelled = answer.json()["status"] not in ENDED

    async def _delete(self, promise: Promise) -> None:
        promise.delete_was_sent = True
        promise.is_deleted = await self._call("DELETE", f"/v1/batches/{promise.id}", expects=204) is not None

    async def _call(self, method: str, path: str, *, expects: int, json: Any = None) -> httpx2.Response | None:
        """Send one request; `None` when it had no answer or one that says to come back."""
        try:
            answer = await self._http.request(method, path, json=json)
        except httpx2.TransportError as error:
            self._ledger.answers[type(error).__name__] += 1
            await asyncio.sleep(PAUSE_S)
            return None
        self._ledger.answers[str(answer.status_code)] += 1
        if answer.status_code == expects:
            return answer
        if answer.status_code not in EXCUSED or "Retry-After" not in answer.headers:
            self._ledger.faults.append(f"{method} {path} was answered {answer.status_code}: {answer.text[:300]}")
        await asyncio.sleep(PAUSE_S)
        return None
