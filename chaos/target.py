"""The servers that are fetched from, and what they saw: the third ledger."""

import asyncio
import time
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum

SLOW_S_MAX = 1.5
FAST_S_MAX = 0.05


class Way(StrEnum):
    """How a URL behaves; the last part of its path."""

    FINE = "fine"
    SLOW = "slow"
    FLAKY = "flaky"  # 500 at first
    GONE = "gone"  # 404
    POST = "post"  # must not be sent twice


@dataclass(slots=True)
class Hit:
    """One request: when it came, on the monotonic clock, and whether it was answered in full."""

    at: float
    is_answered: bool = False


@dataclass
class Target:
    """One port on every loopback address; each address is a host of its own to the service."""

    port: int = 0
    hits: dict[str, list[Hit]] = field(default_factory=lambda: defaultdict(list))

    def url(self, path: str, *, host: int) -> str:
        """The URL of a path on the host of that number, from 1."""
        return f"http://127.0.1.{host}:{self.port}{path}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await self._skip_body(reader, head)
                await self._answer(head.split(b" ", 2)[1].decode(), writer)
        writer.close()

    async def _skip_body(self, reader: asyncio.StreamReader, head: bytes) -> None:
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                await reader.readexactly(int(line.split(b":")[1]))

    async def _answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        hit = Hit(time.monotonic())
        self.hits[path].append(hit)
        way = Way(path.rsplit("/", 1)[1])
        await asyncio.sleep(_pause_s(path, way))
        status = 404 if way == Way.GONE else 500 if way == Way.FLAKY and len(self.hits[path]) == 1 else 200
        content = path.encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(content)) + content)
        await writer.drain()
        hit.is_answered = True


def _pause_s(path: str, way: Way) -> float:
    """A time of the path's own, the same at each try."""
    return (zlib.crc32(path.encode()) % 1000) / 1000 * (SLOW_S_MAX if way in (Way.SLOW, Way.POST) else FAST_S_MAX)


@asynccontextmanager
async def targeting() -> AsyncIterator[Target]:
    """Serve on a free port."""
    target = Target()
    server = await asyncio.start_server(target.serve, "0.0.0.0", 0, backlog=2048)
    target.port = server.sockets[0].getsockname()[1]
    try:
        yield target
    finally:
        server.close()
