"""Content codings undone in small steps, so that no body is larger than allowed even for a moment.

Takes whole bodies as they came over the wire, since those are bounded already: a slow server then never holds a
decoder. Decides nothing about statuses or redirects.
"""

import asyncio
import sys
import time
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import brotli
from msgspec import Struct

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from app.fetch.limits import Failed
from app.outcome import FailureCode

ACCEPT_ENCODING = "gzip, deflate, br, zstd"
TRAILING_JUNK = "body_trailing_junk"

STEP_BYTES = 64 * 2**10
"""Bytes into and (about) out of one call of a native decoder: some 0.2 ms."""
SMALL_BYTES = 128 * 2**10
"""Bodies that decode to no more are decoded at once, in 0.5 ms at most (10 ms for a br bomb: its window is zeroed)."""
SMALL_STEPS_MAX = 64
"""... unless they need more steps: thousands of empty gzip members decode to nothing, slowly."""
SEGMENT_BYTES = 2**20
"""A large body is gathered in parts of this size: one that grew to 16 MiB would be moved, and leave holes, all the way.
Fifty bombs at once made a worker grow by 38 to 77 MiB like that."""
TURN_S = 0.005
"""How long a large body may hold the event loop in one turn."""
SHORT_S = 0.0003
"""Turns that took no longer may follow each other without a breath."""
ZSTD_WINDOW_LOG_MAX = 23
"""8 MiB, the most the coding may ask of a receiver (RFC 9659)."""

Result = TypeVar("Result")

_ALIASES = {"x-gzip": "gzip"}  # RFC 9110, 8.4.1.3
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGICS = (b"\x28\xb5\x2f\xfd", *(bytes((0x50 + nibble, 0x2A, 0x4D, 0x18)) for nibble in range(16)))


@dataclass(slots=True)
class Flags:
    """What was odd about a body that decoded all the same."""

    trailing_junk: bool = False

    def listed(self) -> tuple[str, ...]:
        return (TRAILING_JUNK,) if self.trailing_junk else ()


class Decoded(Struct, frozen=True, gc=False):
    """A body without its content codings, and what was odd about it."""

    body: bytes
    flags: tuple[str, ...] = ()


def codings(values: Sequence[str], *, encodings_max: int) -> tuple[str, ...]:
    """List the codings of Content-Encoding fields, as they were applied. Raise `Failed` for any we did not ask for."""
    if not values:
        return ()
    listed = [coding.strip().lower() for value in values for coding in value.split(",")]
    applied = tuple(_ALIASES.get(coding, coding) for coding in listed if coding not in ("", "identity"))
    if len(applied) > encodings_max:
        raise Failed(FailureCode.TOO_MANY_ENCODINGS, f"The body has more than {encodings_max} content codings.")
    if not set(applied) <= _DECODERS.keys():
        raise Failed(
            FailureCode.CONTENT_ENCODING_NOT_SUPPORTED,
            "The body has a content coding that was not asked for; only gzip, deflate, br and zstd are.",
        )
    return applied


class Decoders:
    """Room for a bounded number of large bodies, and turns on the event loop for all that decode."""

    def __init__(self, count: int) -> None:
        self.places = asyncio.Semaphore(count)
        self._turn = asyncio.Lock()

    async def take_turn(self, run: Callable[[], Result]) -> Result:
        """Run it; if that took long, let the event loop go round before anybody else has a turn.

        Fifty bodies that arrive together would otherwise hold the loop fifty times as long as one.
        """
        async with self._turn:
            started_at = time.monotonic()
            try:
                return run()
            finally:
                if time.monotonic() - started_at > SHORT_S:
                    await asyncio.sleep(0)


async def decode(wire: bytes, applied: tuple[str, ...], *, body_bytes_max: int, decoders: Decoders) -> Decoded:
    """Undo the codings. Raise `Failed` beyond `body_bytes_max`, at any layer, and for data that is cut or garbage.

    A large body starts anew in a place of its own: waiting with a half-used decoder would keep its window, up to
    16 MiB.
    """
    if not applied or not wire:
        return Decoded(wire)
    small = await decoders.take_turn(lambda: _decode_small(wire, applied, body_bytes_max))
    if small is not None:
        return small
    async with decoders.places:
        flags = Flags()
        segments = [bytearray()]
        pieces = _pieces(wire, applied, body_bytes_max=body_bytes_max, flags=flags)
        while await decoders.take_turn(lambda: _advance(pieces, segments)):
            pass
        return Decoded(b"".join(segments), flags.listed())


def _decode_small(wire: bytes, applied: tuple[str, ...], body_bytes_max: int) -> Decoded | None:
    """Decode a body that proves small; `None` if it does not."""
    if len(wire) > SMALL_BYTES:
        return None
    flags = Flags()
    whole = bytearray()
    for step_count, piece in enumerate(_pieces(wire, applied, body_bytes_max=body_bytes_max, flags=flags)):
        whole += piece
        if len(whole) > SMALL_BYTES or step_count > SMALL_STEPS_MAX:
            return None
    return Decoded(bytes(whole), flags.listed())


def _advance(pieces: Iterator[bytes], segments: list[bytearray]) -> bool:
    """Decode for one turn; say whether there is more to do."""
    until_at = time.monotonic() + TURN_S
    for piece in pieces:
        if len(segments[-1]) + len(piece) > SEGMENT_BYTES:
            segments.append(bytearray())
        segments[-1] += piece
        if time.monotonic() > until_at:
            return True
    return False


def _pieces(wire: bytes, applied: tuple[str, ...], *, body_bytes_max: int, flags: Flags) -> Iterator[bytes]:
    """Chain the decoders, the last coding applied being the first undone; every piece is one step, some are empty."""
    source: Iterator[bytes] = (wire[start : start + STEP_BYTES] for start in range(0, len(wire), STEP_BYTES))
    for coding in reversed(applied):
        source = _capped(_DECODERS[coding](source, flags), body_bytes_max)
    return source


def _capped(source: Iterator[bytes], bytes_max: int) -> Iterator[bytes]:
    total_bytes = 0
    for piece in source:
        total_bytes += len(piece)
        if total_bytes > bytes_max:
            raise Failed(
                FailureCode.DECOMPRESSED_TOO_LARGE,
                f"The decoded body is larger than body_bytes_max, {bytes_max:,} bytes.",
            )
        yield piece


# One generator for each coding: wire bytes in, decoded pieces out, an empty one where a step brought nothing.


def _gunzip(source: Iterator[bytes], flags: Flags) -> Iterator[bytes]:
    """Undo gzip, all members of it (RFC 1952, 2.2)."""
    rest = b""
    members = 0
    while True:
        rest = _at_least(2, rest, source)
        if not rest:
            if members:
                return
            raise _cut()
        if members and not rest.startswith(_GZIP_MAGIC):
            flags.trailing_junk = True
            yield from _drained(source, flags)
            return
        rest = yield from _inflate(zlib.decompressobj(wbits=31), rest, source)
        members += 1


def _undeflate(source: Iterator[bytes], flags: Flags) -> Iterator[bytes]:
    """Undo deflate: in the zlib format as it should be, or raw as some servers send it."""
    start = _at_least(2, b"", source)
    has_header = len(start) > 1 and start[0] & 0x0F == 8 and int.from_bytes(start[:2]) % 31 == 0
    rest = yield from _inflate(zlib.decompressobj(wbits=15 if has_header else -15), start, source)
    flags.trailing_junk |= bool(rest)
    yield from _drained(source, flags)


def _inflate(inflater: "zlib._Decompress", start: bytes, source: Iterator[bytes]) -> Generator[bytes, None, bytes]:
    """Run one zlib stream to its end; return what followed it in the same piece of the source."""
    pending = start
    while not inflater.eof:
        if not pending:
            pending = _next(source)
        try:
            piece = inflater.decompress(pending, STEP_BYTES)
        except zlib.error as error:
            raise _garbage(error) from error
        pending = inflater.unconsumed_tail
        yield piece
    return inflater.unused_data


def _unbrotli(source: Iterator[bytes], flags: Flags) -> Iterator[bytes]:
    """Undo br (RFC 7932). The library cannot tell junk after the end from garbage within: both are garbage."""
    decompressor = brotli.Decompressor()
    pending = b""
    drained = True
    while not decompressor.is_finished():
        if drained and decompressor.can_accept_more_data():
            pending = _next(source)
        try:
            piece = decompressor.process(pending, output_buffer_limit=STEP_BYTES)
        except brotli.error as error:
            raise _garbage(error) from error
        drained = len(piece) < STEP_BYTES
        pending = b""
        yield piece
    yield from _drained(source, flags)


def _unzstd(source: Iterator[bytes], flags: Flags) -> Iterator[bytes]:
    """Undo zstd, all frames of it (RFC 8878, 3)."""
    rest = b""
    frames = 0
    while True:
        rest = _at_least(4, rest, source)
        if not rest:
            if frames:
                return
            raise _cut()
        if frames and not rest.startswith(_ZSTD_MAGICS):
            flags.trailing_junk = True
            yield from _drained(source, flags)
            return
        rest = yield from _unframe(rest, source)
        frames += 1


def _unframe(start: bytes, source: Iterator[bytes]) -> Generator[bytes, None, bytes]:
    """Run one zstd frame to its end; return what followed it in the same piece of the source."""
    decompressor = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG_MAX})
    pending = start
    while not decompressor.eof:
        if decompressor.needs_input and not pending:
            pending = _next(source)
        try:
            piece = decompressor.decompress(pending, STEP_BYTES)
        except zstd.ZstdError as error:
            raise _garbage(error) from error
        pending = b""
        yield piece
    return decompressor.unused_data


def _drained(source: Iterator[bytes], flags: Flags) -> Iterator[bytes]:
    """Throw the rest away, but see to its end: the layer below may be cut short or too large."""
    for piece in source:
        flags.trailing_junk |= bool(piece)
        yield b""


def _at_least(count: int, start: bytes, source: Iterator[bytes]) -> bytes:
    """Take from the source until there are that many bytes, or no more."""
    while len(start) < count and (piece := next(source, None)) is not None:
        start += piece
    return start


def _next(source: Iterator[bytes]) -> bytes:
    piece = next(source, None)
    if piece is None:
        raise _cut()
    return piece


def _cut() -> Failed:
    return Failed(FailureCode.BODY_TRUNCATED, "The compressed body was cut short.")


def _garbage(error: Exception) -> Failed:
    return Failed(FailureCode.DECODE_ERROR, f"The body is not what its Content-Encoding says: {error}.")


_DECODERS: dict[str, Callable[[Iterator[bytes], Flags], Iterator[bytes]]] = {
    "gzip": _gunzip,
    "deflate": _undeflate,
    "br": _unbrotli,
    "zstd": _unzstd,
}
