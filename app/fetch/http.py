"""One fetch, as a staircase: `fetch` makes an outcome of it, with one deadline over following redirects hop by hop.

Knows nothing of jobs, retries or which statuses are wanted: a complete response is a `Response` whatever it says.
Never keeps cookies.
"""

import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import lru_cache
from urllib.parse import quote

from msgspec import Struct, structs

from app.fetch.decoding import ACCEPT_ENCODING, codings, decode
from app.fetch.limits import Failed, Limits
from app.fetch.policy import Policy, Refused, Target, check_headers, check_method, check_url, follow
from app.fetch.trace import Trace
from app.fetch.transport import Answer, RawFields, Request, Transport
from app.outcome import SAFE_METHODS, Evidence, Failure, FailureCode, Hop, Outcome, Response

REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
SKIM_BYTES_MAX = 64 * 2**10
SKIM_S = 0.25
"""How much of a redirect's own body is read, and for how long, so that its connection may be kept."""

HEADERS_ACROSS_ORIGINS = frozenset(
    {"accept", "accept-encoding", "accept-language", "user-agent", "cache-control", "pragma"}
)
"""Caller headers that another origin may see. All others may be credentials."""
METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})

BLOCKED = frozenset(
    {
        FailureCode.INVALID_URL,
        FailureCode.SCHEME_NOT_ALLOWED,
        FailureCode.USERINFO_NOT_ALLOWED,
        FailureCode.HOST_INVALID,
        FailureCode.HOST_BLOCKED,
        FailureCode.PORT_NOT_ALLOWED,
        FailureCode.METHOD_NOT_ALLOWED,
        FailureCode.HEADER_NOT_ALLOWED,
        FailureCode.HEADER_INVALID,
        FailureCode.ADDRESS_BLOCKED,
        FailureCode.SELF_REQUEST_BLOCKED,
    }
)
"""Codes after which neither an address nor a timing is told: both would map the network behind this service."""

Move = Callable[[str], Awaitable[None]]
OnConnection = Callable[[], None]
Headers = tuple[tuple[str, str], ...]

logger = logging.getLogger(__name__)


class FetchRequest(Struct, frozen=True, gc=False, kw_only=True):
    """What to fetch and within which bounds."""

    url: str
    method: str = "GET"
    headers: Headers = ()
    body: bytes | None = None
    follow_redirects: bool = True
    limits: Limits


class Step(Struct, frozen=True, gc=False):
    """One request of a chain: where to, and what of the caller's request goes there."""

    target: Target
    method: str
    headers: Headers
    body: bytes | None


async def fetch(
    request: FetchRequest,
    *,
    transport: Transport,
    move: Move | None = None,
    on_connection: OnConnection | None = None,
) -> Outcome:
    """Fetch one URL and say what came of it; raises nothing but `CancelledError`.

    `move(host)` is awaited before a redirect is followed to another politeness key; the deadline covers it.
    `on_connection()` is called once a connection to the URL's own host stands.
    """
    trace = Trace(time.monotonic(), on_connection)
    try:
        with transport.deadlines.within(request.limits.timeout_s):  # DNS to body and decoding
            return await _follow_redirects(request, transport, move, trace=trace)
    except (Failed, Refused) as stop:
        return _failure(stop.code, stop.detail, trace)
    except Exception:
        error_id = uuid.uuid4().hex
        logger.exception("internal error %s in a fetch", error_id)
        return _failure(FailureCode.INTERNAL_ERROR, f"An error of this service; its log has it as {error_id}.", trace)


async def _follow_redirects(
    request: FetchRequest, transport: Transport, move: Move | None, *, trace: Trace
) -> Response:
    """Take hop after hop until an answer stands as it is."""
    hops_max = request.limits.redirects_max
    step = _first_step(request, transport.policy)
    while True:
        answer = await _send(step, request.limits, transport, trace=trace)
        try:
            location = _location(answer) if request.follow_redirects else None
            if location is None:
                return await _receive(step, answer, request.limits, transport=transport, trace=trace)
            await answer.body.skim(bytes_max=SKIM_BYTES_MAX, within_s=SKIM_S)
        finally:
            answer.body.close()
        if len(trace.redirects) >= hops_max:
            raise Failed(FailureCode.TOO_MANY_REDIRECTS, f"There were more redirects than redirects_max, {hops_max}.")
        trace.next_hop(Hop(step.target.url, answer.status_code))
        before, step = step, _next_step(step, answer.status_code, follow(step.target, location, transport.policy))
        if move is not None and step.target.host != before.target.host:
            await move(step.target.host)


async def _send(step: Step, limits: Limits, transport: Transport, *, trace: Trace) -> Answer:
    """Send one request and wait for the head of its answer."""
    trace.url = step.target.url
    fields = _fields(step, transport.user_agent)
    request = Request(step.method, step.target, fields=fields, content=step.body or b"", limits=limits, trace=trace)
    return await transport.handle_async_request(request)


async def _receive(step: Step, answer: Answer, limits: Limits, *, transport: Transport, trace: Trace) -> Response:
    """Read and decode the body of the final answer."""
    body, headers = answer.body, answer.fields
    applied = codings(_values(headers, "content-encoding"), encodings_max=limits.encodings_max) if body.expected else ()
    decoded = await decode(
        await body.read(), applied, body_bytes_max=limits.body_bytes_max, decoders=transport.decoders
    )
    trace.body_bytes = len(decoded.body)
    return Response(
        status=answer.status_code,
        headers=headers,
        body=decoded.body,
        final_url=step.target.url,
        evidence=trace.evidence(now=time.monotonic()),
        flags=decoded.flags,
    )


def _first_step(request: FetchRequest, policy: Policy) -> Step:
    method = check_method(request.method)
    if request.headers:
        check_headers(request.headers)
    return Step(check_url(request.url, policy), method, request.headers, request.body)


def _location(answer: Answer) -> str | None:
    """Say where an answer redirects to, `None` if nowhere. Raise `Failed` when it names several places or none."""
    if answer.status_code not in REDIRECT_STATUSES:
        return None
    values = _values(answer.fields, "location")
    if not values:
        return None
    if len(values) > 1 or not values[0]:
        raise Failed(FailureCode.REDIRECT_INVALID, "The redirect has an empty Location, or more than one.")
    return _text(values[0].encode("latin-1"))


def _text(location: bytes) -> str:
    """Read a Location as browsers do: UTF-8, or else its bytes as they are."""
    try:
        return location.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(chr(byte) if byte < 0x80 else quote(bytes((byte,))) for byte in location)


def _next_step(step: Step, status: int, target: Target) -> Step:
    """Decide what of a request follows a redirect (Fetch standard, HTTP-redirect fetch; RFC 9110, 15.4)."""
    method, headers, body = step.method, step.headers, step.body
    if _becomes_get(method, status):
        method, body = "GET", None
        headers = tuple((name, value) for name, value in headers if not name.lower().startswith("content-"))
    elif method not in SAFE_METHODS and not _may_replay(step.target, target):
        raise Failed(FailureCode.REDIRECT_INVALID, f"The redirect asks to send the {method} to another host.")
    if _origin(target) != _origin(step.target):
        headers = tuple((name, value) for name, value in headers if _may_cross(name, body))
    return Step(target, method, headers, body)


def _becomes_get(method: str, status: int) -> bool:
    if status == 303:
        return method not in ("GET", "HEAD")
    return status in (301, 302) and method == "POST"


def _may_replay(before: Target, after: Target) -> bool:
    """Whether an unsafe request may be sent again: to the same origin, or to its https."""
    return _origin(before) == _origin(after) or (before.hostname == after.hostname and after.scheme == "https")


def _may_cross(name: str, body: bytes | None) -> bool:
    lowered = name.lower()
    return lowered in HEADERS_ACROSS_ORIGINS or (body is not None and lowered == "content-type")


def _origin(target: Target) -> tuple[str, str, int]:
    return target.scheme, target.hostname, target.port


def _fields(step: Step, user_agent: str) -> RawFields:
    """Add our own headers where the caller has none, and the length of the body."""
    has_body = step.body is not None or step.method in METHODS_WITH_BODY
    if not step.headers and not has_body:
        return _defaults(user_agent)  # a tuple, which is kept as written; a client's are a list, and never kept
    fields = [(name.encode("ascii"), value.encode("ascii")) for name, value in step.headers]
    named = {name.lower() for name, _ in fields}
    fields = [field for field in _defaults(user_agent) if field[0].lower() not in named] + fields
    if has_body:
        fields.append((b"Content-Length", b"%d" % len(step.body or b"")))
    return fields


@lru_cache(maxsize=8)
def _defaults(user_agent: str) -> RawFields:
    return (
        (b"User-Agent", user_agent.encode("ascii")),
        (b"Accept", b"*/*"),
        (b"Accept-Encoding", ACCEPT_ENCODING.encode("ascii")),
    )


def _values(headers: Headers, wanted: str) -> list[str]:
    size = len(wanted)
    return [value for name, value in headers if len(name) == size and name.lower() == wanted]


def _failure(code: FailureCode, detail: str, trace: Trace) -> Failure:
    if code in BLOCKED:
        return Failure(code=code, detail=detail, sent=trace.sent, evidence=Evidence(redirects=tuple(trace.redirects)))
    failure = Failure(code=code, detail=detail, sent=trace.sent, evidence=trace.evidence(now=time.monotonic()))
    if (head := trace.head) is None:
        return failure
    return structs.replace(failure, status=head.status, headers=head.fields, final_url=trace.url)
