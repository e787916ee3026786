"""Side by side with its peers: job queues of Python and Scrapy, each as its documentation shows, on the same pages.

With their defaults, but for how many tasks run at once; PgQueuer once more as its guide to tuning shows.

All fetch 10 KiB pages from nginx on 49 loopback addresses and store status and body in PostgreSQL, on two processes
with 100 fetches in flight in all.
"""

import asyncio
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import asyncpg
import contenders
import rounds
import usage
from chart import Bar, Chart
from programs import ROOT, Broken, clean_environment, scratch, started, tail
from rounds import Check, Contender, Report, Sample
from service import SETTLE_S, serving
from stores import Store, postgresql, redis
from target import Site, nginx

PROGRAMS = ROOT / "bench/peer_programs"
PROCESSES, IN_FLIGHT = 2, 50
STORED_S_MAX = 120.0
LOOK_S = 0.05
PGQUEUER = ["pgq", "run", "on_pgqueuer:main", "--max-concurrent-tasks", str(IN_FLIGHT)]
"""It claims 10 jobs at a time unless told otherwise; 25 are the most that so many tasks allow."""
MAKE_PAGES = "CREATE TABLE page (url text PRIMARY KEY, status int NOT NULL, body bytea NOT NULL)"


@dataclass(frozen=True)
class Peer:
    """A peer: its workers' commands, the schema it wants, what it needs, and how much faster the service is to be.

    `at_least` is the goal for jobs/s of the service by those of the peer. One without workers crawls by itself: each
    process is given its share of the URLs and ends with it.
    """

    name: str
    environment: str
    workers: Sequence[Sequence[str]] = ()
    schema: Sequence[str] = ()
    with_redis: bool = False
    at_least: float | None = None


PEERS = (
    Peer(
        "PgQueuer",
        "pgqueuer",
        workers=[PGQUEUER] * PROCESSES,
        schema=["pgq", "install"],
        at_least=4.0,
    ),
    Peer(
        "PgQueuer, 25 a claim",
        "pgqueuer",
        workers=[[*PGQUEUER, "--batch-size", str(IN_FLIGHT // 2)]] * PROCESSES,
        schema=["pgq", "install"],
        at_least=4.0,
    ),
    Peer("arq", "arq", workers=[["arq", "on_arq.WorkerSettings"]] * PROCESSES, with_redis=True, at_least=5.0),
    Peer(
        "Celery",
        "celery",
        workers=[
            ["celery", "--app", "on_celery", "worker", "--pool", "threads", "-c", str(IN_FLIGHT), "-n", f"w{number}@%h"]
            for number in range(PROCESSES)
        ],
        with_redis=True,
        at_least=8.0,
    ),
    Peer("Scrapy", "scrapy", at_least=10.0),
    Peer(
        "taskiq",
        "taskiq",
        workers=[
            ["taskiq", "worker", "on_taskiq:broker", "--workers", str(PROCESSES), "--max-async-tasks", str(IN_FLIGHT)]
        ],
        with_redis=True,
    ),
    Peer(
        "Procrastinate",
        "procrastinate",
        workers=[["procrastinate", "--app", "on_procrastinate.app", "worker", "--concurrency", str(IN_FLIGHT)]]
        * PROCESSES,
        schema=["procrastinate", "--app", "on_procrastinate.app", "schema", "--apply"],
    ),
)


class Running:
    """A peer at work, with stores of its own."""

    def __init__(self, peer: Peer, folder: Path, stores: dict[str, Store]) -> None:
        self._peer = peer
        self._folder = folder
        self._stores = stores
        self._running: list[Popen] = []
        self.log = folder / "peer.log"

    @contextmanager
    def start(self, command: Sequence[str], *, is_heard: bool = False) -> Iterator[Popen]:
        """Run one of its programs; `is_heard`: its standard output is read here, and does not go into the log."""
        binaries = ROOT / "bench/.environments" / self._peer.environment / "bin"
        whole = [binaries / command[0], *command[1:]]
        with started(whole, environment=self._environment(), log=self.log, is_heard=is_heard) as process:
            self._running.append(process)
            yield process
            self._running.remove(process)

    @contextmanager
    def submitters(self, count: int) -> Iterator[list[Popen]]:
        """Run what hands it URLs."""
        command = ["python", str(PROGRAMS / "submitting.py"), f"on_{self._peer.environment}"]
        with ExitStack() as stack:
            processes = [stack.enter_context(self.start(command, is_heard=True)) for _ in range(count)]
            for process in processes:
                self._expect(process, b"ready")
            yield processes

    def run(self, urls: Sequence[str], submitters: Sequence[Popen]) -> Sample:
        """Have all URLs fetched and stored; how many are, is counted in the table itself."""
        return asyncio.run(self._run(urls, submitters))

    async def _run(self, urls: Sequence[str], submitters: Sequence[Popen]) -> Sample:
        database = await asyncpg.connect(self._stores["postgresql"].address)
        await database.execute("TRUNCATE page")
        before, started_at = self._cpu_s(), time.perf_counter()
        for number, process in enumerate(submitters):
            _tell(process, urls[number :: len(submitters)])
        await self._wait_until_stored(database, len(urls))
        wall_s = time.perf_counter() - started_at
        for process in submitters:
            self._expect(process, b"submitted")
        await asyncio.sleep(SETTLE_S)
        after = self._cpu_s()
        bad_count = await database.fetchval("SELECT count(*) FROM page WHERE status <> 200 OR length(body) < 10240")
        await database.close()
        if bad_count:
            raise Broken(f"{self._peer.name} stored {bad_count} wrong pages")
        spent = usage.spent_s(before, after)
        return Sample(len(urls), wall_s, sum(spent.values()), spent)

    async def _wait_until_stored(self, database: asyncpg.Connection, count: int) -> None:
        give_up_at = time.monotonic() + STORED_S_MAX
        stored_count = 0
        while stored_count < count:
            if time.monotonic() > give_up_at or any(process.poll() is not None for process in self._running):
                raise Broken(f"{self._peer.name} stored {stored_count} of {count} pages:\n{tail(self.log)}")
            await asyncio.sleep(LOOK_S)
            stored_count = await database.fetchval("SELECT count(*) FROM page")

    def _cpu_s(self) -> dict[str, float]:
        spent = [sum(usage.tree_cpu_s(process.pid).values()) for process in self._running]
        return {"processes": sum(spent)} | {name: store.cpu_s() for name, store in self._stores.items()}

    def _environment(self) -> dict[str, str]:
        addresses = {"DATABASE_URL": self._stores["postgresql"].address}
        if "redis" in self._stores:
            addresses["REDIS_PORT"] = self._stores["redis"].address
        return clean_environment(
            PYTHONPATH=str(PROGRAMS), IN_FLIGHT=str(IN_FLIGHT), PGDSN=addresses["DATABASE_URL"], **addresses
        )

    def _expect(self, process: Popen, word: bytes) -> None:
        assert process.stdout is not None
        if process.stdout.readline().strip() != word:
            raise Broken(f"{self._peer.name} failed:\n{tail(self.log)}")


def measure() -> None:
    """Run the comparison and report."""
    asked = rounds.arguments(__doc__.splitlines()[0], jobs=10_000, peer_jobs=4_000)
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        site = stack.enter_context(nginx(folder))
        service = stack.enter_context(serving(folder / "service"))
        service.run(site.urls(1_000, series="warm-up"))
        found = {"Fetchpool": contenders.whole(service, lambda number: site.urls(asked.jobs, series=str(number)))}
        for number, peer in enumerate(PEERS):
            found[peer.name] = _contender(stack, peer, folder / str(number), site, asked.peer_jobs)
        samples = rounds.interleave(found, asked.rounds)
    rounds.finish(_report(samples, asked.jobs, asked.peer_jobs), samples, save=not asked.no_save)


def _contender(stack: ExitStack, peer: Peer, folder: Path, site: Site, count: int) -> Contender:
    running = _prepare(stack, peer, folder)
    if not peer.workers:
        return _crawling(running, lambda number: site.urls(count, series=str(number)))
    for command in peer.workers:
        stack.enter_context(running.start(command))
    submitters = stack.enter_context(running.submitters(1))
    running.run(site.urls(len(site.hosts), series="warm-up"), submitters)
    return lambda number: running.run(site.urls(count, series=str(number)), submitters)


def _crawling(running: Running, urls: contenders.Urls) -> Contender:
    """Of one that cannot crawl twice: started anew for each round, which is not measured."""

    def run_once(number: int) -> Sample:
        with running.submitters(PROCESSES) as processes:
            return running.run(urls(number), processes)

    return run_once


def _prepare(stack: ExitStack, peer: Peer, folder: Path) -> Running:
    """Start its stores and make their tables."""
    folder.mkdir(mode=0o711)
    stores = {"postgresql": stack.enter_context(postgresql(folder))}
    if peer.with_redis:
        stores["redis"] = stack.enter_context(redis(folder))
    asyncio.run(_execute(stores["postgresql"].address, MAKE_PAGES))
    running = Running(peer, folder, stores)
    if peer.schema:
        with running.start(peer.schema) as process:
            if process.wait(STORED_S_MAX):
                raise Broken(f"{peer.name} could not make its tables:\n{tail(running.log)}")
    return running


async def _execute(url: str, statement: str) -> None:
    database = await asyncpg.connect(url)
    await database.execute(statement)
    await database.close()


def _tell(process: Popen, urls: Sequence[str]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(urls).encode() + b"\n")
    process.stdin.flush()


def _report(samples: dict[str, list[Sample]], count: int, peer_count: int) -> Report:
    report = Report("peers", "Side by side with peers: pages of 10 KiB from 49 hosts, stored")
    report.notes.append(
        f"Fetchpool as shipped with {count:,} jobs, the others with {peer_count:,}, which does not change what a job "
        f"takes; {PROCESSES} processes with {IN_FLIGHT} in flight each. Each has a PostgreSQL of its own with the "
        "settings of Fetchpool's, and fetches and stores with the fastest that suits it: aiohttp and asyncpg, Celery's "
        "threads with urllib3 and psycopg, Scrapy with its own downloader and asyncpg. They have their defaults but "
        "for how many tasks run at once; PgQueuer, which claims 10 jobs at a time then, runs once more with the "
        "25 that its guide to tuning shows. Redis keeps nothing on disk. CPU is of all processes, of submitting too, "
        "and of the stores. The pages are counted in the tables."
    )
    ours = samples["Fetchpool"]
    rows = [["", "version", "jobs/s", "Fetchpool's by it", "CPU ms/job", "by Fetchpool's", "CPU by part, ms/job"]]
    rows += [_row(name, each, ours) for name, each in samples.items()]
    report.tables.append(("", rows))
    bars = [Bar(name, {"jobs/s": rounds.median([_speed(sample) for sample in each])}) for name, each in samples.items()]
    report.chart = Chart("Jobs a second", "/s", bars)
    for peer in PEERS:
        if peer.at_least is not None:
            faster = rounds.ratio(ours, samples[peer.name], _speed)
            report.checks.append(Check(f"Jobs/s by those of {peer.name}", faster, peer.at_least, is_floor=True))
    return report


def _row(name: str, samples: list[Sample], ours: list[Sample]) -> list[str]:
    parts = {part: rounds.median([s.parts[part] / s.jobs * 1000 for s in samples]) for part in samples[0].parts}
    return [
        name,
        _version(name),
        rounds.spread([_speed(sample) for sample in samples], 0),
        f"{rounds.ratio(ours, samples, _speed):.1f}",
        rounds.spread([sample.cpu_ms for sample in samples], 2),
        f"{rounds.ratio(samples, ours, lambda sample: sample.cpu_ms):.1f}",
        ", ".join(f"{part} {share:.2f}" for part, share in parts.items()),
    ]


def _speed(sample: Sample) -> float:
    return sample.jobs / sample.wall_s


def _version(name: str) -> str:
    """What its lock file holds; the service's own is said below the table."""
    for peer in PEERS:
        if peer.name == name:
            lock = (ROOT / f"bench/environments/{peer.environment}.lock").read_text()
            found = re.search(rf"^{peer.environment}==(\S+)", lock, re.MULTILINE)
            return found[1] if found else "unknown"
    return ""


if __name__ == "__main__":
    rounds.run(measure)
