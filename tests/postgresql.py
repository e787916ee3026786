"""A PostgreSQL that a story may stop, kill and start again as it likes; nothing else restarts it."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from app.jobs.cluster import PORT, Cluster, prepared
from app.jobs.embedded import Server
from app.jobs.left_over import processes_on

STOP_S = 20.0


class Postgres:
    """The embedded one's binaries and files, without the keeper that starts it again."""

    def __init__(self, cluster: Cluster, socket_dir: Path) -> None:
        self._server = Server(cluster, socket_dir)
        self.url = self._server.url
        self.socket_path = socket_dir / f".s.PGSQL.{PORT}"
        self._files = cluster.files

    async def start(self) -> None:
        """Start it; it answers on return."""
        self._process = await self._server.launch()

    async def end(self) -> None:
        """Stop it for good, if it runs."""
        await self._server.stop()

    async def stop(self, signal_number: int = signal.SIGQUIT) -> None:
        """Stop it, at once by default (as `pg_ctl stop -m immediate` does); SIGINT ends sessions and writes all out."""
        self._process.send_signal(signal_number)
        await asyncio.wait_for(self._process.wait(), STOP_S)
        # Its sessions outlive it for a moment, and it does not start beside them.
        while processes_on(self._files):
            await asyncio.sleep(0.02)

    async def restart(self, signal_number: int = signal.SIGQUIT, *, down_s: float = 0.0) -> None:
        """Stop it, and start it again after a while."""
        await self.stop(signal_number)
        await asyncio.sleep(down_s)
        await self.start()


@asynccontextmanager
async def own_postgres(data_dir: Path, *, connections_max: int = 200) -> AsyncIterator[Postgres]:
    """Run a PostgreSQL over a folder that does not exist yet."""
    async with prepared(data_dir, connections_max=connections_max) as (cluster, socket_dir):
        postgres = Postgres(cluster, socket_dir)
        try:
            await postgres.start()
            yield postgres
        finally:
            await postgres.end()
