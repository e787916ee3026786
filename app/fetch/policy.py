"""What a client may ask to be fetched: the rules for URLs, methods, headers and the addresses a name led to.

Ambiguity is refused, never repaired, since URL parsers disagree about it. Deliberately resolves no name and opens no
connection: `resolver` finds addresses, and `check_addresses` judges them each time before they are dialled.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import NoReturn
from urllib.parse import quote

import idna
from msgspec import Struct

from app.fetch.address import Address, Network, is_inside, is_own, is_public, parse
from app.outcome import FailureCode

URL_CHARACTERS_MAX = 8_192
HOST_CHARACTERS_MAX = 253  # RFC 1035, 2.3.4: 255 octets on the wire
LABEL_CHARACTERS_MAX = 63  # RFC 1035, 2.3.4
ORIGINS_MAX = 4_096
"""Origins kept as judged: of many URLs of one host, all but the first cost a third."""
HEADERS_MAX = 100
HEADERS_BYTES_MAX = 32 * 2**10

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

DEFAULT_PORTS = {"http": 80, "https": 443}

LOCAL_SUFFIXES = (
    ".localhost",  # RFC 6761
    ".local",  # RFC 6762; holds .cluster.local
    ".internal",  # reserved by ICANN for private use
    ".localdomain",  # hosts files
    ".home.arpa",  # RFC 8375
    ".lan",
    ".corp",
    ".onion",  # RFC 7686
)
"""Names of local networks; as are all names without a dot."""

BAD_PORTS = frozenset(
    (
        # The Fetch standard's port blocking: protocols that an HTTP request can be made to speak.
        *(1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101, 102, 103, 104, 109),
        *(110, 111, 113, 115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514, 515, 526, 530),
        *(531, 532, 540, 548, 554, 556, 563, 587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049, 3659, 4045),
        *(4190, 5060, 5061, 6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080),
        # Infrastructure that trusts whoever reaches it: Docker, etcd, databases, caches, search, kubelet.
        *(2375, 2376, 2379, 2380, 3306, 5432, 6379, 6380, 9200, 9300, 10250, 10255, 11211, 27017),
    )
)

HEADERS_NOT_ALLOWED = frozenset(
    {
        # The connection's, not the caller's (RFC 9110, 7.6.1); an Upgrade smuggles h2c through proxies.
        *("connection", "keep-alive", "te", "trailer", "upgrade", "http2-settings"),
        # Where a message goes and where it ends is ours to say (RFC 9112, 6): anything else is request smuggling.
        *("host", "content-length", "transfer-encoding", "expect"),
        # What cloud metadata services ask for as proof that no simple request forgery is under way.
        *("metadata", "metadata-flavor", "metadata-token", "x-google-metadata-request", "x-metadata-token"),
        *("x-aliyun-ecs-metadata-token", "x-identity-header"),
    }
)
HEADER_PREFIXES_NOT_ALLOWED = ("proxy-", "x-aws-ec2-metadata-token", ":")
"""`X-Forwarded-For` and its kind pass: this is no proxy, and a server must not believe them from strangers anyway."""

# Nearly all URLs there are take one match and the judgement of their origin, which is kept: 2 us instead of 5.
# Possessive, so it never backtracks. Whatever it does not match is not wrong, only looked at more closely.
_PLAIN_URL = re.compile(r"(https?)://([0-9A-Za-z.:-]++)(/[!$-;=?-\[\]_a-z~]*+)?(?:#[!-\[\]-~]*+)?")
_PLAIN_NAME = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)++[a-z]{2,63}")
_NEVER_IN_A_URL = re.compile(r"[\s\x00-\x20\x7f-\x9f\\\ud800-\udfff]")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_BRACKETED = re.compile(r"\[([^\[\]]*)\](?::(.*))?")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]{2,45}")
_PORT = re.compile(r"[0-9]{1,5}")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # what the URL standard takes for a part of an IPv4 address
_QUAD_PART = re.compile(r"0|[1-9][0-9]{0,2}")
_LAST_SEGMENT = re.compile(r"[^/]*\Z")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e]*")

_TARGET_SAFE = "!$%&'()*+,-./:;=?@[]_~"
"""Bytes that stand for themselves in a request target; `%` too, as what is already encoded stays as it is."""

_ALLOW = "an operator can allow its network with FETCHPOOL_ALLOW_NETWORKS"


class Refused(Exception):
    """Something this service will not fetch: a code, and one sentence for the client that names no address."""

    def __init__(self, code: FailureCode, detail: str) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """What the operator decided: networks opened to fetches, and what is this service itself.

    `own_names` are public names that lead here, on any port, lower case. `own_addresses` with `own_port` is where the
    API listens; on an unspecified address, add the machine's own addresses beside it. A public one is refused on every
    port, one inside an allowed network on `own_port` only: its other ports are other services.
    """

    allow_networks: tuple[Network, ...] = ()
    own_names: frozenset[str] = frozenset()
    own_addresses: frozenset[Address] = frozenset()
    own_port: int | None = None


class Target(Struct, frozen=True, gc=False):
    """A URL that passed, taken apart exactly as it goes on the wire: all ASCII, no fragment.

    `hostname` has no brackets and no trailing dot; `path_query` is the request target. `host` is the politeness key
    and the Host header at once: the host name, and the port unless it is the scheme's own. `is_literal`: an address.
    """

    url: str
    scheme: str
    hostname: str
    port: int
    path_query: str
    host: str
    is_literal: bool = False


def check_url(url: str, policy: Policy) -> Target:
    """Take a URL apart, or raise `Refused`. Resolves nothing: names are judged again by `check_addresses`.

    Checking a target's `url` gives the same target.
    """
    if len(url) > URL_CHARACTERS_MAX:
        _refuse(FailureCode.INVALID_URL, f"The URL is longer than {URL_CHARACTERS_MAX} characters; shorten it.")
    return _plain_target(url, policy) or _careful_target(url, policy)


def check_method(method: str) -> str:
    """Give the method in upper case (`get` is accepted as `GET`), or raise `Refused`."""
    # ASCII first: "po\u017ft".upper() is "POST".
    known = method.upper() if method.isascii() else ""
    if known not in METHODS:
        _refuse(FailureCode.METHOD_NOT_ALLOWED, f"The method must be one of {', '.join(sorted(METHODS))}.")
    return known


def check_headers(headers: Iterable[tuple[str, str]]) -> None:
    """Raise `Refused` for a header a caller must not set, or for too many. Never repeats a value, nor an odd name."""
    size_bytes = 0
    for count, (name, value) in enumerate(headers, start=1):
        size_bytes += len(name) + len(value) + len(": \r\n")
        if count > HEADERS_MAX:
            _refuse(FailureCode.HEADER_INVALID, f"There are more than {HEADERS_MAX} headers; send fewer.")
        if size_bytes > HEADERS_BYTES_MAX:
            _refuse(FailureCode.HEADER_INVALID, f"The headers exceed {HEADERS_BYTES_MAX} bytes; send less.")
        _check_header(name, value)


def check_addresses(target: Target, found: Iterable[str], policy: Policy) -> None:
    """Judge what a target leads to; raise `Refused` if any address of it is bad. Call before every dial.

    Inside allowed networks local names and all ports are open, this service's own port aside.
    """
    addresses = tuple(map(parse, found))
    networks = policy.allow_networks
    if any(_is_self(address, target.port, policy) for address in addresses):
        _refuse(FailureCode.SELF_REQUEST_BLOCKED, "The URL leads to this service itself; fetch something else.")
    outside = [address for address in addresses if not is_inside(address, networks)] if networks else addresses
    if not outside:
        return
    if not target.is_literal and _is_local(target.hostname):
        _refuse_local()
    if not all(map(is_public, outside)):
        _refuse(FailureCode.ADDRESS_BLOCKED, f"The host is not on the public internet; {_ALLOW}.")
    if target.port in BAD_PORTS:
        _refuse_port()


def check_peer(peer: str, dialled: str) -> None:
    """Raise `Refused` unless a connected socket's peer is the checked address that was dialled."""
    if parse(peer) != parse(dialled):
        _refuse(FailureCode.ADDRESS_BLOCKED, "The connection did not reach the address it was made to; try again.")


def follow(target: Target, location: str, policy: Policy) -> Target:
    """Check where a redirect leads, relative ones resolved (RFC 3986, 5.2), from the first rule on.

    Our own, since `urljoin` repairs: it drops tabs and line ends, and reads a backslash as part of a host.
    """
    if len(location) > URL_CHARACTERS_MAX or _NEVER_IN_A_URL.search(location):
        _refuse(FailureCode.INVALID_URL, "The redirect's Location is not a valid URL.")
    return check_url(location if _SCHEME.match(location) else _resolved(target, location), policy)


def _plain_target(url: str, policy: Policy) -> Target | None:
    match = _PLAIN_URL.fullmatch(url)
    return _target(match[1], match[2], match[3] or "/", policy) if match else None


def _careful_target(url: str, policy: Policy) -> Target:
    if not url:
        _refuse(FailureCode.INVALID_URL, "The URL is empty.")
    if url != url.strip():
        _refuse(FailureCode.INVALID_URL, "There is a space before or after the URL; remove it.")
    if _NEVER_IN_A_URL.search(url):
        _refuse(FailureCode.INVALID_URL, "The URL has a space, control character or backslash; percent-encode it.")
    scheme, rest = _split_scheme(url)
    authority, path_query = _split_authority(rest)
    target = _target(scheme, authority, quote(path_query, safe=_TARGET_SAFE), policy)
    if len(target.url) > URL_CHARACTERS_MAX:
        _refuse(FailureCode.INVALID_URL, f"The URL, encoded, is longer than {URL_CHARACTERS_MAX} characters.")
    return target


def _target(scheme: str, authority: str, path_query: str, policy: Policy) -> Target:
    origin = _origin(scheme, authority, policy)
    url = f"{scheme}://{origin.host}{path_query}"
    return Target(url, scheme, origin.hostname, origin.port, path_query, origin.host, origin.is_literal)


@lru_cache(maxsize=ORIGINS_MAX)
def _origin(scheme: str, authority: str, policy: Policy) -> Target:
    """Take an authority apart and judge it; the target is that of the path `/`."""
    host_text, port = _split_port(authority)
    hostname, is_literal = _ipv6(host_text) if host_text[0] == "[" else _name_or_ipv4(host_text)
    host = f"[{hostname}]" if ":" in hostname else hostname
    port = port or DEFAULT_PORTS[scheme]
    if port != DEFAULT_PORTS[scheme]:
        host = f"{host}:{port}"
    target = Target(f"{scheme}://{host}/", scheme, hostname, port, "/", host, is_literal)
    _check_name(target, policy)
    if is_literal:
        check_addresses(target, (hostname,), policy)
    return target


def _split_scheme(url: str) -> tuple[str, str]:
    match = _SCHEME.match(url)
    if match is None:
        _refuse(FailureCode.INVALID_URL, "The URL has no scheme; write it out with http:// or https://.")
    scheme = match[1].lower()
    if scheme not in DEFAULT_PORTS:
        _refuse(FailureCode.SCHEME_NOT_ALLOWED, "The URL must begin with http:// or https://.")
    return scheme, url[match.end() :]


def _split_authority(rest: str) -> tuple[str, str]:
    """Split what follows the scheme into the authority and the path with its query; the fragment is dropped."""
    rest = rest.partition("#")[0]
    if not rest.startswith("//"):
        _refuse(FailureCode.INVALID_URL, "The URL needs two slashes after its scheme, as in https://example.com/.")
    end = min((index for mark in "/?" if (index := rest.find(mark, 2)) != -1), default=len(rest))
    authority, path_query = rest[2:end], rest[end:]
    if not authority:
        _refuse(FailureCode.INVALID_URL, "The URL names no host.")
    return authority, path_query if path_query.startswith("/") else f"/{path_query}"


def _split_port(authority: str) -> tuple[str, int | None]:
    """Split the authority into a host and a port, `None` if it names none."""
    if "@" in authority:
        _refuse(FailureCode.USERINFO_NOT_ALLOWED, "The URL carries credentials; send an Authorization header instead.")
    host, port = _bracketed(authority) if authority[0] == "[" else _unbracketed(authority)
    if port is None:
        return host, None
    if not _PORT.fullmatch(port) or not 1 <= int(port) <= 65_535:
        _refuse(FailureCode.INVALID_URL, "The port must be a number from 1 to 65535.")
    return host, int(port)


def _bracketed(authority: str) -> tuple[str, str | None]:
    match = _BRACKETED.fullmatch(authority)
    if match is None:
        _refuse(
            FailureCode.INVALID_URL, "The brackets in the URL hold no address; write it as in http://[2001:db8::1]/."
        )
    return f"[{match[1]}]", match[2]


def _unbracketed(authority: str) -> tuple[str, str | None]:
    host, colon, port = authority.partition(":")
    if not host or ":" in port:
        _refuse(FailureCode.INVALID_URL, "The URL names no host, or an IPv6 address without brackets.")
    return host, port if colon else None


def _ipv6(host_text: str) -> tuple[str, bool]:
    text = host_text[1:-1]
    try:
        # The pattern keeps out zones, which IPv6Address reads.
        return str(IPv6Address(text if _IPV6.fullmatch(text) else "")), True
    except ValueError:
        _refuse_host()


def _name_or_ipv4(host_text: str) -> tuple[str, bool]:
    if _PLAIN_NAME.fullmatch(host_text) and len(host_text) <= HOST_CHARACTERS_MAX and "xn--" not in host_text:
        return host_text, False
    # Lower case for ASCII only: str.lower() folds the Kelvin sign to "k".
    name = _to_ascii(host_text).removesuffix(".")
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        return _ipv4(host_text), True
    if len(name) > HOST_CHARACTERS_MAX or not all(map(_is_label, labels)):
        _refuse_host()
    return name, False


def _ipv4(text: str) -> str:
    parts = text.split(".")
    if len(parts) != 4 or not all(_QUAD_PART.fullmatch(part) and int(part) <= 255 for part in parts):
        _refuse_host()
    return str(IPv4Address(text))


def _is_label(label: str) -> bool:
    return len(label) <= LABEL_CHARACTERS_MAX and _LABEL.fullmatch(label) is not None


def _to_ascii(host_text: str) -> str:
    """Give the name in lower-case ASCII by strict IDNA 2008: nothing is mapped, and only `.` separates labels."""
    if host_text.isascii() and "xn--" not in (lowered := host_text.lower()):
        return lowered
    if len(host_text) > HOST_CHARACTERS_MAX + 1:
        _refuse_host()
    labels = [_lower_ascii(label) for label in host_text.split(".")]
    try:
        unicode_labels = [_unicode_label(label) for label in labels]
        _check_direction(unicode_labels)
        return ".".join(idna.alabel(label).decode() if not label.isascii() else label for label in labels)
    except UnicodeError:  # idna.IDNAError is one
        _refuse_host()


def _lower_ascii(label: str) -> str:
    return "".join(character.lower() if character.isascii() else character for character in label)


def _unicode_label(label: str) -> str:
    """Decode an A-label; raises `idna.IDNAError` for a U-label or A-label that IDNA 2008 does not allow."""
    if label.isascii() and not label.startswith("xn--"):
        return label
    return idna.ulabel(label)


def _check_direction(labels: list[str]) -> None:
    """Apply the Bidi rule to every label as soon as one is written right to left (RFC 5893, 2)."""
    if any(unicodedata.bidirectional(character) in {"R", "AL", "AN"} for character in "".join(labels)):
        for label in filter(None, labels):
            idna.check_bidi(label, check_ltr=True)


def _check_name(target: Target, policy: Policy) -> None:
    """Judge what a name alone tells; with networks allowed, local names and ports wait for their addresses."""
    if target.hostname in policy.own_names:
        _refuse(FailureCode.SELF_REQUEST_BLOCKED, "The URL leads to this service itself; fetch something else.")
    if target.is_literal or policy.allow_networks:
        return
    if _is_local(target.hostname):
        _refuse_local()
    if target.port in BAD_PORTS:
        _refuse_port()


def _is_local(hostname: str) -> bool:
    return "." not in hostname or hostname.endswith(LOCAL_SUFFIXES) or hostname == "home.arpa"


def _is_self(address: Address, port: int, policy: Policy) -> bool:
    if not policy.own_addresses or not is_own(address, policy.own_addresses):
        return False
    return port == policy.own_port or (is_public(address) and not is_inside(address, policy.allow_networks))


def _check_header(name: str, value: str) -> None:
    if not _HEADER_NAME.fullmatch(name):
        _refuse(FailureCode.HEADER_INVALID, "A header name has a character that names must not have.")
    lowered = name.lower()
    if lowered in HEADERS_NOT_ALLOWED or lowered.startswith(HEADER_PREFIXES_NOT_ALLOWED):
        _refuse(
            FailureCode.HEADER_NOT_ALLOWED,
            f"The header {name} cannot be set, like all hop-by-hop, framing, Host and metadata headers; leave it out.",
        )
    if not _HEADER_VALUE.fullmatch(value):
        _refuse(
            FailureCode.HEADER_INVALID,
            f"The value of the header {name} has a line end, control or non-ASCII character; encode it.",
        )


def _resolved(target: Target, location: str) -> str:
    """Make a relative reference absolute, dot segments and all (RFC 3986, 5.2.2)."""
    reference = location.partition("#")[0]
    path, mark, query = reference.partition("?")
    base_path, base_mark, base_query = target.path_query.partition("?")
    if path.startswith("//"):
        return f"{target.scheme}:{reference}"
    if not path:
        path, mark, query = base_path, mark or base_mark, query if mark else base_query
    elif not path.startswith("/"):
        path = _without_dots(_LAST_SEGMENT.sub("", base_path) + path)
    else:
        path = _without_dots(path)
    return f"{target.scheme}://{target.host}{path}{mark}{query}"


def _without_dots(path: str) -> str:
    """Remove the dot segments of an absolute path (RFC 3986, 5.2.4)."""
    kept: list[str] = []
    segments = path.split("/")[1:]
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in {".", ".."}:
        kept.append("")
    return "/" + "/".join(kept)


def _refuse_host() -> NoReturn:
    _refuse(
        FailureCode.HOST_INVALID,
        "The host must be a valid name, an IPv4 address of four decimal numbers or an IPv6 address in brackets.",
    )


def _refuse_local() -> NoReturn:
    _refuse(FailureCode.HOST_BLOCKED, f"The host is a name of a local network; {_ALLOW}.")


def _refuse_port() -> NoReturn:
    _refuse(FailureCode.PORT_NOT_ALLOWED, f"The port belongs to another protocol than HTTP; {_ALLOW}.")


def _refuse(code: FailureCode, detail: str) -> NoReturn:
    raise Refused(code, detail)
