"""The address tables: every range they name is blocked to its edges, and what lies beside it is not."""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.fetch.address import IPV4_BLOCKED, IPV6_BLOCKED, IPV6_GLOBAL, Address, is_inside, is_own, is_public

BLOCKED = IPV4_BLOCKED + IPV6_BLOCKED


@pytest.mark.parametrize("network", BLOCKED, ids=str)
def test_a_special_range_is_blocked_to_its_edges(network: object) -> None:
    assert not is_public(network[0])  # type: ignore[index]
    assert not is_public(network[-1])  # type: ignore[index]


@pytest.mark.parametrize("table", [IPV4_BLOCKED, IPV6_BLOCKED])
def test_a_table_is_sorted_and_its_ranges_are_apart(table: tuple[object, ...]) -> None:
    assert all(before[-1] < after[0] for before, after in pairwise(table))  # type: ignore[index]


@given(st.ip_addresses())
def test_the_arithmetic_agrees_with_the_tables(address: Address) -> None:
    special = any(address in network for network in BLOCKED)
    expected = not special and (address.version == 4 or address in IPV6_GLOBAL)
    isatap = address.version == 6 and (int(address) >> 32) & 0xFDFF_FFFF == 0x5EFE
    assert isatap or is_public(address) == expected


@given(st.ip_addresses(v=4).filter(lambda address: not is_public(address)), st.ip_addresses(v=4))
def test_no_address_inside_another_opens_a_blocked_one(blocked: IPv4Address, other: IPv4Address) -> None:
    low, high = int(blocked), int(other)
    inside = (
        low,  # compatible, RFC 4291
        (0xFFFF << 32) | low,  # mapped, RFC 4291
        (0xFFFF << 48) | low,  # translated, RFC 2765
        (0x0064_FF9B << 96) | low,  # NAT64, RFC 6052
        (0x0064_FF9B_0001 << 80) | (low >> 16 << 64) | ((low & 0xFFFF) << 40),  # NAT64 of one's own, RFC 8215
        (0x2002 << 112) | (low << 80) | 1,  # 6to4, RFC 3056
        (0x2001_0000 << 96) | (high << 64) | (low ^ 0xFFFF_FFFF),  # Teredo, RFC 4380
        (0x2606_4700 << 96) | (0x5EFE << 32) | low,  # ISATAP, RFC 5214
        (0x2606_4700 << 96) | (0x0200_5EFE << 32) | low,
    )
    assert not any(is_public(IPv6Address(number)) for number in inside)


def test_an_isatap_tunnel_to_a_public_address_is_public() -> None:
    assert is_public(ip_address("2606:4700::200:5efe:8.8.8.8"))


@pytest.mark.parametrize("text", ["8.8.8.8", "2606:4700:4700::1111", "2a00::1", "2001:200::1", "2620:4f:8001::1"])
def test_a_public_address_is_told(text: str) -> None:
    assert is_public(ip_address(text))


def test_an_allowed_network_opens_itself_and_nothing_else() -> None:
    networks = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
    assert is_inside(ip_address("10.255.255.255"), networks)
    assert is_inside(ip_address("fd00:ec2::254"), networks)
    assert not is_inside(ip_address("127.0.0.1"), networks)
    assert not is_inside(ip_address("::ffff:10.0.0.1"), networks)


@pytest.mark.parametrize(
    ("address", "own", "expected"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.2", "127.0.0.1", False),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("::", "::1", True),
        ("127.0.0.9", "0.0.0.0", True),
        ("::1", "::", True),
        ("192.0.2.1", "0.0.0.0", False),
        ("0.0.0.0", "192.0.2.1", False),
    ],
)
def test_our_own_address_is_known_in_all_its_spellings(address: str, own: str, expected: bool) -> None:
    assert is_own(ip_address(address), frozenset({ip_address(own)})) is expected
