"""Runs the service under random faults and reconciles the ledgers; the exit code is 1 when they do not agree."""

import argparse
import asyncio
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from chaos import ledgers, plan
from chaos.clients import Client, Ledger
from chaos.plan import Fault, Kind
from chaos.stage import Stage, strike_all
from chaos.target import targeting

SETTLE_S_MAX = 90.0
SHOWN_MAX = 25

SHORT = {
    Kind.KILL_WORKER: 4,
    Kind.FREEZE_WORKER: 3,
    Kind.STOP_WORKER: 4,
    Kind.KILL_API: 2,
    Kind.CUT_DATABASE: 2,
    Kind.SILENCE_DATABASE: 1,
    Kind.CRASH_DATABASE: 1,
    Kind.RESTART_DATABASE: 1,
    Kind.HURRY_WORKER: 2,
    Kind.ABANDON_DATABASE: 1,
}
LONG = {
    Kind.KILL_WORKER: 50,
    Kind.FREEZE_WORKER: 40,
    Kind.STOP_WORKER: 20,
    Kind.KILL_API: 10,
    Kind.CUT_DATABASE: 15,
    Kind.SILENCE_DATABASE: 5,
    Kind.CRASH_DATABASE: 2,
    Kind.RESTART_DATABASE: 3,
    Kind.HURRY_WORKER: 10,
    Kind.ABANDON_DATABASE: 5,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is asked for."""

    seed: int
    seconds: float
    jobs_max: int
    workers: int
    clients: int
    lease_s: float
    faults: dict[Kind, int]

    @property
    def settings(self) -> dict[str, str]:
        """The service's settings."""
        return {
            "FETCHPOOL_LEASE_S": str(self.lease_s),
            "FETCHPOOL_DRAIN_GRACE_S": "0.2",  # so that some fetches outlive it
            "FETCHPOOL_SLOTS": "50",
        }


def main() -> None:
    """Run once, and report."""
    asked = _arguments()
    sys.stdout.write(f"seed {asked.seed}: {asked.seconds:g} s, {asked.workers} workers, {asked.clients} clients\n")
    sys.stdout.flush()
    with TemporaryDirectory(prefix="fetchpool-chaos-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # as root, PostgreSQL runs as a user of its own, who must be let in
        disagreements = asyncio.run(_run(asked, folder))
    for line in disagreements[:SHOWN_MAX]:
        sys.stdout.write(f"WRONG {line}\n")
    sys.stdout.write(f"seed {asked.seed}: {len(disagreements)} disagreements\n")
    sys.exit(1 if disagreements else 0)


async def _run(asked: Run, folder: Path) -> list[str]:
    faults = plan.draw(asked.seed, asked.faults, seconds=asked.seconds, workers=asked.workers, lease_s=asked.lease_s)
    ledger = Ledger()
    stage = Stage(asked.seed, folder, asked.settings)
    async with targeting() as target, stage.running(asked.workers):
        clients = [
            Client(number, asked.seed, url=stage.url, target=target, ledger=ledger) for number in range(asked.clients)
        ]
        await _load(asked, stage, clients, faults)
        settled_s = await _settle(stage)
        verdict = await ledgers.reconcile(stage.direct_url, ledger, target, lease_s=asked.lease_s)
    if not asked.faults:
        verdict.expect(verdict.figures["fetched again"] == 0, "without faults, something was fetched twice")
    if not asked.faults.get(Kind.KILL_WORKER):
        verdict.expect("poisoned" not in verdict.figures["failures"], "a job is poisoned, and no worker was killed")
    reached = {"jobs submitted": f"{ledger.job_count} of {asked.jobs_max} in {asked.seconds:g} s"}
    _report(reached | verdict.figures | stage.figures() | {"seconds to settle": round(settled_s, 1)})
    return [*ledger.faults, *stage.faults, *verdict.disagreements]


def _report(figures: dict[str, Any]) -> None:
    for name, figure in figures.items():
        sys.stdout.write(f"{name}: {figure}\n")


async def _load(asked: Run, stage: Stage, clients: list[Client], faults: list[Fault]) -> None:
    until = time.monotonic() + asked.seconds
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client.run(until=until, jobs_max=asked.jobs_max // asked.clients))
        group.create_task(strike_all(stage, faults))


async def _settle(stage: Stage) -> float:
    """Wait until everything has ended, now that nothing is broken any more; return the seconds it took."""
    started_at = time.monotonic()
    while (left := await ledgers.count_unfinished(stage.direct_url)) > 0:
        if time.monotonic() > started_at + SETTLE_S_MAX:
            stage.faults.append(f"{left} batches and jobs have not ended {SETTLE_S_MAX:g} s after the last fault")
            break
        await asyncio.sleep(0.1)
    return time.monotonic() - started_at


def _arguments() -> Run:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=None, help="repeats a run's faults and choices")
    parser.add_argument("--seconds", type=float, default=25.0, help="how long clients submit and things break (25)")
    parser.add_argument("--jobs", type=int, default=5_000, help="most jobs submitted (5,000)")
    parser.add_argument("--workers", type=int, default=3, help="worker processes (3)")
    parser.add_argument("--clients", type=int, default=6, help="clients at once (6)")
    parser.add_argument("--lease-s", type=float, default=2.0, help="the service's lease (2)")
    parser.add_argument("--no-faults", action="store_true", help="break nothing: then nothing may be fetched twice")
    parser.add_argument(
        "--faults",
        type=_faults,
        metavar="KIND=N,...",
        help=f"break this and nothing else; kinds: {', '.join(kind.name.lower() for kind in Kind)}",
    )
    parser.add_argument(
        "--long",
        action="store_true",
        help="10 minutes, up to 100,000 jobs, 50 workers and 10 APIs killed, 5 restarts; reports how far it came",
    )
    asked = parser.parse_args()
    faults = {} if asked.no_faults else LONG if asked.long else SHORT
    return Run(
        seed=asked.seed if asked.seed is not None else random.SystemRandom().randrange(2**32),
        seconds=600.0 if asked.long else asked.seconds,
        jobs_max=100_000 if asked.long else asked.jobs,
        workers=asked.workers,
        clients=asked.clients * (4 if asked.long else 1),
        lease_s=asked.lease_s,
        faults=faults if asked.faults is None else asked.faults,
    )


def _faults(said: str) -> dict[Kind, int]:
    """Read `freeze_worker=100,kill_api=2`."""
    pairs = (pair.split("=") for pair in said.split(","))
    try:
        return {Kind[name.strip().upper()]: int(count) for name, count in pairs}
    except KeyError as error:
        raise argparse.ArgumentTypeError(f"unknown kind {error}") from None


if __name__ == "__main__":
    main()
