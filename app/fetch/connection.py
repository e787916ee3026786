"""One connection to one origin, speaking HTTP/1.1 one exchange at a time.

Knows no policy, no pool, no redirects and no content codings. Whatever goes wrong aborts the socket at once and is
raised as `Failed`; a connection is worth keeping only while `reusable`.
"""

import asyncio
import ssl
import time
from typing import cast

from app.fetch.exchange import Exchange
from app.fetch.head import Head
from app.fetch.limits import Failed, Limits
from app.fetch.tls import explain
from app.outcome import FailureCode

READ_BYTES = 512 * 2**10
"""More than an event loop decrypts at once, 256 KiB and what was left of a record: what does not fit waits for its next
turn, and is forgotten should the end of the connection come first (asyncio's `SSLProtocol` and uvloop's)."""
_READ_BUFFER = memoryview(bytearray(READ_BYTES))
"""One for all: the loop fills it and hands it over in the same step. Saves allocating 256 KiB for each read."""


class Connection(asyncio.BufferedProtocol):
    """A connected socket and the exchange that runs on it, if any."""

    _transport: asyncio.Transport

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiter: asyncio.Future[None] | None = None
        self._silence: asyncio.TimerHandle | None = None
        self._silence_at = 0.0
        self._failure: Failed | None = None
        self._exchange: Exchange | None = None
        self._read_timeout_s = 0.0
        self._heard_at = 0.0
        self._unsent_bytes = 0
        self._early = b""
        """What the server said before it was asked anything: uvloop reads as soon as the connection stands. It counts
        as the first answer, and spoils the connection: which request a later answer is for could not be told."""
        self.closed = True  # until it is made
        self.secure: ssl.SSLObject | None = None
        """The TLS of it, until its session is kept."""
        self.remote_address: str | None = None
        self.connect_ms: float | None = None
        self.tls_ms: float | None = None
        self.tls_version: str | None = None
        self.tls_expires_at: str | None = None

    def start(self, request: bytes, *, method: str, limits: Limits) -> Exchange:
        """Send a request; the answer comes into the exchange returned."""
        self._heard_at = time.monotonic()
        self._exchange = Exchange(method, limits, sent_at=self._heard_at)
        self._read_timeout_s = limits.read_timeout_s
        self._watch_silence()
        if not self.closed:
            self._transport.write(request)
            self._unsent_bytes = self._transport.get_write_buffer_size()
            if self._early:
                self._transport.resume_reading()
                self._take(self._exchange, self._early)
        return self._exchange

    async def head(self, exchange: Exchange) -> Head:
        """Wait for the head of the final response. Raise `Failed`, the socket then being aborted."""
        while exchange.head is None:
            await self._news()
        return exchange.head

    async def body(self, exchange: Exchange) -> bytes:
        """Wait for the whole body; return it as it came, less the transfer coding. Raise `Failed` likewise."""
        try:
            exchange.refuse_announced()
        except Failed as failure:
            self._fail(failure)
        while not exchange.complete:
            await self._news()
        self._raise_failure()
        whole = bytes(exchange.body)
        exchange.body = b""  # an idle connection keeps its last exchange
        return whole

    @property
    def reusable(self) -> bool:
        """Whether the last exchange ended so cleanly that another may follow."""
        exchange = self._exchange
        return (
            not self.closed
            and exchange is not None
            and exchange.complete
            and not exchange.extra
            and not self._early
            and exchange.head is not None
            and exchange.head.keep_alive
            and not self._transport.get_write_buffer_size()
        )

    def abort(self) -> None:
        """Close the socket without waiting for anything, a TLS farewell included. Safe to repeat."""
        if not self.closed:
            self.closed = True
            self._transport.abort()

    async def _news(self) -> None:
        """Wait until something happened to the exchange; raise what went wrong with it."""
        self._raise_failure()
        if self.closed:
            self._break_off(None)
            return
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            # Anew each time: one that is kept would keep, by its traceback, all who ever saw it.
            raise Failed(self._failure.code, self._failure.detail)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, failure: Failed) -> None:
        """Note the first thing that went wrong, and give the socket up."""
        if self._failure is None:
            # Without its traceback, which leads back here: a body over the limit would stay until garbage is collected.
            self._failure = Failed(failure.code, failure.detail)
        self.abort()
        self._wake()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own are no subclasses
        self.closed = False

    def get_buffer(self, sizehint: int) -> memoryview:
        return _READ_BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        exchange = self._exchange
        if exchange is None:  # too early: kept for the first one
            self._early += bytes(_READ_BUFFER[:nbytes])
            self._transport.pause_reading()
        elif exchange.complete:  # nobody asked: the next answer must not start with these
            self.abort()
        else:
            self._take(exchange, bytes(_READ_BUFFER[:nbytes]))

    def _take(self, exchange: Exchange, data: bytes) -> None:
        self._heard_at = time.monotonic()
        if exchange.first_byte_at is None:
            exchange.first_byte_at = self._heard_at
        had_head = exchange.head is not None
        try:
            exchange.take(data)
        except Failed as failure:
            self._fail(failure)
            return
        if exchange.complete:
            exchange.completed_at = self._heard_at
        if exchange.complete or (exchange.head is not None and not had_head):
            self._wake()

    def eof_received(self) -> bool:
        self._break_off(None)
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._break_off(error)
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None

    # When the peer is gone or silent.

    def _break_off(self, error: Exception | None) -> None:
        """Judge the end of the connection by what the exchange had got."""
        self.abort()
        exchange = self._exchange
        if self._failure is None and not (exchange is not None and exchange.complete):
            if error is not None:
                self._failure = _explain_break(error, exchange)
            elif exchange is not None:
                self._failure = exchange.end()
                exchange.completed_at = time.monotonic() if exchange.complete else None
        self._wake()

    def _watch_silence(self) -> None:
        """Keep one timer for as long as the connection lives: one for each exchange would cost a heap entry each."""
        due_at = self._heard_at + self._read_timeout_s
        if self._silence is not None:
            if self._silence_at <= due_at:
                return
            self._silence.cancel()
        self._silence_at = due_at
        self._silence = self._loop.call_at(due_at, self._judge_silence)

    def _judge_silence(self) -> None:
        self._silence = None
        exchange = self._exchange
        if exchange is None or exchange.complete or self.closed:
            return
        unsent_bytes = self._transport.get_write_buffer_size()
        if unsent_bytes < self._unsent_bytes:
            self._unsent_bytes = unsent_bytes
            self._heard_at = time.monotonic()
        if time.monotonic() < self._heard_at + self._read_timeout_s:
            self._watch_silence()
        else:
            self._fail(_explain_silence(exchange, unsent_bytes))


def _explain_break(error: Exception, exchange: Exchange | None) -> Failed:
    # With TLS 1.3 a server refuses a client only after the handshake.
    if isinstance(error, ssl.SSLError) and (exchange is None or exchange.first_byte_at is None):
        return explain(error)
    return Failed(FailureCode.CONNECTION_RESET, "The connection was reset.")


def _explain_silence(exchange: Exchange, unsent_bytes: int) -> Failed:
    if unsent_bytes:
        return Failed(FailureCode.WRITE_TIMEOUT, "The server did not read the request in time.")
    if exchange.first_byte_at is None:
        return Failed(FailureCode.FIRST_BYTE_TIMEOUT, "No byte of a response came in time.")
    return Failed(FailureCode.READ_TIMEOUT, "The response fell silent.")
