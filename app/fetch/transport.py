"""Requests to connections: where a fetch meets sockets, through httpx's types.

Dials only addresses the policy passed, keeps idle connections for a short while, and notes how it went. Follows no
redirect, decodes nothing, reads no environment proxy and has no total deadline: `app.fetch.http` does that.
"""

import asyncio
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import httpx2

from app.fetch.address import is_public, parse
from app.fetch.connection import Connection
from app.fetch.decoding import Decoders
from app.fetch.exchange import Exchange
from app.fetch.head import Head
from app.fetch.limits import Failed, Limits
from app.fetch.policy import Policy, Target, check_peer
from app.fetch.resolver import Resolver, addresses
from app.fetch.tls import expires_at, explain, make_context
from app.outcome import SAFE_METHODS, Evidence, FailureCode, Hop

IDLE_S = 15.0
IDLE_MAX = 256
IDLE_PER_HOST_MAX = 100
UNSAFE_REUSE_S = 1.0
"""An unsafe request cannot be sent twice, so it only takes a connection too young for the server to be closing it."""
DIALS_MAX = 4

HANDSHAKE_S = 86_400.0
"""asyncio's own limit on a handshake, put out of the way of `connect_timeout_s`."""
STALE_CODES = frozenset({FailureCode.EMPTY_RESPONSE, FailureCode.CONNECTION_RESET})


RawFields = Sequence[tuple[bytes, bytes]]


class Place(NamedTuple):
    """What may share a connection: scheme, host with port, and credentials (some schemes sign in the connection)."""

    scheme: str
    host: str
    authorization: bytes | None


class Idle(NamedTuple):
    """A connection that waits for its next request."""

    place: Place
    since_at: float
    connection: Connection


@dataclass(slots=True)
class Trace:
    """What is known of a fetch while it runs; the steps are those of the current hop."""

    started_at: float
    sent: bool = False
    redirects: list[Hop] = field(default_factory=list)
    dns_ms: float | None = None
    connection: Connection | None = None
    exchange: Exchange | None = None
    reused: bool = False
    body_bytes: int = 0

    def next_hop(self, hop: Hop) -> None:
        """Note a redirect and forget the steps that led to it."""
        self.redirects.append(hop)
        self.forget_connection()

    def forget_connection(self) -> None:
        """Start the steps of a hop anew."""
        self.dns_ms = self.connection = self.exchange = None
        self.reused = False

    def evidence(self, *, now: float) -> Evidence:
        """Put down what is known, as of `now` on the loop's clock."""
        total_ms = _ms(self.started_at, now)
        connection, exchange = self.connection, self.exchange
        if connection is None or exchange is None:
            return Evidence(redirects=tuple(self.redirects), dns_ms=self.dns_ms, total_ms=total_ms)
        return Evidence(
            redirects=tuple(self.redirects),
            remote_address=connection.remote_address,
            http_version=exchange.head.http_version if exchange.head is not None else None,
            tls_version=connection.tls_version,
            tls_expires_at=connection.tls_expires_at,
            reused_connection=self.reused,
            dns_ms=self.dns_ms,
            connect_ms=None if self.reused else connection.connect_ms,
            tls_ms=None if self.reused else connection.tls_ms,
            first_byte_ms=_ms(exchange.sent_at, exchange.first_byte_at),
            download_ms=_ms(exchange.first_byte_at, exchange.completed_at),
            total_ms=total_ms,
            wire_bytes=exchange.wire_bytes,
            body_bytes=self.body_bytes,
        )


class Request(httpx2.Request):
    """An httpx request made from a checked target; what httpx derives from it is made only if somebody asks.

    Parsing the URL alone would cost 13 us of the 110 that a whole fetch takes, for something the target already says.
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
    """An httpx response made from a parsed head; httpx's headers are made only if somebody asks."""

    def __init__(self, head: Head, body: "Body") -> None:
        super().__init__(head.status, stream=body)
        del self.headers  # httpx's empty ones, which hide the property
        self.fields = head.fields
        self.body = body

    @cached_property
    def headers(self) -> httpx2.Headers:  # type: ignore[override]
        """The fields as httpx would have them."""
        return httpx2.Headers(self.fields, encoding="latin-1")


class Body(httpx2.AsyncByteStream):
    """The body of an answer as it comes over the wire, less the transfer coding; whole, since its size is bounded."""

    def __init__(self, transport: "Transport", connection: Connection, exchange: Exchange, *, place: Place) -> None:
        self._transport = transport
        self._connection = connection
        self._exchange = exchange
        self._place = place
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
            self._transport.release(self._connection, self._place)


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
        self._context = make_context(ca_file)
        self._idle_max = idle_max
        self._idle_per_host_max = idle_per_host_max
        self._idle_s = idle_s
        self._idle: dict[str, list[Idle]] = {}
        self._idle_count = 0
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = False

    async def handle_async_request(self, request: httpx2.Request) -> Answer:
        """Send one request and return its response once the head is there; the stream is a `Body`.

        `request.extensions` hold `target`, `limits` and `trace`. Raises `Failed` and `policy.Refused`, nothing of
        httpx. A kept connection that turns out closed is replaced by a fresh one where that is safe.
        """
        target: Target = request.extensions["target"]
        limits: Limits = request.extensions["limits"]
        trace: Trace = request.extensions["trace"]
        fields = request.fields if isinstance(request, Request) else request.headers.raw
        place = Place(target.scheme, target.host, _authorization(fields))
        content = _serialise(request.method, target, fields, await request.aread())
        connection = self._take_idle(place, safe=request.method in SAFE_METHODS)
        head = None
        if connection is not None:
            head = await _ask_again(connection, content, request.method, limits=limits, trace=trace)
        if connection is None or head is None:
            connection = await self._connect(target, limits, trace)
            head = await _ask(connection, content, request.method, limits=limits, trace=trace)
        assert trace.exchange is not None
        return Answer(head, Body(self, connection, trace.exchange, place=place))

    def release(self, connection: Connection, place: Place) -> None:
        """Take a connection back after an exchange: keep it for the next one, or abort it."""
        if connection.secure is not None:
            self._context.keep_session(connection.secure)
            connection.secure = None
        kept = self._idle.setdefault(place.host, [])
        if self._closed or not connection.reusable or len(kept) >= self._idle_per_host_max:
            connection.abort()
            if not kept:
                del self._idle[place.host]
            return
        kept.append(Idle(place, asyncio.get_running_loop().time(), connection))
        self._idle_count += 1
        if self._idle_count > self._idle_max:
            self._close_oldest()
        self._plan_sweep()

    def close_idle(self, host: str) -> None:
        """Close the idle connections of a politeness key: those of its next holder would come on top of them."""
        for idle in self._idle.pop(host, ()):
            self._idle_count -= 1
            idle.connection.abort()

    async def aclose(self) -> None:
        """Close every idle connection; what runs is aborted when it ends."""
        self._closed = True
        for host in list(self._idle):
            self.close_idle(host)
        if self._sweep is not None:
            self._sweep.cancel()

    # The idle connections.

    def _take_idle(self, place: Place, *, safe: bool) -> Connection | None:
        """Take the youngest idle connection that fits, if any."""
        kept = self._idle.get(place.host)
        if kept is None:
            return None
        oldest_at = asyncio.get_running_loop().time() - (self._idle_s if safe else UNSAFE_REUSE_S)
        for index in reversed(range(len(kept))):
            idle = kept[index]
            if idle.place == place and idle.since_at >= oldest_at and not idle.connection.closed:
                self._forget(place.host, index)
                return idle.connection
        return None

    def _forget(self, host: str, index: int) -> None:
        kept = self._idle[host]
        del kept[index]
        self._idle_count -= 1
        if not kept:
            del self._idle[host]

    def _close_oldest(self) -> None:
        """Close the oldest of the host that has had one for longest: near enough to the oldest of all."""
        host, kept = next(iter(self._idle.items()))
        connection = kept[0].connection
        self._forget(host, 0)
        connection.abort()

    def _plan_sweep(self) -> None:
        if self._sweep is None and self._idle_count:
            self._sweep = asyncio.get_running_loop().call_later(self._idle_s / 3, self._sweep_idle)

    def _sweep_idle(self) -> None:
        """Close what has been idle for too long, and forget what its server closed."""
        self._sweep = None
        oldest_at = asyncio.get_running_loop().time() - self._idle_s
        for host, kept in list(self._idle.items()):
            for index in reversed(range(len(kept))):
                if kept[index].since_at < oldest_at or kept[index].connection.closed:
                    kept[index].connection.abort()
                    self._forget(host, index)
        self._plan_sweep()

    # A new connection.

    async def _connect(self, target: Target, limits: Limits, trace: Trace) -> Connection:
        """Connect to the first checked address that answers. Raise `Refused` or `Failed`."""
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        checked = await addresses(target, self.resolver, self.policy)
        trace.dns_ms = None if target.is_literal else _ms(started_at, loop.time())
        until_at = loop.time() + limits.connect_timeout_s
        failures = []
        dialled = checked[:DIALS_MAX]
        for count, address in enumerate(dialled):
            try:
                async with asyncio.timeout((until_at - loop.time()) / (len(dialled) - count)):
                    return await self._dial(address, target)
            except TimeoutError:
                failures.append(Failed(FailureCode.CONNECT_TIMEOUT, "TCP and TLS did not stand in time."))
            except Failed as failure:
                failures.append(failure)
        try:
            raise _most_telling(failures)
        finally:
            failures.clear()  # by their tracebacks they would keep this list, and all of the fetch

    async def _dial(self, address: str, target: Target) -> Connection:
        """Connect to one address and, for https, shake hands in the target's name."""
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        connected = await _connect_socket(address, target.port)
        connected_at = loop.time()
        try:
            connection = await self._adopt(connected, target)
        except Failed:
            if not self._context.forget_session(target.hostname):
                raise
            return await self._dial(address, target)
        connection.connect_ms = _ms(started_at, connected_at)
        connection.tls_ms = _ms(connected_at, loop.time()) if target.scheme == "https" else None
        connection.remote_address = address if is_public(parse(address)) else None
        return connection

    async def _adopt(self, connected: socket.socket, target: Target) -> Connection:
        """Put a connection on a connected socket; the socket is closed if that fails or is cancelled."""
        loop = asyncio.get_running_loop()
        connection = Connection(loop)
        secure = target.scheme == "https"
        try:
            transport, _ = await loop.create_connection(
                lambda: connection,
                sock=connected,
                ssl=self._context if secure else None,
                server_hostname=target.hostname if secure else None,
                ssl_handshake_timeout=HANDSHAKE_S if secure else None,
            )
        except ssl.SSLError as error:
            raise explain(error) from error
        except OSError as error:
            raise _explain_handshake(error) from error
        except BaseException:
            connection.abort()  # asyncio would first wait for the server's farewell
            connected.close()
            raise
        connection.secure = transport.get_extra_info("ssl_object")
        if connection.secure is not None:
            connection.tls_version = connection.secure.version()
            connection.tls_expires_at = expires_at(connection.secure)
        return connection


async def _ask(connection: Connection, content: bytes, method: str, *, limits: Limits, trace: Trace) -> Head:
    """Send a request and wait for the head of its answer."""
    trace.connection = connection
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


async def _connect_socket(address: str, port: int) -> socket.socket:
    """Open a TCP connection to a checked address and make sure that this is who answered."""
    connecting = _open_socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        connecting.setblocking(False)
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        await asyncio.get_running_loop().sock_connect(connecting, (address, port))
        check_peer(connecting.getpeername()[0], address)
    except TimeoutError:
        connecting.close()
        raise
    except OSError as error:
        connecting.close()
        raise _explain_connect(error) from error
    except BaseException:
        connecting.close()
        raise
    return connecting


def _open_socket(family: socket.AddressFamily) -> socket.socket:
    try:
        return socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise  # out of files or memory: ours, not the web's
        raise _explain_connect(error) from error


def _explain_connect(error: OSError) -> Failed:
    if isinstance(error, ConnectionRefusedError):
        return Failed(FailureCode.CONNECT_REFUSED, "The server refused the connection.")
    if isinstance(error, ConnectionError):
        return Failed(FailureCode.CONNECTION_RESET, "The connection was reset.")
    return Failed(FailureCode.CONNECT_UNREACHABLE, "There is no route to the server.")


def _explain_handshake(error: OSError) -> Failed:
    if error.errno is None:  # asyncio's own, for a peer that closed without a word
        return Failed(FailureCode.TLS_HANDSHAKE_FAILED, "The server closed the connection in the TLS handshake.")
    return Failed(FailureCode.CONNECTION_RESET, "The connection was reset in the TLS handshake.")


def _most_telling(failures: list[Failed]) -> Failed:
    """Choose what to report: an address without a route (often IPv6) says less than one that answered or did not."""
    telling = [failure for failure in failures if failure.code is not FailureCode.CONNECT_UNREACHABLE]
    return (telling or failures)[-1]


def _authorization(fields: RawFields) -> bytes | None:
    for name, value in fields:
        if name.lower() == b"authorization":
            return value
    return None


def _serialise(method: str, target: Target, fields: RawFields, content: bytes) -> bytes:
    """Write a request down as HTTP/1.1; Host comes from the target, never from a header."""
    lines = [f"{method} {target.path_query} HTTP/1.1\r\nHost: {target.host}".encode("ascii")]
    lines += [name + b": " + value for name, value in fields]
    return b"\r\n".join(lines) + b"\r\n\r\n" + content


def _ms(start_at: float | None, end_at: float | None) -> float | None:
    if start_at is None or end_at is None:
        return None
    return round((end_at - start_at) * 1000, 3)
