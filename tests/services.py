"""The service's processes as an operator starts them, and clients of theirs: for stories that need real processes."""

import asyncio
import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import httpx2

from app.jobs import cluster
from app.jobs.account import find_account
from tests.waiting import until

ROOT = Path(__file__).parents[1]
START_S = 60.0
STOP_S = 60.0
ENDED = ("completed", "cancelled")


@dataclass
class Program:
    """A running `fetchpool`, and what it says on standard error."""

    process: asyncio.subprocess.Process
    log: bytearray = field(default_factory=bytearray)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        return self.process.returncode is None

    def log_lines(self) -> list[str]:
        return self.log.decode(errors="replace").splitlines()

    def send(self, signal_number: int) -> None:
        """Send a signal, unless it has ended."""
        # Not by `process.send_signal`: it reaps one that has just died, and asyncio then makes its exit code up.
        if self.is_alive:
            with suppress(ProcessLookupError):  # reaped, and asyncio about to say so
                os.kill(self.pid, signal_number)

    async def stop(self, signal_number: int = signal.SIGINT) -> int:
        """Send a signal, and return the exit code."""
        self.send(signal_number)
        return await self.ended()

    async def ended(self, *, within_s: float = STOP_S) -> int:
        """Wait for the exit code."""
        return await asyncio.wait_for(self.process.wait(), within_s)

    async def kill(self) -> None:
        """kill -9, and see it gone."""
        self.send(signal.SIGKILL)
        await self.process.wait()

    async def read_log(self) -> None:
        assert self.process.stderr is not None
        while more := await self.process.stderr.read(2**16):
            self.log += more


@dataclass
class Service(Program):
    """A running `fetchpool serve`."""

    greeting: str = ""
    url: str = ""

    def worker_pids(self) -> set[int]:
        """Its worker processes that call themselves so."""
        return {pid for pid in children(self.pid) if command_line(pid).startswith("fetchpool worker")}

    async def worker_is_up(self, count: int = 1) -> set[int]:
        """Wait until it has that many workers; return their process ids."""
        await until(lambda: len(self.worker_pids()) == count)
        return self.worker_pids()

    async def call(self, method: str, path: str, **more: Any) -> httpx2.Response:
        """Send one request, over a connection of its own."""
        async with httpx2.AsyncClient(timeout=70) as client:
            return await client.request(method, self.url + path, **more)

    async def post(self, urls: list[str], **more: Any) -> dict[str, Any]:
        """Submit a batch that must be accepted; `more` are other members of its body."""
        return await self.submit({"urls": urls, **more})

    async def submit(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Submit a batch that must be accepted."""
        answer = await self.call("POST", "/v1/batches", json=batch)
        assert answer.status_code == 202, answer.text
        return answer.json()  # type: ignore[no-any-return]

    async def read(self, batch_id: str) -> dict[str, Any]:
        """Poll once."""
        answer = await self.call("GET", f"/v1/batches/{batch_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    async def jobs(self, batch_id: str) -> list[dict[str, Any]]:
        """List the batch's jobs, in the order they were given."""
        answer = await self.call("GET", f"/v1/batches/{batch_id}/jobs?limit=1000")
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]  # type: ignore[no-any-return]

    async def finished(self, batch_id: str, *, within_s: float = 60.0) -> dict[str, Any]:
        """Wait until the batch has ended; while the service cannot say (503), ask again."""
        async with httpx2.AsyncClient(timeout=70) as client, asyncio.timeout(within_s):
            while True:
                answer = await client.get(f"{self.url}/v1/batches/{batch_id}", headers={"Prefer": "wait=5"})
                if answer.status_code == 503:
                    await asyncio.sleep(0.05)
                elif answer.json()["status"] in ENDED:
                    return answer.json()  # type: ignore[no-any-return]


@contextmanager
def data_folder() -> Iterator[Path]:
    """A data folder that does not exist yet, in a folder of its own."""
    # not tmp_path: as root, pytest's own folder is closed to the user that PostgreSQL runs as
    folder = Path(tempfile.mkdtemp(prefix="fp-"))
    folder.chmod(0o711)
    yield folder / "data"
    shutil.rmtree(folder)


@contextmanager
def made_data_folder() -> Iterator[Path]:
    """A data folder as the first start makes it, but for the log's files, which take the longest: a copy, in 0.5 s."""
    with data_folder() as folder:
        subprocess.run(["cp", "-a", _data_folder_once(), folder], check=True)
        yield folder


@cache
def _data_folder_once() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fp-"))
    folder.chmod(0o711)
    atexit.register(shutil.rmtree, folder)
    with mock.patch.object(cluster, "_lay_out_wal"):
        cluster._prepare(folder, wheel=cluster._find_wheel(), account=find_account())
    return folder


def environment(**settings: str) -> dict[str, str]:
    """The environment of a program: of this process's settings none, loopback opened, and the given ones."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FETCHPOOL_")}
    kept.pop("DATABASE_URL", None)
    return kept | {"FETCHPOOL_ALLOW_NETWORKS": "127.0.0.0/8", "PYTHONPATH": str(ROOT)} | settings


async def launch(
    data_dir: Path, *arguments: str, port: int = 0, workers: int = 1, **settings: str
) -> asyncio.subprocess.Process:
    """Start `fetchpool serve` and wait for nothing."""
    asked = ("serve", "--port", str(port), "--workers", str(workers), *arguments)
    return await _start(*asked, folder=data_dir.parent, FETCHPOOL_DATA_DIR=str(data_dir), **settings)


async def start_serve(data_dir: Path, *, port: int, workers: int, **settings: str) -> Program:
    """Start `fetchpool serve` on a port that is known; wait for nothing, and nobody reads its log."""
    return Program(await launch(data_dir, port=port, workers=workers, **settings))


@asynccontextmanager
async def serving(data_dir: Path, *, port: int = 0, workers: int = 1, **settings: str) -> AsyncIterator[Service]:
    """Run `fetchpool serve`; it is ready, and at the end it is stopped."""
    service = Service(await launch(data_dir, port=port, workers=workers, **settings))
    async with _kept(service):
        assert service.process.stdout is not None
        service.greeting = await asyncio.wait_for(read_until(service.process.stdout, b"Ctrl-C"), START_S)
        found = re.search(r"http://\S+(?=/docs)", service.greeting)
        assert found, (service.greeting, service.log_lines())
        service.url = found[0]
        yield service


@asynccontextmanager
async def working(database_url: str, *, folder: Path, **settings: str) -> AsyncIterator[Program]:
    """Run `fetchpool worker`; it may not be up yet, and at the end it is stopped."""
    async with _kept(await start_worker(database_url, folder=folder, **settings)) as worker:
        yield worker


async def start_worker(database_url: str, *, folder: Path, **settings: str) -> Program:
    """Start `fetchpool worker` and wait for nothing; nobody reads its log."""
    return Program(await _start("worker", folder=folder, DATABASE_URL=database_url, **settings))


async def _start(*arguments: str, folder: Path, **settings: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app.cli", *arguments),
        env=environment(**settings),
        cwd=folder,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )


@asynccontextmanager
async def _kept(program: Program) -> AsyncIterator[Any]:
    """Read the program's log; stop it at the end, when it must have logged no fault of its own."""
    reading = asyncio.create_task(program.read_log())
    try:
        yield program
    finally:
        if program.is_alive:
            program.send(signal.SIGCONT)
            await program.stop(signal.SIGTERM)
        await reading
        assert not [line for line in program.log_lines() if "Traceback" in line], program.log.decode()


async def read_until(stream: asyncio.StreamReader, mark: bytes) -> str:
    said = b""
    while line := await stream.readline():
        said += line
        if mark in line:
            break
    return said.decode()


def children(pid: int) -> set[int]:
    return {int(entry.name) for entry in Path("/proc").glob("[0-9]*") if parent_of(entry) == pid}


def parent_of(process: Path) -> int | None:
    try:
        state, parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[:2]
    except OSError:
        return None
    return None if state == "Z" else int(parent)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def postgres_pids(data_dir: Path) -> set[int]:
    """The servers that run on this folder."""
    pids = (int(entry.name) for entry in Path("/proc").glob("[0-9]*"))
    return {pid for pid in pids if f"-D {data_dir}/" in command_line(pid)}
