"""What is known of a fetch while it runs, and the evidence made of it; it reads no clock and steers nothing.

Its times are those of `time.monotonic`, which the event loop's follows: up to Python 3.11, to ask which loop is
running, for its time, is a system call (getpid).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from app.fetch.connection import Connection
from app.fetch.exchange import Exchange
from app.fetch.head import Head
from app.outcome import Evidence, Hop


@dataclass(slots=True)
class Trace:
    """What is known of a fetch while it runs; the steps are those of the current hop.

    `on_connection` is called once, when the first connection stands: that to the host of the request itself.
    """

    started_at: float
    on_connection: Callable[[], None] | None = None
    sent: bool = False
    url: str | None = None
    redirects: list[Hop] = field(default_factory=list)
    dns_ms: float | None = None
    connection: Connection | None = None
    exchange: Exchange | None = None
    reused: bool = False
    body_bytes: int = 0

    def note_connection(self, connection: Connection) -> None:
        """Note over which connection the current hop goes."""
        self.connection = connection
        if self.on_connection is not None:
            self.on_connection()
            self.on_connection = None

    def next_hop(self, hop: Hop) -> None:
        """Note a redirect and forget the steps that led to it."""
        self.redirects.append(hop)
        self.forget_connection()

    def forget_connection(self) -> None:
        """Start the steps of a hop anew."""
        self.dns_ms = self.connection = self.exchange = None
        self.reused = False

    @property
    def head(self) -> Head | None:
        """What the current hop was answered with, if that has come."""
        return self.exchange.head if self.exchange is not None else None

    def evidence(self, *, now: float) -> Evidence:
        """Put down what is known, as of `now`."""
        total_ms = elapsed_ms(self.started_at, now)
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
            first_byte_ms=elapsed_ms(exchange.sent_at, exchange.first_byte_at),
            download_ms=elapsed_ms(exchange.first_byte_at, exchange.completed_at),
            total_ms=total_ms,
            wire_bytes=exchange.wire_bytes,
            body_bytes=self.body_bytes,
        )


def elapsed_ms(start_at: float | None, end_at: float | None) -> float | None:
    """Give the milliseconds between two times, whole microseconds; `None` if one of them never came."""
    if start_at is None or end_at is None:
        return None
    return int((end_at - start_at) * 1_000_000) / 1000  # `round` takes four times as long
