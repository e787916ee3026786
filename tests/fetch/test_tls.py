"""TLS: what is trusted, what is noted, and every cause of failure told apart."""

import asyncio
import inspect
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httptools
import pytest

from app.fetch import tls
from app.fetch.http import FetchRequest, fetch
from app.fetch.tls import VERIFY_CODES, explain, make_context
from app.fetch.transport import Transport
from app.outcome import Failure, FailureCode, Outcome, Response
from tests.fetch.authorities import Authority, make_authority
from tests.fetch.servers import LIMITS, Visit, always, asking, page, redirect, serve, transport_to
from tests.waiting import until

NAMES = {"good.example": ("127.0.0.1",), "other.example": ("127.0.0.1",)}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("authority"))


async def fetch_secure(context: ssl.SSLContext, folder: Path, *, ca_file: Path | None) -> Outcome:
    async with (
        serve(always(page()), context=context) as server,
        transport_to(NAMES, folder=folder, ca_file=ca_file) as transport,
    ):
        return await fetch(asking(server.url(host="good.example")), transport=transport)


async def test_version_and_expiry_are_noted(tmp_path: Path, authority: Authority) -> None:
    response = await fetch_secure(authority.serving("good.example"), tmp_path, ca_file=authority.file)
    assert isinstance(response, Response)
    evidence = response.evidence
    assert evidence.tls_version == "TLSv1.3"
    assert evidence.tls_ms is not None
    assert evidence.connect_ms is not None
    assert evidence.tls_expires_at is not None
    left = datetime.fromisoformat(evidence.tls_expires_at) - datetime.now(UTC)
    assert timedelta(days=29) < left <= timedelta(days=30)


async def test_a_secure_connection_is_used_again(tmp_path: Path, authority: Authority) -> None:
    async with (
        serve(always(page()), context=authority.serving("good.example")) as server,
        transport_to(NAMES, folder=tmp_path, ca_file=authority.file) as transport,
    ):
        for _ in range(2):
            response = await fetch(asking(server.url(host="good.example")), transport=transport)
            assert isinstance(response, Response)
    assert server.visits == 1
    assert (response.evidence.tls_version, response.evidence.tls_ms) == ("TLSv1.3", None)


@contextmanager
def closing_without_farewell(context: ssl.SSLContext, answer: bytes, *, times: int) -> Iterator[int]:
    """A server that answers so many connections, each then closed by a bare FIN; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer_all() -> None:
            for _ in range(times):
                accepted, _ = listening.accept()
                with context.wrap_socket(accepted, server_side=True) as secure:
                    secure.recv(2**16)
                    secure.sendall(answer)

        thread = threading.Thread(target=answer_all, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        thread.join(30)


@pytest.mark.parametrize("framing", [b"Content-Length: 700000\r\n", b""], ids=["length", "until close"])
async def test_a_large_body_comes_whole_though_the_connection_ends_at_once(
    tmp_path: Path, authority: Authority, framing: bytes
) -> None:
    """The end may be noticed while an event loop still has some of what it decrypted."""
    context, body = authority.serving("good.example"), bytes(range(250)) * 2800
    answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + framing + b"\r\n" + body
    async with transport_to(NAMES, folder=tmp_path, ca_file=authority.file) as transport:
        with closing_without_farewell(context, answer, times=20) as port:
            for _ in range(20):
                response = await fetch(asking(f"https://good.example:{port}/"), transport=transport)
                assert isinstance(response, Response)
                assert response.body == body


async def test_an_expired_certificate_is_told(tmp_path: Path, authority: Authority) -> None:
    context = authority.serving("good.example", starts_in_days=-3, ends_in_days=-1)
    outcome = await fetch_secure(context, tmp_path, ca_file=authority.file)
    assert isinstance(outcome, Failure)
    assert (outcome.code, outcome.sent) == (FailureCode.TLS_CERT_EXPIRED, False)


async def test_an_authority_is_trusted_only_by_setting(tmp_path: Path, authority: Authority) -> None:
    outcome = await fetch_secure(authority.serving("good.example"), tmp_path, ca_file=None)
    assert isinstance(outcome, Failure)
    assert outcome.code is FailureCode.TLS_UNTRUSTED


async def test_an_address_in_the_certificate_is_enough(authority: Authority) -> None:
    async with (
        serve(always(page()), context=authority.serving("127.0.0.1")) as server,
        transport_to(ca_file=authority.file) as transport,
    ):
        assert isinstance(await fetch(asking(server.url()), transport=transport), Response)


async def test_plain_http_on_a_secure_port_is_a_failed_handshake() -> None:
    async def script(visit: Visit) -> None:
        visit.send(page(status="400 Bad Request"))
        await visit.hang()

    async with serve(script) as server, transport_to() as transport:
        outcome = await fetch(asking(server.url().replace("http:", "https:")), transport=transport)
    assert isinstance(outcome, Failure)
    assert (outcome.code, outcome.sent) == (FailureCode.TLS_HANDSHAKE_FAILED, False)


async def test_a_reset_in_the_handshake_may_be_tried_again() -> None:
    async def script(visit: Visit) -> None:
        await visit._reader.read(1)
        visit.reset()

    async with serve(script) as server, transport_to() as transport:
        outcome = await fetch(asking(server.url().replace("http:", "https:")), transport=transport)
    assert isinstance(outcome, Failure)
    assert outcome.code is FailureCode.CONNECTION_RESET


async def test_a_server_that_wants_a_certificate_of_ours_fails_the_handshake(
    tmp_path: Path, authority: Authority
) -> None:
    # With TLS 1.3 its refusal only comes after our side of the handshake.
    context = authority.serving("good.example")
    context.load_verify_locations(cafile=authority.file)
    context.verify_mode = ssl.CERT_REQUIRED
    outcome = await fetch_secure(context, tmp_path, ca_file=authority.file)
    assert isinstance(outcome, Failure)
    assert outcome.code in (FailureCode.TLS_HANDSHAKE_FAILED, FailureCode.EMPTY_RESPONSE, FailureCode.CONNECTION_RESET)


async def test_an_unsafe_request_may_follow_its_host_to_https(tmp_path: Path, authority: Authority) -> None:
    async with serve(always(page()), context=authority.serving("good.example")) as secure:
        script = always(redirect(secure.url(host="good.example"), "308 Permanent Redirect"))
        async with (
            serve(script) as plain,
            transport_to(NAMES, folder=tmp_path, ca_file=authority.file) as transport,
        ):
            url = plain.url(host="good.example")
            request = FetchRequest(url=url, method="POST", body=b"content", limits=LIMITS)
            assert isinstance(await fetch(request, transport=transport), Response)
    assert secure.asked[0].body == b"content"


async def test_names_on_one_address_do_not_share_a_secure_connection(tmp_path: Path, authority: Authority) -> None:
    context = authority.serving("good.example", "other.example")
    async with (
        serve(always(page()), context=context) as server,
        transport_to(NAMES, folder=tmp_path, ca_file=authority.file) as transport,
    ):
        for host in NAMES:
            assert isinstance(await fetch(asking(server.url(host=host)), transport=transport), Response)
    assert server.visits == 2


async def test_a_cancelled_handshake_leaves_no_socket(authority: Authority) -> None:
    gone = asyncio.Event()

    async def script(visit: Visit) -> None:
        await visit._reader.read(1)
        fetching.cancel()
        while await visit._reader.read(2**16):
            pass
        gone.set()

    async with serve(script) as server, transport_to(ca_file=authority.file) as transport:
        url = server.url().replace("http:", "https:")
        fetching = asyncio.create_task(fetch(asking(url), transport=transport))
        with pytest.raises(asyncio.CancelledError):
            await fetching
        await asyncio.wait_for(gone.wait(), 1)


@pytest.mark.parametrize("host", ["good.example", "other.example"])
async def test_handshakes_cut_short_leak_nothing(host: str, tmp_path: Path, authority: Authority) -> None:
    # Some end by themselves, since the certificate is for one of the names only.
    async with (
        serve(always(page()), context=authority.serving("good.example")) as server,
        transport_to(NAMES, folder=tmp_path, ca_file=authority.file) as transport,
    ):
        before = open_files()
        loop = asyncio.get_running_loop()
        for _ in range(4):
            tasks = [loop.create_task(fetch(asking(server.url(host=host)), transport=transport)) for _ in range(25)]
            for number, task in enumerate(tasks):
                loop.call_later(0.005 * number, task.cancel)
            await asyncio.wait(tasks)
        transport.close_idle(f"{host}:{server.port}")
        await until(lambda: open_files() <= before)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def resumed(server_context: ssl.SSLContext, transport: Transport, *hosts: str) -> list[bool]:
    """Fetch from each host in turn, each time over a connection of its own; say which resumed a session."""
    seen = []

    async def script(visit: Visit) -> None:
        seen.append(visit.writer.get_extra_info("ssl_object").session_reused)
        await visit.asked()
        visit.send(page(b"hello", "Connection: close"))

    async with serve(script, context=server_context) as server:
        for host in hosts:
            response = await fetch(asking(server.url(host=host)), transport=transport)
            assert isinstance(response, Response)
            assert response.evidence.tls_expires_at is not None
    return seen


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_session_is_resumed_under_its_own_name_only(
    tmp_path: Path, authority: Authority, version: ssl.TLSVersion
) -> None:
    context = authority.serving("good.example", "other.example")
    context.maximum_version = version
    async with transport_to(NAMES, folder=tmp_path, ca_file=authority.file) as transport:
        hosts = ("good.example", "good.example", "other.example", "good.example")
        assert await resumed(context, transport, *hosts) == [False, True, False, True]


async def test_a_session_is_resumed_for_a_while_only(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "SESSION_S", -1.0)
    async with transport_to(NAMES, folder=tmp_path, ca_file=authority.file) as transport:
        assert await resumed(authority.serving("good.example"), transport, *["good.example"] * 2) == [False, False]


async def test_a_handshake_that_fails_with_a_session_is_tried_without(tmp_path: Path, authority: Authority) -> None:
    async with transport_to(NAMES, folder=tmp_path, ca_file=authority.file) as transport:
        context = authority.serving("good.example")
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
        await resumed(context, transport, "good.example")
        visits = 0

        async def refuse_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal visits
            visits += 1
            if visits == 1:
                writer.transport.abort()
                return
            await writer.start_tls(context)
            await reader.readuntil(b"\r\n\r\n")
            writer.write(page(b"hello", "Connection: close"))
            writer.close()

        server = await asyncio.start_server(refuse_first, "127.0.0.1", 0)
        async with server:
            url = f"https://good.example:{server.sockets[0].getsockname()[1]}/"
            assert isinstance(await fetch(asking(url), transport=transport), Response)
    assert visits == 2


async def test_only_so_many_sessions_are_kept(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "SESSIONS_MAX", 1)
    async with transport_to(NAMES, folder=tmp_path, ca_file=authority.file) as transport:
        hosts = ("good.example", "other.example", "good.example")
        context = authority.serving("good.example", "other.example")
        assert await resumed(context, transport, *hosts) == [False, False, False]


def test_the_context_verifies_and_speaks_no_old_version() -> None:
    context = make_context(None)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize("code", [*VERIFY_CODES, 18, 19, 20, 21, 7, 23, 26])
def test_every_verification_error_is_a_tls_failure(code: int) -> None:
    error = ssl.SSLCertVerificationError()
    error.verify_code = code
    assert explain(error).code.startswith("tls_")


def exceptions_of(module: object) -> set[str]:
    found = inspect.getmembers(module, lambda each: inspect.isclass(each) and issubclass(each, Exception))
    return {each.__name__ for _, each in found}


def test_no_library_has_grown_an_error_that_nobody_mapped() -> None:
    assert exceptions_of(httptools) == {
        "HttpParserCallbackError",  # ours: a callback raised
        "HttpParserError",
        "HttpParserInvalidMethodError",
        "HttpParserInvalidStatusError",
        "HttpParserInvalidURLError",
        "HttpParserUpgrade",
    }
    assert all(
        issubclass(each, httptools.HttpParserError) or each is httptools.HttpParserUpgrade
        for each in (getattr(httptools, name) for name in exceptions_of(httptools))
    )
    tls = {name for name in exceptions_of(ssl) if issubclass(getattr(ssl, name, OSError), ssl.SSLError)}
    assert tls - {"SSLError"} == {
        "SSLCertVerificationError",
        "SSLEOFError",
        "SSLSyscallError",
        "SSLWantReadError",
        "SSLWantWriteError",
        "SSLZeroReturnError",
    }
