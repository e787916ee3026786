"""What processes cost: CPU seconds of whole process trees, their memory, and how busy the rest of the machine was."""

import os
import platform
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

PARTS = {"postgres": "postgresql", "fetchpool work": "workers", "fetchpool serv": "api"}
"""Beginnings of process names, and the part of the service they are."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The clocks at one moment: of the wall, of the machine, of this bench with all it started."""

    at: float
    machine_s: float
    bench_s: float


def tree_cpu_s(pid: int, *, without: int | None = None) -> dict[str, float]:
    """CPU seconds so far of a process and all its descendants by part, those included that have ended.

    `without` one of them, which does the measuring's own work.
    """
    spent: dict[str, float] = defaultdict(float)
    for process in tree(pid):
        if process.pid == without:
            continue
        try:
            times, part = process.cpu_times(), _part(process.name())
        except psutil.NoSuchProcess:  # its parent has its time from now on
            continue
        spent[part] += times.user + times.system + times.children_user + times.children_system
    return dict(spent)


def spent_s(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """CPU seconds by part between two readings."""
    return {part: after[part] - before.get(part, 0.0) for part in after}


def tree(pid: int) -> list[psutil.Process]:
    """A process and its descendants."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def tree_pss_bytes(pid: int) -> dict[str, int]:
    """Memory of a process and its descendants by part, shared pages divided among those that share them."""
    held: dict[str, int] = defaultdict(int)
    for process in tree(pid):
        try:
            held[_part(process.name())] += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return dict(held)


def tree_peak_bytes(pid: int) -> dict[str, int]:
    """The most resident memory so far of a process and its descendants by part, the peaks of a part added up."""
    peaks: dict[str, int] = defaultdict(int)
    for process in tree(pid):
        try:
            name, status = process.name(), Path(f"/proc/{process.pid}/status").read_text()
        except (psutil.NoSuchProcess, OSError):
            continue
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            peaks[_part(name)] += int(found[1]) * 1024
    return dict(peaks)


def read() -> Reading:
    """Read the clocks."""
    return Reading(time.monotonic(), _machine_cpu_s(), sum(tree_cpu_s(os.getpid()).values()))


def other_cores(before: Reading, after: Reading) -> float:
    """How many cores, on average, were busy with what is not of this bench."""
    strange_s = (after.machine_s - before.machine_s) - (after.bench_s - before.bench_s)
    return max(0.0, strange_s / (after.at - before.at))


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    memory_gib = psutil.virtual_memory().total / 2**30
    return {
        "cpu": f"{os.cpu_count()} x {_cpu_model()}",
        "memory": f"{memory_gib:.0f} GiB",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
    }


def _machine_cpu_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _part(name: str) -> str:
    return next((part for beginning, part in PARTS.items() if name.startswith(beginning)), "other")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
