"""The resolver against a real name server on loopback."""

import asyncio
import gc
import logging
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_network
from pathlib import Path

import pytest

from app.fetch import resolver as module
from app.fetch.policy import Policy, Refused, check_url
from app.fetch.resolver import ANSWERS_MAX, Resolver, addresses
from app.outcome import FailureCode
from tests.fetch.name_server import Answers, NameServer, serve_names
from tests.waiting import until

PUBLIC = "93.184.216.34"
PUBLIC6 = "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
NO_HOSTS = Path("/nonexistent")


@asynccontextmanager
async def resolving(
    zone: dict[str, Answers], *, ttl_s: int = 0, dns_timeout_s: float = 5.0, hosts_file: Path = NO_HOSTS
) -> AsyncIterator[tuple[Resolver, NameServer]]:
    async with serve_names(zone, ttl_s=ttl_s) as server:
        resolver = Resolver(servers=[server.address], dns_timeout_s=dns_timeout_s, hosts_file=hosts_file)
        try:
            yield resolver, server
        finally:
            await resolver.aclose()


async def refusal(resolver: Resolver, hostname: str) -> FailureCode:
    with pytest.raises(Refused) as caught:
        await resolver.resolve(hostname)
    return caught.value.code


async def test_both_families_are_asked_once_and_alternate() -> None:
    zone: dict[str, Answers] = {"a.test": ["1.1.1.1", "1.0.0.1", "2606::1", "2606::2", "2606::3"]}
    async with resolving(zone) as (resolver, server):
        assert await resolver.resolve("a.test") == ("2606::1", "1.1.1.1", "2606::2", "1.0.0.1", "2606::3")
        assert server.asked == {("a.test", "A"): 1, ("a.test", "AAAA"): 1}


@pytest.mark.parametrize(
    ("answers", "code"),
    [
        ("NXDOMAIN", FailureCode.DNS_NOT_FOUND),
        ([], FailureCode.DNS_NO_ADDRESS),
        ("-> nowhere.test", FailureCode.DNS_NO_ADDRESS),
        ("SERVFAIL", FailureCode.DNS_FAILURE),
        ("REFUSED", FailureCode.DNS_FAILURE),
        ("NOTIMP", FailureCode.DNS_FAILURE),
        ("hang", FailureCode.DNS_TIMEOUT),
    ],
)
async def test_each_way_to_fail_has_its_code(answers: Answers, code: FailureCode) -> None:
    async with resolving({"a.test": answers}, dns_timeout_s=0.4) as (resolver, _):
        assert await refusal(resolver, "a.test") is code


async def test_a_name_server_that_is_not_there_is_a_failure() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    resolver = Resolver(servers=[f"127.0.0.1:{port}"], dns_timeout_s=2.0, hosts_file=NO_HOSTS)
    # c-ares names the last thing it saw, which depends on when the kernel reports the closed port.
    assert await refusal(resolver, "a.test") in {FailureCode.DNS_FAILURE, FailureCode.DNS_TIMEOUT}
    await resolver.aclose()


async def test_an_alias_is_followed() -> None:
    async with resolving({"a.test": "-> b.test", "b.test": [PUBLIC]}) as (resolver, _):
        assert await resolver.resolve("a.test") == (PUBLIC,)


async def test_addresses_of_one_family_do_not_wait_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRAGGLER_S", 0.05)
    async with resolving({"a.test": "hang-aaaa"}, dns_timeout_s=30.0) as (resolver, _):
        async with asyncio.timeout(5):
            assert await resolver.resolve("a.test") == ("8.8.8.8",)


async def test_an_answer_is_kept_for_its_ttl_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    async with resolving({"a.test": [[PUBLIC], ["1.1.1.1"]]}, ttl_s=1) as (resolver, server):
        assert await resolver.resolve("a.test") == (PUBLIC,)
        now = 1_000.9
        assert await resolver.resolve("a.test") == (PUBLIC,)
        assert server.asked["a.test", "A"] == 1
        assert resolver._known("a.test") is not None
        now = 1_001.1
        assert resolver._known("a.test") is None


async def test_a_ttl_of_a_week_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    async with resolving({"a.test": [PUBLIC]}, ttl_s=604_800) as (resolver, _):
        await resolver.resolve("a.test")
        now += module.TTL_S_MAX + 1
        assert resolver._known("a.test") is None


async def test_an_answer_without_ttl_is_not_kept() -> None:
    async with resolving({"a.test": [[PUBLIC], ["127.0.0.1"]]}) as (resolver, server):
        assert await resolver.resolve("a.test") == (PUBLIC,)
        assert await resolver.resolve("a.test") == ("127.0.0.1",)
        assert server.asked["a.test", "A"] == 2


async def test_a_name_that_does_not_exist_is_asked_for_once_in_a_while() -> None:
    async with resolving({}) as (resolver, server):
        assert await refusal(resolver, "a.test") is FailureCode.DNS_NOT_FOUND
        assert await refusal(resolver, "a.test") is FailureCode.DNS_NOT_FOUND
        assert server.asked["a.test", "A"] == 1


async def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE_ENTRIES_MAX", 10)
    async with resolving({f"{n}.test": [PUBLIC] for n in range(30)}, ttl_s=60) as (resolver, _):
        for n in range(30):
            await resolver.resolve(f"{n}.test")
        assert list(resolver._cache) == [f"{n}.test" for n in range(20, 30)]


async def test_a_full_queue_of_lookups_refuses_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOKUPS_WAITING_MAX", 1)
    async with resolving({"a.test": "hang"}, dns_timeout_s=1.0) as (resolver, _):
        waiting = asyncio.create_task(resolver.resolve("a.test"))
        await asyncio.sleep(0)
        assert await refusal(resolver, "b.test") is FailureCode.DNS_TIMEOUT
        with pytest.raises(Refused):
            await waiting


async def test_those_who_ask_together_share_one_lookup() -> None:
    async with resolving({"a.test": [PUBLIC]}) as (resolver, server):
        found = await asyncio.gather(*(resolver.resolve("a.test") for _ in range(100)))
        assert set(found) == {(PUBLIC,)}
        assert server.asked["a.test", "A"] == 1


async def test_cancelling_one_who_waits_leaves_the_others_their_answer() -> None:
    async with resolving({"a.test": [PUBLIC]}) as (resolver, _):
        first = asyncio.create_task(resolver.resolve("a.test"))
        second = asyncio.create_task(resolver.resolve("a.test"))
        await asyncio.sleep(0)
        first.cancel()
        assert await second == (PUBLIC,)
        assert first.cancelled()


async def test_cancelling_everyone_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    async with resolving({"a.test": "hang", "b.test": "SERVFAIL"}, dns_timeout_s=0.2) as (resolver, _):
        tasks = [asyncio.create_task(resolver.resolve(name)) for name in ("a.test", "b.test") * 50]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        async with asyncio.timeout(5):
            await asyncio.gather(*resolver._lookups.values())
        assert resolver._lookups == {}
        assert resolver._places._value == module.LOOKUPS_MAX
    del tasks
    gc.collect()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_hung_names_do_not_delay_good_ones() -> None:
    hung = [f"hung{n}.test" for n in range(64)]
    good = [f"good{n}.test" for n in range(1_000)]
    zone: dict[str, Answers] = {**dict.fromkeys(hung, "hang"), **{name: [PUBLIC] for name in good}}
    async with resolving(zone, dns_timeout_s=3.0) as (resolver, _):
        stuck = [asyncio.create_task(refusal(resolver, name)) for name in hung]
        await asyncio.sleep(0)
        async with asyncio.timeout(2.9):
            found = await asyncio.gather(*(resolver.resolve(name) for name in good))
        assert set(found) == {(PUBLIC,)}
        assert set(await asyncio.gather(*stuck)) == {FailureCode.DNS_TIMEOUT}


async def test_a_flood_of_answers_is_cut() -> None:
    flood = [f"9.9.{n // 256}.{n % 256}" for n in range(4_000)]
    async with resolving({"a.test": [*flood, PUBLIC6]}) as (resolver, _):
        found = await resolver.resolve("a.test")
        assert len(found) == ANSWERS_MAX
        assert found[0] == PUBLIC6


async def test_a_new_channel_takes_over_while_the_old_one_ends_its_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHANNEL_LOOKUPS_MAX", 10)
    names = [f"{n}.test" for n in range(100)]
    async with resolving({name: [PUBLIC] for name in names}) as (resolver, _):
        first = resolver._channel
        await resolver.resolve(names[0])
        monkeypatch.setattr(resolver, "_channel_until", 0.0)
        await resolver.resolve(names[1])
        assert resolver._channel is not first
        first = resolver._channel
        found = await asyncio.gather(*(resolver.resolve(name) for name in names))
        assert set(found) == {(PUBLIC,)}
        assert resolver._channel is not first
        await asyncio.gather(*resolver._retiring)
        assert resolver._retiring == {}


async def test_closing_ends_those_who_wait() -> None:
    async with serve_names({"a.test": "hang"}) as server:
        resolver = Resolver(servers=[server.address], dns_timeout_s=60.0, hosts_file=NO_HOSTS)
        waiting = asyncio.create_task(refusal(resolver, "a.test"))
        await until(lambda: server.asked)
        async with asyncio.timeout(5):
            await resolver.aclose()
            assert await waiting is FailureCode.DNS_FAILURE
            assert await refusal(resolver, "b.test") is FailureCode.DNS_FAILURE
            await resolver.aclose()


async def test_a_name_server_may_be_ipv6_with_or_without_a_port() -> None:
    resolver = Resolver(servers=["::1", "[::1]:5353", "127.0.0.1", "127.0.0.1:5353"])
    await resolver.aclose()


async def test_the_hosts_file_goes_first_and_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HOSTS_CHECK_S", 0.0)
    hosts = tmp_path / "hosts"
    hosts.write_text("# a comment\n10.0.0.1 db Web.Test # another\n\nnonsense web.test\nfe80::1%lo zone\n::1 db\n")
    async with resolving({}, hosts_file=hosts) as (resolver, server):
        assert await resolver.resolve("web.test") == ("10.0.0.1",)
        assert await resolver.resolve("db") == ("::1", "10.0.0.1")
        hosts.write_text("10.0.0.22 web.test\n")
        assert await resolver.resolve("web.test") == ("10.0.0.22",)
        assert not server.asked


async def test_localhost_needs_no_entry_and_is_never_asked_for() -> None:
    async with resolving({}) as (resolver, server):
        assert await resolver.resolve("localhost") == ("::1", "127.0.0.1")
        assert await resolver.resolve("a.localhost") == ("::1", "127.0.0.1")
        assert not server.asked


async def test_a_cached_answer_is_judged_again_at_every_attempt() -> None:
    open_policy = Policy(allow_networks=(ip_network("10.0.0.0/8"),))
    target = check_url("http://a.test/", open_policy)
    async with resolving({"a.test": ["10.0.0.1"]}, ttl_s=60) as (resolver, server):
        assert await addresses(target, resolver, open_policy) == ("10.0.0.1",)
        with pytest.raises(Refused) as caught:
            await addresses(target, resolver, Policy())
        assert caught.value.code is FailureCode.ADDRESS_BLOCKED
        assert "10.0.0.1" not in str(caught.value)
        assert server.asked["a.test", "A"] == 1


async def test_a_literal_address_is_judged_without_a_lookup() -> None:
    async with resolving({}) as (resolver, server):
        target = check_url("http://8.8.8.8:8080/", Policy())
        assert await addresses(target, resolver, Policy()) == ("8.8.8.8",)
        assert not server.asked


async def test_a_thousand_rebinding_rounds_give_only_checked_addresses() -> None:
    rounds: list[list[str]] = [[PUBLIC, PUBLIC6], [PUBLIC, "::1"], ["127.0.0.1", PUBLIC6], ["10.0.0.1", "::1"]] * 250
    policy = Policy()
    target = check_url("http://a.test/", policy)
    async with resolving({"a.test": rounds}) as (resolver, _):
        for answers in rounds:
            if answers == [PUBLIC, PUBLIC6]:
                assert await addresses(target, resolver, policy) == (PUBLIC6, PUBLIC)
                continue
            with pytest.raises(Refused) as caught:
                await addresses(target, resolver, policy)
            assert caught.value.code is FailureCode.ADDRESS_BLOCKED
