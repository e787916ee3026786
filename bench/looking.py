"""Looks at a service from outside and from within: how long its event loop is held, and how soon it answers.

The loop's holds are noted by bench/probe inside the API's process; the answers are those of a client that asks again
and again over one connection.
"""

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from programs import ROOT, Broken

PAUSE_S = 0.005


@dataclass(frozen=True)
class Hold:
    """One callback: the seconds it held the loop, and those that it computed meanwhile."""

    wall_s: float
    cpu_s: float


def probing(file: Path) -> dict[str, str]:
    """The variables that make a service note its loop's holds in the file."""
    return {"PYTHONPATH": f"{ROOT}:{ROOT / 'bench/probe'}", "LOOP_PROBE": str(file)}


def longest_hold(file: Path, since: float, until: float) -> Hold:
    """The longest between two times of the monotonic clock."""
    longest = Hold(0.0, 0.0)
    for line in file.read_text().splitlines():
        ended_at, wall_s, cpu_s = map(float, line.split())
        if since <= ended_at <= until and wall_s > longest.wall_s:
            longest = Hold(wall_s, cpu_s)
    return longest


@dataclass
class Answers:
    """Seconds of each answer, in the order of their questions."""

    waits_s: list[float] = field(default_factory=list)

    def quantile_s(self, share: float) -> float:
        """What that share of the answers took at most."""
        return sorted(self.waits_s)[min(int(len(self.waits_s) * share), len(self.waits_s) - 1)]


@contextmanager
def asking(url: str, path: str) -> Iterator[Answers]:
    """Ask for `path` every few milliseconds for as long as this lasts."""
    answers, ended = Answers(), threading.Event()

    def ask() -> None:
        while not ended.is_set():
            ask_some(url, path, count=100, answers=answers, pause_s=PAUSE_S, ended=ended)

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        yield answers
    finally:
        ended.set()
        asker.join()


def ask_some(
    url: str,
    path: str,
    *,
    count: int,
    answers: Answers,
    pause_s: float = 0.0,
    ended: threading.Event | None = None,
) -> None:
    """Ask `count` times over one connection, with a pause after each."""
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=30.0)) as connection:
        for _ in range(count):
            asked_at = time.monotonic()
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            answers.waits_s.append(time.monotonic() - asked_at)
            if response.status != 200:
                raise Broken(f"{path} answered {response.status}")
            if ended is not None and ended.is_set():
                return
            time.sleep(pause_s)
