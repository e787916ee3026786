"""The form in which bodies are stored: compressed where that saves room, so that PostgreSQL need not try."""

import sys

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PACK_BYTES_MIN = 512
PACK_GAIN = 0.9
"""A body is stored compressed when that makes it at most this fraction of itself."""
LEVEL = 1
"""The fastest: a page of 10 KiB takes 0.03 ms, and the next levels save little more."""
SMALL_BYTES_MAX = 128 * 2**10
"""Bodies up to this size are packed within half a millisecond; larger ones are best packed in a thread."""

_small = zstd.ZstdCompressor(
    options={zstd.CompressionParameter.compression_level: LEVEL, zstd.CompressionParameter.hash_log: 13}
)
"""Kept, since making one costs a third of what a page takes; not for large bodies, which would hold up small ones.

Its table of 32 KiB fits the processor's nearest cache. The one of 128 KiB that zstd takes for up to 16 KiB does not: it
costs a fifth more when other things ran in between, and saves 0.3 % of room."""


def pack(content: bytes) -> tuple[bytes, str]:
    """Return the bytes to store and their encoding, `zstd` or `identity`. Threads may call it at once."""
    if len(content) >= PACK_BYTES_MIN:
        packed = (
            _small.compress(content, _small.FLUSH_FRAME)
            if len(content) <= SMALL_BYTES_MAX
            else zstd.compress(content, LEVEL)
        )
        if len(packed) <= len(content) * PACK_GAIN:
            return packed, "zstd"
    return content, "identity"


def unpack(stored: bytes, encoding: str) -> bytes:
    """Return the bytes that came over the web."""
    return zstd.decompress(stored) if encoding == "zstd" else stored
