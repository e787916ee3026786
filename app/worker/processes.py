"""Keeps a number of worker processes alive: starts them, starts them again when they die, ends them with the service.

Deliberately does not know what a worker does; it only runs a command.
"""

import asyncio
import logging
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

RESTART_S_MIN, RESTART_S_MAX = 0.5, 30.0
HEALTHY_S = 60.0
"""A process that lived this long did not die of its start: the next one starts without back-off."""

KILL_MARGIN_S = 10.0

logger = logging.getLogger(__name__)


def next_delay_s(delay_s: float, *, lived_s: float) -> float:
    """Return the seconds to wait before the next start, from the wait before the last one (0 at first)."""
    if lived_s >= HEALTHY_S or delay_s == 0:
        return RESTART_S_MIN
    return min(delay_s * 2, RESTART_S_MAX)


class Processes:
    """`count` processes of one command, each started again with back-off when it dies.

    Each has the read end of a pipe as its standard input, which closes when this process dies, however it dies: a
    process that watches for that leaves no orphan behind. Each is in a session of its own, since Ctrl-C in a terminal
    must reach the service alone, which then drains them in order.
    """

    def __init__(self, command: Sequence[str], *, count: int, environment: Mapping[str, str], grace_s: float) -> None:
        self._command = command
        self._count = count
        self._environment = environment
        self._grace_s = grace_s
        self._alive: set[asyncio.subprocess.Process] = set()
        self._ending = asyncio.Event()

    async def run(self) -> None:
        """Keep the processes alive until `end` is called, then until the last has ended.

        One that outlives its grace is killed; when this is cancelled, all are.
        """
        async with asyncio.TaskGroup() as group:
            seats = [group.create_task(self._keep_one()) for _ in range(self._count)]
            await self._ending.wait()
            if seats:
                await asyncio.wait(seats, timeout=self._grace_s + KILL_MARGIN_S)
                self._signal(signal.SIGKILL)

    def end(self) -> None:
        """Ask the processes to drain and end, and start none any more; asked again, they end at once."""
        self._ending.set()
        self._signal(signal.SIGTERM)

    async def _keep_one(self) -> None:
        delay_s = 0.0
        while not self._ending.is_set():
            started = time.monotonic()
            how = await self._run_one()
            if self._ending.is_set():
                return
            delay_s = next_delay_s(delay_s, lived_s=time.monotonic() - started)
            logger.warning("A worker process %s; the next starts in %g s", how, delay_s)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), delay_s)

    async def _run_one(self) -> str:
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command, env=self._environment, stdin=asyncio.subprocess.PIPE, start_new_session=True
            )
        except OSError as error:  # no memory or no process left: like a death, it may pass
            return f"could not be started ({error.strerror})"
        self._alive.add(process)
        try:
            if self._ending.is_set():  # asked for while it was being started
                process.send_signal(signal.SIGTERM)
            return f"({process.pid}) ended with exit code {await process.wait()}"
        finally:
            self._alive.discard(process)
            if process.returncode is None:
                process.kill()
                await process.wait()

    def _signal(self, signal_number: signal.Signals) -> None:
        for process in self._alive:
            with suppress(ProcessLookupError):
                process.send_signal(signal_number)
