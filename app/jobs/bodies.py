"""Bodies, each stored once in a shard: compressed where that saves room, so that PostgreSQL need not try.

Of jobs it knows only how many share a body; `batches` erases the bodies that none wants any more.
"""

import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import asyncpg
from isal import igzip_lib
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs import copying

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Key = tuple[int, bytes]
"""Shard and SHA-256."""
Packed = tuple[bytes, str]
"""A body as stored, and its encoding."""

PACK_BYTES_MIN = 512
PACK_GAIN = 0.9
"""A body is stored compressed when that makes it at most this fraction of itself."""
LEVEL = 1
"""Of ISA-L's gzip and of zstd: a page of 10 KiB takes 0.02 ms, and the next levels save little more."""
SMALL_BYTES_MAX = 128 * 2**10
"""Bodies up to this size are packed within half a millisecond; larger ones are best packed in a thread."""

COLUMNS = ("shard", "sha256", "encoding", "content")


def pack(content: bytes) -> Packed:
    """Return the bytes to store and their encoding: `gzip`, `zstd` if large, or `identity`.

    zstd makes hardly less of a page and takes one and a half times as long; of large ones it makes a tenth less.
    Threads may call it at once.
    """
    if len(content) < PACK_BYTES_MIN:
        return content, "identity"
    packed, encoding = (
        (igzip_lib.compress(content, LEVEL, igzip_lib.COMP_GZIP), "gzip")
        if len(content) <= SMALL_BYTES_MAX
        else (zstd.compress(content, LEVEL), "zstd")
    )
    return (packed, encoding) if len(packed) <= len(content) * PACK_GAIN else (content, "identity")


def unpack(stored: bytes, encoding: str) -> bytes:
    """Return the bytes that came over the web."""
    if encoding == "gzip":
        return igzip_lib.decompress(stored, igzip_lib.DECOMP_GZIP)
    return zstd.decompress(stored) if encoding == "zstd" else stored


# The lock keeps erasures from taking a body away under this transaction. Row by row (LATERAL), so in key order.
KEEP = text("""
    SELECT wanted.shard, wanted.sha256
    FROM (
        SELECT * FROM unnest(CAST(:shards AS smallint[]), CAST(:sha256s AS bytea[])) AS w(shard, sha256)
        ORDER BY shard, sha256
    ) AS wanted
    CROSS JOIN LATERAL (
        SELECT FROM body WHERE body.shard = wanted.shard AND body.sha256 = wanted.sha256 FOR KEY SHARE
    ) AS kept
""")

# The update of a row that is there already is never done, but locks the row, as above, and returns nothing of it.
INSERT = text("""
    INSERT INTO body (shard, sha256, encoding, content)
    SELECT * FROM unnest(
        CAST(:shards AS smallint[]), CAST(:sha256s AS bytea[]), CAST(:encodings AS text[]), CAST(:contents AS bytea[])
    )
    ON CONFLICT (shard, sha256) DO UPDATE SET encoding = body.encoding WHERE false
    RETURNING shard, sha256
""")

SHARE = text("""
    INSERT INTO body_shared (shard, sha256, more)
    SELECT * FROM unnest(CAST(:shards AS smallint[]), CAST(:sha256s AS bytea[]), CAST(:more AS int[]))
    ON CONFLICT (shard, sha256) DO UPDATE SET more = body_shared.more + excluded.more
""")


class Conflict(Exception):
    """Another worker has just stored the same bytes: the transaction is void, and succeeds anew without COPY."""


async def store(
    session: AsyncSession,
    packed: Mapping[Key, Packed],
    *,
    seen: Collection[Key],
    counts: Counter[Key],
    by_copy: bool,
) -> None:
    """Store bodies in the caller's transaction, but for those of the `seen` that are still there.

    `counts` says how many jobs bring each; those beyond a body's first are counted in `body_shared`. Nobody erases any
    of them before the transaction's end. COPY takes half the time of an INSERT, but knows no ON CONFLICT: raises
    `Conflict`, rarely. Without it all bodies are offered again, the `seen` too, for it locks them all in key order.
    """
    if not packed:
        return
    if by_copy:
        kept = await _keep(session, seen) if seen else set()
        new = sorted(packed.keys() - kept)
        await _copy(session, new, packed=packed)
    else:
        new = await _insert(session, sorted(packed), packed=packed)
    await _share(session, counts - Counter(new))


async def _copy(session: AsyncSession, keys: Sequence[Key], *, packed: Mapping[Key, Packed]) -> None:
    if not keys:
        return
    try:
        await copying.copy(session, "body", columns=COLUMNS, rows=_rows(keys, packed))
    except asyncpg.UniqueViolationError as error:
        raise Conflict from error


def _rows(keys: Sequence[Key], packed: Mapping[Key, Packed]) -> Iterator[bytes]:
    start = copying.row(len(COLUMNS))
    for shard, sha256 in keys:
        content, encoding = packed[shard, sha256]
        yield b"".join(
            (start, copying.smallint(shard), copying.field(sha256), copying.text(encoding), copying.field(content))
        )


async def _keep(session: AsyncSession, keys: Collection[Key]) -> set[Key]:
    return {(row.shard, row.sha256) for row in await session.execute(KEEP, _columns(keys))}


async def _insert(session: AsyncSession, keys: Sequence[Key], *, packed: Mapping[Key, Packed]) -> list[Key]:
    """Return those that were not there."""
    contents, encodings = map(list, zip(*(packed[key] for key in keys), strict=True))
    rows = await session.execute(INSERT, _columns(keys) | {"contents": contents, "encodings": encodings})
    return [(row.shard, row.sha256) for row in rows]


async def _share(session: AsyncSession, more: Mapping[Key, int]) -> None:
    if keys := sorted(more):
        await session.execute(SHARE, _columns(keys) | {"more": [more[key] for key in keys]})


def _columns(keys: Collection[Key]) -> dict[str, list[Any]]:
    return {"shards": [shard for shard, _ in keys], "sha256s": [sha256 for _, sha256 in keys]}
