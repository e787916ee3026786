"""A small real web server for stories: it answers by path, and remembers what it saw."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

Answer = tuple[int, dict[str, str], bytes]


def page(path: str) -> Answer:
    """Any path answers 200 with its own name."""
    return 200, {"Content-Type": "text/plain"}, path.encode()


@dataclass
class Site:
    """What the server saw, and the gate behind which paths under `/held` wait."""

    answer: Callable[[str], Answer] = page
    port: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    methods: Counter[str] = field(default_factory=Counter)
    now_count: int = 0
    most_at_once: int = 0
    closed_early: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)

    def url(self, path: str, *, address: str = "127.0.0.1") -> str:
        return f"http://{address}:{self.port}{path}"

    async def wait_for_hits(self, count: int) -> None:
        """Wait until that many requests have arrived in all."""
        async with asyncio.timeout(20), self.arrived:
            await self.arrived.wait_for(lambda: sum(self.hits.values()) >= count)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await reader.readline():
                method, target, _ = request.decode().split()
                await self._read_rest(reader)
                await self._reply(reader, writer, method, urlsplit(target).path)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.closed_early += 1
        finally:
            writer.close()

    async def _read_rest(self, reader: asyncio.StreamReader) -> None:
        length = 0
        while (line := (await reader.readline()).strip().lower()) != b"":
            if line.startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        await reader.readexactly(length)

    async def _reply(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, path: str) -> None:
        self.now_count += 1
        self.most_at_once = max(self.most_at_once, self.now_count)
        self.methods[method] += 1
        async with self.arrived:
            self.hits[path] += 1
            self.arrived.notify_all()
        try:
            if path.startswith("/held"):
                await self._wait_at_gate(reader)
            status, headers, content = self.answer(path)
            lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(content)}"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            writer.write("\r\n".join([*lines, "", ""]).encode() + content)
            await writer.drain()
        finally:
            self.now_count -= 1

    async def _wait_at_gate(self, reader: asyncio.StreamReader) -> None:
        opened = asyncio.create_task(self.gate.wait())
        closed = asyncio.create_task(reader.read(1))
        await asyncio.wait({opened, closed}, return_when=asyncio.FIRST_COMPLETED)
        opened.cancel()
        if closed.done():
            raise ConnectionResetError
        closed.cancel()
        await asyncio.wait({closed})


@asynccontextmanager
async def serving(answer: Callable[[str], Answer] = page, *, port: int = 0) -> AsyncIterator[Site]:
    """Serve on a port, else a free one, of every loopback address."""
    site = Site(answer=answer)
    server = await asyncio.start_server(site.serve, "0.0.0.0", port)
    site.port = server.sockets[0].getsockname()[1]
    try:
        yield site
    finally:
        site.gate.set()
        server.close()
