"""Opens connections, only to addresses the policy passed, and checks who answered; it sends and keeps nothing.

`connect` is the one way in, so that no address is dialled that was not judged for this very fetch.
"""

import asyncio
import errno
import os
import socket
import ssl
import time
from collections.abc import Sequence

from app.fetch.address import is_public, parse
from app.fetch.connection import Connection
from app.fetch.limits import Failed, Limits
from app.fetch.policy import Policy, Target, check_peer
from app.fetch.resolver import Resolver, addresses
from app.fetch.tls import Context, expires_at, explain
from app.fetch.trace import Trace, elapsed_ms
from app.outcome import FailureCode

DIALS_MAX = 4

HANDSHAKE_S = 86_400.0
"""The event loop's own limit on a handshake, put out of the way of `connect_timeout_s`."""


async def connect(
    target: Target, *, limits: Limits, trace: Trace, policy: Policy, resolver: Resolver, context: Context
) -> Connection:
    """Connect to the first checked address that answers. Raise `Refused` or `Failed`."""
    started_at = time.monotonic()
    checked = await addresses(target, resolver, policy)
    trace.dns_ms = None if target.is_literal else elapsed_ms(started_at, time.monotonic())
    return await _dial_in_turn(checked[:DIALS_MAX], target, within_s=limits.connect_timeout_s, context=context)


async def _dial_in_turn(checked: Sequence[str], target: Target, *, within_s: float, context: Context) -> Connection:
    """Dial one address after the other; each may take an even share of the time that is left."""
    until_at = time.monotonic() + within_s
    failures = []
    for count, address in enumerate(checked):
        try:
            async with asyncio.timeout((until_at - time.monotonic()) / (len(checked) - count)):
                return await _dial(address, target, context=context)
        except TimeoutError:
            failures.append(
                Failed(FailureCode.CONNECT_TIMEOUT, f"There was no connection within {within_s:g} seconds.")
            )
        except Failed as failure:
            failures.append(failure)
    try:
        raise _most_telling(failures)
    finally:
        failures.clear()  # by their tracebacks they would keep this list, and all of the fetch


async def _dial(address: str, target: Target, *, context: Context) -> Connection:
    """Connect to one checked address and, for https, shake hands in the target's name."""
    started_at = time.monotonic()
    connected = await _connect_socket(address, target.port)
    connected_at = time.monotonic()
    try:
        connection = await _adopt(connected, target, context=context)
    except Failed:
        if not context.forget_session(target.hostname):
            raise
        return await _dial(address, target, context=context)
    connection.connect_ms = elapsed_ms(started_at, connected_at)
    connection.tls_ms = elapsed_ms(connected_at, time.monotonic()) if target.scheme == "https" else None
    connection.remote_address = address if is_public(parse(address)) else None
    return connection


async def _connect_socket(address: str, port: int) -> socket.socket:
    """Open a TCP connection to a checked address and make sure that this is who answered."""
    connecting = _open_socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        connecting.setblocking(False)
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        await _await_connection(connecting, address, port)
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


async def _await_connection(connecting: socket.socket, address: str, port: int) -> None:
    """Connect a non-blocking socket. Not by `loop.sock_connect`: uvloop's looks addresses up in threads."""
    code = connecting.connect_ex((address, port))
    if code == errno.EINPROGRESS:
        loop = asyncio.get_running_loop()
        writable = loop.create_future()
        loop.add_writer(connecting, _note, writable)
        try:
            await writable
        finally:
            loop.remove_writer(connecting)
        code = connecting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


def _note(event: asyncio.Future[None]) -> None:
    if not event.done():
        event.set_result(None)


def _open_socket(family: socket.AddressFamily) -> socket.socket:
    try:
        return socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise  # out of files or memory: ours, not the web's
        raise _explain_connect(error) from error


async def _adopt(connected: socket.socket, target: Target, *, context: Context) -> Connection:
    """Put a connection on a connected socket; the socket is closed if that fails or is cancelled."""
    loop = asyncio.get_running_loop()
    connection = Connection(loop)
    secure = target.scheme == "https"
    try:
        transport, _ = await loop.create_connection(
            lambda: connection,
            sock=connected,
            ssl=context if secure else None,
            server_hostname=target.hostname if secure else None,
            ssl_handshake_timeout=HANDSHAKE_S if secure else None,
        )
    except ssl.SSLError as error:
        raise explain(error) from error
    except OSError as error:
        raise _explain_handshake(error) from error
    except BaseException:
        connection.abort()  # the loop would first wait for the server's farewell
        connected.close()
        raise
    connection.secure = transport.get_extra_info("ssl_object")
    if connection.secure is not None:
        connection.tls_version = connection.secure.version()
        connection.tls_expires_at = expires_at(connection.secure)
    return connection


def _explain_connect(error: OSError) -> Failed:
    if isinstance(error, ConnectionRefusedError):
        return Failed(FailureCode.CONNECT_REFUSED, "The server refused the connection.")
    if isinstance(error, ConnectionError):
        return Failed(FailureCode.CONNECTION_RESET, "The connection was reset.")
    return Failed(FailureCode.CONNECT_UNREACHABLE, "There is no route to the server.")


def _explain_handshake(error: OSError) -> Failed:
    if error.errno is None:  # the loop's own, for a peer that closed without a word
        return Failed(FailureCode.TLS_HANDSHAKE_FAILED, "The server closed the connection in the TLS handshake.")
    return Failed(FailureCode.CONNECTION_RESET, "The connection was reset in the TLS handshake.")


def _most_telling(failures: list[Failed]) -> Failed:
    """Choose what to report: an address without a route (often IPv6) says less than one that answered or did not."""
    telling = [failure for failure in failures if failure.code is not FailureCode.CONNECT_UNREACHABLE]
    return (telling or failures)[-1]
