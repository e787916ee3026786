"""What one fetch can come to: a response or a failure, and the closed set of failure codes.

Deliberately knows nothing of HTTP libraries, of jobs or of the database: every folder may import it.
"""

from dataclasses import dataclass, field
from enum import StrEnum


class FailureCode(StrEnum):
    """The closed vocabulary of failures; `RETRYABLE` says which of them another attempt may cure."""

    INVALID_URL = "invalid_url"
    SCHEME_NOT_ALLOWED = "scheme_not_allowed"
    USERINFO_NOT_ALLOWED = "userinfo_not_allowed"
    HOST_INVALID = "host_invalid"
    HOST_BLOCKED = "host_blocked"
    PORT_NOT_ALLOWED = "port_not_allowed"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    HEADER_NOT_ALLOWED = "header_not_allowed"
    HEADER_INVALID = "header_invalid"
    ADDRESS_BLOCKED = "address_blocked"
    SELF_REQUEST_BLOCKED = "self_request_blocked"
    DNS_NOT_FOUND = "dns_not_found"
    DNS_NO_ADDRESS = "dns_no_address"
    DNS_TIMEOUT = "dns_timeout"
    DNS_FAILURE = "dns_failure"
    CONNECT_REFUSED = "connect_refused"
    CONNECT_TIMEOUT = "connect_timeout"
    CONNECT_UNREACHABLE = "connect_unreachable"
    TLS_CERT_EXPIRED = "tls_cert_expired"
    TLS_CERT_NOT_YET_VALID = "tls_cert_not_yet_valid"
    TLS_HOSTNAME_MISMATCH = "tls_hostname_mismatch"
    TLS_UNTRUSTED = "tls_untrusted"
    TLS_HANDSHAKE_FAILED = "tls_handshake_failed"
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    READ_TIMEOUT = "read_timeout"
    WRITE_TIMEOUT = "write_timeout"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    EMPTY_RESPONSE = "empty_response"
    CONNECTION_RESET = "connection_reset"
    BODY_TRUNCATED = "body_truncated"
    PROTOCOL_ERROR = "protocol_error"
    HEADERS_TOO_LARGE = "headers_too_large"
    TOO_MANY_HEADERS = "too_many_headers"
    TOO_MANY_INFORMATIONAL = "too_many_informational"
    UPGRADE_NOT_SUPPORTED = "upgrade_not_supported"
    BODY_TOO_LARGE = "body_too_large"
    DECOMPRESSED_TOO_LARGE = "decompressed_too_large"
    DECODE_ERROR = "decode_error"
    CONTENT_ENCODING_NOT_SUPPORTED = "content_encoding_not_supported"
    TOO_MANY_ENCODINGS = "too_many_encodings"
    TOO_MANY_REDIRECTS = "too_many_redirects"
    REDIRECT_INVALID = "redirect_invalid"
    HTTP_STATUS = "http_status"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    LEASE_LOST = "lease_lost"
    WORKER_CRASHED = "worker_crashed"
    POISONED = "poisoned"
    SHUTDOWN_INTERRUPTED = "shutdown_interrupted"
    STORAGE_ERROR = "storage_error"
    INTERNAL_ERROR = "internal_error"


RETRYABLE = frozenset(
    {
        FailureCode.DNS_TIMEOUT,
        FailureCode.DNS_FAILURE,
        FailureCode.CONNECT_REFUSED,
        FailureCode.CONNECT_TIMEOUT,
        FailureCode.CONNECT_UNREACHABLE,
        FailureCode.FIRST_BYTE_TIMEOUT,
        FailureCode.READ_TIMEOUT,
        FailureCode.WRITE_TIMEOUT,
        FailureCode.DEADLINE_EXCEEDED,
        FailureCode.EMPTY_RESPONSE,
        FailureCode.CONNECTION_RESET,
        FailureCode.BODY_TRUNCATED,
        FailureCode.LEASE_LOST,
        FailureCode.WORKER_CRASHED,
        FailureCode.SHUTDOWN_INTERRUPTED,
        FailureCode.STORAGE_ERROR,
    }
)
"""Codes another attempt may cure. `http_status` is judged by its status, see `RETRYABLE_STATUSES`."""

RETRYABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Hop:
    """One redirect that was followed: the URL that answered, and the status it answered with."""

    url: str
    status: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """How a fetch went, as far as it got. Milliseconds and bytes; `None` where a step was not reached.

    The steps are those of the last hop; `total_ms` covers all of them. A blocked fetch shows no address and no timing.
    """

    redirects: tuple[Hop, ...] = ()
    remote_address: str | None = None
    http_version: str | None = None
    tls_version: str | None = None
    tls_expires_at: str | None = None
    reused_connection: bool = False
    dns_ms: float | None = None
    connect_ms: float | None = None
    tls_ms: float | None = None
    first_byte_ms: float | None = None
    download_ms: float | None = None
    total_ms: float | None = None
    wire_bytes: int = 0
    body_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A complete response, whatever its status; whether the job succeeded is the job's own rule.

    `headers` keep their order and repetitions, decoded as latin-1; `body` is decoded of its content codings.
    `final_url` is where the redirects ended.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    final_url: str
    evidence: Evidence = field(default_factory=Evidence)
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """No usable response: a code, one sentence for the client, and what was seen up to there.

    `sent` says whether any byte of the request may have reached a server: an unsafe method is then not retried.
    """

    code: FailureCode
    detail: str
    sent: bool = False
    evidence: Evidence = field(default_factory=Evidence)


Outcome = Response | Failure
