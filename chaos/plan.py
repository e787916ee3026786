"""What goes wrong and when, decided before anything starts, from one seed."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

QUIET_SHARE = 0.1
"""The first and the last part of a run, in which nothing is broken."""


HURRY_S_MAX = 0.1
"""Longest time between two SIGTERM: well within the drain's grace."""


class Kind(StrEnum):
    """A fault; the value is how reports call it."""

    KILL_WORKER = "worker kill -9"
    FREEZE_WORKER = "worker SIGSTOP past the lease"
    STOP_WORKER = "worker SIGTERM"
    KILL_API = "API kill -9"
    CUT_DATABASE = "database connections cut"
    SILENCE_DATABASE = "database connections silent"
    CRASH_DATABASE = "PostgreSQL restart -m immediate"
    RESTART_DATABASE = "PostgreSQL restart -m fast"
    HURRY_WORKER = "worker SIGTERM twice"
    ABANDON_DATABASE = "database connections that carry nothing any more"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault: seconds after the start, the worker it strikes where that matters, and how long it lasts."""

    at_s: float
    kind: Kind
    victim: int
    lasts_s: float


def draw(seed: int, counts: Mapping[Kind, int], *, seconds: float, workers: int, lease_s: float) -> list[Fault]:
    """Draw the faults of a run, in the order of their times."""
    dice = random.Random(seed)
    faults = [
        Fault(
            at_s=seconds * dice.uniform(QUIET_SHARE, 1 - QUIET_SHARE),
            kind=kind,
            victim=dice.randrange(workers),
            lasts_s=_lasts_s(kind, dice, lease_s),
        )
        for kind, count in counts.items()
        for _ in range(count)
    ]
    return sorted(faults, key=lambda fault: fault.at_s)


def _lasts_s(kind: Kind, dice: random.Random, lease_s: float) -> float:
    if kind == Kind.FREEZE_WORKER:
        return lease_s * dice.uniform(1.1, 2.0)
    if kind == Kind.HURRY_WORKER:
        return dice.uniform(0.0, HURRY_S_MAX)
    return lease_s * dice.uniform(0.0, 1.0)
