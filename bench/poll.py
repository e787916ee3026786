"""Polling: a GET of a batch of 1,000,000 jobs, of one of 10, of raw asyncpg behind FastAPI, and while the pool is busy.

All over one connection, one GET after the other; nothing is remembered between them (no ETag is sent).
"""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import looking
import rounds
import usage
from filling import Pages, fill
from looking import Answers
from programs import ROOT, SERVICE_PYTHON, Broken, clean_environment, scratch, started, tail
from rounds import Check, Contender, Report, Sample
from service import Service, serving
from target import loopback_hosts, nginx

HOSTS = 1_000
"""So that every shard has its part of the large batch's counts."""

SMALL = 10
BUSY_JOBS = 400_000
"""Enough to keep the pool busy through all rounds."""

WARM_UP = 100
PAUSE_S = 0.005
BUSY_AFTER_S = 2.0
OF_SMALL_MAX = 1.2
OF_BARE_MAX = 2.0
BUSY_OF_REST_MAX = 5.0


def measure() -> None:
    """Run the comparison and report."""
    asked = rounds.arguments(__doc__.splitlines()[0], gets=500, jobs=1_000_000)
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        site = stack.enter_context(nginx(folder, hosts=loopback_hosts(HOSTS)))
        with serving(folder / "busy", "--workers", "0") as service:
            [busy_id] = fill(service, [Pages(site.origins(), "poll", BUSY_JOBS)], folder)
        service = stack.enter_context(serving(folder / "rest", "--workers", "0"))
        ids = fill(service, [Pages(site.origins(), "poll", count) for count in (asked.jobs, SMALL)], folder)
        bare_url, bare_pid = stack.enter_context(_bare_api(service, folder))
        large, small = (f"/v1/batches/{batch_id}" for batch_id in ids)
        found = {
            "large": _gets(service, large, asked.gets),
            "small": _gets(service, small, asked.gets),
            "bare": _gets(_BareApi(service, bare_url, bare_pid), large, asked.gets),
            "at rest": _gets(service, large, asked.gets, pause_s=PAUSE_S),
            "busy": _gets_while_busy(folder / "busy", f"/v1/batches/{busy_id}", asked.gets),
        }
        samples = rounds.interleave(found, asked.rounds)
    rounds.finish(_report(samples, asked.jobs, asked.gets), samples, save=not asked.no_save)


class _BareApi:
    """The bare API in the place of a service, with the service's PostgreSQL."""

    def __init__(self, service: Service, url: str, pid: int) -> None:
        self.url = url
        self._service = service
        self._pid = pid

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far, by part."""
        return {
            "api": sum(usage.tree_cpu_s(self._pid).values()),
            "postgresql": self._service.cpu_s()["postgresql"],
        }


@contextmanager
def _bare_api(service: Service, folder: Path) -> Iterator[tuple[str, int]]:
    log = folder / "bare_api.log"
    command = [SERVICE_PYTHON, ROOT / "bench/bare_api.py", json.dumps({"database_url": service.database_url})]
    with started(command, environment=clean_environment(), log=log) as process:
        assert process.stdout is not None
        port = process.stdout.readline().decode().strip()
        if not port:
            raise Broken(f"The bare API did not start:\n{tail(log)}")
        yield f"http://127.0.0.1:{port}", process.pid


def _gets(service: "Service | _BareApi", path: str, count: int, *, pause_s: float = 0.0) -> Contender:
    def run_once(_: int) -> Sample:
        looking.ask_some(service.url, path, count=WARM_UP, answers=Answers())
        answers, cpu_before = Answers(), service.cpu_s()
        looking.ask_some(service.url, path, count=count, answers=answers, pause_s=pause_s)
        spent = usage.spent_s(cpu_before, service.cpu_s())
        return Sample(
            count,
            sum(answers.waits_s),
            sum(spent.values()),
            {"api": spent["api"], "postgresql": spent["postgresql"]},
            p99_s=answers.quantile_s(0.99),
        )

    return run_once


def _gets_while_busy(folder: Path, path: str, count: int) -> Contender:
    """With all its workers fetching; started anew for each round, so that it is not busy during the others."""

    def run_once(number: int) -> Sample:
        with serving(folder) as service:
            time.sleep(BUSY_AFTER_S)
            before = _done_count(service, path)
            sample = _gets(service, path, count, pause_s=PAUSE_S)(number)
            if _done_count(service, path) == before:
                raise Broken("The pool was not busy")
            return replace(sample, parts={})  # that CPU is the fetching

    return run_once


def _done_count(service: Service, path: str) -> int:
    status, batch = service.call("GET", path)
    if status != 200 or not batch["counts"]["queued"]:
        raise Broken(f"The batch keeps nothing busy: {status} {batch}")
    return int(batch["counts"]["succeeded"])


def _report(samples: dict[str, list[Sample]], jobs: int, gets: int) -> Report:
    report = Report("poll", "Polling: GET of a batch")
    report.notes.append(
        f"{gets:,} GETs a round over one connection. The bare one is FastAPI and one raw asyncpg query, the service's "
        f"own, for the large batch ({jobs:,} jobs of {HOSTS:,} hosts). At rest and busy: a GET every 5 ms, the latter "
        "while the service as shipped fetches as fast as it can, on the same cores."
    )
    names = {
        "large": f"batch of {jobs:,}",
        "small": f"batch of {SMALL}",
        "bare": "raw asyncpg behind FastAPI",
        "at rest": "at rest, a GET every 5 ms",
        "busy": "while the pool runs flat out",
    }
    rows = [["", "ms a GET", "p99 ms", "CPU ms a GET", "CPU by part"]]
    rows += [_row(title, samples[name]) for name, title in names.items()]
    report.tables.append(("", rows))
    of_small = rounds.ratio(samples["large"], samples["small"], lambda sample: sample.cpu_s)
    of_bare = rounds.ratio(samples["large"], samples["bare"], lambda sample: sample.cpu_s)
    slower = rounds.ratio(samples["large"], samples["bare"], lambda sample: sample.wall_s)
    of_rest = rounds.ratio(samples["busy"], samples["at rest"], lambda sample: sample.p99_s or 0.0)
    report.checks += [
        Check("CPU of a GET of the large batch by the small one's", of_small, OF_SMALL_MAX),
        Check("CPU of a GET by the bare one's", of_bare, OF_BARE_MAX),
        Check("Time of a GET by the bare one's", slower, OF_BARE_MAX),
        Check("p99 while the pool runs flat out by that at rest", of_rest, BUSY_OF_REST_MAX),
    ]
    return report


def _row(title: str, samples: list[Sample]) -> list[str]:
    parts = {
        part: rounds.median([sample.parts[part] / sample.jobs * 1000 for sample in samples])
        for part in samples[0].parts
    }
    return [
        title,
        rounds.spread([sample.wall_s / sample.jobs * 1000 for sample in samples], 2),
        rounds.spread([(sample.p99_s or 0.0) * 1000 for sample in samples], 1),
        rounds.spread([sample.cpu_ms for sample in samples], 2) if parts else "",
        ", ".join(f"{part} {share:.2f}" for part, share in parts.items()),
    ]


if __name__ == "__main__":
    rounds.run(measure)
