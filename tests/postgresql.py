"""A PostgreSQL that a story may stop, kill and start again as it likes; nothing else restarts it."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from app.jobs import embedded

STOP_S = 20.0


class Postgres:
    """The embedded one's binaries and files, without the keeper that starts it again."""

    def __init__(self, server: embedded.Server) -> None:
        self.url = server.url
        self.socket_path = server._socket_dir / f".s.PGSQL.{embedded.PORT}"
        self._server = server

    async def start(self) -> None:
        """Start it; it answers on return."""
        self._process = await self._server._launch()
        self._server._up = False  # whoever strikes it or its clients need not read what it says about that

    async def stop(self, signal_number: int = signal.SIGQUIT) -> None:
        """Stop it, at once by default (as `pg_ctl stop -m immediate` does); SIGINT ends sessions and writes all out."""
        self._process.send_signal(signal_number)
        await asyncio.wait_for(self._process.wait(), STOP_S)
        # Its sessions outlive it for a moment, and it does not start beside them.
        while embedded._processes_on(self._server._cluster.files):
            await asyncio.sleep(0.02)

    async def restart(self, signal_number: int = signal.SIGQUIT, *, down_s: float = 0.0) -> None:
        """Stop it, and start it again after a while."""
        await self.stop(signal_number)
        await asyncio.sleep(down_s)
        await self.start()


@asynccontextmanager
async def own_postgres(data_dir: Path, *, connections_max: int = 200) -> AsyncIterator[Postgres]:
    """Run a PostgreSQL over a folder that does not exist yet."""
    account = embedded._find_account()
    with embedded._claimed(data_dir, account):
        cluster = embedded._prepare(data_dir, wheel=embedded._find_wheel(), account=account)
        embedded._write_configuration(cluster, connections_max)
        with embedded._socket_dir(cluster) as socket_dir:
            server = embedded.Server(cluster, socket_dir)
            postgres = Postgres(server)
            try:
                await postgres.start()
                yield postgres
            finally:
                await server.stop()
