"""A PostgreSQL of the service's own, for machines without one: run it, restart it when it dies, stop it.

Prepares nothing itself, which is `cluster`'s, and knows nothing of the tables; the rest of the service sees an ordinary
database URL.
"""

import asyncio
import logging
import signal
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

import asyncpg

from app.jobs.account import EmbeddedUnusable
from app.jobs.cluster import DATABASE, ENVIRONMENT, PORT, ROLE, Cluster, prepared
from app.jobs.left_over import QUIT_S_MAX, STOP_S_MAX, end_left_over

START_S_MAX = 300.0
"""Covers the recovery of a full `max_wal_size` after a crash; a usual start takes a second."""

RESTART_S_MIN, RESTART_S_MAX = 0.5, 30.0
LOG_LINE_BYTES_MAX = 64 * 2**10

logger = logging.getLogger(__name__)


@asynccontextmanager
async def running(data_dir: Path, *, connections_max: int = 100) -> AsyncIterator[str]:
    """Run PostgreSQL over `data_dir` and yield its URL, `postgresql://user@/database?host=/socket/folder`.

    `data_dir` is an absolute path; what is missing of it is made, and it belongs to one instance at a time. The server
    is started again should it die, and stopped on the way out. Raises `EmbeddedUnusable`.
    """
    async with prepared(data_dir, connections_max=connections_max) as (cluster, socket_dir):
        server = Server(cluster, socket_dir)
        try:
            await server.start()
            yield server.url
        finally:
            await server.stop()


class Server:
    """One running PostgreSQL server: started, watched, started again when it dies, stopped."""

    def __init__(self, cluster: Cluster, socket_dir: Path) -> None:
        self.url = f"postgresql://{ROLE}@/{DATABASE}?host={quote(str(socket_dir))}&port={PORT}"
        self._cluster = cluster
        self._socket_dir = socket_dir
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._last_lines: deque[str] = deque(maxlen=5)
        self._up = False

    async def start(self) -> None:
        """Start the server, wait until it answers, and keep it running from then on."""
        process = await self.launch()
        self._up = True
        self._keeper = asyncio.create_task(self._keep(process))

    async def launch(self) -> asyncio.subprocess.Process:
        """Start the server and wait until it answers, but neither watch it nor log what it says as warnings."""
        self._process = process = await _spawn(self._cluster, self._socket_dir)
        self._reader = asyncio.create_task(self._relay_log(process))
        process_ended = asyncio.create_task(process.wait())
        ready = asyncio.create_task(self._wait_until_ready())
        try:
            await asyncio.wait({process_ended, ready}, timeout=START_S_MAX, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                await asyncio.wait({self._reader}, timeout=1.0)
                self._fail("ended at its start" if process_ended.done() else f"did not answer in {START_S_MAX:.0f} s")
            ready.result()
        except asyncpg.PostgresError as error:
            self._fail(f"refuses its own service ({error})")
        finally:
            process_ended.cancel()
            ready.cancel()
        return process

    async def stop(self) -> None:
        """Stop the server: sessions are ended, what was committed is on disk."""
        self._up = False
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        if self._process is not None:
            await _shut_down(self._process)
        if self._reader is not None:
            await self._reader

    async def _wait_until_ready(self) -> None:
        while True:
            try:
                await self._ensure_database()
                return
            except (OSError, asyncpg.CannotConnectNowError, asyncpg.ConnectionDoesNotExistError, TimeoutError):
                await asyncio.sleep(0.02)

    async def _ensure_database(self) -> None:
        connection = await asyncpg.connect(
            host=str(self._socket_dir), port=PORT, user=ROLE, database="postgres", ssl="disable", timeout=5.0
        )
        try:
            if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", DATABASE):
                await connection.execute(f"CREATE DATABASE {DATABASE}")
        finally:
            await connection.close()

    async def _keep(self, process: asyncio.subprocess.Process) -> None:
        delay_s = RESTART_S_MIN
        while True:
            await process.wait()
            self._up = False
            logger.error("The embedded PostgreSQL died (exit code %s); it is started again.", process.returncode)
            try:
                # Sessions outlive a killed server for a moment, and no second one may start beside them.
                await asyncio.to_thread(end_left_over, self._cluster.files)
                process = await self.launch()
                self._up = True
                delay_s = RESTART_S_MIN
            except (EmbeddedUnusable, OSError) as error:
                logger.error("%s", error)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RESTART_S_MAX)

    async def _relay_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while True:
            try:
                line = (await process.stderr.readline()).decode(errors="replace")
            except ValueError:  # longer than LOG_LINE_BYTES_MAX: readline has dropped it
                continue
            if not line:
                return
            self._last_lines.append(line.strip())
            serious = self._up and line.startswith(("WARNING:", "ERROR:", "FATAL:", "PANIC:"))
            logger.log(logging.WARNING if serious else logging.DEBUG, "PostgreSQL: %s", line.strip())

    def _fail(self, what: str) -> NoReturn:
        said = " ".join(self._last_lines) or "it said nothing"
        raise EmbeddedUnusable(f"The embedded PostgreSQL in {self._cluster.data_dir} {what}: {said}")


async def _spawn(cluster: Cluster, socket_dir: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *cluster.command(socket_dir),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        limit=LOG_LINE_BYTES_MAX,
        cwd="/",
        env=ENVIRONMENT,
        umask=0o077,
        # Its own session: Ctrl-C in the terminal must reach the service first, which drains before this stops.
        start_new_session=True,
        **cluster.account.run_as,
    )


async def _shut_down(process: asyncio.subprocess.Process) -> None:
    for signal_number, patience_s in ((signal.SIGINT, STOP_S_MAX), (signal.SIGQUIT, QUIT_S_MAX)):
        with suppress(ProcessLookupError):
            process.send_signal(signal_number)
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await process.wait()
                return
    process.kill()
    await process.wait()
