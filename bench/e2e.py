"""End to end: CPU for each job of the whole service against a bare aiohttp loop on the same URLs.

10 KiB pages from nginx on 49 loopback addresses; the service as shipped, with its own PostgreSQL, bodies stored.
"""

from contextlib import ExitStack
from pathlib import Path

import contenders
import rounds
from chart import Bar, Chart
from programs import ROOT, scratch
from rounds import Check, Contender, Report, Sample
from service import serving
from target import Site, nginx

OF_BARE_MAX = 2.0
PARTS = ("workers", "postgresql", "api")


def measure() -> None:
    """Run the comparison and report."""
    asked = rounds.arguments(__doc__.splitlines()[0], beside=True, jobs=10_000, in_flight=100)
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        site = stack.enter_context(nginx(folder))
        found = _contenders(stack, folder, site, asked.jobs, in_flight=asked.in_flight)
        if asked.beside is not None:
            found["beside"] = _service(stack, folder / "beside", site, asked.jobs, source=asked.beside.resolve())
        samples = rounds.interleave(found, asked.rounds)
    rounds.finish(_report(samples, asked.jobs, asked.in_flight), samples, save=not asked.no_save)


def _contenders(stack: ExitStack, folder: Path, site: Site, count: int, *, in_flight: int) -> dict[str, Contender]:
    return {
        "aiohttp": contenders.bare(
            lambda number: site.urls(count, series=str(number)),
            in_flight=in_flight,
            warm_up=site.urls(len(site.hosts), series="warm-up"),
            folder=folder,
        ),
        "fetchpool": _service(stack, folder / "service", site, count),
    }


def _service(stack: ExitStack, folder: Path, site: Site, count: int, *, source: Path = ROOT) -> Contender:
    service = stack.enter_context(serving(folder, source=source))
    service.run(site.urls(1_000, series="warm-up"))
    return contenders.whole(service, lambda number: site.urls(count, series=str(number)))


def _report(samples: dict[str, list[Sample]], count: int, in_flight: int) -> Report:
    report = Report("e2e", f"End to end: {count:,} jobs of 10 KiB from 49 hosts")
    report.notes.append(
        f"The bare loop has {in_flight} in flight and keeps nothing. The service runs as shipped, a worker process for "
        "each core, its PostgreSQL included; its seconds are from before the POST until a client sees the batch "
        "completed."
    )
    bare, ours = samples["aiohttp"], samples["fetchpool"]
    of_bare = rounds.ratio(ours, bare, lambda sample: sample.cpu_ms)
    rows = [["", "CPU ms/job", "of aiohttp's", "jobs/s", "CPU by part, ms/job"]]
    rows.append(["aiohttp, bare", _cpu(bare), "1", _speed(bare), ""])
    rows.append(["Fetchpool", _cpu(ours), f"{of_bare:.2f}", _speed(ours), _parts(ours)])
    if beside := samples.get("beside"):
        beside_of_bare = rounds.ratio(beside, bare, lambda sample: sample.cpu_ms)
        rows.append(["the other clone's", _cpu(beside), f"{beside_of_bare:.2f}", _speed(beside), _parts(beside)])
    report.tables.append(("", rows))
    bars = [Bar("aiohttp, bare", {"bare loop": rounds.median([sample.cpu_ms for sample in bare])})]
    report.chart = Chart("CPU for each job", "ms", [*bars, Bar("Fetchpool", _shares(ours))])
    report.checks.append(Check("CPU per job by the bare loop's", of_bare, OF_BARE_MAX))
    return report


def _cpu(samples: list[Sample]) -> str:
    return rounds.spread([sample.cpu_ms for sample in samples], 3)


def _speed(samples: list[Sample]) -> str:
    return rounds.spread([sample.jobs / sample.wall_s for sample in samples], 0)


def _parts(samples: list[Sample]) -> str:
    return ", ".join(f"{part} {share:.3f}" for part, share in _shares(samples).items())


def _shares(samples: list[Sample]) -> dict[str, float]:
    return {
        part: rounds.median([sample.parts.get(part, 0.0) / sample.jobs * 1000 for sample in samples]) for part in PARTS
    }


if __name__ == "__main__":
    rounds.run(measure)
