"""Rows by COPY, in its binary format, for half of what an INSERT costs, and made while PostgreSQL stores those before.

Not by asyncpg's `copy_records_to_table`, which prepares a statement that PgBouncer would not carry over.
"""

import asyncio
import struct
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import chain

import asyncpg
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs import database

COPY_BYTES = 4 * 2**20
"""Of one COPY, but for its last row: each has a statement's time."""
CHUNK_BYTES = 64 * 2**10
"""Written at once: a socket takes that whole. Of more, event loops keep copies, in memory that is new each time: with
1 MiB a job cost its worker 7 % more."""

NULL = b"\xff\xff\xff\xff"

_START = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_END = b"\xff\xff"
"""A signature, no flags and no extension; and a row of -1 fields."""
_LENGTH = struct.Struct("!i")
_ROW, _SMALLINT, _INTEGER = map(struct.Struct, ("!h", "!ih", "!ii"))
_JSONB_VERSION = b"\x01"
_SMALLINT_OID, _UUID_OID = 21, 2950


async def copy(
    session: AsyncSession, table: str, *, columns: Sequence[str], rows: Iterable[bytes], pauses: bool = False
) -> None:
    """Put rows into a table, in a transaction that has executed a statement; raises the driver's own errors.

    `pauses`: the loop has a turn after each 64 KiB, however fast they go. Not for a worker, whose turns take long, and
    rows are few.
    """
    driver = await database.driver(session)
    coming = iter(rows)
    while (first := next(coming, None)) is not None:
        async with _in_time(driver):
            await driver.copy_to_table(
                table,
                source=_in_chunks(chain((first,), coming), pauses=pauses),
                columns=columns,
                format="binary",
                timeout=2 * database.COMMAND_TIMEOUT_S,  # ours comes first
            )


async def _in_chunks(rows: Iterator[bytes], *, pauses: bool) -> AsyncIterator[bytes]:
    """Take as many rows as one COPY may have."""
    parts, size, left = [_START], 0, COPY_BYTES
    for made in rows:
        parts.append(made)
        size += len(made)
        if size >= min(CHUNK_BYTES, left):
            yield b"".join(parts)
            parts, size, left = [], 0, left - size
            if left <= 0:
                break
            if pauses:
                await asyncio.sleep(0)
    yield b"".join((*parts, _END))


@asynccontextmanager
async def _in_time(driver: asyncpg.Connection) -> AsyncIterator[None]:
    """End a COPY whose connection is lost, or whose time is up.

    asyncpg (0.32) waits for ever to write to a connection that is lost meanwhile, and breaks when it ends one itself.
    """

    def end(_: object) -> None:
        with suppress(RuntimeError):  # it is over
            limit.reschedule(0)

    try:
        async with asyncio.timeout(database.COMMAND_TIMEOUT_S) as limit:
            driver.add_termination_listener(end)
            try:
                yield
            finally:
                driver.remove_termination_listener(end)
    except (TimeoutError, RuntimeError) as error:  # the latter from uvloop, of what is written to a closed connection
        driver.terminate()
        raise asyncpg.InterfaceError("the connection was lost, or did not answer in time, during a COPY") from error


# What a row is made of, in the order of its columns.


def row(field_count: int) -> bytes:
    """Begin a row."""
    return _ROW.pack(field_count)


def field(value: bytes) -> bytes:
    """Make a field of bytes as they are: bytea, uuid, or UTF-8."""
    return _LENGTH.pack(len(value)) + value


def text(value: str | None) -> bytes:
    """Make a field of text."""
    return NULL if value is None else field(value.encode())


def jsonb(value: str | None) -> bytes:
    """Make a field of jsonb, given as JSON."""
    return NULL if value is None else field(_JSONB_VERSION + value.encode())


def smallint(value: int) -> bytes:
    """Make a field of smallint."""
    return _SMALLINT.pack(2, value)


def integer(value: int) -> bytes:
    """Make a field of integer."""
    return _INTEGER.pack(4, value)


def smallints(values: Sequence[int]) -> bytes:
    """Make a field of smallint[]."""
    return field(_array_head(_SMALLINT_OID, len(values)) + b"".join(map(smallint, values)))


def uuids(values: Sequence[bytes]) -> bytes:
    """Make a field of uuid[]: 16 bytes each, and at least one."""
    sixteen = _LENGTH.pack(16)
    return field(_array_head(_UUID_OID, len(values)) + sixteen + sixteen.join(values))


def _array_head(element_oid: int, count: int) -> bytes:
    """One dimension, no NULLs, and the first index."""
    return struct.pack("!5i", 1, 0, element_oid, count, 1)
