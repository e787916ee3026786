"""The deadlines of all fetches, each of which bounds everything; one timer for all of one length, instead of one each.

`asyncio.timeout` puts a timer into the event loop's heap for each fetch and takes it out again, a tenth of what a whole
fetch costs. Of deadlines of one length, those that began first are due first: a dict, in the order of insertion, is
their queue.
"""

import asyncio
import time
from types import TracebackType

from app.fetch.limits import Failed
from app.outcome import FailureCode


class Deadlines:
    """The open deadlines of one event loop, by their length in seconds; a length goes with the last of them."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._open: dict[float, dict[Deadline, None]] = {}
        self._timers: dict[float, asyncio.TimerHandle] = {}

    def within(self, length_s: float) -> "Deadline":
        """Bound a `with` block: its task is cancelled when the time is over, and the block raises `Failed`."""
        return Deadline(self, length_s)

    def add(self, deadline: "Deadline") -> None:
        """Watch a deadline that begins now."""
        queue = self._open.get(deadline.length_s)
        if queue is None:
            queue = self._open[deadline.length_s] = {}
            self._wait_for(deadline)
        queue[deadline] = None

    def remove(self, deadline: "Deadline") -> None:
        """Watch it no longer."""
        queue = self._open[deadline.length_s]
        del queue[deadline]
        if not queue:
            del self._open[deadline.length_s]
            self._timers.pop(deadline.length_s).cancel()

    def _wait_for(self, first: "Deadline") -> None:
        self._timers[first.length_s] = self.loop.call_at(first.due_at, self._expire, first.length_s)

    def _expire(self, length_s: float) -> None:
        """End what is due, and wait for the first that is not: what the timer was set for has mostly ended in time."""
        queue, now = self._open[length_s], time.monotonic()
        for deadline in list(queue):
            if deadline.due_at > now:
                self._wait_for(deadline)
                return
            del queue[deadline]
            deadline.expire()
        del self._open[length_s], self._timers[length_s]


class Deadline:
    """One bounded block. It tells its own end from other cancelling as that of `asyncio.timeout` does.

    `due_at` is on the monotonic clock, which is also the event loop's.
    """

    __slots__ = ("_cancelling", "_deadlines", "_expired", "_task", "due_at", "length_s")

    def __init__(self, deadlines: Deadlines, length_s: float) -> None:
        self._deadlines = deadlines
        self.length_s = length_s

    def __enter__(self) -> None:
        task = asyncio.current_task(self._deadlines.loop)  # not asked for again: that is a call of the kernel
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._expired = False
        self.due_at = time.monotonic() + self.length_s
        self._deadlines.add(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._expired:
            self._deadlines.remove(self)
        elif self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise Failed(
                FailureCode.DEADLINE_EXCEEDED, "The total time of the attempt, timeout_s, was used up."
            ) from error

    def expire(self) -> None:
        """Cancel the task, which leaves the block by it."""
        self._expired = True
        self._task.cancel()
