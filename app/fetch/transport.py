"""Requests to connections, kept or fresh, through httpx's types: sends one and gives the connection back after it.

Follows no redirect, decodes nothing, reads no environment proxy and has no total deadline: `app.fetch.http` does that.
Opens no socket of its own: `app.fetch.dialling` does, and only to addresses the policy passed.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import httpx2

from app.fetch.connection import Connection
from app.fetch.deadline import Deadlines
from app.fetch.decoding import Decoders
from app.fetch.dialling import connect
from app.fetch.exchange import Exchange
from app.fetch.head import Head
from app.fetch.idle import IDLE_MAX, IDLE_PER_HOST_MAX, IDLE_S, Affinity, IdleConnections
from app.fetch.limits import Failed, Limits
from app.fetch.policy import Policy, Target
from app.fetch.resolver import Resolver
from app.fetch.tls import make_context
from app.fetch.trace import Trace
from app.outcome import SAFE_METHODS, FailureCode

STALE_CODES = frozenset({FailureCode.EMPTY_RESPONSE, FailureCode.CONNECTION_RESET})

RawFields = Sequence[tuple[bytes, bytes]]


class Request(httpx2.Request):
    """An httpx request made from a checked target; what httpx derives from it is made only if somebody asks.

    Parsing the URL alone would cost 13 us, where a whole fetch takes some 60, for something the target already says.
    """

    def __init__(
        self, method: str, target: Target, *, fields: RawFields, content: bytes, limits: Limits, trace: Trace
    ) -> None:
        self.method = method
        self.fields = fields
        self.extensions = {"target": target, "limits": limits, "trace": trace}
        self._body = content

    async def aread(self) -> bytes:
        """Give the body, which needs no reading."""
        return self._body

    @cached_property
    def url(self) -> httpx2.URL:  # type: ignore[override]
        """The URL as httpx would have it."""
        return httpx2.URL(self.extensions["target"].url)

    @cached_property
    def headers(self) -> httpx2.Headers:  # type: ignore[override]
        """The fields as httpx would have them."""
        return httpx2.Headers(self.fields)

    @cached_property
    def stream(self) -> httpx2.ByteStream:  # type: ignore[override]
        """The body as httpx would have it."""
        return httpx2.ByteStream(self._body)


class Answer(httpx2.Response):
    """An httpx response made from a parsed head; what httpx makes of it is made only if somebody asks."""

    def __init__(self, head: Head, body: "Body") -> None:
        self.status_code = head.status
        self.fields = head.fields
        self.body = body

    def __getattr__(self, name: str) -> Any:
        """Make it an httpx response at last, for somebody who asks for more than the above."""
        set_before = dict(self.__dict__)
        if "stream" in set_before or "body" not in set_before:
            raise AttributeError(name)
        super().__init__(self.status_code, stream=self.body)
        self.headers = httpx2.Headers(self.fields, encoding="latin-1")
        self.__dict__.update(set_before)
        return getattr(self, name)


class Body(httpx2.AsyncByteStream):
    """The body of an answer as it comes over the wire, less the transfer coding; whole, since its size is bounded."""

    def __init__(
        self, transport: "Transport", connection: Connection, exchange: Exchange, *, affinity: Affinity
    ) -> None:
        self._transport = transport
        self._connection = connection
        self._exchange = exchange
        self._affinity = affinity
        self._open = True

    @property
    def expected(self) -> bool:
        """Whether there is anything to read."""
        return not (self._exchange.complete and not self._exchange.body)

    async def read(self) -> bytes:
        """Read it all and give the connection back, or abort it. Raise `Failed`."""
        try:
            return await self._connection.body(self._exchange)
        finally:
            self.close()

    async def skim(self, *, bytes_max: int, within_s: float) -> None:
        """Let a short body end, so that its connection can be kept; a longer or slower one costs the connection."""
        self._exchange.narrow(bytes_max)
        try:
            async with asyncio.timeout(within_s):
                await self._connection.body(self._exchange)
        except (Failed, TimeoutError):
            pass
        finally:
            self.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield await self.read()

    async def aclose(self) -> None:
        """Close it, as httpx would."""
        self.close()

    def close(self) -> None:
        """Give the connection back if it may be used again, else abort it. Safe to repeat."""
        if self._open:
            self._open = False
            self._transport.release(self._connection, self._affinity)


class Transport(httpx2.AsyncBaseTransport):
    """Connections to the web for one process, and what all its fetches share."""

    def __init__(
        self,
        *,
        policy: Policy,
        resolver: Resolver,
        user_agent: str,
        ca_file: Path | None = None,
        decoders: int = 2,
        idle_max: int = IDLE_MAX,
        idle_per_host_max: int = IDLE_PER_HOST_MAX,
        idle_s: float = IDLE_S,
    ) -> None:
        self.policy = policy
        self.resolver = resolver
        self.user_agent = user_agent
        self.decoders = Decoders(decoders)
        self.deadlines = Deadlines()
        self._context = make_context(ca_file)
        self._idle = IdleConnections(idle_max=idle_max, idle_per_host_max=idle_per_host_max, idle_s=idle_s)

    async def handle_async_request(self, request: httpx2.Request) -> Answer:
        """Send one request and return its response once the head is there; the stream is a `Body`.

        `request.extensions` hold `target`, `limits` and `trace`. Raises `Failed` and `policy.Refused`, nothing of
        httpx. A kept connection that turns out closed is replaced by a fresh one where that is safe.
        """
        target: Target = request.extensions["target"]
        limits: Limits = request.extensions["limits"]
        trace: Trace = request.extensions["trace"]
        fields = request.fields if isinstance(request, Request) else request.headers.raw
        written, authorization = _write_own(fields) if isinstance(fields, tuple) else _write(fields)
        affinity = Affinity(target.scheme, target.host, authorization)
        content = _serialise(request.method, target, written, await request.aread())
        connection = self._idle.take(affinity, safe=request.method in SAFE_METHODS)
        head = None
        if connection is not None:
            head = await _ask_again(connection, content, request.method, limits=limits, trace=trace)
        if connection is None or head is None:
            connection = await connect(
                target, limits=limits, trace=trace, policy=self.policy, resolver=self.resolver, context=self._context
            )
            head = await _ask(connection, content, request.method, limits=limits, trace=trace)
        assert trace.exchange is not None
        return Answer(head, Body(self, connection, trace.exchange, affinity=affinity))

    def release(self, connection: Connection, affinity: Affinity) -> None:
        """Take a connection back after an exchange: keep it for the next one, or abort it."""
        if connection.secure is not None:
            self._context.keep_session(connection.secure)
            connection.secure = None
        self._idle.keep(connection, affinity)

    def close_idle(self, host: str) -> None:
        """Close the idle connections of a politeness key: those of its next holder would come on top of them."""
        self._idle.close(host)

    async def aclose(self) -> None:
        """Close every idle connection; what runs is aborted when it ends."""
        self._idle.close_all()


async def _ask(connection: Connection, content: bytes, method: str, *, limits: Limits, trace: Trace) -> Head:
    """Send a request and wait for the head of its answer."""
    trace.note_connection(connection)
    trace.exchange = connection.start(content, method=method, limits=limits)
    trace.sent = True
    try:
        return await connection.head(trace.exchange)
    except BaseException:
        connection.abort()
        raise


async def _ask_again(
    connection: Connection, content: bytes, method: str, *, limits: Limits, trace: Trace
) -> Head | None:
    """Ask over a kept connection. `None`: the server had closed it, and the request may be sent again."""
    trace.reused = True
    try:
        return await _ask(connection, content, method, limits=limits, trace=trace)
    except Failed as failure:
        answered = trace.exchange is not None and trace.exchange.first_byte_at is not None
        if answered or failure.code not in STALE_CODES or method not in SAFE_METHODS:
            raise
    trace.forget_connection()
    return None


def _write(fields: RawFields) -> tuple[bytes, bytes | None]:
    """Write header fields down. Return also the value of Authorization, `None` without one."""
    authorization = next((value for name, value in fields if name.lower() == b"authorization"), None)
    return b"".join([name + b": " + value + b"\r\n" for name, value in fields]), authorization


_write_own = lru_cache(maxsize=8)(_write)
"""Fields in a tuple are our own, the same for each request: so no secret of a client's is kept here."""


def _serialise(method: str, target: Target, written: bytes, content: bytes) -> bytes:
    """Write a request down as HTTP/1.1; Host comes from the target, never from a header."""
    start = f"{method} {target.path_query} HTTP/1.1\r\nHost: {target.host}\r\n".encode("ascii")
    return b"".join((start, written, b"\r\n", content))
