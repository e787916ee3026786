"""Flat: CPU for each job, as a multiple of the bare loop on the same URLs, whatever is pending.

The service as shipped takes a part of what is pending as fast as it can; the loop fetches as many pages of the same
hosts. The cases take turns, each with a service and data of its own that is started for its turn.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import contenders
import rounds
import usage
from filling import Pages, fill
from programs import Broken, scratch
from rounds import Check, Contender, Report, Sample
from service import Service, serving
from target import HOSTS, Site, loopback_hosts, nginx

MANY_HOSTS = 50_000
"""Or more, for more rounds: each takes those it has done, and what was under way at its end, away from the next."""
MANY_BATCHES = 1_000
WARM_UP = 1_000
LEFT = 8_000
"""What the smallest case still has pending when the measuring ends, but for what is done between two looks."""

LOOK_S = 0.05
LOOK_SHARE = 1 / 40
"""A look reads every tally, of which many batches have tens of thousands: it is to take no more of the time than this.
Every `LOOK_S`, it took a tenth of a core, and the caches, from the service that is measured."""
TAKE_S_MAX = 120.0
DRAIN_S_MAX = 1_200.0
SETTLE_S = 75.0
"""For the autovacuum that follows the last jobs: it starts within a minute."""
OF_SMALLEST_MAX = 1.15
MOVED_MIN = 40.0
DEAD_MAX = 0.2
JOB_KIB_MAX = 1.5
SMALLEST = "smallest"
TABLES = ("job", "batch_jobs", "host", "tally", "histogram", "body", "body_shared", "attempt")


@dataclass(frozen=True)
class Case:
    """What is pending, and on how many hosts; `batches` are filled in once, or for each round those of `in_round`.

    `settings` are further ones of the service.
    """

    title: str
    hosts: Sequence[str]
    batches: Sequence[Pages] = ()
    in_round: Callable[[int], Pages] | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    moves: list["Moves"] = field(default_factory=list)


@dataclass(frozen=True)
class Moves:
    """Jobs for each statement that claimed or recorded some, in one round."""

    by_claim: float
    by_record: float


@dataclass(frozen=True)
class Size:
    """A table: its rows, the dead ones beside them, and its bytes, with indexes and of these alone."""

    table: str
    rows: int
    dead_rows: int
    size_bytes: int
    index_bytes: int


def measure() -> None:
    """Run the comparison and report."""
    asked = rounds.arguments(__doc__.splitlines()[0], jobs=8_000, pending=1_000_000, in_flight=100)
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        many = max(MANY_HOSTS, asked.rounds * (WARM_UP + asked.jobs) * 10 // 9)
        site = stack.enter_context(nginx(folder, hosts=loopback_hosts(many)))
        cases = _cases(site, asked.jobs, asked.pending, asked.rounds, asked.in_flight)
        found: dict[str, Contender] = {}
        for name, case in cases.items():
            data = folder / f"case-{len(found)}"
            _fill_once(case, data)
            found[name] = _taking(case, data, asked.jobs)
        for count in sorted({len(case.hosts) for case in cases.values()}):
            found[f"aiohttp {count}"] = _bare(site, count, asked.jobs, folder, in_flight=asked.in_flight)
        samples = rounds.interleave(found, asked.rounds)
        with serving(folder / f"case-{list(cases).index('pending')}") as service:
            sizes = asyncio.run(_sizes_when_done(service, asked.pending))
    rounds.finish(_report(cases, samples, sizes), samples, save=not asked.no_save)


def _cases(site: Site, jobs: int, pending: int, count: int, in_flight: int) -> dict[str, Case]:
    origins = site.origins()
    some, one = origins[:HOSTS], origins[:1]
    a_round = WARM_UP + jobs + LEFT
    each = count * a_round // MANY_BATCHES
    return {
        SMALLEST: Case(
            f"{LEFT:,} to {a_round:,} pending, {HOSTS} hosts, 1 batch",
            some,
            in_round=lambda number: Pages(some, f"small-{number}", a_round),
        ),
        "pending": Case(f"{pending:,} pending", some, [Pages(some, "large", pending)]),
        # With the shipped limit of a host, the loop would have many more in flight than the service may.
        "host": Case(
            f"1 host, {in_flight} in flight at most",
            one,
            in_round=lambda number: Pages(one, f"host-{number}", a_round),
            settings={"FETCHPOOL_HOST_CONCURRENCY": str(in_flight)},
        ),
        "hosts": Case(f"{len(origins):,} hosts, a URL each", origins, [Pages(origins, "hosts", len(origins))]),
        "batches": Case(
            f"{MANY_BATCHES:,} batches",
            some,
            [Pages(some, f"batch-{number}", each, first=number) for number in range(MANY_BATCHES)],
        ),
    }


def _fill_once(case: Case, data: Path) -> None:
    if case.batches:
        with serving(data, "--workers", "0") as service:
            fill(service, list(case.batches), data)


def _taking(case: Case, data: Path, jobs: int) -> Contender:
    def run_once(number: int) -> Sample:
        with serving(data, **case.settings) as service:
            if case.in_round is not None:
                fill(service, [case.in_round(number)], data)
            return asyncio.run(_take(service, case, jobs))

    return run_once


async def _take(service: Service, case: Case, jobs: int) -> Sample:
    """Measure while so many jobs are done, from when the workers have warmed up."""
    database = await asyncpg.connect(service.database_url)
    done_before = await _wait_until_done(database, await _done(database) + WARM_UP)
    looking = database.get_server_pid()
    since, cpu_before, at = await _now(database), service.cpu_s(without=looking), time.perf_counter()
    count = await _wait_until_done(database, done_before + jobs) - done_before
    wall_s, cpu_after, until = time.perf_counter() - at, service.cpu_s(without=looking), await _now(database)
    case.moves.append(await _moves(database, since, until))
    await database.close()
    spent = usage.spent_s(cpu_before, cpu_after)
    return Sample(count, wall_s, sum(spent.values()), spent)


async def _wait_until_done(database: asyncpg.Connection, wanted: int, *, within_s: float = TAKE_S_MAX) -> int:
    give_up_at = time.monotonic() + within_s
    while True:
        began = time.monotonic()
        if (done := await _done(database)) >= wanted:
            return done
        if began > give_up_at:
            raise Broken(f"Only {done:,} of {wanted:,} jobs were done in time")
        await asyncio.sleep(max(LOOK_S, (time.monotonic() - began) / LOOK_SHARE))


async def _done(database: asyncpg.Connection) -> int:
    return int(await database.fetchval("SELECT coalesce(sum(succeeded), 0) FROM tally"))


async def _now(database: asyncpg.Connection) -> Any:
    return await database.fetchval("SELECT clock_timestamp()")


async def _moves(database: asyncpg.Connection, since: Any, until: Any) -> Moves:
    """The jobs of one claim, and of one record, have the time of its transaction."""
    claimed, recorded = [
        await database.fetchrow(
            f"SELECT count(*) AS jobs, count(DISTINCT {column}) AS statements FROM job "
            f"WHERE {column} BETWEEN $1 AND $2",
            since,
            until,
        )
        for column in ("started_at", "finished_at")
    ]
    return Moves(
        claimed["jobs"] / max(claimed["statements"], 1),
        recorded["jobs"] / max(recorded["statements"], 1),
    )


def _bare(site: Site, host_count: int, jobs: int, folder: Path, *, in_flight: int) -> Contender:
    part = Site(site.hosts[:host_count], site.ports)
    return contenders.bare(
        lambda number: part.urls(jobs, series=f"bare-{number}"),
        in_flight=in_flight,
        warm_up=part.urls(HOSTS, series="warm-up"),
        folder=folder,
    )


async def _sizes_when_done(service: Service, pending: int) -> list[Size]:
    """Let the service do all that is pending; then say how large its tables are, and how much of them is dead rows."""
    database = await asyncpg.connect(service.database_url)
    await _wait_until_done(database, pending, within_s=DRAIN_S_MAX)
    await asyncio.sleep(SETTLE_S)
    rows = await database.fetch(
        "SELECT relname, n_live_tup, n_dead_tup, pg_total_relation_size(relid), pg_indexes_size(relid) "
        "FROM pg_stat_user_tables WHERE relname = ANY($1)",
        list(TABLES),
    )
    await database.close()
    return sorted((Size(*row) for row in rows), key=lambda size: TABLES.index(size.table))


def _report(cases: dict[str, Case], samples: dict[str, list[Sample]], sizes: list[Size]) -> Report:
    report = Report("scale", "Flat: from a thousand jobs to a million")
    report.notes.append(
        "CPU for each job of all processes of the service, PostgreSQL included, while it takes some thousands of what "
        "is pending; the multiple is by a bare aiohttp loop on URLs of the same hosts. A claim or record is one "
        "statement; the figures are the jobs that each moved."
    )
    header = ["pending", "CPU ms/job", "aiohttp's", "multiple", "by the first's", "jobs/s", "jobs a claim", "a record"]
    rows = [header]
    for name, case in cases.items():
        of_first = rounds.median(_multiples_of_first(cases, samples, name))
        rows.append(_row(case, samples[name], _bares(case, samples), of_first))
        if name != SMALLEST:
            what = f"Multiple of the bare loop with {case.title} by that of the smallest"
            report.checks.append(Check(what, of_first, OF_SMALLEST_MAX))
    for what in ("by_claim", "by_record"):
        least = min(rounds.median([getattr(moves, what) for moves in case.moves]) for case in cases.values())
        report.checks.append(Check(f"Jobs moved {what.replace('_', ' ')}, the least", least, MOVED_MIN, is_floor=True))
    report.tables += [
        ("", rows),
        (f'The tables of "{cases["pending"].title}", once all of them are done', _size_rows(sizes)),
    ]
    job = sizes[TABLES.index("job")]
    report.checks.append(Check("Dead rows of job by the live ones, all done", job.dead_rows / job.rows, DEAD_MAX))
    report.checks.append(Check("KiB of job and its indexes for each", job.size_bytes / job.rows / 2**10, JOB_KIB_MAX))
    report.data["moves"] = {name: [vars(moves) for moves in case.moves] for name, case in cases.items()}
    return report


def _size_rows(sizes: list[Size]) -> list[list[str]]:
    rows = [["table", "rows", "dead rows", "MiB with indexes", "MiB of indexes"]]
    for size in sizes:
        counts = [f"{size.rows:,}", f"{size.dead_rows:,}"]
        rows.append([size.table, *counts, _mib(size.size_bytes), _mib(size.index_bytes)])
    return rows


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.1f}"


def _row(case: Case, samples: list[Sample], bare: list[Sample], of_first: float) -> list[str]:
    return [
        case.title,
        rounds.spread([sample.cpu_ms for sample in samples], 3),
        f"{rounds.median([sample.cpu_ms for sample in bare]):.3f}",
        f"{rounds.ratio(samples, bare, lambda sample: sample.cpu_ms):.2f}",
        f"{of_first:.2f}",
        f"{rounds.median([sample.jobs / sample.wall_s for sample in samples]):,.0f}",
        f"{rounds.median([moves.by_claim for moves in case.moves]):.0f}",
        f"{rounds.median([moves.by_record for moves in case.moves]):.0f}",
    ]


def _multiples_of_first(cases: dict[str, Case], samples: dict[str, list[Sample]], name: str) -> list[float]:
    first = _multiples(cases[SMALLEST], samples, SMALLEST)
    return [this / that for this, that in zip(_multiples(cases[name], samples, name), first, strict=True)]


def _multiples(case: Case, samples: dict[str, list[Sample]], name: str) -> list[float]:
    return [ours.cpu_ms / bare.cpu_ms for ours, bare in zip(samples[name], _bares(case, samples), strict=True)]


def _bares(case: Case, samples: dict[str, list[Sample]]) -> list[Sample]:
    return samples[f"aiohttp {len(case.hosts)}"]


if __name__ == "__main__":
    rounds.run(measure)
