"""The fetch alone, guarded and with its evidence, against bare aiohttp: HTTP, HTTPS, and HTTPS without keep-alive."""

from pathlib import Path

import contenders
import rounds
from chart import Bar, Chart
from programs import scratch
from rounds import Check, Contender, Report, Sample
from target import Site, nginx

KINDS = {
    "http": ("HTTP, connections kept", 1.5),
    "https": ("HTTPS, connections kept", 1.3),
    "https-fresh": ("HTTPS, a connection for each", 1.3),
}
"""What is fetched, and what the service's fetch may cost of aiohttp's CPU."""


def measure() -> None:
    """Run the comparison and report."""
    asked = rounds.arguments(__doc__.splitlines()[0], fetches=5_000, fresh_fetches=1_500, in_flight=100)
    counts = {"http": asked.fetches, "https": asked.fetches, "https-fresh": asked.fresh_fetches}
    with scratch() as folder, nginx(folder, tls=True) as site:
        samples = rounds.interleave(_contenders(folder, site, counts, in_flight=asked.in_flight), asked.rounds)
    rounds.finish(_report(samples, counts, asked.in_flight), samples, save=not asked.no_save)


def _contenders(folder: Path, site: Site, counts: dict[str, int], *, in_flight: int) -> dict[str, Contender]:
    found: dict[str, Contender] = {}
    for kind, count in counts.items():
        for name, make in (("aiohttp", contenders.bare), ("fetch", contenders.guarded)):
            found[f"{name} {kind}"] = make(
                lambda number, kind=kind, count=count: site.urls(count, kind=kind, series=str(number)),
                in_flight=in_flight,
                warm_up=site.urls(len(site.hosts), kind=kind, series="warm-up"),
                folder=folder,
                ca_file=None if kind == "http" else site.ca_file,
            )
    return found


def _report(samples: dict[str, list[Sample]], counts: dict[str, int], in_flight: int) -> Report:
    report = Report("fetch", f"The fetch alone, {in_flight} in flight to 49 hosts, 10 KiB pages")
    report.notes.append(
        "One process each, without a database: `app.fetch.http.fetch` on uvloop, as in workers, and aiohttp on asyncio."
    )
    rows = [["", "fetches", "aiohttp CPU ms", "Fetchpool CPU ms", "ratio", "aiohttp /s", "Fetchpool /s"]]
    for kind, (title, of_bare_max) in KINDS.items():
        bare, ours = samples[f"aiohttp {kind}"], samples[f"fetch {kind}"]
        of_bare = rounds.ratio(ours, bare, lambda sample: sample.cpu_ms)
        rows.append([title, f"{counts[kind]:,}", _cpu(bare), _cpu(ours), f"{of_bare:.2f}", _speed(bare), _speed(ours)])
        report.checks.append(Check(f"CPU of the fetch by aiohttp's, {title}", of_bare, of_bare_max))
    report.tables.append(("", rows))
    report.chart = Chart("CPU for each fetch", "ms", _bars(samples))
    return report


def _bars(samples: dict[str, list[Sample]]) -> list[Bar]:
    return [
        Bar(f"{name}, {kind}", {name: rounds.median([sample.cpu_ms for sample in samples[f"{name} {kind}"]])})
        for kind in KINDS
        for name in ("aiohttp", "fetch")
    ]


def _cpu(samples: list[Sample]) -> str:
    return rounds.spread([sample.cpu_ms for sample in samples], 3)


def _speed(samples: list[Sample]) -> str:
    return f"{rounds.median([sample.jobs / sample.wall_s for sample in samples]):,.0f}"


if __name__ == "__main__":
    rounds.run(measure)
