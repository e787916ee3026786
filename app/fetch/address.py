"""Which addresses a fetch may reach; tables and arithmetic only: it resolves nothing and refuses nobody.

`ipaddress.is_global` is deliberately not asked: it calls 168.63.129.16, NAT64, multicast, IPv4-compatible and ISATAP
addresses global, and its answers change between Python releases.
"""

from bisect import bisect_right
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

PARSED_MAX = 4_096
"""Addresses kept parsed, so that checking a cached answer again at every attempt costs next to nothing."""

IPV4_BLOCKED = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network (RFC 791); Linux connects 0.0.0.0 to itself
        "10.0.0.0/8",  # private (RFC 1918)
        "100.64.0.0/10",  # shared address space of carriers (RFC 6598); also cloud metadata
        "127.0.0.0/8",  # loopback (RFC 1122)
        "168.63.129.16/32",  # Azure's WireServer: a public address that answers inside its cloud only
        "169.254.0.0/16",  # link-local (RFC 3927); also cloud metadata
        "172.16.0.0/12",  # private (RFC 1918)
        "192.0.0.0/24",  # IETF protocol assignments (RFC 6890), with DS-Lite, NAT64 discovery and PCP anycast
        "192.0.2.0/24",  # documentation, TEST-NET-1 (RFC 5737)
        "192.31.196.0/24",  # AS112 anycast (RFC 7535)
        "192.52.193.0/24",  # AMT relay anycast (RFC 7450)
        "192.88.99.0/24",  # 6to4 relay anycast, deprecated (RFC 7526)
        "192.168.0.0/16",  # private (RFC 1918)
        "192.175.48.0/24",  # AS112 direct delegation (RFC 7534)
        "198.18.0.0/15",  # benchmarking (RFC 2544)
        "198.51.100.0/24",  # documentation, TEST-NET-2 (RFC 5737)
        "203.0.113.0/24",  # documentation, TEST-NET-3 (RFC 5737)
        "224.0.0.0/4",  # multicast (RFC 5771), with MCAST-TEST-NET (RFC 6676)
        "240.0.0.0/4",  # reserved (RFC 1112) and limited broadcast (RFC 919)
    )
)
"""Every special-purpose range of IPv4 (IANA's registry, RFC 6890) and the one public address known to be internal."""

IPV6_GLOBAL = IPv6Network("2000::/3")
"""All that IANA allocates as global unicast (RFC 4291). What lies outside is blocked unnamed: loopback, unique local,
link-local, multicast, discard, SRv6, and IPv4 inside IPv6 as mapped, compatible, translated or NAT64 addresses."""

IPV6_BLOCKED = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # IETF protocol assignments (RFC 2928): Teredo, ORCHID, benchmarking, AMT, AS112, DETs
        "2001:db8::/32",  # documentation (RFC 3849)
        "2002::/16",  # 6to4: carries an IPv4 address of the sender's choice (RFC 3056, 7526)
        "2620:4f:8000::/48",  # AS112 direct delegation (RFC 7534)
        "3fff::/20",  # documentation (RFC 9637)
    )
)
"""The special-purpose ranges inside 2000::/3."""

_ISATAP_MARK = 0x0000_5EFE
_ISATAP_UNIVERSAL_BIT = 0x0200_0000
_LOW_32_BITS = 0xFFFF_FFFF

_Ranges = tuple[list[int], list[int]]


def _ranges(networks: tuple[Network, ...]) -> _Ranges:
    """Give the first and the last addresses as numbers; the tables are sorted and do not overlap."""
    return [int(network[0]) for network in networks], [int(network[-1]) for network in networks]


_IPV4_RANGES = _ranges(IPV4_BLOCKED)
_IPV6_RANGES = _ranges(IPV6_BLOCKED)


@lru_cache(maxsize=PARSED_MAX)
def parse(text: str) -> Address:
    """Parse an address as a resolver or a socket gives it; raises `ValueError` for anything else."""
    return ip_address(text)


def is_inside(address: Address, networks: tuple[Network, ...]) -> bool:
    """Tell whether one of the networks holds the address; IPv4 inside IPv6 counts as IPv6 only."""
    return any(address in network for network in networks)


def is_public(address: Address) -> bool:
    """Tell whether the address belongs to the public internet: IPv4 by a deny list, IPv6 by an allow list."""
    number = int(address)
    if address.version == 4:
        return not _is_within(number, _IPV4_RANGES)
    if address not in IPV6_GLOBAL or _is_within(number, _IPV6_RANGES):
        return False
    return not _is_private_isatap(number)


def is_own(address: Address, own: frozenset[Address]) -> bool:
    """Tell whether the address leads to one of our own, as a connecting socket understands it.

    Listening on an unspecified address answers on every loopback address, and connecting to an unspecified address
    reaches loopback (Linux); IPv4-mapped IPv6 is its IPv4 address (RFC 4291, 2.5.5.2).
    """
    address = _unmapped(address)
    if address in own:
        return True
    if address.is_unspecified:
        return any(each.is_loopback or each.is_unspecified for each in own)
    return address.is_loopback and any(each.is_unspecified for each in own)


def _unmapped(address: Address) -> Address:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return address if mapped is None else mapped


def _is_within(number: int, ranges: _Ranges) -> bool:
    firsts, lasts = ranges
    index = bisect_right(firsts, number) - 1
    return index >= 0 and number <= lasts[index]


def _is_private_isatap(number: int) -> bool:
    """Tell whether the last 64 bits are an ISATAP tunnel to an IPv4 address that is not public (RFC 5214, 6.1)."""
    mark = (number >> 32) & _LOW_32_BITS & ~_ISATAP_UNIVERSAL_BIT
    return mark == _ISATAP_MARK and not is_public(IPv4Address(number & _LOW_32_BITS))
