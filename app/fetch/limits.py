"""What one fetch may use, and the failure raised when a server oversteps it or breaks off.

Deliberately without behaviour: every file of this folder may import it.
"""

from dataclasses import dataclass

from app.outcome import FailureCode


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds of one fetch; seconds, bytes and counts.

    `timeout_s` bounds the whole of it, from resolving to decoding, and `redirects_max` its hops; all others begin anew
    with each hop.
    """

    timeout_s: float
    connect_timeout_s: float
    read_timeout_s: float
    wire_bytes_max: int
    body_bytes_max: int
    header_bytes_max: int
    header_count_max: int
    redirects_max: int
    informational_max: int
    encodings_max: int


class Failed(Exception):
    """What the web did wrong: a code and one sentence for the client. Never leaves `app.fetch.http.fetch`."""

    def __init__(self, code: FailureCode, detail: str) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail
