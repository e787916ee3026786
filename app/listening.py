"""Where the API listens: who may reach it there, its socket, and the addresses that are this machine's own."""

import ipaddress
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from app.fetch.address import Address

BACKLOG = 2_048


class CannotListen(Exception):
    """The settings or the machine rule it out; the message is one line that tells the operator what to do."""


def check_exposure(host: str, port: int) -> None:
    """Refuse, for a service without a token, to listen where other machines reach it. Raises `CannotListen`."""
    if not all(ipaddress.ip_address(found[4][0]).is_loopback for found in _resolve(host, port)):
        raise CannotListen(
            f"Listening on {host}, beyond this machine, needs a token: set FETCHPOOL_API_TOKEN to a secret of "
            "16 characters or more, or listen on 127.0.0.1."
        )


@contextmanager
def bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """Take the port before anything else is started, so that a taken one is told at once; clients are let in later.

    Raises `CannotListen`.
    """
    family, kind, protocol, _, address = _resolve(host, port)[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise _refused(host, port, error) from None
        yield listener


def let_in(listener: socket.socket, host: str, port: int) -> None:
    """Let clients connect. Raises `CannotListen`."""
    try:
        listener.listen(BACKLOG)
    except OSError as error:  # another one bound it as well and was the first to listen
        raise _refused(host, port, error) from None


def own_addresses(host: str) -> frozenset[Address]:
    """Every address under which the service is reached that listens on `host`; none when its name is not known here."""
    try:
        addresses = frozenset(ipaddress.ip_address(found[4][0]) for found in _resolve(host, 0))
    except CannotListen:  # a worker elsewhere need not know the name the API listens by
        return frozenset()
    return addresses | _machine_addresses() if any(each.is_unspecified for each in addresses) else addresses


def _machine_addresses() -> frozenset[Address]:
    """Every address of this machine, as Linux lists them; elsewhere none."""
    found: set[Address] = set()
    with suppress(OSError):
        table = Path("/proc/net/fib_trie").read_text()
        found |= {ipaddress.IPv4Address(each) for each in re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", table)}
    with suppress(OSError):
        table = Path("/proc/net/if_inet6").read_text()
        found |= {ipaddress.IPv6Address(int(line.split()[0], 16)) for line in table.splitlines()}
    return frozenset(found)


def _refused(host: str, port: int, error: OSError) -> CannotListen:
    return CannotListen(
        f"Cannot listen on port {port} of {host} ({error.strerror}): choose another with --port (FETCHPOOL_PORT)."
    )


_Resolved = list[tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[str, int] | tuple[str, int, int, int]]]


def _resolve(host: str, port: int) -> _Resolved:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)  # type: ignore[return-value]
    except (OSError, UnicodeError):
        raise CannotListen(
            f"{host!r} is no address to listen on: set --host (FETCHPOOL_HOST) to one of this machine, such as "
            "127.0.0.1."
        ) from None
