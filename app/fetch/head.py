"""What the head of a response says: syntax by llhttp, framing by RFC 9112. Knows no sockets and keeps no time.

llhttp is left strict but for two things it would refuse and browsers do not: a length beside `chunked` (we ignore the
length and close afterwards) and spaces after a chunk size.
"""

import re
from enum import Enum

import httptools
from msgspec import Struct

from app.fetch.limits import Failed, Limits
from app.outcome import FailureCode

HEAD_END = b"\r\n\r\n"
PROLOGUE = b"HTTP/1."
OVERHEAD_BYTES_MAX = 64 * 2**10
"""Bytes of chunk sizes, extensions and trailers a chunked body may have for nothing, and between two bytes of body."""
OVERHEAD_RATIO_MAX = 16
"""... and this many more for each byte of body: one-byte chunks need 5."""

BODILESS = frozenset({204, 304})
Fields = tuple[tuple[str, str], ...]
_LINE_THAT_MAY_HOLD_NUL = re.compile(
    rb"(?<=\r\n)(?!(?:content-length|transfer-encoding)[ \t]*:)[^\r\n:\0]+:[^\r\n]*", re.IGNORECASE
)
_LENGTH_LINE = re.compile(rb"\r\ncontent-length[ \t]*:[ \t]*([^\r\n]*?)[ \t]*(?=\r\n)", re.IGNORECASE)


class Framing(Enum):
    """How the end of a body is known."""

    LENGTH = "length"
    CHUNKED = "chunked"
    UNTIL_CLOSE = "until_close"


class Chunks:
    """What llhttp tells of a message while it is fed. Apart from `Message`, or the two would keep each other alive."""

    __slots__ = ("after_size", "body", "complete", "extra")

    def __init__(self) -> None:
        self.body = bytearray()
        self.complete = False
        self.extra = False
        self.after_size = False

    def on_message_begin(self) -> None:
        if self.complete:
            self.extra = True

    def on_chunk_header(self) -> None:
        self.after_size = True

    def on_body(self, body: bytes) -> None:
        if not self.complete:
            self.after_size = False
            self.body += body

    def on_message_complete(self) -> None:
        self.complete = True


class Message:
    """A message fed to llhttp. Of the head it only takes the judgement; a chunked body comes into `chunks`."""

    __slots__ = ("_fed_bytes", "_parser", "_stale_bytes", "chunks")

    def __init__(self) -> None:
        self.chunks = Chunks()
        self._fed_bytes = 0
        self._stale_bytes = 0
        self._parser = httptools.HttpResponseParser(self.chunks)
        self._parser.set_dangerous_leniencies(lenient_chunked_length=True, lenient_spaces_after_chunk_size=True)

    def feed_head(self, head: bytes) -> tuple[int, str]:
        """Judge a whole head; return its status and its version. Raise httptools' errors if it is not one."""
        self._parser.feed_data(head)
        self.chunks.complete = False
        return self._parser.get_status_code(), self._parser.get_http_version()

    def feed_body(self, data: bytes) -> None:
        """Take wire bytes of the body. Raise `Failed` if they are not chunks, or bring the body no further."""
        body_bytes_before = len(self.chunks.body)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.chunks.complete:
                raise Failed(FailureCode.PROTOCOL_ERROR, f"The chunked body is not valid HTTP: {error}.") from error
            self.chunks.extra = True
        self._fed_bytes += len(data)
        self._stale_bytes = 0 if len(self.chunks.body) > body_bytes_before else self._stale_bytes + len(data)
        if not self.chunks.complete:
            self._refuse_padding()

    def _refuse_padding(self) -> None:
        """Bound what is not body: chunk sizes and extensions, and the trailer."""
        body_bytes = len(self.chunks.body)
        overhead_bytes = self._fed_bytes - body_bytes
        if max(self._stale_bytes, overhead_bytes - OVERHEAD_RATIO_MAX * body_bytes) <= OVERHEAD_BYTES_MAX:
            return
        if self.chunks.after_size:
            raise Failed(FailureCode.HEADERS_TOO_LARGE, "The trailer of the body is too large.")
        raise Failed(FailureCode.PROTOCOL_ERROR, "The chunked body is padded beyond reason.")


class Head(Struct, frozen=True, gc=False):
    """The head of a response. `length` counts only with `Framing.LENGTH`; `message` takes the body with `CHUNKED`.

    `fields` are names and values in their order, latin-1.
    """

    status: int
    http_version: str
    fields: Fields
    framing: Framing
    length: int
    keep_alive: bool
    message: Message


def refuse_prologue(start: bytes | bytearray) -> None:
    """Raise `Failed` when the first bytes of an answer cannot become a head of HTTP/1: no need to wait for its end."""
    if not PROLOGUE.startswith(start[: len(PROLOGUE)]):
        raise Failed(FailureCode.PROTOCOL_ERROR, "The answer does not start like HTTP/1.")


def parse(head: bytes, *, method: str, limits: Limits) -> Head:
    """Read a complete head, blank line included. Raise `Failed` where it is not one, or beyond the limits."""
    if b"\0" in head:
        head = _without_nul(head)
    if head.count(b"\r\n") - 2 > limits.header_count_max:
        raise Failed(
            FailureCode.TOO_MANY_HEADERS, f"The response has more than {limits.header_count_max} header fields."
        )
    if head[8:12] == b" 101":
        raise Failed(FailureCode.UPGRADE_NOT_SUPPORTED, "The server switched to another protocol unasked.")
    message, status, version = _read(head)
    if status < 100 or version not in ("1.0", "1.1"):
        raise Failed(FailureCode.PROTOCOL_ERROR, "The status line is not one of HTTP/1.")
    fields = _fields(head)
    lengths, codings, connection = _framing_fields(fields)
    framing, length = _frame(lengths, codings, bodiless=method == "HEAD" or status in BODILESS or status < 200)
    clean = framing is not Framing.UNTIL_CLOSE and not (lengths and codings)
    keep_alive = clean and _keeps_alive(version, connection)
    return Head(status, f"HTTP/{version}", fields, framing, length, keep_alive, message)


def _read(head: bytes) -> tuple[Message, int, str]:
    message = Message()
    try:
        return message, *message.feed_head(head)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
        collapsed = _collapse_lengths(head)
        if collapsed is None:
            raise Failed(FailureCode.PROTOCOL_ERROR, f"The response head is not valid HTTP: {error}.") from error
        return _read(collapsed)


def _fields(head: bytes) -> Fields:
    """Split a head that llhttp passed: no folded lines, no bare line ends. A third of the cost of its callbacks."""
    lines = [line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:-2]]
    return tuple([(name, value.strip(" \t")) for name, _, value in lines])


def _without_nul(head: bytes) -> bytes:
    """Make a space of each NUL in a field's value (RFC 9110, 5.5).

    Where it might change the framing it stays, as it does outside of values: llhttp refuses it there.
    """
    return _LINE_THAT_MAY_HOLD_NUL.sub(lambda line: line[0].replace(b"\0", b" "), head)


def _collapse_lengths(head: bytes) -> bytes | None:
    """Make several equal lengths one (RFC 9110, 8.6), which llhttp refuses. `None`: nothing to collapse."""
    values = [value for line in _LENGTH_LINE.findall(head) for value in re.split(rb"[ \t]*,[ \t]*", line)]
    if len(values) < 2 or len(set(values)) > 1:
        return None
    return _LENGTH_LINE.sub(b"", head).replace(b"\r\n", b"\r\nContent-Length: " + values[0] + b"\r\n", 1)


def _framing_fields(fields: Fields) -> tuple[list[str], list[str], list[str]]:
    """Pick the values of Content-Length, Transfer-Encoding and Connection."""
    lengths, codings, connection = [], [], []
    for name, value in fields:
        size = len(name)
        if size == 14 and name.lower() == "content-length":
            lengths.append(value)
        elif size == 17 and name.lower() == "transfer-encoding":
            codings.append(value)
        elif size == 10 and name.lower() == "connection":
            connection.append(value)
    return lengths, codings, connection


def _frame(lengths: list[str], codings: list[str], *, bodiless: bool) -> tuple[Framing, int]:
    """Decide how the body ends (RFC 9112, 6.3). Several lengths are equal numbers by now."""
    if codings and [coding.lower() for coding in codings] != ["chunked"]:
        raise Failed(FailureCode.PROTOCOL_ERROR, "The response has a Transfer-Encoding other than chunked.")
    if bodiless:
        return Framing.LENGTH, 0
    if codings:
        return Framing.CHUNKED, 0
    if lengths:
        return Framing.LENGTH, int(lengths[0].partition(",")[0])
    return Framing.UNTIL_CLOSE, 0


def _keeps_alive(version: str, connection: list[str]) -> bool:
    if not connection:
        return version == "1.1"
    if connection == ["keep-alive"]:  # as nearly all say it
        return True
    options = {option.strip() for value in connection for option in value.lower().split(",")}
    return "close" not in options if version == "1.1" else "keep-alive" in options
