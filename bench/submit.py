"""Submitting: 100,000 URLs in one POST against the bare insert of the same rows, and what goes on meanwhile.

The bare insert is one `INSERT ... SELECT FROM unnest(...)` by asyncpg into a table like the service's own, with its
indexes and rules, in the same PostgreSQL.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import asyncpg
import looking
import rounds
import usage
from looking import Hold
from programs import Broken, scratch
from rounds import Check, Contender, Report, Sample
from service import SETTLE_S, Service, serving
from target import Site, nginx

POSTS = 10
OF_BARE_MAX = 3.0
API_MIB_MAX = 250.0
HOLD_MS_MAX = 50.0
PAUSE_MS_MAX = 1_000.0
"""What claims may pause for while a batch comes in."""

BEFORE_S = 3.0
MIB = 2**20


@dataclass(frozen=True)
class Pressed:
    """A service under several POSTs: their seconds, and what they did to it."""

    label: str
    wall_s: float
    api_peak_mib: float
    hold: Hold
    answer_ms_max: float


@dataclass(frozen=True)
class Claims:
    """Jobs finished a second, and the longest time without a claim."""

    jobs_per_s: float
    pause_ms: float


def measure() -> None:
    """Run the comparison and report."""
    asked = rounds.arguments(__doc__.splitlines()[0], urls=100_000)
    with scratch() as folder, nginx(folder) as site:
        with serving(folder / "posted", "--workers", "0") as service:
            samples = rounds.interleave(_contenders(service, site.urls(asked.urls)), asked.rounds)
        pressed = [_press(folder / f"pressed-{beside}", site, asked.urls, beside=beside) for beside in (1, 2)]
        claims = _claims_meanwhile(folder / "claimed", site, asked.urls, posts=asked.rounds)
    rounds.finish(_report(samples, pressed, claims, asked.urls), samples, save=not asked.no_save)


def _contenders(service: Service, urls: Sequence[str]) -> dict[str, Contender]:
    """Both into empty tables; what the bare one inserts is what the service made of the first POST."""
    content = json.dumps({"urls": urls}).encode()
    _post(service, content)
    columns = asyncio.run(_read_columns(service))

    def post(_: int) -> Sample:
        asyncio.run(_empty(service))
        cpu_before, at = service.cpu_s(), time.perf_counter()
        _post(service, content)
        wall_s = time.perf_counter() - at
        time.sleep(SETTLE_S)
        cpu_after = service.cpu_s()
        spent = usage.spent_s(cpu_before, cpu_after)
        return Sample(len(urls), wall_s, sum(spent.values()), spent)

    return {"unnest": lambda _: asyncio.run(_insert(service, columns, len(urls))), "POST": post}


async def _read_columns(service: Service) -> dict[str, tuple[str, list[Any]]]:
    """The rows by column: its type, and its values, for those that have some."""
    database = await asyncpg.connect(service.database_url)
    await database.execute("CREATE TABLE bare (LIKE job INCLUDING ALL)")
    types = await database.fetch(
        "SELECT attname AS name, format_type(atttypid, atttypmod) AS type FROM pg_attribute "
        "WHERE attrelid = 'job'::regclass AND attnum > 0 AND NOT attisdropped"
    )
    rows = await database.fetch("SELECT * FROM job ORDER BY position")
    await database.close()
    columns = {each["name"]: (each["type"], [row[each["name"]] for row in rows]) for each in types}
    return {name: column for name, column in columns.items() if any(value is not None for value in column[1])}


async def _insert(service: Service, columns: dict[str, tuple[str, list[Any]]], count: int) -> Sample:
    await _empty(service)
    names = ", ".join(columns)
    arrays = ", ".join(f"${number}::{kind}[]" for number, (kind, _) in enumerate(columns.values(), 1))
    statement = f"INSERT INTO bare ({names}) SELECT * FROM unnest({arrays})"
    database = await asyncpg.connect(service.database_url)
    cpu_before, own_cpu_s, at = service.cpu_s(), time.process_time(), time.perf_counter()
    async with database.transaction():
        await database.execute(statement, *(values for _, values in columns.values()))
    wall_s, own_cpu_s = time.perf_counter() - at, time.process_time() - own_cpu_s
    await asyncio.sleep(SETTLE_S)
    store_cpu_s = service.cpu_s()["postgresql"] - cpu_before["postgresql"]
    await database.close()
    return Sample(count, wall_s, own_cpu_s + store_cpu_s, {"client": own_cpu_s, "postgresql": store_cpu_s})


async def _empty(service: Service) -> None:
    database = await asyncpg.connect(service.database_url)
    await database.execute("TRUNCATE batch, job, batch_jobs, tally, host, bare")
    await database.close()


def _press(folder: Path, site: Site, count: int, *, beside: int) -> Pressed:
    """Send several POSTs, so many beside each other, to a service that has just started."""
    contents = [json.dumps({"urls": site.urls(count, series=f"press-{n}")}).encode() for n in range(POSTS)]
    holds = folder.with_suffix(".holds")
    with ExitStack() as stack:
        service = stack.enter_context(serving(folder, "--workers", "0", **looking.probing(holds)))
        service.submit(site.urls(1))
        with looking.asking(service.url, "/healthz") as answers, ThreadPoolExecutor(beside) as posters:
            at = time.monotonic()
            list(posters.map(lambda content: _post(service, content), contents))
            ended_at = time.monotonic()
        return Pressed(
            "one after the other" if beside == 1 else f"{beside} at a time",
            ended_at - at,
            service.peak_bytes()["api"] / MIB,
            looking.longest_hold(holds, at, ended_at),
            max(answers.waits_s) * 1000,
        )


def _claims_meanwhile(folder: Path, site: Site, count: int, *, posts: int) -> list[tuple[Claims, Claims]]:
    """Let the service as shipped fetch, and see what it claims before and during POSTs of the same hosts."""
    with serving(folder) as service:
        service.submit(site.urls(count, series="running"))
        time.sleep(BEFORE_S)
        return [asyncio.run(_claims_around_a_post(service, site.urls(count, series=str(n)))) for n in range(posts)]


async def _claims_around_a_post(service: Service, urls: Sequence[str]) -> tuple[Claims, Claims]:
    content = json.dumps({"urls": urls}).encode()
    database = await asyncpg.connect(service.database_url)
    since = await database.fetchval("SELECT clock_timestamp()")
    await asyncio.sleep(BEFORE_S)
    posted_at = await database.fetchval("SELECT clock_timestamp()")
    await asyncio.to_thread(_post, service, content)
    until = await database.fetchval("SELECT clock_timestamp()")
    before, during = await _claims(database, since, posted_at), await _claims(database, posted_at, until)
    await database.close()
    return before, during


async def _claims(database: asyncpg.Connection, since: Any, until: Any) -> Claims:
    """What happened between two times; the jobs of one claim have one `started_at`."""
    finished = await database.fetchval("SELECT count(*) FROM job WHERE finished_at BETWEEN $1 AND $2", since, until)
    claimed = await database.fetch(
        "SELECT DISTINCT started_at AS at FROM job WHERE started_at BETWEEN $1 AND $2 ORDER BY at", since, until
    )
    times = [since, *(row["at"] for row in claimed), until]
    pause_s = max((later - earlier).total_seconds() for earlier, later in pairwise(times))
    return Claims(finished / (until - since).total_seconds(), pause_s * 1000)


def _post(service: Service, content: bytes) -> None:
    status, answer = service.call("POST", "/v1/batches", content)
    if status != 202:
        raise Broken(f"The batch was not accepted: {status} {answer}")


def _report(
    samples: dict[str, list[Sample]], pressed: list[Pressed], claims: list[tuple[Claims, Claims]], count: int
) -> Report:
    report = Report("submit", f"Submitting {count:,} URLs of 49 hosts in one POST")
    report.notes.append(
        "The bare insert is one statement in one transaction, by asyncpg, of the rows that the POST made, into a table "
        "with the same indexes and rules. CPU is of the API and PostgreSQL, or of the inserting client and PostgreSQL."
    )
    bare, ours = samples["unnest"], samples["POST"]
    slower = rounds.ratio(ours, bare, lambda sample: sample.wall_s)
    dearer = rounds.ratio(ours, bare, lambda sample: sample.cpu_s)
    rows = [["", "seconds", "CPU s", "CPU s by part", "seconds by the bare's", "CPU by the bare's"]]
    rows.append(["bare insert", *_costs(bare), "1", "1"])
    rows.append(["POST", *_costs(ours), f"{slower:.2f}", f"{dearer:.2f}"])
    report.tables += [("", rows), _pressed_table(pressed), _claims_table(claims)]
    report.checks += [
        Check("Seconds of the POST by the bare insert's", slower, OF_BARE_MAX),
        Check("MiB of the API at its peak", max(each.api_peak_mib for each in pressed), API_MIB_MAX),
        Check("Longest hold of its event loop, ms", max(each.hold.wall_s for each in pressed) * 1000, HOLD_MS_MAX),
        Check("Longest pause of claims, ms", max(during.pause_ms for _, during in claims), PAUSE_MS_MAX),
    ]
    report.data |= {"pressed": [vars(each) | {"hold": vars(each.hold)} for each in pressed]}
    report.data |= {"claims": [{"before": vars(before), "during": vars(during)} for before, during in claims]}
    return report


def _costs(samples: list[Sample]) -> list[str]:
    parts = {part: rounds.median([sample.parts[part] for sample in samples]) for part in samples[0].parts}
    return [
        rounds.spread([sample.wall_s for sample in samples], 2),
        rounds.spread([sample.cpu_s for sample in samples], 2),
        ", ".join(f"{part} {spent:.2f}" for part, spent in parts.items()),
    ]


def _pressed_table(pressed: list[Pressed]) -> tuple[str, list[list[str]]]:
    rows = [["", "seconds a POST", "API at its peak, MiB", "loop held, ms (of it computing)", "slowest /healthz, ms"]]
    rows += [
        [
            each.label,
            f"{each.wall_s / POSTS:.2f}",
            f"{each.api_peak_mib:.0f}",
            f"{each.hold.wall_s * 1000:.0f} ({each.hold.cpu_s * 1000:.0f})",
            f"{each.answer_ms_max:.0f}",
        ]
        for each in pressed
    ]
    return f"{POSTS} such POSTs; the longest hold is that of one callback, noted inside the process", rows


def _claims_table(claims: list[tuple[Claims, Claims]]) -> tuple[str, list[list[str]]]:
    rows = [["", "jobs/s", "longest time without a claim, ms"]]
    for label, some in (("before", [before for before, _ in claims]), ("during", [during for _, during in claims])):
        rows.append(
            [
                label,
                rounds.spread([each.jobs_per_s for each in some], 0),
                rounds.spread([each.pause_ms for each in some], 0),
            ]
        )
    return "The workers, on jobs of the same hosts, before and during a POST (which takes the same two cores)", rows


if __name__ == "__main__":
    rounds.run(measure)
