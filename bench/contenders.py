"""Those that take turns: the bare loop, the service's fetch alone, and the whole service; each run gives a sample."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import programs
from programs import SERVICE_PYTHON, Broken
from rounds import Contender, Sample
from service import Service

Urls = Callable[[int], Sequence[str]]
"""The URLs of a round."""


def bare(urls: Urls, *, in_flight: int, warm_up: Sequence[str], folder: Path, ca_file: Path | None = None) -> Contender:
    """The bare aiohttp loop, which keeps nothing."""
    return _loop("bare.py", Path(sys.executable), urls, in_flight, warm_up=warm_up, folder=folder, ca_file=ca_file)


def guarded(
    urls: Urls, *, in_flight: int, warm_up: Sequence[str], folder: Path, ca_file: Path | None = None
) -> Contender:
    """The service's fetch alone."""
    return _loop("guarded.py", SERVICE_PYTHON, urls, in_flight, warm_up=warm_up, folder=folder, ca_file=ca_file)


def whole(service: Service, urls: Urls) -> Contender:
    """A batch through the whole service."""

    def run_once(number: int) -> Sample:
        wanted = urls(number)
        run = service.run(wanted)
        return Sample(len(wanted), run.wall_s, sum(run.cpu_s.values()), run.cpu_s, run.stored_s)

    return run_once


def _loop(
    script: str,
    python: Path,
    urls: Urls,
    in_flight: int,
    *,
    warm_up: Sequence[str],
    folder: Path,
    ca_file: Path | None,
) -> Contender:
    def run_once(number: int) -> Sample:
        wanted = urls(number)
        question = {
            "urls": wanted,
            "warm_up": warm_up,
            "in_flight": in_flight,
            "ca_file": str(ca_file) if ca_file else None,
        }
        done = programs.ask(python, script, question, log=folder / f"{script}.log")
        if done["count"] != len(wanted):
            raise Broken(f"{script} got {done['count']} of {len(wanted)} pages")
        return Sample(len(wanted), done["wall_s"], done["cpu_s"])

    return run_once
