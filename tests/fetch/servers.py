"""A web server that answers with exactly the bytes a test gives it, and transports that may reach it."""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from app.fetch.http import FetchRequest, fetch
from app.fetch.limits import Limits
from app.fetch.policy import Policy
from app.fetch.resolver import Resolver
from app.fetch.transport import Transport
from app.outcome import Outcome

LOOPBACK = Policy(allow_networks=(ip_network("127.0.0.0/8"),))

LIMITS = Limits(
    timeout_s=20.0,
    connect_timeout_s=10.0,
    read_timeout_s=10.0,
    wire_bytes_max=2**20,
    body_bytes_max=2**20,
    header_bytes_max=128 * 2**10,
    header_count_max=256,
    redirects_max=10,
    informational_max=16,
    encodings_max=3,
)
"""Wide enough that only a test's own narrower limit ever strikes."""


@dataclass(frozen=True)
class Asked:
    """A request as the server saw it; header names in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


class Visit:
    """One connection to a server, as its script sees it."""

    def __init__(self, server: "Server", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server = server
        self._reader = reader
        self.writer = writer

    async def asked(self) -> Asked:
        """Read the next request and note it on the server."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *fields = head.removesuffix("\r\n\r\n").split("\r\n")
        method, target, _ = line.split(" ")
        headers = {name.lower(): value for name, _, value in (each.partition(": ") for each in fields)}
        body = await self._reader.readexactly(int(headers.get("content-length", "0")))
        asked = Asked(method, target, headers, body)
        self._server.asked.append(asked)
        return asked

    def send(self, *parts: bytes) -> None:
        if self.writer.transport.is_closing():
            raise ConnectionResetError  # a script that goes on for ever ends with its client
        self.writer.write(b"".join(parts))

    async def drip(self, data: bytes, *, every_s: float) -> None:
        """Send byte by byte."""
        for byte in data:
            self.send(bytes((byte,)))
            await asyncio.sleep(every_s)

    async def hang(self) -> None:
        """Do nothing until the test ends."""
        await asyncio.Event().wait()

    def reset(self) -> None:
        """Close with a RST."""
        raw: socket.socket = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Visit], Awaitable[None]]


@dataclass
class Server:
    """Where it listens, and what it has seen."""

    port: int
    scheme: str
    visits: int = 0
    asked: list[Asked] = field(default_factory=list)

    def url(self, path: str = "/", *, host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"


@asynccontextmanager
async def serve(script: Script, *, context: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    """Run the script for every connection; the connection is closed when it returns."""
    tasks: dict[asyncio.Task[None], asyncio.WriteTransport] = {}

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.visits += 1
        try:
            # The client hanging up is what many of these tests are about.
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
                await script(Visit(server, reader, writer))
                await writer.drain()
        finally:
            writer.close()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(run(reader, writer))
        tasks[task] = writer.transport
        task.add_done_callback(tasks.pop)

    listening = await asyncio.start_server(connected, "0.0.0.0", 0, ssl=context, backlog=1024, limit=2**20)
    server = Server(listening.sockets[0].getsockname()[1], "https" if context else "http")
    try:
        yield server
    finally:
        await _let_callbacks_run()  # before closing: asyncio drops a connection accepted meanwhile (Python 3.11)
        listening.close()
        for task, transport in list(tasks.items()):
            task.cancel()
            transport.abort()  # a task that never ran closes nothing
        await asyncio.gather(*tasks, return_exceptions=True)
        await _let_callbacks_run()


async def _let_callbacks_run() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def answering(*answers: bytes) -> Script:
    """Answer one request after the other on each connection, then close it."""

    async def script(visit: Visit) -> None:
        for answer in answers:
            await visit.asked()
            visit.send(answer)

    return script


def always(answer: bytes) -> Script:
    """Answer every request alike, for as long as the client stays."""

    async def script(visit: Visit) -> None:
        while True:
            await visit.asked()
            visit.send(answer)

    return script


def page(body: bytes = b"hello", *fields: str, status: str = "200 OK") -> bytes:
    """Write an ordinary answer."""
    head = "\r\n".join((f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *fields))
    return head.encode("latin-1") + b"\r\n\r\n" + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    """Write a redirect."""
    return page(b"", f"Location: {location}", status=status)


@asynccontextmanager
async def transport_to(
    names: Mapping[str, tuple[str, ...]] | None = None,
    *,
    folder: Path | None = None,
    policy: Policy = LOOPBACK,
    ca_file: Path | None = None,
    decoders: int = 2,
    idle_s: float = 15.0,
    idle_max: int = 1000,
    idle_per_host_max: int = 64,
) -> AsyncIterator[Transport]:
    """Make a transport that may reach loopback and knows these names, through a hosts file in `folder`."""
    hosts_file = (folder or Path("/nonexistent")) / "hosts"
    if names is not None:
        lines = [f"{address} {name}\n" for name, found in names.items() for address in found]
        hosts_file.write_text("".join(lines))
    resolver = Resolver(hosts_file=hosts_file)
    transport = Transport(
        policy=policy,
        resolver=resolver,
        user_agent="Fetchpool-Test/1",
        ca_file=ca_file,
        decoders=decoders,
        idle_s=idle_s,
        idle_max=idle_max,
        idle_per_host_max=idle_per_host_max,
    )
    try:
        yield transport
    finally:
        await transport.aclose()
        await resolver.aclose()


def asking(url: str, *, method: str = "GET", headers: tuple[tuple[str, str], ...] = (), **limits: Any) -> FetchRequest:
    """Make a request whose limits are wide but for those given."""
    return FetchRequest(url=url, method=method, headers=headers, limits=replace(LIMITS, **limits))


async def fetch_from(script: Script, path: str = "/", **limits: Any) -> Outcome:
    """Fetch one page from a server that runs the script."""
    async with serve(script) as server, transport_to() as transport:
        return await fetch(asking(server.url(path), **limits), transport=transport)
