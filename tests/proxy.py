"""A small TCP proxy before PostgreSQL, whose connections can be cut or fall silent."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from app.jobs.cluster import DATABASE, ROLE

CHUNK = 2**16


class Proxy:
    """Carries bytes to a unix socket, until told otherwise."""

    def __init__(self, socket_path: Path) -> None:
        self.port = 0
        self.hidden_ends = 0
        self._socket_path = socket_path
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._refuses = False
        self._hides_ends = False
        self._pumps: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """The database's URL, by way of this."""
        return f"postgresql://{ROLE}@127.0.0.1:{self.port}/{DATABASE}?sslmode=disable"

    async def cut(self, lasts_s: float) -> None:
        """Reset every connection, and refuse new ones for a while."""
        self._refuses = True
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(lasts_s)
        self._refuses = False

    async def silence(self, lasts_s: float) -> None:
        """Let nothing through for a while; what was sent meanwhile arrives afterwards."""
        self._is_open.clear()
        await asyncio.sleep(lasts_s)
        self._is_open.set()

    def abandon(self) -> None:
        """Carry nothing of today's connections any more, and close none: as when the other machine lost its power."""
        for pump in self._pumps:
            pump.cancel()

    def hide_ends(self) -> None:
        """From now on carry to the end what is sent, and not that it was the end."""
        self._hides_ends = True

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection to its end."""
        if self._refuses:
            writer.transport.abort()
            return
        try:
            there, back = await asyncio.open_unix_connection(str(self._socket_path))
        except OSError:  # PostgreSQL is down
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        pumps = {asyncio.create_task(self._pump(reader, back)), asyncio.create_task(self._pump(there, writer))}
        self._pumps |= pumps
        await asyncio.wait(pumps)
        self._pumps -= pumps
        if not self._hides_ends and not any(pump.cancelled() for pump in pumps):
            self._writers -= {writer, back}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while chunk := await reader.read(CHUNK):
                await self._is_open.wait()
                writer.write(chunk)
                await writer.drain()
        if self._hides_ends:
            self.hidden_ends += 1
        else:
            writer.close()


@asynccontextmanager
async def proxying(socket_path: Path) -> AsyncIterator[Proxy]:
    """Run a proxy on a free port."""
    proxy = Proxy(socket_path)
    server = await asyncio.start_server(proxy.carry, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.cut(0)
