"""Worker processes are started again when they die, drained on request, and leave no orphan."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from app.worker import processes
from app.worker.processes import Processes, next_delay_s
from tests.waiting import until

# Writes its process id into the folder, and ends on SIGTERM or when its standard input closes.
POLITE = """
import os, pathlib, signal, sys
pathlib.Path(sys.argv[1], str(os.getpid())).touch()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
sys.stdin.read()
"""
STUBBORN = POLITE.replace("lambda *_: sys.exit(0)", "signal.SIG_IGN")


def make_processes(program: str, folder: Path, *, count: int = 1, grace_s: float = 5.0) -> Processes:
    return Processes([sys.executable, "-c", program, str(folder)], count=count, environment=os.environ, grace_s=grace_s)


async def pids_in(folder: Path, count: int) -> list[int]:
    await until(lambda: len(list(folder.iterdir())) >= count)
    return [int(path.name) for path in folder.iterdir()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_as_many_processes_run_as_asked_for_and_all_end(tmp_path: Path) -> None:
    workers = make_processes(POLITE, tmp_path, count=3)
    running = asyncio.create_task(workers.run())
    pids = await pids_in(tmp_path, 3)
    workers.end()
    await asyncio.wait_for(running, 10)
    assert not any(is_alive(pid) for pid in pids)


async def test_a_dead_process_is_started_again(tmp_path: Path) -> None:
    workers = make_processes(POLITE, tmp_path)
    running = asyncio.create_task(workers.run())
    [first] = await pids_in(tmp_path, 1)
    os.kill(first, signal.SIGKILL)
    second = next(pid for pid in await pids_in(tmp_path, 2) if pid != first)
    assert is_alive(second)
    workers.end()
    await asyncio.wait_for(running, 10)


async def test_a_command_that_does_not_exist_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    workers = Processes(["/nonexistent"], count=1, environment={}, grace_s=0)
    running = asyncio.create_task(workers.run())
    await until(lambda: "could not be started" in caplog.text)
    workers.end()
    await asyncio.wait_for(running, 10)


async def test_a_process_that_outlives_its_grace_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "KILL_MARGIN_S", 0.1)
    workers = make_processes(STUBBORN, tmp_path, grace_s=0.1)
    running = asyncio.create_task(workers.run())
    [pid] = await pids_in(tmp_path, 1)
    workers.end()
    await asyncio.wait_for(running, 10)
    assert not is_alive(pid)


async def test_nothing_is_left_when_it_is_cancelled(tmp_path: Path) -> None:
    running = asyncio.create_task(make_processes(STUBBORN, tmp_path).run())
    [pid] = await pids_in(tmp_path, 1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not is_alive(pid)


async def test_a_killed_parent_leaves_no_orphan(tmp_path: Path) -> None:
    parent_program = (
        "import asyncio, os, sys\n"
        "from app.worker.processes import Processes\n"
        "command = [sys.executable, '-c', sys.argv[1], sys.argv[2]]\n"
        "asyncio.run(Processes(command, count=1, environment=os.environ, grace_s=5).run())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", parent_program, POLITE, str(tmp_path))
    [pid] = await pids_in(tmp_path, 1)
    parent.kill()
    await parent.wait()
    await until(lambda: not is_alive(pid))


async def test_a_process_is_out_of_reach_of_ctrl_c(tmp_path: Path) -> None:
    workers = make_processes(POLITE, tmp_path)
    running = asyncio.create_task(workers.run())
    [pid] = await pids_in(tmp_path, 1)
    assert os.getpgid(pid) != os.getpgid(0)
    workers.end()
    await asyncio.wait_for(running, 10)


async def test_no_workers_at_all_end_at_once(tmp_path: Path) -> None:
    workers = make_processes(POLITE, tmp_path, count=0)
    workers.end()
    await asyncio.wait_for(workers.run(), 5)


def test_the_back_off_doubles_up_to_its_bound_and_forgets() -> None:
    waits = [0.0]
    for _ in range(9):
        waits.append(next_delay_s(waits[-1], lived_s=0.1))
    assert waits[1:] == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert next_delay_s(30, lived_s=61) == 0.5
