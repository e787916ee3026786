"""Rows by COPY, in its binary format: for half of what an INSERT costs, and written while PostgreSQL stores others.

Not by asyncpg's `copy_records_to_table`, which prepares a statement that PgBouncer would not carry over, nor from a
file, which it would read in a thread. A row is the number of its fields (int16), then each field after its length.
"""

import asyncio
import struct
from collections.abc import AsyncIterator, Iterable, Sequence

from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs import database

CHUNK_BYTES = 64 * 2**10
"""Written at once: a socket takes that whole. Of more, event loops keep copies: 1.5 MB in one piece cost three times as
much (asyncio)."""

NULL = b"\xff\xff\xff\xff"

_START = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_END = b"\xff\xff"
"""A signature, no flags and no extension; and a row of -1 fields."""
_LENGTH = struct.Struct("!i")
_ROW, _SMALLINT, _INTEGER, _BIGINT, _BOOLEAN = map(struct.Struct, ("!h", "!ih", "!ii", "!iq", "!i?"))
_JSONB_VERSION = b"\x01"
_SMALLINT_OID, _UUID_OID = 21, 2950


async def copy(
    session: AsyncSession, table: str, *, columns: Sequence[str], pieces: Iterable[bytes], pauses: bool = False
) -> None:
    """Put rows into a table, in a transaction that has executed a statement; raises the driver's own errors.

    `pieces` are rows, or parts of them. `pauses`: the loop has a turn after each 64 KiB, however fast they go. Not for
    a worker, whose turns take long, and rows are few.
    """
    driver = await database.driver(session)
    await driver.copy_to_table(table, source=_in_chunks(pieces, pauses=pauses), columns=list(columns), format="binary")


async def _in_chunks(pieces: Iterable[bytes], *, pauses: bool) -> AsyncIterator[bytes]:
    parts, size = [_START], 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size >= CHUNK_BYTES:
            yield b"".join(parts)
            parts, size = [], 0
            if pauses:
                await asyncio.sleep(0)
    yield b"".join((*parts, _END))


# What a row is made of, in the order of its columns.


def row(field_count: int) -> bytes:
    """Begin a row."""
    return _ROW.pack(field_count)


def field(value: bytes) -> bytes:
    """Make a field of bytes as they are: bytea, uuid, or UTF-8."""
    return _LENGTH.pack(len(value)) + value


def field_in_pieces(value: bytes) -> tuple[bytes, bytes]:
    """Make a field of bytes that may be many, without copying them."""
    return _LENGTH.pack(len(value)), value


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


def boolean(value: bool) -> bytes:
    """Make a field of boolean."""
    return _BOOLEAN.pack(1, value)


def timestamp(since_2000_us: int) -> bytes:
    """Make a field of timestamptz."""
    return _BIGINT.pack(8, since_2000_us)


def smallints(values: Sequence[int]) -> bytes:
    """Make a field of smallint[]."""
    return field(_array_head(_SMALLINT_OID, len(values)) + b"".join(map(smallint, values)))


def uuids(values: Sequence[bytes]) -> bytes:
    """Make a field of uuid[]; 16 bytes each."""
    return field(_array_head(_UUID_OID, len(values)) + b"".join(map(field, values)))


def _array_head(element_oid: int, count: int) -> bytes:
    """One dimension, no NULLs, and the first index."""
    return struct.pack("!5i", 1, 0, element_oid, count, 1)
