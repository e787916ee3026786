"""The processes under attack, each started again when it ends, and the faults that strike them."""

import asyncio
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from chaos.plan import Fault, Kind
from tests.postgresql import Postgres, own_postgres
from tests.proxy import Proxy, proxying
from tests.services import Program, start_serve, start_worker

RESTART_S_MAX = 1.0
STOP_S_MAX = 30.0
DATABASE_AWAY = "cannot be used"
"""What a program says that was started while the database was away; it then ends with exit code 1, as it should."""


class Seat:
    """One program, started again whenever it ends."""

    def __init__(self, name: str, number: int, stage: "Stage") -> None:
        self.name = name
        self.program: Program | None = None
        self._number = number
        self._stage = stage
        self._dice = random.Random(f"{stage.seed}/{name}/{number}")
        self._asked: set[int] = set()

    async def keep(self) -> None:
        """Keep it running until cancelled."""
        while True:
            self.program = program = await self._start()
            reading = asyncio.create_task(program.read_log())
            try:
                exit_code = await program.process.wait()
            finally:
                if program.is_alive:
                    await _end(program)
                await reading
                self._judge(program)
            self._stage.exits[self.name] += 1
            self._judge_exit(program, exit_code)
            await asyncio.sleep(self._dice.uniform(0, RESTART_S_MAX))

    def send(self, signal_number: int) -> Program | None:
        """Signal the program that runs now, if one does; return it."""
        program = self.program
        if program is None or not program.is_alive:
            return None
        self._asked.add(program.pid)
        program.send(signal_number)
        return program

    async def _start(self) -> Program:
        stage = self._stage
        if self.name == "API":
            return await start_serve(
                stage.folder / "data", port=stage.port, workers=0, DATABASE_URL=stage.database_url, **stage.settings
            )
        return await start_worker(stage.database_url, folder=stage.folder, **stage.settings)

    def _judge_exit(self, program: Program, exit_code: int) -> None:
        is_expected = program.pid in self._asked and exit_code in (0, 130, -signal.SIGKILL, -signal.SIGTERM)
        if not is_expected and not any(DATABASE_AWAY in line for line in program.log_lines()[-1:]):
            said = "\n".join(program.log_lines()[-5:])
            self._stage.faults.append(f"{self.name} {self._number} ended by itself, exit code {exit_code}:\n{said}")

    def _judge(self, program: Program) -> None:
        lines = program.log_lines()
        if found := [number for number, line in enumerate(lines) if "Traceback" in line]:
            said = "\n".join(lines[max(0, found[0] - 2) : found[0] + 60])
            self._stage.faults.append(f"{self.name} {self._number} logged a traceback:\n{said}")
        self._stage.log_line_count += len(lines)
        self._stage.lost_leases += sum("Lost the lease" in line for line in lines)


class Stage:
    """All processes of a run: PostgreSQL, a proxy before it, one API, some workers."""

    def __init__(self, seed: int, folder: Path, settings: dict[str, str]) -> None:
        self.seed = seed
        self.folder = folder
        self.settings = settings
        self.exits: Counter[str] = Counter()
        self.done: Counter[Kind] = Counter()
        self.faults: list[str] = []
        self.log_line_count = 0
        self.lost_leases = 0
        self.workers: list[Seat] = []
        self._api = Seat("API", 0, self)
        self._database_is_struck = asyncio.Lock()

    @property
    def url(self) -> str:
        """Where the API listens, through all its restarts."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def database_url(self) -> str:
        """The way through the proxy."""
        return self._proxy.url

    @property
    def direct_url(self) -> str:
        """The way past the proxy."""
        return self._postgres.url

    def figures(self) -> dict[str, Any]:
        """What was done, and what the programs did about it."""
        return {
            "faults": {kind.value: count for kind, count in self.done.items()},
            "programs that ended": dict(self.exits),
            "leases given up": self.lost_leases,
            "log lines": self.log_line_count,
        }

    @asynccontextmanager
    async def running(self, worker_count: int) -> AsyncIterator[None]:
        """Start everything; end it at the end."""
        async with AsyncExitStack() as stack:
            self._postgres: Postgres = await stack.enter_async_context(own_postgres(self.folder / "data"))
            self._proxy: Proxy = await stack.enter_async_context(proxying(self._postgres.socket_path))
            self.port = _free_port()  # last of all: what listens after this might be given the same
            self.workers = [Seat("worker", number, self) for number in range(worker_count)]
            keeping = [asyncio.create_task(self._api.keep())]
            stack.push_async_callback(_cancel, keeping)
            await self._is_listening()
            keeping += [asyncio.create_task(seat.keep()) for seat in self.workers]
            yield

    async def strike(self, fault: Fault) -> None:
        """Do one fault, and what ends it."""
        worker = self.workers[fault.victim]
        match fault.kind:
            case Kind.KILL_WORKER:
                struck = worker.send(signal.SIGKILL) is not None
            case Kind.STOP_WORKER:
                struck = worker.send(signal.SIGTERM) is not None
            case Kind.HURRY_WORKER:
                struck = await _send_twice(worker, signal.SIGTERM, signal.SIGTERM, pause_s=fault.lasts_s)
            case Kind.FREEZE_WORKER:
                struck = await _send_twice(worker, signal.SIGSTOP, signal.SIGCONT, pause_s=fault.lasts_s)
            case Kind.KILL_API:
                struck = self._api.send(signal.SIGKILL) is not None
            case _:
                async with self._database_is_struck:
                    await self._strike_database(fault)
                struck = True
        if struck:
            self.done[fault.kind] += 1

    async def _strike_database(self, fault: Fault) -> None:
        match fault.kind:
            case Kind.CUT_DATABASE:
                await self._proxy.cut(fault.lasts_s)
            case Kind.SILENCE_DATABASE:
                await self._proxy.silence(fault.lasts_s)
            case Kind.ABANDON_DATABASE:
                self._proxy.abandon()
            case Kind.CRASH_DATABASE:
                await self._postgres.restart(signal.SIGQUIT, down_s=fault.lasts_s)
            case _:
                await self._postgres.restart(signal.SIGINT, down_s=fault.lasts_s)

    async def _is_listening(self) -> None:
        async with asyncio.timeout(60):
            while True:
                with suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.close()
                    return
                await asyncio.sleep(0.05)


async def strike_all(stage: Stage, faults: list[Fault]) -> None:
    """Do each fault at its time; return when the last is over."""
    started_at = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for fault in faults:
            await asyncio.sleep(started_at + fault.at_s - time.monotonic())
            group.create_task(stage.strike(fault))


async def _send_twice(worker: Seat, first: int, then: int, *, pause_s: float) -> bool:
    program = worker.send(first)
    if program is None:
        return False
    await asyncio.sleep(pause_s)
    program.send(then)
    return True


async def _end(program: Program) -> None:
    for signal_number in (signal.SIGCONT, signal.SIGTERM):
        with suppress(ProcessLookupError):
            program.send(signal_number)
    with suppress(TimeoutError):
        await program.ended(within_s=STOP_S_MAX)
        return
    await program.kill()


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in reversed(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
