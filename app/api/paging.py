"""Opaque cursors and the links between the pages of a list."""

import base64
import binascii
from collections.abc import Mapping
from urllib.parse import urlencode
from uuid import UUID

from app.api.problems import invalid_cursor

CURSOR_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
POSITION_MAX = 2**31 - 1


def batch_cursor(batch_id: UUID) -> str:
    """Name the last batch of a page."""
    return _encode(b"b" + batch_id.bytes)


def read_batch_cursor(cursor: str | None) -> UUID | None:
    """Return the batch after which a page begins; raises the problem `invalid_cursor`."""
    if cursor is None:
        return None
    kind, value = _decode(cursor)
    if kind != b"b" or len(value) != 16:
        raise invalid_cursor()
    return UUID(bytes=value)


def job_cursor(position: int) -> str:
    """Name the last position of a page."""
    return _encode(b"j" + position.to_bytes(4, "big"))


def read_job_cursor(cursor: str | None) -> int:
    """Return the position after which a page begins, -1 for the first; raises the problem `invalid_cursor`."""
    if cursor is None:
        return -1
    kind, value = _decode(cursor)
    position = int.from_bytes(value, "big")
    if kind != b"j" or len(value) != 4 or position > POSITION_MAX:
        raise invalid_cursor()
    return position


def next_link(path: str, parameters: Mapping[str, object], cursor: str | None) -> dict[str, str]:
    """Make the Link header to the next page, with the same filters; nothing at the end of the list."""
    if cursor is None:
        return {}
    query = urlencode({**{name: str(value) for name, value in parameters.items()}, "cursor": cursor})
    return {"Link": f'<{path}?{query}>; rel="next"'}


def _encode(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def _decode(cursor: str) -> tuple[bytes, bytes]:
    try:
        value = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
    except (ValueError, binascii.Error):
        raise invalid_cursor() from None
    return value[:1], value[1:]
