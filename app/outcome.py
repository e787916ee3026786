"""What one fetch can come to: a response or a failure, and the closed set of failure codes.

Deliberately knows nothing of HTTP libraries, of jobs or of the database: every folder may import it.
"""

from collections.abc import Mapping
from enum import StrEnum

from msgspec import Struct, field


class FailureCode(StrEnum):
    """The closed vocabulary of failures: `MEANINGS` explains them, `RETRYABLE` says which another attempt may cure."""

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
        FailureCode.INTERNAL_ERROR,
    }
)
"""Codes another attempt may cure. `http_status` is judged by its status, see `RETRYABLE_STATUSES`."""

RETRYABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing (RFC 9110, 9.2.1): they are sent again freely."""

MEANINGS: Mapping[FailureCode, str] = {
    FailureCode.INVALID_URL: "The URL cannot be read: control characters, a backslash, too long, no host.",
    FailureCode.SCHEME_NOT_ALLOWED: "Neither http nor https, also by way of a redirect.",
    FailureCode.USERINFO_NOT_ALLOWED: "The URL carries a user name or password.",
    FailureCode.HOST_INVALID: "The host is no canonical name or address.",
    FailureCode.HOST_BLOCKED: "The host is a local or reserved name.",
    FailureCode.PORT_NOT_ALLOWED: "The port is zero, or belongs to another protocol or to infrastructure.",
    FailureCode.METHOD_NOT_ALLOWED: "A method this service does not send.",
    FailureCode.HEADER_NOT_ALLOWED: "A hop-by-hop, framing, Host or metadata header.",
    FailureCode.HEADER_INVALID: "A header with a bad name, a line end, NUL or non-ASCII; or too many of them.",
    FailureCode.ADDRESS_BLOCKED: "The address, any answer to the name, or a redirect leads off the public internet.",
    FailureCode.SELF_REQUEST_BLOCKED: "The URL leads to this service itself.",
    FailureCode.DNS_NOT_FOUND: "The host name does not exist.",
    FailureCode.DNS_NO_ADDRESS: "The host name has no address.",
    FailureCode.DNS_TIMEOUT: "The host name was not resolved in time.",
    FailureCode.DNS_FAILURE: "The name servers failed or refused to answer.",
    FailureCode.CONNECT_REFUSED: "The server refused the connection.",
    FailureCode.CONNECT_TIMEOUT: "TCP or TLS did not stand in time.",
    FailureCode.CONNECT_UNREACHABLE: "There is no route to the server.",
    FailureCode.TLS_CERT_EXPIRED: "The server's certificate has expired.",
    FailureCode.TLS_CERT_NOT_YET_VALID: "The server's certificate is not valid yet.",
    FailureCode.TLS_HOSTNAME_MISMATCH: "The server's certificate is for another name.",
    FailureCode.TLS_UNTRUSTED: "The server's certificate is not signed by a trusted authority.",
    FailureCode.TLS_HANDSHAKE_FAILED: "TLS failed: protocol, cipher, or a server that speaks plain HTTP.",
    FailureCode.FIRST_BYTE_TIMEOUT: "No byte of a response came within the read timeout.",
    FailureCode.READ_TIMEOUT: "The response fell silent.",
    FailureCode.WRITE_TIMEOUT: "The server did not read the request.",
    FailureCode.DEADLINE_EXCEEDED: "The total time of the attempt was used up.",
    FailureCode.EMPTY_RESPONSE: "The connection closed before a status line.",
    FailureCode.CONNECTION_RESET: "The server reset the connection.",
    FailureCode.BODY_TRUNCATED: "Fewer bytes came than announced, or a compressed body was cut.",
    FailureCode.PROTOCOL_ERROR: "The response is not valid HTTP.",
    FailureCode.HEADERS_TOO_LARGE: "The response head or trailer is larger than the limit.",
    FailureCode.TOO_MANY_HEADERS: "The response has more header fields than the limit.",
    FailureCode.TOO_MANY_INFORMATIONAL: "The server sent more preliminary (1xx) answers than the limit.",
    FailureCode.UPGRADE_NOT_SUPPORTED: "The server switched to another protocol (101).",
    FailureCode.BODY_TOO_LARGE: "The body on the wire is larger than the limit.",
    FailureCode.DECOMPRESSED_TOO_LARGE: "The decoded body is larger than the limit.",
    FailureCode.DECODE_ERROR: "The body is not what its Content-Encoding says.",
    FailureCode.CONTENT_ENCODING_NOT_SUPPORTED: "The body has a content coding that was not asked for.",
    FailureCode.TOO_MANY_ENCODINGS: "The body has more content codings than the limit.",
    FailureCode.TOO_MANY_REDIRECTS: "There were more redirects than the limit.",
    FailureCode.REDIRECT_INVALID: "A redirect with a bad Location, or that asks to repeat an unsafe request elsewhere.",
    FailureCode.HTTP_STATUS: "The final status is not one of `accept_statuses`.",
    FailureCode.CANCELLED: "The client cancelled the batch.",
    FailureCode.EXPIRED: "The job's own deadline passed before it finished. Jobs have none yet.",
    FailureCode.LEASE_LOST: "The worker was not heard of any more; the attempt was closed for it.",
    FailureCode.WORKER_CRASHED: "The worker was lost while it had the job, whose request must not be repeated.",
    FailureCode.POISONED: "Three workers were lost while they ran this job, the last one with nothing else to run.",
    FailureCode.SHUTDOWN_INTERRUPTED: "The service stopped while the job ran: put back if it may be repeated.",
    FailureCode.STORAGE_ERROR: "The result could not be stored.",
    FailureCode.INTERNAL_ERROR: "A fault of this service; its log says more.",
}
"""One sentence on each code, for the API's documentation."""


class Hop(Struct, frozen=True, gc=False):
    """One redirect that was followed: the URL that answered, and the status it answered with."""

    url: str
    status: int


class Evidence(Struct, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """How a fetch went, as far as it got. Milliseconds and bytes; `None` where a step was not reached.

    The steps are those of the last hop; `total_ms` covers all of them. A blocked fetch shows no address and no timing.
    Its JSON leaves out what has its default, but not 0 and false, which clients are given as they are stored: hence the
    factories, whose values msgspec does not compare.
    """

    redirects: tuple[Hop, ...] = ()
    remote_address: str | None = None
    http_version: str | None = None
    tls_version: str | None = None
    tls_expires_at: str | None = None
    reused_connection: bool = field(default_factory=bool)
    dns_ms: float | None = None
    connect_ms: float | None = None
    tls_ms: float | None = None
    first_byte_ms: float | None = None
    download_ms: float | None = None
    total_ms: float | None = None
    wire_bytes: int = field(default_factory=int)
    body_bytes: int = field(default_factory=int)


class Response(Struct, frozen=True, gc=False, kw_only=True):
    """A complete response, whatever its status; whether the job succeeded is the job's own rule.

    `headers` keep their order and repetitions, decoded as latin-1; `body` is decoded of its content codings.
    `final_url` is where the redirects ended.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    final_url: str
    evidence: Evidence = Evidence()
    flags: tuple[str, ...] = ()


class Failure(Struct, frozen=True, gc=False, kw_only=True):
    """No usable response: a code, one sentence for the client, and what was seen up to there.

    `sent` says whether any byte of the request may have reached a server: an unsafe method is then not retried.
    `status`, `headers` and `final_url` are those of a response whose head came, as in `Response`.
    """

    code: FailureCode
    detail: str
    sent: bool = False
    status: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    final_url: str | None = None
    evidence: Evidence = Evidence()


Outcome = Response | Failure
