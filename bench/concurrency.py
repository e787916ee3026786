"""The concurrency experiment: one host that answers after 50 to 200 ms, with more and more requests in flight.

A pool that looks for a free connection among all of them, say, gets slower with every one more. Here the whole service,
with stored results, must stay near a bare loop that keeps nothing, and more in flight must never be slower.
"""

from contextlib import AbstractContextManager, ExitStack
from itertools import pairwise
from pathlib import Path

import contenders
import rounds
from chart import Bar, Chart
from programs import scratch
from rounds import Check, Contender, Report, Sample
from service import Service, serving
from target import Site, latency_server, least_s

IN_FLIGHT = (50, 100, 500, 1_000)
OF_BARE_MAX = 1.3
SLOWER_MAX = 1.05
"""What two runs of the same may differ by."""


def measure() -> None:
    """Run the experiment and report."""
    asked = rounds.arguments(__doc__.splitlines()[0], requests=1_000)
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        site = stack.enter_context(latency_server(folder))
        samples = rounds.interleave(_contenders(stack, folder, site, asked.requests), asked.rounds)
    rounds.finish(_report(samples, asked.requests), samples, save=not asked.no_save)


def _contenders(stack: ExitStack, folder: Path, site: Site, count: int) -> dict[str, Contender]:
    """All services run all the time: idle ones cost next to nothing, and starting them in every round would."""
    found: dict[str, Contender] = {}
    for in_flight in IN_FLIGHT:
        service = stack.enter_context(_serving_with(folder / str(in_flight), in_flight))
        service.run(site.urls(100, series="warm-up"))
        found[f"aiohttp {in_flight}"] = contenders.bare(
            lambda number: site.urls(count, series=str(number)),
            in_flight=in_flight,
            warm_up=site.urls(1, series="warm-up"),
            folder=folder,
        )
        found[f"fetchpool {in_flight}"] = contenders.whole(service, lambda number: site.urls(count, series=str(number)))
    return found


def _serving_with(folder: Path, in_flight: int) -> AbstractContextManager[Service]:
    return serving(folder, FETCHPOOL_SLOTS=str(in_flight), FETCHPOOL_HOST_CONCURRENCY=str(in_flight))


def _report(samples: dict[str, list[Sample]], count: int) -> Report:
    report = Report("concurrency", f"One host, 50 to 200 ms an answer, {count:,} requests")
    report.notes.append(
        "Seconds from the first request to the last answer; for Fetchpool from before the POST until a client sees the "
        "batch completed, everything stored (stored after: by its own clock, before a waiting client is told). "
        "The floor is what the answers alone take. CPU is for each job, of all its processes."
    )
    rows = [
        [
            "in flight",
            "floor s",
            "aiohttp s",
            "Fetchpool s",
            "ratio",
            "stored after s",
            "aiohttp CPU ms",
            "Fetchpool CPU ms",
        ]
    ]
    rows += [_row(samples, in_flight, count) for in_flight in IN_FLIGHT]
    report.tables.append(("", rows))
    report.chart = Chart(f"Seconds for {count:,} requests of 50 to 200 ms to one host", "s", _bars(samples, count))
    report.checks += [
        Check(f"Fetchpool's seconds by aiohttp's at {in_flight}", _of_bare(samples, in_flight), OF_BARE_MAX)
        for in_flight in (50, 100)
    ]
    for fewer, more in pairwise(IN_FLIGHT):
        slower = rounds.ratio(_ours(samples, more), _ours(samples, fewer), lambda sample: sample.wall_s)
        report.checks.append(Check(f"Fetchpool's seconds at {more} by those at {fewer}", slower, SLOWER_MAX))
    return report


def _row(samples: dict[str, list[Sample]], in_flight: int, count: int) -> list[str]:
    bare, ours = samples[f"aiohttp {in_flight}"], _ours(samples, in_flight)
    return [
        f"{in_flight:,}",
        f"{least_s(count, in_flight):.2f}",
        rounds.spread([sample.wall_s for sample in bare], 2),
        rounds.spread([sample.wall_s for sample in ours], 2),
        f"{_of_bare(samples, in_flight):.2f}",
        f"{rounds.median([sample.stored_s or 0.0 for sample in ours]):.2f}",
        f"{rounds.median([sample.cpu_ms for sample in bare]):.3f}",
        f"{rounds.median([sample.cpu_ms for sample in ours]):.3f}",
    ]


def _bars(samples: dict[str, list[Sample]], count: int) -> list[Bar]:
    bars: list[Bar] = []
    for in_flight in IN_FLIGHT:
        bars.append(Bar(f"floor, {in_flight:,} in flight", {"floor": least_s(count, in_flight)}))
        for name in ("aiohttp", "fetchpool"):
            wall_s = rounds.median([sample.wall_s for sample in samples[f"{name} {in_flight}"]])
            bars.append(Bar(name, {name: wall_s}))
    return bars


def _of_bare(samples: dict[str, list[Sample]], in_flight: int) -> float:
    return rounds.ratio(_ours(samples, in_flight), samples[f"aiohttp {in_flight}"], lambda sample: sample.wall_s)


def _ours(samples: dict[str, list[Sample]], in_flight: int) -> list[Sample]:
    return samples[f"fetchpool {in_flight}"]


if __name__ == "__main__":
    rounds.run(measure)
