"""At rest: memory and CPU of an idle service, its start, how soon a lone URL is done, and a large worker's memory.

Each round starts the service anew over the same data, as on a machine that has everything installed and cached.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import rounds
from programs import Broken, scratch
from rounds import Check, Report, Sample
from service import Service, serving
from target import Site, loopback_hosts, nginx

MIB = 2**20
START_S_MAX = 5.0
LATENCY_MS_MAX = 50.0
IDLE_MIB_MAX, IDLE_PERCENT_MAX = 350.0, 1.0
WORKER_MIB_MAX = 200.0
GROWTH_MAX = 1.1
"""Of the large worker's peak from the first fifth of its jobs to the last: flat, but for what an allocator keeps."""

QUIET_S = 2.0
IDLE_S = 45
"""Several wakes of a worker at rest, which come each quarter of a minute."""
SLOTS = 1_000
HOSTS = 500
SHARES = 5
PARTS = ("api", "workers", "postgresql")


@dataclass(frozen=True)
class Rest:
    """One round: seconds to the first 202, milliseconds of each lone URL beyond its fetch, idle memory and cores."""

    start_s: float
    beyond_ms: list[float]
    fetch_ms: list[float]
    pss_mib: dict[str, float]
    cores: float


def measure() -> None:
    """Run the measurements and report."""
    asked = rounds.arguments(__doc__.splitlines()[0], urls=20, idle_seconds=IDLE_S, worker_jobs=100_000)
    rests: list[Rest] = []
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        site = stack.enter_context(nginx(folder, hosts=loopback_hosts(HOSTS)))
        with serving(folder / "service") as service:
            service.run(site.urls(1))

        def rest(number: int) -> Sample:
            at = time.perf_counter()
            rests.append(_rest(folder / "service", site, number, urls=asked.urls, idle_s=asked.idle_seconds))
            return Sample(asked.urls, time.perf_counter() - at, rests[-1].cores * asked.idle_seconds)

        samples = rounds.interleave({"rest": rest}, asked.rounds)
        peaks = _large_worker(folder / "large", site, asked.worker_jobs)
    rounds.finish(_report(rests, peaks, asked.worker_jobs), samples, save=not asked.no_save)


def _rest(folder: Path, site: Site, number: int, *, urls: int, idle_s: float) -> Rest:
    started_at = time.perf_counter()
    with serving(folder) as service:
        first_id = service.submit(site.urls(1, series=f"first-{number}"))
        start_s = time.perf_counter() - started_at
        service.finished(first_id)
        time.sleep(QUIET_S)
        taken = [_lone_url(service, url) for url in site.urls(urls, series=f"lone-{number}")]
        time.sleep(QUIET_S)
        cpu_before, at = sum(service.cpu_s().values()), time.perf_counter()
        time.sleep(idle_s)
        cores = (sum(service.cpu_s().values()) - cpu_before) / (time.perf_counter() - at)
        pss_mib = {part: held / MIB for part, held in service.pss_bytes().items()}
    return Rest(start_s, [whole - fetch for whole, fetch in taken], [fetch for _, fetch in taken], pss_mib, cores)


def _lone_url(service: Service, url: str) -> tuple[float, float]:
    """Milliseconds from before the POST until a client sees it succeeded, and those of its fetch."""
    at = time.perf_counter()
    batch = service.finished(service.submit([url]))
    whole_ms = (time.perf_counter() - at) * 1000
    if batch["counts"]["succeeded"] != 1:
        raise Broken(f"The URL failed: {batch['errors']}")
    _, listed = service.call("GET", f"/v1/batches/{batch['id']}/jobs")
    return whole_ms, float(listed["data"][0]["total_ms"])


def _large_worker(folder: Path, site: Site, jobs: int) -> list[float]:
    """Let one worker with many slots do jobs, a fifth at a time; its peak memory in MiB after each."""
    peaks: list[float] = []
    with serving(folder, "--workers", "1", FETCHPOOL_SLOTS=str(SLOTS)) as service:
        for number in range(SHARES):
            service.run(site.urls(jobs // SHARES, series=f"large-{number}"))
            peaks.append(service.peak_bytes()["workers"] / MIB)
    return peaks


def _report(rests: list[Rest], peaks: list[float], jobs: int) -> Report:
    report = Report("idle", "At rest, and memory")
    report.notes.append(
        "Memory at rest is the sum of the PSS of the API, the workers and PostgreSQL, after a few batches. A lone "
        "URL's time is from before the POST until a client that waits for it sees it succeeded, less the fetch itself."
    )
    start_s = [rest.start_s for rest in rests]
    beyond_ms = [ms for rest in rests for ms in rest.beyond_ms]
    fetch_ms = [ms for rest in rests for ms in rest.fetch_ms]
    whole_mib = [sum(rest.pss_mib.values()) for rest in rests]
    by_part = ", ".join(f"{part} {rounds.median([rest.pss_mib[part] for rest in rests]):.0f}" for part in PARTS)
    cores = [rest.cores for rest in rests]
    rows = [
        ["", "median (least to most)"],
        ["start of the command to the first 202, s", rounds.spread(start_s, 2)],
        ["lone URL, ms beyond its fetch", rounds.spread(beyond_ms, 1)],
        ["its fetch, ms", rounds.spread(fetch_ms, 1)],
        ["idle memory, MiB", f"{rounds.spread(whole_mib, 0)}: {by_part}"],
        ["idle, % of a core", rounds.spread([each * 100 for each in cores], 2)],
        [f"peak of a worker of {SLOTS:,} slots, MiB", ", ".join(f"{peak:.0f}" for peak in peaks)],
    ]
    report.tables.append(("", rows))
    report.notes.append(f"The large worker's peak is that after each fifth of {jobs:,} jobs of {HOSTS} hosts.")
    report.checks += [
        Check("Seconds from the start to the first accepted batch", rounds.median(start_s), START_S_MAX),
        Check("A lone URL, ms beyond its fetch", rounds.median(beyond_ms), LATENCY_MS_MAX),
        Check("Idle memory, MiB", rounds.median(whole_mib), IDLE_MIB_MAX),
        Check("Idle, % of a core", rounds.median(cores) * 100, IDLE_PERCENT_MAX),
        Check(f"Peak of a worker with {SLOTS:,} slots, MiB", max(peaks), WORKER_MIB_MAX),
        Check("That peak by the one after the first fifth", peaks[-1] / peaks[0], GROWTH_MAX),
    ]
    report.data |= {"rests": [vars(rest) for rest in rests], "worker_peaks_mib": peaks}
    return report


if __name__ == "__main__":
    rounds.run(measure)
