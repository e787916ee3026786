"""A fetch from outside: redirects, what follows them, the deadline, and the evidence of it all."""

import asyncio
import gzip
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from app.fetch.http import FetchRequest, fetch
from app.fetch.policy import Policy
from app.fetch.transport import Transport
from app.outcome import Evidence, Failure, FailureCode, Hop, Outcome, Response
from tests.fetch.servers import (
    LIMITS,
    Asked,
    Script,
    Server,
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


def ok(outcome: Outcome) -> Response:
    assert isinstance(outcome, Response), outcome
    return outcome


def failed(outcome: Outcome) -> Failure:
    assert isinstance(outcome, Failure), outcome
    return outcome


def routes(pages: dict[str, bytes]) -> Script:
    """Answer by the target of the request; what is not listed is an ordinary page."""

    async def script(visit: Visit) -> None:
        while True:
            visit.send(pages.get((await visit.asked()).target, page()))

    return script


async def fetch_over(pages: dict[str, bytes], **limits: Any) -> tuple[Outcome, Server]:
    async with serve(routes(pages)) as server, transport_to() as transport:
        return await fetch(asking(server.url(), **limits), transport=transport), server


@asynccontextmanager
async def away() -> AsyncIterator[tuple[Server, Transport]]:
    """A server that redirects to another one."""
    async with (
        serve(always(page())) as other,
        serve(always(redirect(other.url()))) as server,
        transport_to() as transport,
    ):
        yield server, transport


# What is sent.


async def sent_for(**changes: object) -> Asked:
    async with serve(always(page())) as server, transport_to() as transport:
        request = structs.replace(asking(server.url("/a%20b?c=d")), **changes)
        ok(await fetch(request, transport=transport))
    assert server.asked[0].headers.pop("host") == f"127.0.0.1:{server.port}"
    return server.asked[0]


async def test_a_plain_request_says_who_asks_and_what_it_can_decode() -> None:
    headers = {"user-agent": "Fetchpool-Test/1", "accept": "*/*", "accept-encoding": "gzip, deflate, br, zstd"}
    assert await sent_for() == Asked("GET", "/a%20b?c=d", headers, b"")


async def test_headers_of_the_caller_replace_ours() -> None:
    asked = await sent_for(headers=(("ACCEPT", "text/html"), ("User-agent", "mine"), ("X-A", "1")))
    assert asked.headers["accept"] == "text/html"
    assert asked.headers["user-agent"] == "mine"
    assert asked.headers["x-a"] == "1"
    assert len(asked.headers) == 4


async def test_a_body_is_sent_with_its_length() -> None:
    asked = await sent_for(method="put", body=b"content")
    assert (asked.method, asked.body, asked.headers["content-length"]) == ("PUT", b"content", "7")


@pytest.mark.parametrize(("method", "length"), [("POST", "0"), ("PATCH", "0"), ("DELETE", None), ("OPTIONS", None)])
async def test_a_method_that_expects_a_body_says_when_there_is_none(method: str, length: str | None) -> None:
    assert (await sent_for(method=method)).headers.get("content-length") == length


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"method": "TRACE"}, "method_not_allowed"),
        ({"headers": (("Host", "x"),)}, "header_not_allowed"),
        ({"headers": (("X-A", "a\r\nb"),)}, "header_invalid"),
        ({"url": "ftp://127.0.0.1/"}, "scheme_not_allowed"),
        ({"url": "http://10.0.0.1/"}, "address_blocked"),
        ({"url": "http://exam ple.com/"}, "invalid_url"),
    ],
)
async def test_what_must_not_be_sent_is_refused_without_a_trace(changes: dict[str, object], code: str) -> None:
    async with transport_to() as transport:
        outcome = failed(await fetch(structs.replace(asking("http://127.0.0.1/"), **changes), transport=transport))
    assert (outcome.code, outcome.sent, outcome.evidence) == (code, False, Evidence())


# What comes back.


async def test_a_response_carries_its_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.fetch.dialling.is_public", lambda address: True)
    answer = page(b"hello", "X-A: 1", "x-a: 2", status="418 Teapot")
    async with serve(always(answer)) as server, transport_to() as transport:
        response = ok(await fetch(asking(server.url("/x#fragment")), transport=transport))
    assert (response.status, response.body, response.final_url) == (418, b"hello", server.url("/x"))
    assert response.headers == (("Content-Length", "5"), ("X-A", "1"), ("x-a", "2"))
    evidence = response.evidence
    assert (evidence.remote_address, evidence.http_version, evidence.tls_version) == ("127.0.0.1", "HTTP/1.1", None)
    assert (evidence.wire_bytes, evidence.body_bytes, evidence.redirects) == (5, 5, ())
    times = (evidence.connect_ms, evidence.first_byte_ms, evidence.download_ms, evidence.total_ms)
    assert all(each is not None and 0 <= each < 5_000 for each in times)
    assert evidence.dns_ms is evidence.tls_ms is None


async def test_an_address_that_is_not_public_is_not_shown() -> None:
    assert ok(await fetch_from(answering(page()))).evidence.remote_address is None


async def test_a_name_is_looked_up_and_the_time_noted(tmp_path: Path) -> None:
    names = {"page.example": ("127.0.0.1",)}
    async with serve(always(page())) as server, transport_to(names, folder=tmp_path) as transport:
        response = ok(await fetch(asking(server.url(host="page.example")), transport=transport))
    assert response.evidence.dns_ms is not None
    assert server.asked[0].headers["host"] == f"page.example:{server.port}"


async def test_bytes_on_the_wire_and_decoded_are_told_apart() -> None:
    wire = gzip.compress(b"x" * 5_000)
    response = ok(await fetch_from(answering(page(wire, "Content-Encoding: gzip"))))
    assert (response.evidence.wire_bytes, response.evidence.body_bytes) == (len(wire), 5_000)
    assert ("Content-Encoding", "gzip") in response.headers


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found"])
async def test_a_head_request_has_no_body_and_nothing_to_decode(status: str) -> None:
    head = f"HTTP/1.1 {status}\r\nContent-Length: 999999999\r\nContent-Encoding: gzip\r\n\r\n".encode()
    async with serve(always(head)) as server, transport_to() as transport:
        for _ in range(2):
            assert ok(await fetch(asking(server.url(), method="HEAD"), transport=transport)).body == b""
        assert server.visits == 1


@pytest.mark.parametrize("status", ["200 OK", "204 No Content", "304 Not Modified"])
async def test_no_body_needs_no_decoding(status: str) -> None:
    answer = page(b"", "Content-Encoding: gzip, foo", status=status)
    assert ok(await fetch_from(answering(answer))).body == b""


async def test_preliminary_answers_are_passed_over() -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
    assert ok(await fetch_from(answering(early + page(b"final")))).body == b"final"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"HTTP/1.1 103 Early Hints\r\n\r\n" * 17, "too_many_informational"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "upgrade_not_supported"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "upgrade_not_supported"),
        (page(b"", *("X-A: 1" for _ in range(256))), "too_many_headers"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000, "headers_too_large"),
        (b"HTTP/1.1 099 Odd\r\n\r\n", "protocol_error"),
        (b"HTTP/2.0 200 OK\r\n\r\n", "protocol_error"),
        (b"HTTP/1.1 200 OK\nContent-Length: 0\n\n\r\n\r\n", "protocol_error"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "protocol_error"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\n", "protocol_error"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\n", "protocol_error"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, chunked\r\n\r\n", "protocol_error"),
        (b"", "empty_response"),
        (b"HTTP/1.1 20", "empty_response"),
        (b"HTTP/1.1 200 OK\r\nX-A", "body_truncated"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "body_truncated"),
        (page(b"hello")[:-1], "body_truncated"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", "body_truncated"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: " + b"x" * 99_999,
            "headers_too_large",
        ),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1;" + b"x" * 99_999, "protocol_error"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1;%s\r\nx\r\n" % (b"x" * 999) * 99,
            "protocol_error",
        ),
    ],
)
async def test_a_broken_answer_is_told_by_its_cause(answer: bytes, code: str) -> None:
    outcome = failed(await fetch_from(answering(answer)))
    assert outcome.code == code
    assert outcome.sent


async def test_what_fails_in_the_body_keeps_the_head_and_where_it_is_from() -> None:
    outcome, server = await fetch_over({"/": redirect("/x"), "/x": page(b"hello", "Content-Encoding: gzip")})
    failure = failed(outcome)
    assert (failure.code, failure.status, failure.final_url) == (FailureCode.DECODE_ERROR, 200, server.url("/x"))
    assert ("Content-Encoding", "gzip") in failure.headers


async def test_a_redirect_is_not_the_head_of_what_failed_after_it() -> None:
    outcome, _ = await fetch_over({"/": redirect("/none"), "/none": b"no HTTP"})
    failure = failed(outcome)
    assert (failure.code, failure.status, failure.headers) == (FailureCode.PROTOCOL_ERROR, None, ())


async def test_spaces_after_a_chunk_size_are_borne() -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n5  \r\nhello\r\n0\r\nX-Trailer: a\r\n\r\n"
    response = ok(await fetch_from(answering(answer)))
    assert response.body == b"hello"
    assert response.headers == (("Transfer-Encoding", "Chunked"),)


async def test_equal_lengths_in_one_field_are_one() -> None:
    assert ok(await fetch_from(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok"))).body == b"ok"


async def test_chunks_over_the_limit_are_cut_off() -> None:
    async def script(visit: Visit) -> None:
        await visit.asked()
        visit.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(100):
            visit.send(b"1000\r\n" + bytes(4096) + b"\r\n")
        await visit.hang()

    outcome = failed(await fetch_from(script, wire_bytes_max=100_000))
    assert outcome.code is FailureCode.BODY_TOO_LARGE
    assert outcome.evidence.wire_bytes < 200_000


# Redirects.


@pytest.mark.parametrize(
    ("status", "method", "followed"),
    [
        *[(status, "GET", "GET") for status in (301, 302, 303, 307, 308)],
        *[(status, "HEAD", "HEAD") for status in (301, 302, 303, 307, 308)],
        *[(status, "POST", "GET") for status in (301, 302, 303)],
        *[(status, "PUT", "PUT") for status in (301, 302)],
        *[(status, "POST", "POST") for status in (307, 308)],
        (303, "DELETE", "GET"),
        (307, "DELETE", "DELETE"),
    ],
)
async def test_a_redirect_keeps_or_changes_the_method(status: int, method: str, followed: str) -> None:
    async with serve(routes({"/": redirect("/next", f"{status} Moved")})) as server, transport_to() as transport:
        headers = (("Content-Type", "a/b"), ("Content-Language", "en"), ("X-A", "1"))
        body = b"content" if method in ("POST", "PUT") else None
        request = FetchRequest(url=server.url(), method=method, headers=headers, body=body, limits=LIMITS)
        response = ok(await fetch(request, transport=transport))
    assert (response.final_url, response.evidence.redirects) == (server.url("/next"), (Hop(server.url(), status),))
    last = server.asked[1]
    kept = method == followed
    assert (last.method, last.target) == (followed, "/next")
    assert last.body == (body or b"" if kept else b"")
    assert ("content-type" in last.headers, "content-language" in last.headers) == (kept, kept)
    assert last.headers["x-a"] == "1"


@pytest.mark.parametrize(("status", "method"), [(307, "POST"), (308, "PATCH"), (302, "PUT"), (307, "DELETE")])
async def test_an_unsafe_request_is_not_replayed_to_another_host(status: int, method: str) -> None:
    async with serve(always(page())) as other:
        script = always(redirect(other.url(), f"{status} Moved"))
        async with serve(script) as server, transport_to() as transport:
            request = FetchRequest(url=server.url(), method=method, body=b"secret", limits=LIMITS)
            outcome = failed(await fetch(request, transport=transport))
    assert (outcome.code, outcome.sent, other.visits) == (FailureCode.REDIRECT_INVALID, True, 0)


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("next", "/a/next"),
        ("?q=1", "/a/b?q=1"),
        ("../up/./x", "/up/x"),
        ("//127.0.0.1:{port}/other#fragment", "/other"),
        ("http://127.0.0.1:{port}", "/"),
        ("/caf\u00e9", "/caf%C3%A9"),
    ],
)
async def test_a_location_may_be_relative(location: str, target: str) -> None:
    async with transport_to() as transport:

        async def script(visit: Visit) -> None:
            while True:
                first = (await visit.asked()).target == "/a/b"
                field = location.replace("{port}", str(server.port)).encode()
                visit.send(
                    b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + field + b"\r\n\r\n" if first else page()
                )

        async with serve(script) as server:
            response = ok(await fetch(asking(server.url("/a/b")), transport=transport))
    assert response.final_url == server.url(target)
    assert server.visits == 1


async def test_a_location_that_is_no_utf_8_is_followed_byte_for_byte() -> None:
    outcome, server = await fetch_over({"/": redirect("/caf\xe9")})
    assert ok(outcome).final_url == server.url("/caf%E9")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        (["Location: "], "redirect_invalid"),
        (["Location: /a", "Location: /b"], "redirect_invalid"),
        (["Location: /a b"], "invalid_url"),
        (["Location: \\\\127.0.0.1\\"], "invalid_url"),
        (["Location: http://u:p@127.0.0.1/"], "userinfo_not_allowed"),
        (["Location: http://[::1/"], "invalid_url"),
        (["Location: file:///etc/passwd"], "scheme_not_allowed"),
        (["Location: javascript:alert(1)"], "scheme_not_allowed"),
    ],
)
async def test_a_bad_location_is_refused(fields: list[str], code: str) -> None:
    outcome = failed(await fetch_from(answering(page(b"", *fields, status="302 Found"))))
    assert (outcome.code, outcome.sent) == (code, True)


@pytest.mark.parametrize("status", ["300 Choices", "304 Not Modified", "305 Proxy", "201 Created"])
async def test_a_location_without_a_redirect_means_nothing(status: str) -> None:
    response = ok(await fetch_from(answering(page(b"", "Location: /x", status=status))))
    assert response.status == int(status[:3])


async def test_a_redirect_stands_when_none_is_to_be_followed() -> None:
    answer = page(b"over there", "Location: /x", status="301 Moved")
    async with serve(always(answer)) as server, transport_to() as transport:
        request = structs.replace(asking(server.url()), follow_redirects=False)
        response = ok(await fetch(request, transport=transport))
    assert (response.status, response.body) == (301, b"over there")


def chain(length: int) -> dict[str, bytes]:
    return {"/" + "x" * number: redirect("/" + "x" * (number + 1)) for number in range(length)}


async def test_ten_redirects_are_followed_and_eleven_are_not() -> None:
    outcome, _ = await fetch_over(chain(10))
    assert len(ok(outcome).evidence.redirects) == 10
    outcome, server = await fetch_over(chain(11))
    assert failed(outcome).code is FailureCode.TOO_MANY_REDIRECTS
    assert len(server.asked) == 11


async def test_a_loop_ends() -> None:
    outcome, _ = await fetch_over({"/": redirect("/2"), "/2": redirect("/")})
    assert failed(outcome).code is FailureCode.TOO_MANY_REDIRECTS


async def test_no_redirect_is_followed_with_a_limit_of_none() -> None:
    outcome, _ = await fetch_over(chain(1), redirects_max=0)
    assert failed(outcome).code is FailureCode.TOO_MANY_REDIRECTS


async def test_a_redirect_into_a_blocked_network_is_never_connected_to() -> None:
    policy = Policy(allow_networks=(ip_network("127.0.0.1/32"),))
    async with serve(always(page())) as canary:
        location = canary.url(host="127.0.0.2")
        async with serve(always(redirect(location))) as server, transport_to(policy=policy) as transport:
            outcome = failed(await fetch(asking(server.url()), transport=transport))
    assert outcome.code is FailureCode.ADDRESS_BLOCKED
    assert outcome.evidence == Evidence(redirects=(Hop(server.url(), 302),))
    assert canary.visits == 0
    assert "127.0.0.2" not in outcome.detail


async def test_a_name_that_moves_to_a_blocked_address_is_blocked(tmp_path: Path) -> None:
    names = {"both.example": ("127.0.0.1", "10.0.0.1")}
    async with serve(always(page())) as server, transport_to(names, folder=tmp_path) as transport:
        outcome = failed(await fetch(asking(server.url(host="both.example")), transport=transport))
    assert (outcome.code, server.visits, outcome.evidence) == (FailureCode.ADDRESS_BLOCKED, 0, Evidence())


async def test_credentials_do_not_come_back_with_the_origin() -> None:
    # There, to another origin, and back again.
    async def script(visit: Visit) -> None:
        while True:
            first = (await visit.asked()).target == "/"
            visit.send(redirect(other.url()) if first else page())

    async with (
        serve(script) as server,
        serve(always(redirect(server.url("/back")))) as other,
        transport_to() as transport,
    ):
        headers = (("Authorization", "CANARY"), ("X-Api-Key", "CANARY"), ("Accept-Language", "en"))
        ok(await fetch(asking(server.url(), headers=headers), transport=transport))
    assert "CANARY" in str(server.asked[0])
    assert "CANARY" not in str([other.asked[0], server.asked[1]])
    assert server.asked[1].headers["accept-language"] == "en"


async def test_cookies_are_never_kept() -> None:
    pages = {"/": page(b"", "Set-Cookie: a=b", "Location: /next", status="302 Found")}
    async with serve(routes(pages)) as server, transport_to() as transport:
        for _ in range(2):
            ok(await fetch(asking(server.url()), transport=transport))
    assert not [asked for asked in server.asked if "cookie" in asked.headers]


async def test_a_slow_redirect_body_is_not_waited_for() -> None:
    async def script(visit: Visit) -> None:
        if (await visit.asked()).target == "/":
            visit.send(b"HTTP/1.1 302 Found\r\nLocation: /next\r\nContent-Length: 100\r\n\r\nnever more")
            await visit.hang()
        visit.send(page())

    response = ok(await fetch_from(script, timeout_s=2.0))
    assert response.evidence.redirects[0].status == 302


async def test_a_short_redirect_body_keeps_the_connection() -> None:
    outcome, server = await fetch_over({"/": page(b"moved", "Location: /next", status="302 Found")})
    assert ok(outcome).evidence.reused_connection
    assert server.visits == 1


# Changing places.


async def test_a_move_is_asked_for_only_where_the_host_changes() -> None:
    moves: list[tuple[str, int]] = []
    async with serve(always(page())) as other:
        pages = {"/": redirect("/same"), "/same": redirect(other.url())}

        async def move(host: str) -> None:
            moves.append((host, other.visits))

        async with serve(routes(pages)) as server, transport_to() as transport:
            ok(await fetch(asking(server.url()), transport=transport, move=move))
        assert moves == [(f"127.0.0.1:{other.port}", 0)]


async def test_no_place_is_taken_for_a_redirect_that_is_refused() -> None:
    async def move(host: str) -> None:
        raise AssertionError(host)

    async with serve(always(redirect("http://10.0.0.1/"))) as server, transport_to() as transport:
        outcome = failed(await fetch(asking(server.url()), transport=transport, move=move))
    assert outcome.code is FailureCode.ADDRESS_BLOCKED


async def test_the_deadline_covers_waiting_for_a_place() -> None:
    async def move(host: str) -> None:
        await asyncio.Event().wait()

    async with away() as (server, transport):
        outcome = failed(await fetch(asking(server.url(), timeout_s=0.2), transport=transport, move=move))
    assert outcome.code is FailureCode.DEADLINE_EXCEEDED
    assert len(outcome.evidence.redirects) == 1


async def test_it_is_told_when_the_first_connection_stands_and_no_later() -> None:
    told: list[tuple[int, int]] = []
    async with serve(always(page())) as other:

        async def script(visit: Visit) -> None:
            await visit.asked()
            told_before.append(len(told))
            visit.send(redirect(other.url()))

        told_before: list[int] = []
        async with serve(script) as server, transport_to() as transport:
            on_connection = lambda: told.append((server.visits, other.visits))  # noqa: E731
            ok(await fetch(asking(server.url()), transport=transport, on_connection=on_connection))
            assert (told_before, len(told)) == ([1], 1)
            ok(await fetch(asking(other.url()), transport=transport, on_connection=on_connection))
        assert (len(told), other.visits) == (2, 1)  # a kept one counts as well


# The deadline, cancelling, and our own faults.


async def test_the_deadline_covers_connecting() -> None:
    async def script(visit: Visit) -> None:
        await visit.hang()

    async with serve(script) as server, transport_to() as transport:
        url = server.url().replace("http:", "https:")
        outcome = failed(await fetch(asking(url, timeout_s=0.1, connect_timeout_s=5.0), transport=transport))
    assert (outcome.code, outcome.sent) == (FailureCode.DEADLINE_EXCEEDED, False)


async def test_a_timeout_that_is_not_the_deadline_is_not_taken_for_it() -> None:
    async def move(host: str) -> None:
        raise TimeoutError

    async with away() as (server, transport):
        outcome = failed(await fetch(asking(server.url()), transport=transport, move=move))
    assert outcome.code is FailureCode.INTERNAL_ERROR


async def test_a_fault_of_ours_is_logged_once_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    async def move(host: str) -> None:
        raise ValueError("SECRET")

    async with away() as (server, transport):
        with caplog.at_level(logging.ERROR):
            outcome = failed(await fetch(asking(server.url()), transport=transport, move=move))
    assert outcome.code is FailureCode.INTERNAL_ERROR
    (logged,) = [record for record in caplog.records if record.name == "app.fetch.http"]
    assert logged.exc_info is not None
    assert str(logged.args[0]) in outcome.detail  # type: ignore[index]
    assert "SECRET" not in outcome.detail


async def test_cancelling_passes_through() -> None:
    async def script(visit: Visit) -> None:
        await visit.hang()

    async with serve(script) as server, transport_to() as transport:
        fetching = asyncio.create_task(fetch(asking(server.url()), transport=transport))
        await asyncio.sleep(0)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching


async def test_a_refused_connection_sent_nothing() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        async with transport_to() as transport:
            url = f"http://127.0.0.1:{bound.getsockname()[1]}/"
            outcome = failed(await fetch(asking(url, method="POST"), transport=transport))
    assert (outcome.code, outcome.sent) == (FailureCode.CONNECT_REFUSED, False)
