"""A network of the test's own, in which every address leads to this machine, and a world that answers on it."""

import asyncio
import ctypes
import os
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field

from app.fetch.policy import BAD_PORTS
from tests.fetch.servers import page, redirect

CLONE_NEWNET = 0x4000_0000
PLAIN_PORTS = (80, 8080, 3000)
TLS_PORTS = (443, 8443)


class NoNetwork(Exception):
    """This machine does not let the test have a network of its own."""


@contextmanager
def private_network() -> Iterator[None]:
    """Move this thread, and the processes it starts, into an empty network where all addresses are local.

    Sockets that are open stay where they are. Raises `NoNetwork`; it takes root, and a container often lacks the right.
    """
    if shutil.which("ip") is None:
        raise NoNetwork("needs the program ip")
    libc = ctypes.CDLL(None, use_errno=True)
    outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(CLONE_NEWNET) != 0:
            raise NoNetwork(f"a network of its own: {os.strerror(ctypes.get_errno())}")
        try:
            _open_all_addresses()
            yield
        finally:
            assert libc.setns(outside, CLONE_NEWNET) == 0
    finally:
        os.close(outside)


def _open_all_addresses() -> None:
    for command in ("link set lo up", "-4 route add local default dev lo", "-6 route add local default dev lo"):
        done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NoNetwork(f"ip {command}: {done.stderr.strip()}")


@dataclass
class World:
    """Web servers on the usual ports, canaries on those of infrastructure; it knows who was connected to."""

    redirects: Mapping[str, str]
    visits: set[tuple[str, int]] = field(default_factory=set)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address, port = writer.get_extra_info("sockname")[:2]
        self.visits.add((address, port))
        scheme = "https" if writer.get_extra_info("ssl_object") else "http"
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                line, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                host = next(each.split(": ")[1] for each in fields if each.lower().startswith("host:"))
                writer.write(self.page(f"{scheme}://{host}{line.split(' ')[1]}"))
        writer.close()

    def page(self, url: str) -> bytes:
        if url.endswith("/busy"):
            return page(status="503 Busy")
        return redirect(self.redirects[url]) if url in self.redirects else page()


@asynccontextmanager
async def world(redirects: Mapping[str, str], *, tls: ssl.SSLContext, hosts: list[str] | None) -> AsyncIterator[World]:
    """Listen on all addresses, or only on these hosts and where a port is free."""
    here = World(redirects)
    servers = []
    for port in (*PLAIN_PORTS, *TLS_PORTS, *BAD_PORTS):
        context = tls if port in TLS_PORTS else None
        for host in hosts or (None,):
            with suppress(OSError) if hosts else nullcontext():
                servers.append(await asyncio.start_server(here.answer, host, port, ssl=context))
    try:
        yield here
    finally:
        await asyncio.sleep(0.05)  # a connection just accepted is dropped by a server that closes (Python 3.11)
        for server in servers:
            server.close()
