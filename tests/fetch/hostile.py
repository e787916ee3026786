"""Every row of hostile.csv that a fetch can meet, as a scenario: a server that answers byte for byte as the row says.

A scenario fetches through the ground it is given: the transport alone (`tests/fetch`) or the whole service
(`tests/test_safety.py`). Times and sizes are scaled down.
"""

import asyncio
import csv
import gzip
import re
import socket
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import brotli

from app.outcome import RETRYABLE, RETRYABLE_STATUSES, Failure, FailureCode, Outcome, Response
from tests.fetch.authorities import Authority
from tests.fetch.servers import Script, Visit, always, answering, page, redirect, serve

FILE = Path(__file__).parents[1] / "cases" / "hostile.csv"

MIB = 2**20
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
SECRETS = (
    ("Authorization", "Bearer CANARY"),
    ("Cookie", "a=CANARY"),
    ("X-Api-Key", "CANARY"),
    ("Referer", "https://example.com/CANARY"),
)

NAMES: dict[str, tuple[str, ...]] = {
    "good.example": ("127.0.0.1",),
    "pinned.example": ("127.0.0.3",),
    # A link-local address without a zone: there is no route to it anywhere.
    "both.example": ("fe80::1", "127.0.0.1"),
    "none.example": ("fe80::1",),
}
"""What names the scenarios use; a ground knows them."""

OPEN_NETWORKS = ("127.0.0.0/8", "fe80::/10")
"""What networks a ground lets fetches reach."""

BODY_BYTES_MAX = 16 * MIB
"""The cap on bodies where a scenario sets none."""


@dataclass(frozen=True, kw_only=True)
class Ground:
    """Where a scenario takes place. Times are `pace` times as long as written, for grounds that are slower."""

    authority: Authority
    pace: float = 1.0
    keeps_connections: bool = True

    async def fetch(
        self,
        url: str,
        *,
        method: str = "GET",
        headers: tuple[tuple[str, str], ...] = (),
        body: bytes | None = None,
        **limits: Any,
    ) -> Outcome:
        """Fetch one URL with limits that are wide but for those given."""
        raise NotImplementedError

    async def fetch_from(self, script: Script, path: str = "/", **limits: Any) -> Outcome:
        """Fetch one page from a server that runs the script."""
        async with serve(script) as server:
            return await self.fetch(server.url(path), **limits)

    @asynccontextmanager
    async def frugal(self) -> AsyncIterator[None]:
        """See that what is done here takes neither much memory nor the event loop for long."""
        yield


Scenario = Callable[[Ground], Awaitable[Outcome]]
SCENARIOS: dict[str, Scenario] = {}


def row(name: str) -> Callable[[Scenario], Scenario]:
    def register(scenario: Scenario) -> Scenario:
        assert name not in SCENARIOS
        SCENARIOS[name] = scenario
        return scenario

    return register


def rows() -> dict[str, str]:
    if not FILE.exists():
        return {}
    with FILE.open(newline="") as lines:
        return {line["name"]: line["expected outcome"] for line in csv.DictReader(lines)}


def is_retryable(outcome: Outcome) -> bool:
    return outcome.code in RETRYABLE if isinstance(outcome, Failure) else outcome.status in RETRYABLE_STATUSES


def mismatch(outcome: Outcome, expected: str) -> str | None:
    """Compare an outcome to the choices that a row leaves; say what is wrong with it."""
    came_to = outcome.code if isinstance(outcome, Failure) else f"status={outcome.status}"
    if f"; or {came_to}" in expected:
        return None
    verdict = re.match(r"(succeeded|failed (?P<code>\w+))", expected)
    status = re.search(r"status=\d+", expected)
    assert verdict is not None
    if isinstance(outcome, Failure):
        is_right = came_to == verdict["code"]
    else:
        is_right = verdict["code"] in (None, FailureCode.HTTP_STATUS) and (status is None or came_to == status[0])
    is_right = is_right and ("retry=yes" in expected) is is_retryable(outcome)
    return None if is_right else f"{came_to}, not {expected}"


def answers(name: str, *parts: bytes, **limits: Any) -> None:
    """Register a row that one answer and the outcome alone decide."""

    async def scenario(ground: Ground) -> Outcome:
        return await ground.fetch_from(answering(b"".join(parts)), **limits)

    row(name)(scenario)


# Time.


@row("total_drip_body")
async def total_drip_body(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        await visit.asked()
        visit.send(OK, b"\r\n")
        await visit.drip(b"x" * 10_000, every_s=0.02)

    outcome = await ground.fetch_from(script, timeout_s=0.3, read_timeout_s=0.2)
    assert outcome.evidence.wire_bytes > 1
    return outcome


@row("total_drip_status")
async def total_drip_status(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        await visit.asked()
        await visit.drip(OK * 1000, every_s=0.02)

    return await ground.fetch_from(script, timeout_s=0.2, read_timeout_s=0.15)


@row("total_drip_chunks")
async def total_drip_chunks(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        await visit.asked()
        visit.send(CHUNKED)
        for _ in range(1000):
            visit.send(b"1\r\nx\r\n")
            await asyncio.sleep(0.02)

    return await ground.fetch_from(script, timeout_s=0.3, read_timeout_s=0.2)


@row("hang_before_response")
async def hang_before_response(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        await visit.asked()
        await visit.hang()

    return await ground.fetch_from(script, read_timeout_s=0.1)


@row("hang_mid_body")
async def hang_mid_body(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        await visit.asked()
        visit.send(page(b"x" * 10)[:-5])
        await visit.hang()

    outcome = await ground.fetch_from(script, read_timeout_s=0.1)
    assert outcome.evidence.wire_bytes == 5
    return outcome


@row("hang_tls")
async def hang_tls(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        await visit.hang()

    async with serve(script) as server:
        return await ground.fetch(server.url().replace("http:", "https:"), connect_timeout_s=0.2)


@row("connect_blackhole")
async def connect_blackhole(ground: Ground) -> Outcome:
    with ExitStack() as stack:
        # A full accept queue drops every further SYN, as a firewall would.
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listening.getsockname())
        return await ground.fetch(f"http://127.0.0.1:{listening.getsockname()[1]}/", connect_timeout_s=0.2)


@row("deadline_over_redirects")
async def deadline_over_redirects(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        while True:
            asked = await visit.asked()
            await asyncio.sleep(0.16 * ground.pace)
            visit.send(redirect(f"{asked.target}x"))

    outcome = await ground.fetch_from(script, "/", timeout_s=0.5, read_timeout_s=0.3)
    assert 0 < len(outcome.evidence.redirects) < 5
    return outcome


@row("slow_close")
async def slow_close(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        await visit.asked()
        visit.send(page(b"all of it", "Connection: close"))
        await visit.hang()

    return await ground.fetch_from(script, timeout_s=2.0)


# Size.


@row("cl_over_limit")
async def cl_over_limit(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        await visit.asked()
        visit.send(OK, b"Content-Length: 10737418240\r\n\r\n")
        await visit.hang()

    outcome = await ground.fetch_from(script)
    assert outcome.evidence.wire_bytes == 0
    return outcome


answers("no_cl_over_limit", OK, b"\r\n", b"x" * 1001, wire_bytes_max=1000)


@row("exactly_limit")
async def exactly_limit(ground: Ground) -> Outcome:
    for answer in (
        page(b"x" * 1000),
        OK + b"\r\n" + b"x" * 1000,
        CHUNKED + b"3e8\r\n" + b"x" * 1000 + b"\r\n0\r\n\r\n",
    ):
        outcome = await ground.fetch_from(answering(answer), wire_bytes_max=1000, body_bytes_max=1000)
        assert isinstance(outcome, Response)
        assert len(outcome.body) == 1000
    return outcome


def gzip_bomb(bytes_count: int = 64 * MIB) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    return b"".join(packer.compress(bytes(MIB)) for _ in range(bytes_count // MIB)) + packer.flush()


@cache
def bomb_of(coding: str) -> bytes:
    match coding:
        case "gzip":
            return gzip_bomb()
        case "br":
            return bytes(brotli.compress(bytes(64 * MIB), quality=5))
        case "deflate":
            return zlib.compress(bytes(64 * MIB), 9)
        case _:
            return gzip.compress(gzip_bomb())


def bomb(name: str, coding: str, *, status: str = "200 OK") -> None:
    async def scenario(ground: Ground) -> Outcome:
        body = await asyncio.to_thread(bomb_of, coding)
        async with serve(always(page(body, f"Content-Encoding: {coding}", status=status))) as server, ground.frugal():
            return await ground.fetch(server.url(), wire_bytes_max=BODY_BYTES_MAX, body_bytes_max=BODY_BYTES_MAX)

    row(name)(scenario)


bomb("bomb_gzip", "gzip")
bomb("bomb_br", "br")
bomb("bomb_deflate", "deflate")
bomb("bomb_double_gzip", "gzip, gzip")
bomb("bomb_on_error", "gzip", status="500 Internal Server Error")

answers("encodings_x50", page(b"x", "Content-Encoding: " + ", ".join(["gzip"] * 50)))


@row("bomb_on_redirect")
async def bomb_on_redirect(ground: Ground) -> Outcome:
    bombs = await asyncio.to_thread(bomb_of, "gzip")

    async def script(visit: Visit) -> None:
        while True:
            if (await visit.asked()).target == "/":
                visit.send(page(bombs, "Content-Encoding: gzip", "Location: /next", status="302 Found"))
            else:
                visit.send(page())

    return await ground.fetch_from(script)


# Content codings.


@row("gzip_multi_member")
async def gzip_multi_member(ground: Ground) -> Outcome:
    body = gzip.compress(b"first ") + gzip.compress(b"second")
    outcome = await ground.fetch_from(answering(page(body, "Content-Encoding: gzip")))
    assert isinstance(outcome, Response)
    assert outcome.body == b"first second"
    return outcome


answers("gzip_truncated", page(gzip.compress(b"x" * 1000)[:-9], "Content-Encoding: gzip"))
answers("gzip_garbage", page(b"this is plain text", "Content-Encoding: gzip"))


@row("gzip_trailing_junk")
async def gzip_trailing_junk(ground: Ground) -> Outcome:
    outcome = await ground.fetch_from(answering(page(gzip.compress(b"hello") + b"junk", "Content-Encoding: gzip")))
    assert isinstance(outcome, Response)
    assert outcome.body == b"hello"
    assert outcome.flags == ("body_trailing_junk",)
    return outcome


answers("enc_unknown", page(b"x", "Content-Encoding: foo"))

# Heads and framing.

answers("hdr_200k", page(b"x", "X-Long: " + "x" * 200_000))
answers("hdr_60k", page(b"x", "X-Long: " + "x" * 60_000))
answers("trailer_nul", CHUNKED, b"1\r\nx\r\n0\r\nX-A: a\0b\r\n\r\n")
answers("chunk_ext_200k", CHUNKED, b"1;a=", b"x" * 200_000, b"\r\nx\r\n0\r\n\r\n")
answers("hdr_bare_cr", page(b"x", "X-A: a\rb"))
answers("hdr_no_colon", page(b"x", "X-A"))
answers("hdr_space_before_colon", page(b"x", "X-A : a"))
answers("hdr_first_space", OK, b" X-A: a\r\nContent-Length: 1\r\n\r\nx")


@row("hdr_latin1")
async def hdr_latin1(ground: Ground) -> Outcome:
    outcome = await ground.fetch_from(answering(page(b"x", "X-A: \xe9\xff")))
    assert isinstance(outcome, Response)
    assert ("X-A", "\xe9\xff") in outcome.headers
    return outcome


answers("http09", b"<html>hello</html>")
answers("status_99999", b"HTTP/1.1 99999 Odd\r\nContent-Length: 0\r\n\r\n")
answers("cl_conflict", OK, b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx")
answers("cl_same_twice", OK, b"Content-Length: 1\r\ncontent-length: 1\r\n\r\nx")


async def twice_anew(ground: Ground, answer: bytes, body: bytes) -> Outcome:
    """Fetch twice from a server that spoils its connection, and see that it was not used again."""
    async with serve(always(answer)) as server:
        for _ in range(2):
            outcome = await ground.fetch(server.url())
            assert isinstance(outcome, Response), outcome
            assert outcome.body == body
        assert server.visits == 2
    return outcome


@row("cl_too_short")
async def cl_too_short(ground: Ground) -> Outcome:
    return await twice_anew(ground, OK + b"Content-Length: 2\r\n\r\n0123456789", b"01")


@row("te_and_cl")
async def te_and_cl(ground: Ground) -> Outcome:
    head = OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
    return await twice_anew(ground, head + b"5\r\nhello\r\n0\r\n\r\n", b"hello")


answers("te_gzip_chunked", OK, b"Transfer-Encoding: gzip, chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n")
answers("chunk_overflow", CHUNKED, b"fffffffffffffffffffff\r\nx\r\n0\r\n\r\n")
answers("chunk_bad_footer", CHUNKED, b"1\r\nxXX0\r\n\r\n")


@row("rst_mid_body")
async def rst_mid_body(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        await visit.asked()
        visit.send(page(b"x" * 10)[:-5])
        await asyncio.sleep(0.05)
        visit.reset()

    return await ground.fetch_from(script)


@row("204_with_body")
async def no_content_with_body(ground: Ground) -> Outcome:
    return await twice_anew(ground, page(b"body", status="204 No Content"), b"")


@row("304_with_body")
async def not_modified_with_body(ground: Ground) -> Outcome:
    return await twice_anew(ground, page(b"body", status="304 Not Modified"), b"")


answers("404", page(b"no such page", status="404 Not Found"))

# Redirects.

answers("redirect_no_location", page(b"", status="302 Found"))


@row("redirect_cross_origin_creds")
async def redirect_cross_origin_creds(ground: Ground) -> Outcome:
    async with serve(always(page())) as other:
        async with serve(always(redirect(other.url("/there")))) as first:
            outcome = await ground.fetch(first.url(), headers=(*SECRETS, ("Accept", "a/b")))
        assert "CANARY" in str(first.asked)
        assert "CANARY" not in str(other.asked)
        assert other.asked[0].headers["accept"] == "a/b"
    return outcome


@row("redirect_https_to_http")
async def redirect_https_to_http(ground: Ground) -> Outcome:
    async with serve(always(page())) as plain:
        location = plain.url("/there", host="good.example")
        async with serve(always(redirect(location)), context=ground.authority.serving("good.example")) as secure:
            outcome = await ground.fetch(secure.url(host="good.example"), headers=SECRETS)
        assert "CANARY" in str(secure.asked)
        assert "CANARY" not in str(plain.asked)
    return outcome


@row("redirect_303_post")
async def redirect_303_post(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        while True:
            method = (await visit.asked()).method
            visit.send(redirect("/done", "303 See Other") if method == "POST" else page())

    async with serve(script) as server:
        headers = (("Content-Type", "text/x"),)
        outcome = await ground.fetch(server.url(), method="POST", headers=headers, body=b"secret")
    sent, followed = server.asked
    assert sent.body == b"secret"
    assert (followed.method, followed.target, followed.body) == ("GET", "/done", b"")
    assert not [name for name in followed.headers if name.startswith("content-")]
    return outcome


# TLS.


def tls(name: str, *, host: str = "good.example", certificate: Callable[[Authority], ssl.SSLContext]) -> None:
    async def scenario(ground: Ground) -> Outcome:
        context = await asyncio.to_thread(certificate, ground.authority)  # 10,000 names take long, and others wait
        async with serve(always(page()), context=context) as server:
            outcome = await ground.fetch(server.url(host=host))
            assert isinstance(outcome, Response) or not server.asked
            return outcome

    row(name)(scenario)


tls("tls_not_yet", certificate=lambda authority: authority.serving("good.example", starts_in_days=1))
tls("tls_wrong_host", certificate=lambda authority: authority.serving("other.example"))
tls("tls_self_signed", certificate=lambda authority: authority.serving_self_signed("good.example"))
tls("tls_untrusted_root", certificate=lambda authority: authority.stranger().serving("good.example"))
tls("tls_1_0_only", certificate=lambda authority: authority.serving_tls_1_0("good.example"))
tls("tls_ip_san", host="127.0.0.1", certificate=lambda authority: authority.serving("good.example"))
tls("tls_10000_sans", certificate=lambda authority: authority.serving_many("good.example", count=10_000))


@row("tls_pinned_sni")
async def tls_pinned_sni(ground: Ground) -> Outcome:
    named: list[str | None] = []
    context = ground.authority.serving("pinned.example")
    context.sni_callback = lambda session, name, original: named.append(name)
    async with serve(always(page()), context=context) as server:
        outcome = await ground.fetch(server.url(host="pinned.example"))
    assert named == ["pinned.example"]
    assert outcome.evidence.tls_version == "TLSv1.3"
    return outcome


# Connections.


@row("refused")
async def refused(ground: Ground) -> Outcome:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return await ground.fetch(f"http://127.0.0.1:{bound.getsockname()[1]}/")


@row("unreachable")
async def unreachable(ground: Ground) -> Outcome:
    async with serve(always(page())) as server:
        fallen_back = await ground.fetch(server.url(host="both.example"))
        assert isinstance(fallen_back, Response)
        return await ground.fetch(server.url(host="none.example"))


@row("rst_on_accept")
async def rst_on_accept(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        visit.reset()

    return await ground.fetch_from(script)


@row("auth_conn_reuse")
async def auth_conn_reuse(ground: Ground) -> Outcome:
    async with serve(always(page())) as server:
        for name in ("one", "two", "one"):
            outcome = await ground.fetch(server.url(), headers=(("Authorization", f"NTLM {name}"),))
            assert isinstance(outcome, Response)
        assert server.visits >= 2
        if ground.keeps_connections:
            assert outcome.evidence.reused_connection
            assert server.visits == 2
    return outcome


# Bodies.


@row("charset_codec")
async def charset_codec(ground: Ground) -> Outcome:
    for charset in ("zlib", "idna", "rot13", "unicode_escape"):
        outcome = await ground.fetch_from(answering(page(b"\xff\x00", f"Content-Type: text/html; charset={charset}")))
        assert isinstance(outcome, Response)
        assert outcome.body == b"\xff\x00"
    return outcome


@row("body_binary_nul")
async def body_binary_nul(ground: Ground) -> Outcome:
    outcome = await ground.fetch_from(answering(page(bytes(range(256)))))
    assert isinstance(outcome, Response)
    assert outcome.body == bytes(range(256))
    return outcome


@row("content_type_injection")
async def content_type_injection(ground: Ground) -> Outcome:
    for content_type in ("text/html\0", "text/html\0; charset=x", "x" * 5_000):
        outcome = await ground.fetch_from(answering(page(b"x", f"Content-Type: {content_type}")))
        assert isinstance(outcome, Response)
        assert "\0" not in str(outcome.headers)
    return outcome
