"""Every row of hostile.csv that a fetch alone can meet, against a server that answers byte for byte as the row says.

Times and sizes are scaled down; what the row expects is read from the file.
"""

import asyncio
import csv
import gzip
import re
import socket
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import brotli
import pytest

from app.fetch.http import FetchRequest, fetch
from app.fetch.policy import Policy
from app.outcome import RETRYABLE, RETRYABLE_STATUSES, Failure, FailureCode, Outcome, Response
from tests.fetch.authorities import Authority, make_authority
from tests.fetch.servers import (
    LIMITS,
    Script,
    Visit,
    always,
    answering,
    asking,
    fetch_from,
    page,
    redirect,
    serve,
    transport_to,
)

FILE = Path(__file__).parents[3] / "shared" / "cases" / "hostile.csv"

ELSEWHERE = {
    "deadline_over_dns": "tests/fetch/test_resolver.py",
    "dns_servfail": "tests/fetch/test_resolver.py",
    "dns_nodata": "tests/fetch/test_resolver.py",
    "dns_saturation": "tests/fetch/test_resolver.py",
    "dns_10000_answers": "tests/fetch/test_resolver.py",
    "h2_rst_stream": "HTTP/1.1 is all we offer and speak: test_only_http_1_1_is_offered",
    "h2_goaway": "likewise",
    "h2_settings_flood": "likewise",
    "h2_header_bomb": "likewise",
    "429_retry_after": "a retry: tests/worker",
    "hot_host": "the pool: tests/worker",
    "flapping_host": "the pool: tests/worker",
    "body_html_script": "how a body is served: tests/api",
}
"""Rows that are not about one fetch over HTTP/1.1, and where they are met."""

MIB = 2**20
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
SECRETS = (
    ("Authorization", "Bearer CANARY"),
    ("Cookie", "a=CANARY"),
    ("X-Api-Key", "CANARY"),
    ("Referer", "https://example.com/CANARY"),
)

Scenario = Callable[["Ground"], Awaitable[Outcome]]
SCENARIOS: dict[str, Scenario] = {}


class Ground:
    """What a scenario may need besides a server: a folder for files and a certificate authority."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        self.folder = folder
        self.authority = authority


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


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("authority"))


@pytest.mark.skipif(not FILE.exists(), reason="../shared/cases/hostile.csv is not there")
def test_every_row_is_met_here_or_elsewhere() -> None:
    assert rows().keys() == SCENARIOS.keys() | ELSEWHERE.keys()
    assert not SCENARIOS.keys() & ELSEWHERE.keys()


def matches(outcome: Outcome, expected: str) -> None:
    """Compare an outcome to the choices that a row leaves."""
    came_to = outcome.code if isinstance(outcome, Failure) else f"status={outcome.status}"
    if f"; or {came_to}" in expected:
        return
    verdict = re.match(r"(succeeded|failed (?P<code>\w+))", expected)
    status = re.search(r"status=\d+", expected)
    assert verdict is not None
    if isinstance(outcome, Failure):
        assert came_to == verdict["code"], outcome
        assert ("retry=yes" in expected) is (outcome.code in RETRYABLE)
    else:
        assert verdict["code"] in (None, FailureCode.HTTP_STATUS), outcome
        assert status is None or came_to == status[0]
        assert ("retry=yes" in expected) is (outcome.status in RETRYABLE_STATUSES)


def answers(name: str, *parts: bytes, **limits: float) -> None:
    """Register a row that one answer and the outcome alone decide."""

    async def scenario(ground: Ground) -> Outcome:
        return await fetch_from(answering(b"".join(parts)), **limits)

    row(name)(scenario)


# Time.


@row("total_drip_body")
async def total_drip_body(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        await visit.asked()
        visit.send(OK, b"\r\n")
        await visit.drip(b"x" * 10_000, every_s=0.02)

    started_at = time.monotonic()
    outcome = await fetch_from(script, deadline_s=0.3, read_timeout_s=0.2)
    assert time.monotonic() - started_at < 0.8
    assert outcome.evidence.wire_bytes > 1
    return outcome


@row("total_drip_status")
async def total_drip_status(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        await visit.asked()
        await visit.drip(OK * 1000, every_s=0.02)

    return await fetch_from(script, deadline_s=0.2, read_timeout_s=0.15)


@row("total_drip_chunks")
async def total_drip_chunks(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        await visit.asked()
        visit.send(CHUNKED)
        for _ in range(1000):
            visit.send(b"1\r\nx\r\n")
            await asyncio.sleep(0.02)

    return await fetch_from(script, deadline_s=0.3, read_timeout_s=0.2)


@row("hang_before_response")
async def hang_before_response(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        await visit.asked()
        await visit.hang()

    return await fetch_from(script, read_timeout_s=0.1)


@row("hang_mid_body")
async def hang_mid_body(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        await visit.asked()
        visit.send(page(b"x" * 10)[:-5])
        await visit.hang()

    outcome = await fetch_from(script, read_timeout_s=0.1)
    assert outcome.evidence.wire_bytes == 5
    return outcome


@row("hang_tls")
async def hang_tls(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        await visit.hang()

    async with serve(script) as server, transport_to() as transport:
        url = server.url().replace("http:", "https:")
        return await fetch(asking(url, connect_timeout_s=0.2), transport=transport)


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
        async with transport_to() as transport:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
            return await fetch(asking(url, connect_timeout_s=0.2), transport=transport)


@row("deadline_over_redirects")
async def deadline_over_redirects(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        while True:
            asked = await visit.asked()
            await asyncio.sleep(0.16)
            visit.send(redirect(f"{asked.target}x"))

    started_at = time.monotonic()
    outcome = await fetch_from(script, "/", deadline_s=0.5, read_timeout_s=0.2)
    assert time.monotonic() - started_at < 1.0
    assert 0 < len(outcome.evidence.redirects) < 5
    return outcome


@row("slow_close")
async def slow_close(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        await visit.asked()
        visit.send(page(b"all of it", "Connection: close"))
        await visit.hang()

    return await fetch_from(script, deadline_s=2.0)


# Size.


@row("cl_over_limit")
async def cl_over_limit(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        await visit.asked()
        visit.send(OK, b"Content-Length: 10737418240\r\n\r\n")
        await visit.hang()

    outcome = await fetch_from(script)
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
        outcome = await fetch_from(answering(answer), wire_bytes_max=1000, body_bytes_max=1000)
        assert isinstance(outcome, Response)
        assert len(outcome.body) == 1000
    return outcome


def gzip_bomb(bytes_count: int = 64 * MIB) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    return b"".join(packer.compress(bytes(MIB)) for _ in range(bytes_count // MIB)) + packer.flush()


def bomb_of(coding: str) -> bytes:
    match coding:
        case "gzip":
            return gzip_bomb()
        case "br":
            return brotli.compress(bytes(64 * MIB), quality=5)
        case "deflate":
            return zlib.compress(bytes(64 * MIB), 9)
        case _:
            return gzip.compress(gzip_bomb())


def bomb(name: str, coding: str, *, status: str = "200 OK") -> None:
    async def scenario(ground: Ground) -> Outcome:
        body = await asyncio.to_thread(bomb_of, coding)
        script = answering(page(body, f"Content-Encoding: {coding}", status=status))
        async with serve(script) as server, transport_to() as transport:
            request = asking(server.url(), wire_bytes_max=16 * MIB, body_bytes_max=16 * MIB)
            before_bytes = peak_memory_bytes(reset=True)
            async with stalls() as worst:
                outcome = await fetch(request, transport=transport)
        assert worst() < 0.1
        assert peak_memory_bytes() - before_bytes < 36 * MIB
        return outcome

    row(name)(scenario)


def peak_memory_bytes(*, reset: bool = False) -> int:
    """Read the largest resident size of this process, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@asynccontextmanager
async def stalls() -> AsyncIterator[Callable[[], float]]:
    """Measure the longest time the event loop was held, as processor time: a busy machine holds it for others."""
    worst_s = 0.0

    async def watch() -> None:
        nonlocal worst_s
        while True:
            slept_at = time.thread_time()
            await asyncio.sleep(0)
            worst_s = max(worst_s, time.thread_time() - slept_at)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    yield lambda: worst_s
    watching.cancel()
    await asyncio.wait([watching])


bomb("bomb_gzip", "gzip")
bomb("bomb_br", "br")
bomb("bomb_deflate", "deflate")
bomb("bomb_double_gzip", "gzip, gzip")
bomb("bomb_on_error", "gzip", status="500 Internal Server Error")

answers("encodings_x50", page(b"x", "Content-Encoding: " + ", ".join(["gzip"] * 50)))


@row("bomb_on_redirect")
async def bomb_on_redirect(ground: Ground) -> Outcome:
    bombs = gzip_bomb()

    async def script(visit: Visit) -> None:
        while True:
            if (await visit.asked()).target == "/":
                visit.send(page(bombs, "Content-Encoding: gzip", "Location: /next", status="302 Found"))
            else:
                visit.send(page())

    return await fetch_from(script)


# Content codings.


@row("gzip_multi_member")
async def gzip_multi_member(ground: Ground) -> Outcome:
    body = gzip.compress(b"first ") + gzip.compress(b"second")
    outcome = await fetch_from(answering(page(body, "Content-Encoding: gzip")))
    assert isinstance(outcome, Response)
    assert outcome.body == b"first second"
    return outcome


answers("gzip_truncated", page(gzip.compress(b"x" * 1000)[:-9], "Content-Encoding: gzip"))
answers("gzip_garbage", page(b"this is plain text", "Content-Encoding: gzip"))


@row("gzip_trailing_junk")
async def gzip_trailing_junk(ground: Ground) -> Outcome:
    outcome = await fetch_from(answering(page(gzip.compress(b"hello") + b"junk", "Content-Encoding: gzip")))
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
    outcome = await fetch_from(answering(page(b"x", "X-A: \xe9\xff")))
    assert isinstance(outcome, Response)
    assert ("X-A", "\xe9\xff") in outcome.headers
    return outcome


answers("http09", b"<html>hello</html>")
answers("status_99999", b"HTTP/1.1 99999 Odd\r\nContent-Length: 0\r\n\r\n")
answers("cl_conflict", OK, b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx")
answers("cl_same_twice", OK, b"Content-Length: 1\r\ncontent-length: 1\r\n\r\nx")


async def once_each_way(answer: bytes, body: bytes, **limits: float) -> Outcome:
    """Fetch twice from a server that spoils its connection, and see that it was not used again."""
    async with serve(always(answer)) as server, transport_to() as transport:
        for _ in range(2):
            outcome = await fetch(asking(server.url(), **limits), transport=transport)
            assert isinstance(outcome, Response), outcome
            assert outcome.body == body
        assert server.visits == 2
    return outcome


@row("cl_too_short")
async def cl_too_short(ground: Ground) -> Outcome:
    return await once_each_way(OK + b"Content-Length: 2\r\n\r\n0123456789", b"01")


@row("te_and_cl")
async def te_and_cl(ground: Ground) -> Outcome:
    head = OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
    return await once_each_way(head + b"5\r\nhello\r\n0\r\n\r\n", b"hello")


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

    return await fetch_from(script)


@row("204_with_body")
async def no_content_with_body(ground: Ground) -> Outcome:
    return await once_each_way(page(b"body", status="204 No Content"), b"")


@row("304_with_body")
async def not_modified_with_body(ground: Ground) -> Outcome:
    return await once_each_way(page(b"body", status="304 Not Modified"), b"")


answers("404", page(b"no such page", status="404 Not Found"))

# Redirects.

answers("redirect_no_location", page(b"", status="302 Found"))


@row("redirect_cross_origin_creds")
async def redirect_cross_origin_creds(ground: Ground) -> Outcome:
    async with serve(always(page())) as other:
        async with serve(always(redirect(other.url("/there")))) as first, transport_to() as transport:
            outcome = await fetch(asking(first.url(), headers=(*SECRETS, ("Accept", "a/b"))), transport=transport)
        assert "CANARY" in str(first.asked)
        assert "CANARY" not in str(other.asked)
        assert other.asked[0].headers["accept"] == "a/b"
    return outcome


@row("redirect_https_to_http")
async def redirect_https_to_http(ground: Ground) -> Outcome:
    authority = ground.authority
    async with serve(always(page())) as plain:
        location = plain.url("/there", host="good.example")
        async with (
            serve(always(redirect(location)), context=authority.serving("good.example")) as secure,
            transport_to({"good.example": ("127.0.0.1",)}, folder=ground.folder, ca_file=authority.file) as transport,
        ):
            url = secure.url(host="good.example")
            outcome = await fetch(asking(url, headers=SECRETS), transport=transport)
        assert "CANARY" in str(secure.asked)
        assert "CANARY" not in str(plain.asked)
    return outcome


@row("redirect_303_post")
async def redirect_303_post(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        while True:
            method = (await visit.asked()).method
            visit.send(redirect("/done", "303 See Other") if method == "POST" else page())

    async with serve(script) as server, transport_to() as transport:
        request = FetchRequest(
            url=server.url(), method="POST", headers=(("Content-Type", "text/x"),), body=b"secret", limits=LIMITS
        )
        outcome = await fetch(request, transport=transport)
    sent, followed = server.asked
    assert sent.body == b"secret"
    assert (followed.method, followed.target, followed.body) == ("GET", "/done", b"")
    assert not [name for name in followed.headers if name.startswith("content-")]
    return outcome


# TLS.


def tls(name: str, *, host: str = "good.example", certificate: Callable[[Authority], ssl.SSLContext]) -> None:
    async def scenario(ground: Ground) -> Outcome:
        names = {"good.example": ("127.0.0.1",)}
        async with (
            serve(always(page()), context=certificate(ground.authority)) as server,
            transport_to(names, folder=ground.folder, ca_file=ground.authority.file) as transport,
        ):
            outcome = await fetch(asking(server.url(host=host)), transport=transport)
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
    context = ground.authority.serving("good.example")
    context.sni_callback = lambda session, name, original: named.append(name)
    async with (
        serve(always(page()), context=context) as server,
        transport_to(
            {"good.example": ("127.0.0.3",)}, folder=ground.folder, ca_file=ground.authority.file
        ) as transport,
    ):
        outcome = await fetch(asking(server.url(host="good.example")), transport=transport)
    assert named == ["good.example"]
    assert outcome.evidence.tls_version == "TLSv1.3"
    return outcome


# Connections.


@row("refused")
async def refused(ground: Ground) -> Outcome:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        async with transport_to() as transport:
            return await fetch(asking(f"http://127.0.0.1:{bound.getsockname()[1]}/"), transport=transport)


@row("unreachable")
async def unreachable(ground: Ground) -> Outcome:
    # A link-local address without a zone: there is no route to it anywhere.
    policy = Policy(allow_networks=(ip_network("127.0.0.0/8"), ip_network("fe80::/10")))
    names = {"both.example": ("fe80::1", "127.0.0.1"), "none.example": ("fe80::1",)}
    async with serve(always(page())) as server, transport_to(names, folder=ground.folder, policy=policy) as transport:
        fallen_back = await fetch(asking(server.url(host="both.example")), transport=transport)
        assert isinstance(fallen_back, Response)
        return await fetch(asking(server.url(host="none.example")), transport=transport)


@row("rst_on_accept")
async def rst_on_accept(ground: Ground) -> Outcome:
    async def script(visit: Visit) -> None:
        visit.reset()

    return await fetch_from(script)


@row("auth_conn_reuse")
async def auth_conn_reuse(ground: Ground) -> Outcome:
    async with serve(always(page())) as server, transport_to() as transport:
        for name in ("one", "two", "one"):
            headers = (("Authorization", f"NTLM {name}"),)
            outcome = await fetch(asking(server.url(), headers=headers), transport=transport)
            assert isinstance(outcome, Response)
        assert outcome.evidence.reused_connection
        assert server.visits == 2
    return outcome


@row("cancel_pool_leak")
async def cancel_pool_leak(ground: Ground) -> Outcome:
    async with serve(always(page(b"x" * 10_000))) as server, transport_to() as transport:
        open_count = len(list(Path("/proc/self/fd").iterdir()))
        for start in range(0, 1000, 50):
            tasks = [asyncio.create_task(fetch(asking(server.url()), transport=transport)) for _ in range(50)]
            for number, task in enumerate(tasks):
                asyncio.get_running_loop().call_later(0.0004 * (number + start % 7), task.cancel)
            await asyncio.wait(tasks)
        outcome = await fetch(asking(server.url()), transport=transport)
        transport.close_idle(f"127.0.0.1:{server.port}")
        await until(lambda: len(list(Path("/proc/self/fd").iterdir())) <= open_count)
    return outcome


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not happened():
            await asyncio.sleep(0.01)


# Bodies.


@row("charset_codec")
async def charset_codec(ground: Ground) -> Outcome:
    for charset in ("zlib", "idna", "rot13", "unicode_escape"):
        outcome = await fetch_from(answering(page(b"\xff\x00", f"Content-Type: text/html; charset={charset}")))
        assert isinstance(outcome, Response)
        assert outcome.body == b"\xff\x00"
    return outcome


@row("body_binary_nul")
async def body_binary_nul(ground: Ground) -> Outcome:
    outcome = await fetch_from(answering(page(bytes(range(256)))))
    assert isinstance(outcome, Response)
    assert outcome.body == bytes(range(256))
    return outcome


@row("content_type_injection")
async def content_type_injection(ground: Ground) -> Outcome:
    return await fetch_from(answering(page(b"x", "Content-Type: " + "x" * 5_000)))


@pytest.mark.skipif(not FILE.exists(), reason="../shared/cases/hostile.csv is not there")
@pytest.mark.parametrize("name", sorted(SCENARIOS))
async def test_a_hostile_server_gets_the_outcome_expected(name: str, tmp_path: Path, authority: Authority) -> None:
    outcome = await SCENARIOS[name](Ground(tmp_path, authority))
    matches(outcome, rows()[name])


# What the rows leave open.


@pytest.mark.parametrize("script", [answering(b"SSH-2.0-OpenSSH\r\n"), answering(b"\x00\x00\x12\x04" + bytes(30))])
async def test_what_is_not_http_1_is_told_at_once(script: Script) -> None:
    outcome = await fetch_from(script)
    assert isinstance(outcome, Failure)
    assert outcome.code is FailureCode.PROTOCOL_ERROR


async def test_only_http_1_1_is_offered(tmp_path: Path, authority: Authority) -> None:
    context = authority.serving("good.example")
    context.set_alpn_protocols(["h2", "http/1.1"])
    chosen: list[str | None] = []

    async def script(visit: Visit) -> None:
        chosen.append(visit.writer.get_extra_info("ssl_object").selected_alpn_protocol())
        await always(page())(visit)

    names = {"good.example": ("127.0.0.1",)}
    async with (
        serve(script, context=context) as server,
        transport_to(names, folder=tmp_path, ca_file=authority.file) as transport,
    ):
        outcome = await fetch(asking(server.url(host="good.example")), transport=transport)
    assert isinstance(outcome, Response)
    assert chosen == ["http/1.1"]


async def test_fifty_bombs_at_once_stay_within_four_times_20_mib() -> None:
    codings = ("gzip", "br", "deflate", "gzip, gzip")
    bombs = {coding: await asyncio.to_thread(bomb_of, coding) for coding in codings}

    async def script(visit: Visit) -> None:
        coding = codings[int((await visit.asked()).target[1:]) % 4]
        visit.send(page(bombs[coding], f"Content-Encoding: {coding}"))

    async with serve(script) as server, transport_to(decoders=2) as transport:
        limits = replace(LIMITS, wire_bytes_max=16 * MIB, body_bytes_max=16 * MIB)
        requests = [FetchRequest(url=server.url(f"/{number}"), limits=limits) for number in range(50)]
        before_bytes = peak_memory_bytes(reset=True)
        async with stalls() as worst:
            outcomes = await asyncio.gather(*(fetch(request, transport=transport) for request in requests))
    assert worst() < 0.1
    assert peak_memory_bytes() - before_bytes < 80 * MIB
    assert {outcome.code for outcome in outcomes if isinstance(outcome, Failure)} == {
        FailureCode.DECOMPRESSED_TOO_LARGE
    }
