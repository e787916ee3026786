"""Keeps connections between requests, few and for a short while, apart by what may share one.

Opens none and judges no answer: whether a connection may be used again it asks the connection.
"""

import asyncio
import time
from typing import NamedTuple

from app.fetch.connection import Connection

IDLE_S = 15.0
IDLE_MAX = 256
IDLE_PER_HOST_MAX = 100
UNSAFE_REUSE_S = 1.0
"""An unsafe request cannot be sent twice, so it only takes a connection too young for the server to be closing it."""


class Affinity(NamedTuple):
    """What may share a connection: scheme, host with port, and credentials (some schemes sign in the connection)."""

    scheme: str
    host: str
    authorization: bytes | None


class Idle(NamedTuple):
    """A connection that waits for its next request."""

    affinity: Affinity
    since_at: float
    connection: Connection


class IdleConnections:
    """The idle connections of one process by politeness key, those of a key from the oldest to the youngest."""

    def __init__(self, *, idle_max: int, idle_per_host_max: int, idle_s: float) -> None:
        self.count = 0
        self._idle_max = idle_max
        self._idle_per_host_max = idle_per_host_max
        self._idle_s = idle_s
        self._by_host: dict[str, list[Idle]] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = False

    def take(self, affinity: Affinity, *, safe: bool) -> Connection | None:
        """Take the youngest connection that fits, if any; `safe`: the request may be sent twice."""
        kept = self._by_host.get(affinity.host)
        if kept is None:
            return None
        oldest_at = time.monotonic() - (self._idle_s if safe else UNSAFE_REUSE_S)
        for index in reversed(range(len(kept))):
            idle = kept[index]
            if idle.affinity == affinity and idle.since_at >= oldest_at and not idle.connection.closed:
                self._forget(affinity.host, index)
                return idle.connection
        return None

    def keep(self, connection: Connection, affinity: Affinity) -> None:
        """Keep a connection for the next request, or abort it: unclean, one too many, or after `close_all`."""
        kept = self._by_host.setdefault(affinity.host, [])
        if self._closed or not connection.reusable or len(kept) >= self._idle_per_host_max:
            connection.abort()
            if not kept:
                del self._by_host[affinity.host]
            return
        kept.append(Idle(affinity, time.monotonic(), connection))
        self.count += 1
        if self.count > self._idle_max:
            self._close_oldest()
        self._plan_sweep()

    def close(self, host: str) -> None:
        """Close the connections of a politeness key."""
        for idle in self._by_host.pop(host, ()):
            self.count -= 1
            idle.connection.abort()

    def close_all(self) -> None:
        """Close every connection and keep none from now on."""
        self._closed = True
        for host in list(self._by_host):
            self.close(host)
        if self._sweep is not None:
            self._sweep.cancel()

    def _forget(self, host: str, index: int) -> None:
        kept = self._by_host[host]
        del kept[index]
        self.count -= 1
        if not kept:
            del self._by_host[host]

    def _close_oldest(self) -> None:
        """Close the oldest of the host that has had one for longest: near enough to the oldest of all."""
        host, kept = next(iter(self._by_host.items()))
        connection = kept[0].connection
        self._forget(host, 0)
        connection.abort()

    def _plan_sweep(self) -> None:
        if self._sweep is None and self.count:
            self._sweep = asyncio.get_running_loop().call_later(self._idle_s / 3, self._sweep_idle)

    def _sweep_idle(self) -> None:
        """Close what has been idle for too long, and forget what its server closed."""
        self._sweep = None
        oldest_at = time.monotonic() - self._idle_s
        for host, kept in list(self._by_host.items()):
            for index in reversed(range(len(kept))):
                if kept[index].since_at < oldest_at or kept[index].connection.closed:
                    kept[index].connection.abort()
                    self._forget(host, index)
        self._plan_sweep()
