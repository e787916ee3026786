"""Programs that a bench starts and surely ends: by their process ids, in the end with force, also on Ctrl-C."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import usage

ROOT = Path(__file__).resolve().parents[1]
SERVICE_PYTHON = ROOT / ".venv/bin/python"
"""The Python that has the service as it is shipped, and nothing of the bench."""

STOP_S = 40.0
READY_S = 10.0
CHILD_S_MAX = 600.0


class Broken(Exception):
    """The bench cannot go on; the message says why."""


@contextmanager
def started(
    command: Sequence[str | Path], *, environment: Mapping[str, str], log: Path, is_heard: bool = True
) -> Iterator[subprocess.Popen]:
    """Run a program for as long as this lasts; what it says on standard error goes into `log`.

    Its standard output as well, unless `is_heard`: it is read by the caller then, or the program would wait.
    """
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [str(part) for part in command],
            env=dict(environment),
            cwd=log.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if is_heard else errors,
            stderr=errors,
            start_new_session=True,  # Ctrl-C is this program's, which then ends the others in order
        )
    try:
        yield process
    finally:
        _end(process)


def ask(python: Path, script: str, question: Mapping[str, Any], *, log: Path) -> dict[str, Any]:
    """Run one of the bench's scripts: JSON in on standard input, JSON out on standard output."""
    command = [python, ROOT / "bench" / script]
    with started(command, environment=clean_environment(), log=log) as process:
        try:
            answer, _ = process.communicate(json.dumps(question).encode(), timeout=CHILD_S_MAX)
        except subprocess.TimeoutExpired:
            raise Broken(f"{script} did not end within {CHILD_S_MAX:g} s") from None
    if process.returncode:
        raise Broken(f"{script} ended with exit code {process.returncode}:\n{tail(log)}")
    return json.loads(answer)


def free_ports(count: int) -> list[int]:
    """So many ports that nobody listens on just now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def wait_for_port(process: subprocess.Popen, host: str, port: int, log: Path) -> None:
    """Wait until a program listens."""
    give_up_at = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < give_up_at:
        try:
            socket.create_connection((host, port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise Broken(f"{process.args[0]} did not start:\n{tail(log)}")


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without what would change a measurement: the service's settings, proxies, Python's own."""
    kept = {name: value for name, value in os.environ.items() if not _changes_figures(name)}
    return kept | {"PYTHONPATH": str(ROOT)} | more


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for what a bench writes, gone at the end; the service's PostgreSQL, another user, may pass through."""
    folder = Path(tempfile.mkdtemp(prefix="fetchpool-bench-"))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def end_in_order_on_signals() -> None:
    """Let the first signal end the bench by way of every `finally`, and further ones not disturb that."""

    def stop(signal_number: int, _: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + signal_number)

    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, stop)


def _changes_figures(name: str) -> bool:
    return name.startswith(("FETCHPOOL_", "PYTHON", "PG")) or name == "DATABASE_URL" or name.lower().endswith("_proxy")


def _end(process: subprocess.Popen) -> None:
    everything = usage.tree(process.pid)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.terminate()
        process.wait(STOP_S)
    for left_over in everything:  # psutil knows a process from a later one of the same id
        with contextlib.suppress(psutil.NoSuchProcess):
            left_over.kill()
    process.wait()
