"""The answer to one request, from bytes to head and body, within the limits. Pure: knows no sockets and no clock."""

from app.fetch import head as heads
from app.fetch.head import Framing, Head
from app.fetch.limits import Failed, Limits
from app.outcome import FailureCode


class Exchange:
    """What has come of one answer so far. Feed it with `take` and, at the end of the connection, `end`."""

    __slots__ = (
        "_head_bytes",
        "_informational_count",
        "_limits",
        "_method",
        "_wire_bytes_max",
        "body",
        "complete",
        "completed_at",
        "extra",
        "first_byte_at",
        "head",
        "sent_at",
        "wire_bytes",
    )

    def __init__(self, method: str, limits: Limits, *, sent_at: float) -> None:
        self._method = method
        self._limits = limits
        self._wire_bytes_max = limits.wire_bytes_max
        self._head_bytes = b""
        self._informational_count = 0
        self.head: Head | None = None
        self.body: bytes | bytearray = b""
        self.wire_bytes = 0
        self.complete = False
        self.extra = False
        """Whether bytes followed the end of the answer: the connection is then spoilt."""
        self.sent_at = sent_at
        self.first_byte_at: float | None = None
        self.completed_at: float | None = None

    def take(self, data: bytes) -> None:
        """Take bytes as they come. Raise `Failed` when they are no valid answer, or more than the limits allow."""
        while self.head is None:
            if self._head_bytes:
                data = self._head_bytes + data
            end = data.find(heads.HEAD_END)
            self._refuse_head(data, end)
            if end < 0:
                self._head_bytes = data
                return
            end += len(heads.HEAD_END)
            self._take_head(data[:end])
            self._head_bytes = b""
            data = data[end:]
        self._take_body(data)

    def end(self) -> Failed | None:
        """Say what it means that the connection ended here. `None`: the answer is complete."""
        if self.complete:
            return None
        if self.head is None:
            return self._explain_cut_head()
        if self.head.framing is not Framing.UNTIL_CLOSE:
            return Failed(FailureCode.BODY_TRUNCATED, "The connection closed before the body was complete.")
        self.complete = True
        return None

    def narrow(self, bytes_max: int) -> None:
        """Take less of the body than the limits allow."""
        self._wire_bytes_max = min(self._wire_bytes_max, bytes_max)

    def refuse_announced(self) -> None:
        """Raise `Failed` when the head announces a body over the limit: nothing of it need be awaited."""
        if self.head is not None and self.head.length > self._wire_bytes_max:
            raise Failed(
                FailureCode.BODY_TOO_LARGE,
                f"The announced body is larger than wire_bytes_max, {self._wire_bytes_max:,} bytes.",
            )

    def _refuse_head(self, data: bytes, end: int) -> None:
        heads.refuse_prologue(data)
        if (len(data) if end < 0 else end) > self._limits.header_bytes_max:
            raise Failed(
                FailureCode.HEADERS_TOO_LARGE,
                f"The response head is larger than header_bytes_max, {self._limits.header_bytes_max:,} bytes.",
            )

    def _take_head(self, data: bytes) -> None:
        head = heads.parse(data, method=self._method, limits=self._limits)
        if head.status >= 200:
            self.head = head
            return
        self._informational_count += 1
        if self._informational_count > self._limits.informational_max:
            raise Failed(FailureCode.TOO_MANY_INFORMATIONAL, "The server sent too many preliminary (1xx) answers.")

    def _take_body(self, data: bytes) -> None:
        assert self.head is not None
        if self.head.framing is Framing.CHUNKED:
            self._take_chunks(data, self.head.message)
        elif self.head.framing is Framing.UNTIL_CLOSE:
            self._append(data)
            self.wire_bytes += len(data)
        else:
            self._take_counted(data, self.head.length - self.wire_bytes)
        if self.wire_bytes > self._wire_bytes_max:
            raise Failed(
                FailureCode.BODY_TOO_LARGE, f"The body is larger than wire_bytes_max, {self._wire_bytes_max:,} bytes."
            )

    def _append(self, data: bytes) -> None:
        """Add to the body; what comes in one piece, as most do, is not copied."""
        if not self.body:
            self.body = data
            return
        if isinstance(self.body, bytes):
            self.body = bytearray(self.body)
        self.body += data

    def _take_counted(self, data: bytes, missing: int) -> None:
        self.extra = len(data) > missing
        self._append(data[:missing] if self.extra else data)
        self.wire_bytes += min(missing, len(data))
        self.complete = len(data) >= missing

    def _take_chunks(self, data: bytes, message: heads.Message) -> None:
        if data:
            message.feed_body(data)
        self.body = message.chunks.body
        self.wire_bytes = len(self.body)
        self.complete = message.chunks.complete
        self.extra = message.chunks.extra

    def _explain_cut_head(self) -> Failed:
        if b"\r\n" in self._head_bytes or self._informational_count:
            return Failed(FailureCode.BODY_TRUNCATED, "The connection closed within the response head.")
        return Failed(FailureCode.EMPTY_RESPONSE, "The connection closed before a status line.")
