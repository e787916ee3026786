"""Who may talk to the API: the Host, Origin and token checks, the request id, and the last resort for our own bugs.

Pure ASGI, so that a response that streams stays a stream. Knows no user but the one who holds the token.
"""

import asyncio
import hmac
import logging
import re
import uuid
from collections.abc import Iterable, Iterator
from email.utils import formatdate

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import (
    CROSS_SITE,
    HOST_NOT_ALLOWED,
    INTERNAL_ERROR,
    OVERLOADED,
    STOPPING,
    UNAUTHORIZED,
    Problem,
    respond,
)

logger = logging.getLogger(__name__)

REQUESTS_MAX = 2_000
"""Requests under way at once, long polls among them, so that what they hold in memory has a bound."""

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
PAGES = frozenset({"/", "/docs", "/redoc"})
"""What a link on another site may lead to."""

OPEN_PATHS = PAGES | {"/healthz", "/readyz", "/openapi.json", "/favicon.ico"}
OPEN_PREFIX = "/static/"

_SANE_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")
_ORIGIN = re.compile(r"(?P<scheme>https?)://(?P<authority>[^/?#@\\\s]+)")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


class Outermost:
    """Names every request, runs at most `requests_max` at once, and answers and logs what nothing else caught.

    It also dates every response: for that, uvicorn would look at the clock ten times a second, at rest too.
    """

    def __init__(self, app: ASGIApp, *, requests_max: int = REQUESTS_MAX) -> None:
        self.app = app
        self.requests_max = requests_max
        self.request_count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request under its id."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                _mark(MutableHeaders(scope=message), request_id, scope["path"])
            await send(message)

        if self.request_count >= self.requests_max:
            await respond(Problem(OVERLOADED), request_id=request_id)(scope, receive, send_marked)
            return
        self.request_count += 1
        try:
            await self.app(scope, receive, send_marked)
        except ClientDisconnect:
            return
        except asyncio.CancelledError:
            # The service stops, and this has outlasted the grace. Not raised again: nothing else runs in this task, and
            # uvicorn would log it as a fault.
            logger.warning("Request %s is left: %s %s", request_id, scope["method"], scope["path"])
            if not started:
                await respond(Problem(STOPPING), request_id=request_id)(scope, receive, send_marked)
        except Exception:
            logger.exception("Request %s failed: %s %s", request_id, scope["method"], scope["path"])
            # A response that has begun cannot be taken back; left unfinished, the server cuts it off.
            if not started:
                await respond(Problem(INTERNAL_ERROR), request_id=request_id)(scope, receive, send_marked)
        finally:
            self.request_count -= 1


class Gate:
    """Refuses what was not meant for this service, comes from another site's page, or lacks the token.

    `host` is the address listened on, `allowed_hosts` the names the operator gave; loopback names are answered always.
    """

    def __init__(self, app: ASGIApp, *, host: str, allowed_hosts: Iterable[str], api_token: str | None) -> None:
        self.app = app
        self.named_hosts = frozenset(_hosts(allowed_hosts)) - LOOPBACK_HOSTS
        self.hosts = LOOPBACK_HOSTS | self.named_hosts | frozenset(_hosts([host]))
        self.token = api_token.encode() if api_token is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it with a problem."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        problem = self._refuse_host(headers) or self._refuse_site(scope, headers) or self._refuse_token(scope, headers)
        if problem is None:
            await self.app(scope, receive, send)
        else:
            await respond(problem, request_id=scope["state"]["request_id"])(scope, receive, send)

    def _refuse_host(self, headers: Headers) -> Problem | None:
        """A page can make its own name resolve to this machine (DNS rebinding): only known names are answered."""
        values = headers.getlist("host")
        if len(values) == 1 and _name(values[0]) in self.hosts:
            return None
        return Problem(HOST_NOT_ALLOWED)

    def _refuse_site(self, scope: Scope, headers: Headers) -> Problem | None:
        for origin in headers.getlist("origin"):
            if not self._is_own(origin, headers["host"]):
                return Problem(CROSS_SITE)
        if headers.get("sec-fetch-site") == "cross-site" and not _is_visit(scope, headers):
            return Problem(CROSS_SITE)
        return None

    def _refuse_token(self, scope: Scope, headers: Headers) -> Problem | None:
        if self.token is None or _is_open(scope["path"]):
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode("latin-1"), self.token):
            return None
        return Problem(UNAUTHORIZED, headers={"WWW-Authenticate": 'Bearer realm="fetchpool"'})

    def _is_own(self, origin: str, host: str) -> bool:
        """The same name and port as the Host, or, behind a proxy that changes the Host, a name the operator gave."""
        match = _ORIGIN.fullmatch(origin)
        if match is None:
            return False
        scheme, authority = match["scheme"], match["authority"]
        return _place(authority, scheme) == _place(host, scheme) or _name(authority) in self.named_hosts


def _request_id(given: str | None) -> str:
    return given if given is not None and _SANE_ID.fullmatch(given) else uuid.uuid4().hex


def _mark(headers: MutableHeaders, request_id: str, path: str) -> None:
    headers["Date"] = formatdate(usegmt=True)
    headers["X-Request-ID"] = request_id
    headers["X-Content-Type-Options"] = "nosniff"
    if not path.startswith(OPEN_PREFIX):
        headers.setdefault("Cache-Control", "no-store")


def _hosts(given: Iterable[str]) -> Iterator[str]:
    """Names and addresses as a Host header has them; a wildcard address is none."""
    for host in given:
        name = f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host
        if (found := _name(name)) is not None and found not in ("0.0.0.0", "[::]"):
            yield found


def _name(host: str) -> str | None:
    match = _HOST.fullmatch(host)
    return match["name"].lower() if match else None


def _place(authority: str, scheme: str) -> tuple[str, str] | None:
    match = _HOST.fullmatch(authority)
    return (match["name"].lower(), match["port"] or _DEFAULT_PORTS[scheme]) if match else None


def _is_visit(scope: Scope, headers: Headers) -> bool:
    return (
        scope["method"] in {"GET", "HEAD"}
        and scope["path"] in PAGES
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
    )


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIX)
