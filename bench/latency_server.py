"""A web server whose every answer takes 50 to 200 ms, by the number in its path; runs until standard input closes.

One asyncio protocol a connection and one timer an answer: it must not be what a thousand connections wait for.
"""

import asyncio
import random
import sys

BACKLOG = 4_096
PAGE = b"<p>A page that took its time.</p>\n" * 300
DELAYS_S = [random.Random(number).uniform(0.05, 0.2) for number in range(1_009)]


class Answering(asyncio.Protocol):
    """One connection: a request at a time, its answer when its time has come."""

    def __init__(self) -> None:
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._received.endswith(b"\r\n\r\n"):
            path = self._received.split(b" ", 2)[1]
            self._received = b""
            number = int(path.rsplit(b"/", 1)[1].split(b".")[0])
            asyncio.get_running_loop().call_later(DELAYS_S[number % len(DELAYS_S)], self._answer, path)

    def _answer(self, path: bytes) -> None:
        if self._transport is not None:
            body = b"<title>%s</title>\n%s" % (path, PAGE)
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(body)
            self._transport.write(head + body)


async def serve() -> None:
    """Listen on a free port of 127.0.0.1 and say which."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Answering, "127.0.0.1", 0, backlog=BACKLOG)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    closed = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), closed.set)
    await closed.wait()
    server.close()


if __name__ == "__main__":
    asyncio.run(serve())
