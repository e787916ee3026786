"""Results on their way into the database: gathered for a moment, stored many at once, kept while it is away."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from uuid import UUID

from app.jobs import batches, bodies, database, leases, queue
from app.jobs.database import DATABASE_ERRORS, Sessions, is_refused_value
from app.jobs.leases import BackOff
from app.jobs.values import NO_EVIDENCE, ClaimedJob, Recorded, Result, Returned
from app.outcome import FailureCode

FLUSH_PAUSE_S = 0.05
FLUSH_PAUSE_S_MAX = 0.25
"""Longest pause, while results keep coming: a flush of 100 costs a worker twice as much for each as one of 400."""
MORE_PAUSE_S = 0.02
MORE_MIN = 10
"""So many results within the last pause are worth waiting `MORE_PAUSE_S` for more."""
RECORD_MAX = 1_000
RECORD_BYTES_MAX = 16 * 2**20
"""Of one transaction: within every timeout, and never so many that the same are offered again for ever."""
BUFFERED_MAX = 2_000
"""Twice what is stored at once: with less, fetches stopped while a record was under way."""
BUFFERED_BYTES_MAX = 64 * 2**20
FAILED_PAUSE_S = 1.0

logger = logging.getLogger(__name__)


class Recorder:
    """A bounded buffer of results and the loop that stores them.

    `on_stored` is called with the results of each flush after its commit, whether their leases still stood or not.
    `present_batches` tells of which batches this worker has jobs that still run or wait.
    """

    def __init__(
        self,
        sessions: Sessions,
        *,
        autocommit: Sessions,
        on_stored: Callable[[Sequence[Result]], None],
        present_batches: Callable[[], set[UUID]],
    ) -> None:
        self._sessions = sessions
        self._autocommit = autocommit
        self._on_stored = on_stored
        self._present_batches = present_batches
        self._maybe_finished: set[UUID] = set()
        self._results: list[Result] = []
        self._back_offs: dict[tuple[int, str], BackOff] = {}
        self._bytes = 0
        self._arrived = asyncio.Event()
        self._hurried = asyncio.Event()
        self._flushed_at = 0.0
        self.dropped_count = 0
        """Results that came after their leases."""

    @property
    def is_empty(self) -> bool:
        """Whether all results offered so far are stored."""
        return not self._results

    @property
    def is_full(self) -> bool:
        """Whether no fetch may start, because its result might find no room."""
        return len(self._results) >= BUFFERED_MAX or self._bytes >= BUFFERED_BYTES_MAX

    def add(self, result: Result) -> None:
        """Offer a result; it is stored within a moment, or dropped if its lease no longer stands."""
        self._results.append(result)
        self._bytes += _size_bytes(result)
        self._arrived.set()

    def add_back_off(self, back_off: BackOff) -> None:
        """Store a host's back-off together with the next results; the latest for a host counts."""
        self._back_offs[back_off.lease.shard, back_off.lease.host] = back_off
        self._arrived.set()

    def hurry(self) -> None:
        """Store at once what is there: no more is on its way."""
        self._hurried.set()

    async def run(self) -> None:
        """Store what arrives, for ever."""
        while True:
            await self._arrived.wait()
            await self._gather()
            await self._flush()

    async def _gather(self) -> None:
        """Wait a moment after the last flush, longer while many come; what comes alone or last is stored at once."""
        pause_s = self._flushed_at + FLUSH_PAUSE_S - time.monotonic()
        until_at = self._flushed_at + FLUSH_PAUSE_S_MAX
        while pause_s > 0 and not (self._has_plenty or self._hurried.is_set()):
            count = len(self._results)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._hurried.wait()
            more_come = len(self._results) >= count + MORE_MIN
            pause_s = min(MORE_PAUSE_S, until_at - time.monotonic()) if more_come else 0.0
        self._hurried.clear()

    @property
    def _has_plenty(self) -> bool:
        return len(self._results) >= RECORD_MAX or self._bytes >= RECORD_BYTES_MAX

    async def _flush(self) -> None:
        results, back_offs = self._next_results(), list(self._back_offs.values())
        try:
            await self._store(results, back_offs)
        except DATABASE_ERRORS as error:
            if is_refused_value(error):
                await self._flush_one_by_one(results)
            else:
                await self._wait_for_database(error)
            return
        self._remove(results, back_offs)
        self._on_stored(results)

    def _next_results(self) -> list[Result]:
        """As many of the oldest as one transaction takes, and at least one."""
        size, count = 0, 0
        for result in self._results[:RECORD_MAX]:
            size += _size_bytes(result)
            if count and size > RECORD_BYTES_MAX:
                break
            count += 1
        return self._results[:count]

    async def _flush_one_by_one(self, results: Sequence[Result]) -> None:
        """Find the result whose values PostgreSQL refuses, and store in its place that it could not be stored."""
        self._back_offs.clear()
        for result in results:
            try:
                await self._store_or_replace(result)
            except DATABASE_ERRORS as error:
                await self._wait_for_database(error)
                return
            self._remove([result], [])
            self._on_stored([result])

    async def _store_or_replace(self, result: Result) -> None:
        try:
            await self._store([result], [])
        except DATABASE_ERRORS as error:
            if not is_refused_value(error):
                raise
            logger.exception("The result of job %s cannot be stored", result.job.id)
            await self._store_or_drop(_unstorable(result))

    async def _store_or_drop(self, result: Result) -> None:
        """Let go of what is refused in any form, lest all other results wait behind it; its job is then rescued."""
        try:
            await self._store([result], [])
        except DATABASE_ERRORS as error:
            if not is_refused_value(error):
                raise
            logger.exception("Job %s cannot even be failed", result.job.id)

    async def _wait_for_database(self, error: BaseException) -> None:
        database.log_failure(logger, "Results wait for the database", error)
        await asyncio.sleep(FAILED_PAUSE_S)

    async def _store(self, results: Sequence[Result], back_offs: Sequence[BackOff]) -> None:
        try:
            recorded = await self._record(results, back_offs, by_copy=True)
        except bodies.Conflict:
            recorded = await self._record(results, back_offs, by_copy=False)
        self._flushed_at = time.monotonic()
        self._maybe_finished |= recorded.maybe_finished
        if self._maybe_finished:
            await self._finish_batches(self._results[len(results) :])
        if recorded.dropped:
            await self._note_dropped(recorded.dropped)

    async def _record(self, results: Sequence[Result], back_offs: Sequence[BackOff], *, by_copy: bool) -> Recorded:
        async with self._sessions.begin() as session:
            if back_offs:
                await leases.back_off(session, back_offs)
            return await queue.record(session, results, by_copy=by_copy)

    async def _finish_batches(self, later: Sequence[Result]) -> None:
        """Finish what may be finished: not a batch of which this worker has more, whose results come `later`."""
        present = self._present_batches() | {result.job.batch_id for result in later}
        if asked := self._maybe_finished - present:
            async with self._autocommit.begin() as session:
                await batches.finish(session, asked)
            self._maybe_finished -= asked

    async def _note_dropped(self, jobs: Sequence[ClaimedJob]) -> None:
        """Count them, and clear their jobs of the crash that the loss of their lease was taken for: we live."""
        async with self._sessions.begin() as session:
            await queue.give_back(session, [Returned(job=job) for job in jobs])
        self.dropped_count += len(jobs)
        logger.warning("Dropped %d results that came after their leases", len(jobs))

    def _remove(self, results: Sequence[Result], back_offs: Sequence[BackOff]) -> None:
        """Forget the first results, which are stored, and the back-offs that were not renewed meanwhile."""
        del self._results[: len(results)]
        self._bytes -= sum(map(_size_bytes, results))
        for back_off in back_offs:
            key = back_off.lease.shard, back_off.lease.host
            if self._back_offs.get(key) is back_off:
                del self._back_offs[key]
        if not self._results and not self._back_offs:
            self._arrived.clear()


def _size_bytes(result: Result) -> int:
    """Of what a server can make large: the body as stored, and evidence, in which all its header fields are."""
    return len(result.body or b"") + len(result.evidence or "")


def _unstorable(result: Result) -> Result:
    return Result(
        job=result.job,
        status="failed",
        error=FailureCode.STORAGE_ERROR,
        error_detail="What came back could not be stored; the operator finds the reason in the log.",
        evidence=None if result.evidence is None else NO_EVIDENCE,
    )
