"""Connections: kept, shared and given up as they should be, and never leaked."""

import asyncio
import gc
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest

from app.fetch.dialling import connect
from app.fetch.exchange import Exchange
from app.fetch.http import FetchRequest, fetch
from app.fetch.policy import check_url
from app.fetch.trace import Trace
from app.fetch.transport import Body, Request, Transport
from app.outcome import Failure, FailureCode, Outcome, Response
from tests.fetch.servers import (
    LIMITS,
    LOOPBACK,
    Script,
    Server,
    Visit,
    always,
    answering,
    asking,
    page,
    redirect,
    serve,
    transport_to,
)
from tests.waiting import until


@asynccontextmanager
async def talking(script: Script, **options: float) -> AsyncIterator[tuple[Server, Transport]]:
    async with serve(script) as server, transport_to(**options) as transport:  # type: ignore[arg-type]
        yield server, transport


def ok(outcome: Outcome) -> Response:
    assert isinstance(outcome, Response), outcome
    return outcome


def open_files() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_connection_is_kept_and_used_again() -> None:
    async with talking(always(page())) as (server, transport):
        first = ok(await fetch(asking(server.url()), transport=transport))
        second = ok(await fetch(asking(server.url()), transport=transport))
    assert server.visits == 1
    assert (first.evidence.reused_connection, second.evidence.reused_connection) == (False, True)
    assert first.evidence.connect_ms is not None
    assert second.evidence.connect_ms is None


@pytest.mark.parametrize(
    "answer",
    [
        page(b"x", "Connection: close"),
        b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx",
        page(b"x") + b"y",
        page(b"x") + page(b"y"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    ],
)
async def test_a_connection_that_ended_unclean_is_not_used_again(answer: bytes) -> None:
    async with talking(always(answer)) as (server, transport):
        for _ in range(2):
            assert ok(await fetch(asking(server.url()), transport=transport)).body == b"x"
        assert server.visits == 2


async def test_an_http_1_0_connection_is_kept_when_the_server_says_so() -> None:
    answer = b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\nConnection: Keep-Alive\r\n\r\nx"
    async with talking(always(answer)) as (server, transport):
        for _ in range(2):
            ok(await fetch(asking(server.url()), transport=transport))
        assert server.visits == 1


async def test_bytes_nobody_asked_for_close_an_idle_connection() -> None:
    spoilt = asyncio.Event()

    async def script(visit: Visit) -> None:
        await visit.asked()
        visit.send(page(b"first"))
        await spoilt.wait()
        visit.send(page(b"smuggled"))
        await visit.hang()

    async with talking(script) as (server, transport):
        ok(await fetch(asking(server.url()), transport=transport))
        kept = transport._idle._by_host[f"127.0.0.1:{server.port}"][0].connection
        spoilt.set()
        await until(lambda: kept.closed)
        assert ok(await fetch(asking(server.url()), transport=transport)).body == b"first"
        assert server.visits == 2


async def once_then_vanish(visit: Visit) -> None:
    """Answer one request, and close when the second comes."""
    await visit.asked()
    visit.send(page())
    await visit.asked()


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_a_safe_request_on_a_stale_connection_is_sent_again(method: str) -> None:
    async with talking(once_then_vanish) as (server, transport):
        ok(await fetch(asking(server.url()), transport=transport))
        response = ok(await fetch(asking(server.url(), method=method), transport=transport))
    assert server.visits == 2
    assert not response.evidence.reused_connection
    assert len(server.asked) == 3


async def test_a_safe_request_is_sent_again_only_once() -> None:
    async def script(visit: Visit) -> None:
        await visit.asked()
        if server.visits == 1:
            visit.send(page())
            await visit.asked()

    async with talking(script) as (server, transport):
        ok(await fetch(asking(server.url()), transport=transport))
        outcome = await fetch(asking(server.url()), transport=transport)
    assert isinstance(outcome, Failure)
    assert outcome.code is FailureCode.EMPTY_RESPONSE
    assert server.visits == 2


async def test_an_unsafe_request_is_never_sent_twice() -> None:
    async with talking(once_then_vanish) as (server, transport):
        ok(await fetch(asking(server.url()), transport=transport))
        outcome = await fetch(asking(server.url(), method="POST"), transport=transport)
    assert isinstance(outcome, Failure)
    assert (outcome.code, outcome.sent) == (FailureCode.EMPTY_RESPONSE, True)
    assert [asked.method for asked in server.asked] == ["GET", "POST"]


async def test_an_unsafe_request_takes_no_connection_that_may_be_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.fetch.idle.UNSAFE_REUSE_S", -1.0)
    async with talking(once_then_vanish) as (server, transport):
        ok(await fetch(asking(server.url()), transport=transport))
        ok(await fetch(asking(server.url(), method="POST"), transport=transport))
    assert server.visits == 2


async def test_a_connection_that_breaks_after_the_first_byte_is_not_tried_again() -> None:
    async def script(visit: Visit) -> None:
        await visit.asked()
        visit.send(page())
        await visit.asked()
        visit.send(b"HTTP/1.1 200 OK\r\n")

    async with talking(script) as (server, transport):
        ok(await fetch(asking(server.url()), transport=transport))
        outcome = await fetch(asking(server.url()), transport=transport)
    assert isinstance(outcome, Failure)
    assert outcome.code is FailureCode.BODY_TRUNCATED
    assert server.visits == 1


async def test_idle_connections_of_a_host_are_closed_on_demand() -> None:
    gone = asyncio.Event()

    async def script(visit: Visit) -> None:
        try:
            await always(page())(visit)
        finally:
            gone.set()

    async with talking(script) as (server, transport):
        ok(await fetch(asking(server.url()), transport=transport))
        transport.close_idle("127.0.0.2")
        assert not gone.is_set()
        transport.close_idle(f"127.0.0.1:{server.port}")
        await asyncio.wait_for(gone.wait(), 5)
        assert transport._idle._by_host == {}
        ok(await fetch(asking(server.url()), transport=transport))
        assert server.visits == 2


async def test_an_idle_connection_is_closed_after_its_time() -> None:
    async with talking(always(page()), idle_s=0.05) as (server, transport):
        ok(await fetch(asking(server.url()), transport=transport))
        assert transport._idle.count == 1
        await until(lambda: transport._idle.count == 0)
        assert transport._idle._by_host == {}


async def test_idle_connections_are_bounded_for_each_host_and_in_all() -> None:
    async with talking(always(page()), idle_per_host_max=2, idle_max=3) as (server, transport):
        for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
            requests = [asking(server.url(host=host)) for _ in range(4)]
            await asyncio.gather(*(fetch(request, transport=transport) for request in requests))
            assert max(map(len, transport._idle._by_host.values())) <= 2
        assert transport._idle.count == sum(map(len, transport._idle._by_host.values())) == 3


async def test_credentials_do_not_share_a_connection() -> None:
    async with talking(always(page())) as (server, transport):
        for credentials in ((), (("Authorization", "Basic a"),), (("authorization", "Basic b"),)):
            ok(await fetch(asking(server.url(), headers=credentials), transport=transport))
        assert server.visits == 3


async def test_addresses_are_dialled_in_turn_until_one_answers(tmp_path: Path) -> None:
    # Only 127.0.0.2 listens.
    with socket.socket() as listening:
        listening.bind(("127.0.0.2", 0))
        listening.listen()
        listening.setblocking(False)
        names = {"two.example": ("127.0.0.1", "127.0.0.2")}
        async with transport_to(names, folder=tmp_path) as transport:
            url = f"http://two.example:{listening.getsockname()[1]}/"
            fetching = asyncio.create_task(fetch(asking(url), transport=transport))
            accepted, _ = await asyncio.get_running_loop().sock_accept(listening)
            with accepted:
                await asyncio.get_running_loop().sock_sendall(accepted, page(b"second"))
                assert ok(await fetching).body == b"second"


async def test_a_silent_address_leaves_time_for_the_next(tmp_path: Path) -> None:
    with socket.socket() as full, socket.socket() as listening, socket.socket() as filler, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for each in (filler, second):
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        listening.bind(("127.0.0.2", full.getsockname()[1]))
        listening.listen()
        listening.setblocking(False)
        names = {"two.example": ("127.0.0.1", "127.0.0.2")}
        async with transport_to(names, folder=tmp_path) as transport:
            url = f"http://two.example:{full.getsockname()[1]}/"
            fetching = asyncio.create_task(fetch(asking(url, connect_timeout_s=0.4), transport=transport))
            accepted, _ = await asyncio.get_running_loop().sock_accept(listening)
            with accepted:
                await asyncio.get_running_loop().sock_sendall(accepted, page(b"second"))
                assert ok(await fetching).body == b"second"


async def test_a_body_that_is_not_read_costs_the_connection() -> None:
    async with talking(always(page(b"x" * 200_000))) as (server, transport):
        for _ in range(2):
            target = check_url(server.url(), LOOPBACK)
            trace = Trace(asyncio.get_running_loop().time())
            request = Request("GET", target, fields=(), content=b"", limits=LIMITS, trace=trace)
            answer = await transport.handle_async_request(request)
            await answer.aclose()
            assert answer.status_code == 200
        assert server.visits == 2


async def test_it_is_an_httpx_transport() -> None:
    async with talking(always(page(b"through httpx"))) as (server, transport):
        target = check_url(server.url("/a?b"), LOOPBACK)
        extensions = {"target": target, "limits": LIMITS, "trace": Trace(0.0)}
        plain = httpx2.Request("GET", target.url, extensions=extensions)
        answer = await transport.handle_async_request(plain)
        answer.request = plain  # before it is an httpx response in full
        assert isinstance(answer.stream, Body)
        assert answer.request is plain
        assert await answer.aread() == b"through httpx"
        request = Request("GET", target, fields=(), content=b"", limits=LIMITS, trace=Trace(0.0))
        assert request.url == httpx2.URL(target.url)


async def test_a_request_that_is_not_read_times_out() -> None:
    async def script(visit: Visit) -> None:
        visit.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await visit.hang()

    async with talking(script) as (server, transport):
        limits = asking("", read_timeout_s=0.2).limits
        request = FetchRequest(url=server.url(), method="POST", body=bytes(2**25), limits=limits)
        outcome = await fetch(request, transport=transport)
    assert isinstance(outcome, Failure)
    assert outcome.code is FailureCode.WRITE_TIMEOUT
    assert outcome.sent


async def test_a_request_that_is_read_slowly_does_not_time_out() -> None:
    body = bytes(2**25)

    async def script(visit: Visit) -> None:
        left = len(body)
        while left > 0:
            left -= len(await visit._reader.read(2**20))
            await asyncio.sleep(0.02)
        visit.send(page())

    async with talking(script) as (server, transport):
        request = FetchRequest(url=server.url(), method="POST", body=body, limits=asking("", read_timeout_s=0.3).limits)
        response = ok(await fetch(request, transport=transport))
    assert response.evidence.first_byte_ms is not None
    assert response.evidence.first_byte_ms > 300


async def test_what_a_server_says_too_early_answers_the_first_request_and_spoils_the_connection() -> None:
    """It comes before anything was asked, as on uvloop when the connection's maker has its turn late."""

    async def script(visit: Visit) -> None:
        visit.send(page(b"early"))
        await visit.hang()

    async with talking(script) as (server, transport):
        target = check_url(server.url(), LOOPBACK)
        connection = await connect(
            target,
            limits=LIMITS,
            trace=Trace(asyncio.get_running_loop().time()),
            policy=LOOPBACK,
            resolver=transport.resolver,
            context=transport._context,
        )
        await until(lambda: connection._early)
        request = f"GET / HTTP/1.1\r\nHost: {target.host}\r\n\r\n".encode()
        exchange = connection.start(request, method="GET", limits=LIMITS)
        await connection.head(exchange)
        assert await connection.body(exchange) == b"early"
        assert not connection.reusable
        connection.abort()


async def test_an_answer_before_the_request_was_read_spoils_the_connection() -> None:
    async def script(visit: Visit) -> None:
        visit.send(page(b"early"))
        await visit.hang()

    async with talking(script) as (server, transport):
        request = FetchRequest(url=server.url(), method="POST", body=bytes(2**25), limits=LIMITS)
        assert ok(await fetch(request, transport=transport)).body == b"early"
        assert transport._idle.count == 0


async def test_an_idle_connection_keeps_no_body() -> None:
    async with talking(always(page(b"x" * 500_000))) as (server, transport):
        ok(await fetch(asking(server.url()), transport=transport))
        exchange = transport._idle._by_host[f"127.0.0.1:{server.port}"][0].connection._exchange
        assert exchange is not None
        assert len(exchange.body) == 0


async def test_a_cancelled_fetch_closes_its_socket_at_once() -> None:
    asked, gone = asyncio.Event(), asyncio.Event()

    async def script(visit: Visit) -> None:
        await visit.asked()
        asked.set()
        try:
            await visit._reader.read()
        finally:
            gone.set()

    async with talking(script) as (server, transport):
        fetching = asyncio.create_task(fetch(asking(server.url()), transport=transport))
        await asked.wait()
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        await asyncio.wait_for(gone.wait(), 1)


async def cancel_many(count: int, server: Server, transport: Transport) -> None:
    """Start fetches of every kind and cancel each at some point of its life."""
    numbers = random.Random(count)
    loop = asyncio.get_running_loop()
    for _ in range(count // 100):
        urls = [server.url(numbers.choice(("/", "/chunks", "/away", "/drip", "/gzip"))) for _ in range(100)]
        tasks = [loop.create_task(fetch(asking(url), transport=transport)) for url in urls]
        for task in tasks:
            loop.call_later(numbers.random() * 0.05, task.cancel)
        await asyncio.wait(tasks)
        assert all(task.cancelled() or isinstance(task.result(), Response) for task in tasks)


async def any_page(visit: Visit) -> None:
    """Answer in the way the path asks for."""
    while True:
        match (await visit.asked()).target:
            case "/chunks":
                visit.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
            case "/away":
                visit.send(redirect("/"))
            case "/drip":
                await visit.drip(page(), every_s=0.002)
            case _:
                visit.send(page(b"x" * 50_000))


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.long)])
async def test_cancelled_fetches_leak_nothing(count: int) -> None:
    async with talking(any_page) as (server, transport):
        before = open_files()
        await cancel_many(count, server, transport)
        for _ in range(100):
            ok(await fetch(asking(server.url()), transport=transport))
        transport.close_idle(f"127.0.0.1:{server.port}")
        await until(lambda: open_files() <= before)
        assert transport._idle.count == 0


CYCLE_FREE = [page(), page(b"x" * 100_000), b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"]


@pytest.mark.parametrize("answer", CYCLE_FREE)
async def test_a_fetch_leaves_nothing_to_the_garbage_collector(answer: bytes) -> None:
    async with talking(always(answer)) as (server, transport):
        ok(await fetch(asking(server.url()), transport=transport))
        gc.collect()
        gc.disable()
        try:
            for _ in range(50):
                ok(await fetch(asking(server.url()), transport=transport))
            assert gc.collect() < 50
        finally:
            gc.enable()


async def test_what_came_of_a_body_over_the_limit_goes_with_its_fetch() -> None:
    async with talking(always(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(100_000))) as (server, transport):
        gc.collect()
        gc.disable()
        try:
            outcome = await fetch(asking(server.url(), wire_bytes_max=50_000), transport=transport)
            assert isinstance(outcome, Failure)
            assert outcome.code is FailureCode.BODY_TOO_LARGE
            await until(lambda: not any(isinstance(each, Exchange) for each in gc.get_objects()))
        finally:
            gc.enable()


async def test_a_refused_connection_leaves_nothing_to_the_garbage_collector() -> None:
    async with talking(always(page())) as (server, transport):
        url = server.url()
    gc.collect()
    gc.disable()
    try:
        for _ in range(50):
            outcome = await fetch(asking(url), transport=transport)
            assert isinstance(outcome, Failure)
        assert gc.collect() < 50
    finally:
        gc.enable()


async def test_a_closed_transport_keeps_nothing() -> None:
    async with talking(answering(page(), page())) as (server, transport):
        ok(await fetch(asking(server.url()), transport=transport))
        await transport.aclose()
        assert transport._idle.count == 0
        ok(await fetch(asking(server.url()), transport=transport))
        assert transport._idle.count == 0
