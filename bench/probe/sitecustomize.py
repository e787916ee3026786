"""Notes inside a process how long each callback holds its event loop: Python loads this at start from `PYTHONPATH`.

Only in the service's own process, and only where `LOOP_PROBE` names the file to write to. A line for each callback of
a millisecond and more: when it ended (CLOCK_MONOTONIC, the same in every process), its seconds, its CPU seconds. The
former include the time in which the machine let others run.
"""

import os
import sys
import time
from pathlib import Path

WORTH_NOTING_S = 0.001


def install(path: Path) -> None:
    """Time every callback: each step of a task is one."""
    from asyncio.events import Handle

    run_untimed = Handle._run
    file = path.open("a", buffering=1)

    def run(handle: Handle) -> None:
        at, cpu_s = time.monotonic(), time.thread_time()
        try:
            run_untimed(handle)
        finally:
            ended_at = time.monotonic()
            if ended_at - at >= WORTH_NOTING_S:
                file.write(f"{ended_at} {ended_at - at} {time.thread_time() - cpu_s}\n")

    Handle._run = run


if "LOOP_PROBE" in os.environ and "serve" in sys.orig_argv:
    install(Path(os.environ["LOOP_PROBE"]))
