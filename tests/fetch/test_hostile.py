"""Every row of hostile.csv that a fetch alone can meet, on a transport of the test's own; and what the rows leave open.

What the row expects is read from the file; `tests/test_safety.py` has the same rows through the whole service.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from app.fetch.http import FetchRequest, fetch
from app.fetch.policy import Policy
from app.fetch.transport import Transport
from app.outcome import Failure, FailureCode, Outcome, Response
from tests.fetch.authorities import Authority, make_authority
from tests.fetch.hostile import (
    BODY_BYTES_MAX,
    MIB,
    NAMES,
    OPEN_NETWORKS,
    SCENARIOS,
    Ground,
    bomb_of,
    mismatch,
    rows,
)
from tests.fetch.servers import LIMITS, Script, Visit, always, answering, asking, fetch_from, page, serve, transport_to

SAFETY = "tests/test_safety.py"
ELSEWHERE = {
    "deadline_over_dns": SAFETY,
    "dns_servfail": SAFETY,
    "dns_nodata": SAFETY,
    "dns_saturation": SAFETY,
    "dns_10000_answers": SAFETY,
    "h2_rst_stream": "HTTP/1.1 is all we offer and speak: test_only_http_1_1_is_offered",
    "h2_goaway": "likewise",
    "h2_settings_flood": "likewise",
    "h2_header_bomb": "likewise",
    "429_retry_after": SAFETY,
    "hot_host": SAFETY,
    "flapping_host": SAFETY,
    "body_html_script": SAFETY,
    "cancel_pool_leak": "tests/fetch/test_transport.py: test_cancelled_fetches_leak_nothing",
}
"""Rows that are not about one fetch over HTTP/1.1, and where they are met."""


@dataclass(frozen=True, kw_only=True)
class Alone(Ground):
    """A fetch on a transport of its own."""

    transport: Transport

    async def fetch(
        self,
        url: str,
        *,
        method: str = "GET",
        headers: tuple[tuple[str, str], ...] = (),
        body: bytes | None = None,
        **limits: Any,
    ) -> Outcome:
        request = asking(url, method=method, headers=headers, **limits)
        return await fetch(structs.replace(request, body=body), transport=self.transport)

    @asynccontextmanager
    async def frugal(self) -> AsyncIterator[None]:
        before_bytes = peak_memory_bytes(reset=True)
        async with stalls() as worst:
            yield
        assert worst() < 0.1
        assert peak_memory_bytes() - before_bytes < BODY_BYTES_MAX + 20 * MIB


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


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
async def alone(tmp_path: Path, authority: Authority) -> AsyncIterator[Alone]:
    policy = Policy(allow_networks=tuple(map(ip_network, OPEN_NETWORKS)))
    async with transport_to(NAMES, folder=tmp_path, policy=policy, ca_file=authority.file) as transport:
        yield Alone(authority=authority, transport=transport)


def test_every_row_is_met_here_or_elsewhere() -> None:
    assert rows().keys() == SCENARIOS.keys() | ELSEWHERE.keys()
    assert not SCENARIOS.keys() & ELSEWHERE.keys()


@pytest.mark.parametrize("name", sorted(SCENARIOS))
async def test_a_hostile_server_gets_the_outcome_expected(name: str, alone: Alone) -> None:
    assert mismatch(await SCENARIOS[name](alone), rows()[name]) is None


# What the rows leave open.


@pytest.mark.parametrize("script", [answering(b"SSH-2.0-OpenSSH\r\n"), answering(b"\x00\x00\x12\x04" + bytes(30))])
async def test_what_is_not_http_1_is_told_at_once(script: Script) -> None:
    outcome = await fetch_from(script)
    assert isinstance(outcome, Failure)
    assert outcome.code is FailureCode.PROTOCOL_ERROR


@pytest.mark.parametrize(
    "field",
    [b"Content-Length: 1\0", b"Transfer-Encoding: chunked\0", b"X\0A: b", b"content-length : 1\0", b"X-A\0"],
)
async def test_a_nul_is_refused_where_it_could_change_the_framing(field: bytes) -> None:
    outcome = await fetch_from(answering(b"HTTP/1.1 200 OK\r\n" + field + b"\r\n\r\nx"))
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
