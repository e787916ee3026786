"""Ends what a killed service, or a killed server, left running of PostgreSQL. Does not check who holds the lock.

Sees processes by way of `/proc`; where there is none, nothing is found and nothing is ended.
"""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from app.jobs.account import EmbeddedUnusable

STOP_S_MAX = 60.0
QUIT_S_MAX = 10.0


def end_left_over(files: Path) -> None:
    """Stop what a killed service left running on `files`; the lock says that it is nobody's any more.

    Only then is `postmaster.pid` removed: its process id may by now be somebody else's, for which PostgreSQL would
    refuse to start, but while any process is at the files it must stand, and where processes cannot be seen as well.
    """
    if not Path("/proc/self").exists():
        return
    pid_file = files / "postmaster.pid"
    for signal_number, patience_s in ((signal.SIGINT, STOP_S_MAX), (signal.SIGQUIT, QUIT_S_MAX), (signal.SIGKILL, 5.0)):
        if _ended(files, signal_number, patience_s=patience_s):
            pid_file.unlink(missing_ok=True)
            return
    raise EmbeddedUnusable(f"A PostgreSQL is left running on {files} and does not stop: stop it first.")


def processes_on(files: Path) -> set[int]:
    """Return the PostgreSQL processes at work in `files`: server and sessions alike have it as their current folder."""
    return {int(entry.name) for entry in Path("/proc").glob("[0-9]*") if _is_postgres_in(entry, files)}


def _ended(files: Path, signal_number: int, *, patience_s: float) -> bool:
    postmaster = _postmaster_of(files)
    for pid in processes_on(files):
        # a server passes it on to its sessions, and a session without a server ends on SIGTERM
        orphan_signal = signal.SIGTERM if signal_number == signal.SIGINT else signal_number
        if pid == postmaster or postmaster is None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal_number if pid == postmaster else orphan_signal)
    give_up_at = time.monotonic() + patience_s
    while processes_on(files):
        if time.monotonic() > give_up_at:
            return False
        time.sleep(0.05)
    return True


def _postmaster_of(files: Path) -> int | None:
    try:
        pid = int((files / "postmaster.pid").read_text().split("\n", 1)[0])
    except (FileNotFoundError, ValueError):
        return None
    return pid if pid in processes_on(files) else None


def _is_postgres_in(process: Path, files: Path) -> bool:
    try:
        if not (process / "comm").read_text().startswith("postgres"):
            return False
        return (process / "cwd").readlink() == files.resolve()
    except OSError:  # it ended, or it is another user's
        return False
