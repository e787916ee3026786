"""Finds the addresses of a name, for a bounded time and number of lookups at once, and keeps them for their TTL.

Deliberately not `getaddrinfo`: it blocks a thread for as long as a name hangs, and hung names would starve the others.
It judges nothing: `addresses` has the policy do that anew at every attempt, for what was cached as for what was asked.
"""

import asyncio
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path

import aiodns
import pycares

from app.fetch.address import parse
from app.fetch.policy import Policy, Refused, Target, check_addresses
from app.outcome import FailureCode

ANSWERS_MAX = 64
"""Addresses of a name that are looked at, and so may be dialled; any beyond them are dropped."""

LOOKUPS_MAX = 256
"""Lookups on the wire at once: many more than may hang, yet hardly more than a name server's socket takes in one burst.
1,000 names took 1.1 s with 256 at once and 1.9 s with 1,000, as what overflows is asked again a second later."""

LOOKUPS_WAITING_MAX = 10_000
"""Names being looked up or waiting to be; one more fails as a timeout, which a later attempt may cure."""

CACHE_ENTRIES_MAX = 10_000
TTL_S_MAX = 300.0
NEGATIVE_TTL_S = 5.0
"""How long a name stays absent. c-ares does not show the TTL that RFC 2308 asks for, so it is short."""

STRAGGLER_S = 2.0
"""How long the slower of A and AAAA is waited for once the other settled it: some servers never answer AAAA. It covers
one packet that was lost and sent again."""

CHANNEL_LOOKUPS_MAX = 10_000
CHANNEL_S_MAX = 60.0
"""When a new c-ares channel takes over. Each has a cache that cannot be turned off from here, which grows without a
bound (1 KiB an answer) and keeps an empty answer for an hour, whatever its SOA says (c-ares 1.34.9, pycares 5.2)."""

HOSTS_FILE = Path("/etc/hosts")
HOSTS_BYTES_MAX = 4 * 2**20
HOSTS_CHECK_S = 5.0

LOOPBACK = ("::1", "127.0.0.1")

_FIRST_TIMEOUT_S = 1.0  # until c-ares knows how fast the servers answer
_SHORTEST_TIMEOUT_S = 0.25  # what c-ares goes down to then; it doubles with each try, less a jitter of up to a half

_DETAILS: Mapping[FailureCode, str] = {
    FailureCode.DNS_NOT_FOUND: "The host name does not exist; check its spelling.",
    FailureCode.DNS_NO_ADDRESS: "The host name exists but has no address; check the URL.",
    FailureCode.DNS_TIMEOUT: "The host name was not resolved in time; try again later.",
    FailureCode.DNS_FAILURE: "The name servers failed to resolve the host name; try again later.",
}


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a lookup came to: addresses or a failure, kept until a moment of the monotonic clock."""

    addresses: tuple[str, ...]
    failure: FailureCode | None
    expires_at: float = 0.0


@dataclass(frozen=True, slots=True)
class _Reply:
    """What the servers said to one query: addresses and their TTL, or a failure."""

    addresses: tuple[str, ...] = ()
    ttl_s: float = 0.0
    failure: FailureCode | None = None

    @property
    def settles(self) -> bool:
        """Whether the other query can add little: there are addresses, or the name does not exist at all."""
        return bool(self.addresses) or self.failure is FailureCode.DNS_NOT_FOUND


async def addresses(target: Target, resolver: "Resolver", policy: Policy) -> tuple[str, ...]:
    """Give the addresses to dial, in this order, at most 64; raise `Refused` if any of them is bad.

    Families alternate, IPv6 first (RFC 8305, 4). A literal address is judged as a name's is, without a lookup.
    """
    found = (target.hostname,) if target.is_literal else await resolver.resolve(target.hostname)
    check_addresses(target, found, policy)
    return found


class Resolver:
    """One per process; made and closed inside its event loop.

    `servers` are `address` or `address:port`, IPv6 with a port in brackets; none means the system's.
    """

    def __init__(
        self, *, servers: Sequence[str] = (), dns_timeout_s: float = 5.0, hosts_file: Path = HOSTS_FILE
    ) -> None:
        self._servers = tuple(servers)
        self._dns_timeout_s = dns_timeout_s
        self._hosts = _Hosts(hosts_file)
        self._cache: dict[str, _Answer] = {}
        self._lookups: dict[str, asyncio.Task[_Answer]] = {}
        self._places = asyncio.Semaphore(LOOKUPS_MAX)
        self._retiring: dict[asyncio.Task[None], aiodns.DNSResolver] = {}
        self._closed = False
        self._renew_channel()

    async def resolve(self, hostname: str) -> tuple[str, ...]:
        """Give the addresses of a name in ASCII, at most 64, families alternating; raise `Refused` with a `dns_` code.

        Cancelling it leaves a shared lookup to those who share it.
        """
        answer = self._known(hostname) or await self._shared(hostname)
        if answer.failure is not None:
            raise Refused(answer.failure, _DETAILS[answer.failure])
        return answer.addresses

    async def aclose(self) -> None:
        """End every lookup and close the sockets; those who wait for a lookup see `dns_failure`."""
        self._closed = True
        for channel in (self._channel, *self._retiring.values()):
            await channel.close()
        if running := [*self._lookups.values(), *self._retiring]:
            await asyncio.wait(running)

    def _known(self, hostname: str) -> _Answer | None:
        if local := self._hosts.find(hostname):
            return _Answer(local, None)
        answer = self._cache.get(hostname)
        if answer is None or answer.expires_at > time.monotonic():
            return answer
        del self._cache[hostname]
        return None

    async def _shared(self, hostname: str) -> _Answer:
        lookup = self._lookups.get(hostname)
        if lookup is None:
            if len(self._lookups) >= LOOKUPS_WAITING_MAX:
                return _Answer((), FailureCode.DNS_TIMEOUT)
            lookup = asyncio.create_task(self._look_up(hostname))
            self._lookups[hostname] = lookup
            lookup.add_done_callback(partial(self._keep, hostname))
        return await asyncio.shield(lookup)

    def _keep(self, hostname: str, lookup: asyncio.Task[_Answer]) -> None:
        del self._lookups[hostname]
        if lookup.cancelled() or lookup.exception() or lookup.result().expires_at <= time.monotonic():
            return
        self._cache.pop(hostname, None)
        if len(self._cache) >= CACHE_ENTRIES_MAX:
            del self._cache[next(iter(self._cache))]
        self._cache[hostname] = lookup.result()

    async def _look_up(self, hostname: str) -> _Answer:
        try:
            async with asyncio.timeout(self._dns_timeout_s), self._places:
                return _decide(await self._ask(hostname))
        except TimeoutError:
            return _Answer((), FailureCode.DNS_TIMEOUT)

    async def _ask(self, hostname: str) -> list[_Reply]:
        """Query AAAA and A once each; whichever is not answered in time counts as a timeout."""
        if self._closed:
            return [_Reply(failure=FailureCode.DNS_FAILURE)]
        channel = self._next_channel()
        queries = [channel.query_dns(hostname, kind) for kind in ("AAAA", "A")]
        try:
            done, pending = await asyncio.wait(queries, return_when=asyncio.FIRST_COMPLETED)
            if pending:
                settled = any(_read(query).settles for query in done)
                await asyncio.wait(pending, timeout=STRAGGLER_S if settled else None)
            return [_read(query) for query in queries]
        finally:
            for query in queries:
                # One that failed is read here too: asyncio logs an exception that nobody looked at.
                query.cancel() or query.cancelled() or query.exception()

    def _next_channel(self) -> aiodns.DNSResolver:
        self._channel_lookups += 1
        if self._channel_lookups > CHANNEL_LOOKUPS_MAX or time.monotonic() > self._channel_until:
            retiring = asyncio.create_task(_retire(self._channel, list(self._lookups.values())))
            self._retiring[retiring] = self._channel
            retiring.add_done_callback(self._retiring.pop)
            self._renew_channel()
        return self._channel

    def _renew_channel(self) -> None:
        self._channel = self._open_channel()
        self._channel_lookups = 0
        self._channel_until = time.monotonic() + CHANNEL_S_MAX

    def _open_channel(self) -> aiodns.DNSResolver:
        return aiodns.DNSResolver(
            nameservers=self._servers or None,
            loop=asyncio.get_running_loop(),
            timeout=min(_FIRST_TIMEOUT_S, self._dns_timeout_s),
            tries=_tries(self._dns_timeout_s),
        )


class _Hosts:
    """The hosts file: read again when it changed, looked at every few seconds at most."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: dict[str, tuple[str, ...]] = {}
        self._version: tuple[int, int] | None = None
        self._check_at = 0.0

    def find(self, hostname: str) -> tuple[str, ...]:
        """Give the addresses the file has for a name, or none; localhost needs no entry (RFC 6761, 6.3)."""
        now = time.monotonic()
        if now >= self._check_at:
            self._check_at = now + HOSTS_CHECK_S
            self._refresh()
        found = self._names.get(hostname, ())
        if not found and (hostname == "localhost" or hostname.endswith(".localhost")):
            return LOOPBACK
        return found

    def _refresh(self) -> None:
        try:
            status = self._path.stat()
            version = (status.st_mtime_ns, status.st_size)
            if version == self._version:
                return
            with self._path.open(encoding="utf-8", errors="replace") as file:
                self._names = _read_hosts(file.read(HOSTS_BYTES_MAX).splitlines())
            self._version = version
        except OSError:  # no such file, or not ours to read: then it names nothing
            self._names, self._version = {}, None


def _read_hosts(lines: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Map each name to its addresses; lines that are not of the format are passed over (hosts(5))."""
    found: dict[str, dict[str, None]] = {}
    for line in lines:
        address, *names = line.partition("#")[0].split() or [""]
        if _is_address(address):
            for name in names:
                found.setdefault(name.lower().removesuffix("."), {})[address] = None
    return {name: _in_order(entries) for name, entries in found.items()}


def _is_address(text: str) -> bool:
    try:
        return "%" not in text and bool(parse(text))
    except ValueError:
        return False


def _read(query: "asyncio.Future[pycares.DNSResult]") -> _Reply:
    if not query.done():
        return _Reply(failure=FailureCode.DNS_TIMEOUT)
    error = query.exception()
    if error is not None:
        return _Reply(failure=_failure(error))
    # Aliases stand in the same answer, and their TTLs count too; records for other names do not come from resolvers.
    records = query.result().answer
    found = tuple(
        record.data.addr for record in records if isinstance(record.data, pycares.ARecordData | pycares.AAAARecordData)
    )
    if not found:
        return _Reply(failure=FailureCode.DNS_NO_ADDRESS)
    return _Reply(found, ttl_s=min(record.ttl for record in records))


def _failure(error: BaseException) -> FailureCode:
    """Tell apart what c-ares reports; whatever is not known is a failure of the servers."""
    match error.args[0] if isinstance(error, aiodns.error.DNSError) else None:
        case aiodns.error.ARES_ENOTFOUND:
            return FailureCode.DNS_NOT_FOUND
        case aiodns.error.ARES_ENODATA:
            return FailureCode.DNS_NO_ADDRESS
        case aiodns.error.ARES_ETIMEOUT:
            return FailureCode.DNS_TIMEOUT
        case _:
            return FailureCode.DNS_FAILURE


def _decide(replies: Sequence[_Reply]) -> _Answer:
    """Make one answer of the replies for AAAA and A; addresses of either will do.

    Without any, what is certain (the name does not exist) comes first, then what another attempt may cure.
    """
    found = _in_order(chain.from_iterable(reply.addresses for reply in replies))
    now = time.monotonic()
    if found:
        return _Answer(found, None, now + min(TTL_S_MAX, *(reply.ttl_s for reply in replies if reply.addresses)))
    failures = {reply.failure for reply in replies}
    for code in (FailureCode.DNS_NOT_FOUND, FailureCode.DNS_TIMEOUT, FailureCode.DNS_FAILURE):
        if code in failures:
            return _Answer((), code, now + NEGATIVE_TTL_S if code is FailureCode.DNS_NOT_FOUND else 0.0)
    return _Answer((), FailureCode.DNS_NO_ADDRESS, now + NEGATIVE_TTL_S)


def _in_order(found: Iterable[str]) -> tuple[str, ...]:
    """Alternate IPv6 and IPv4, each in the order given, and cut; a cut list so keeps some of both."""
    unique = tuple(dict.fromkeys(found))
    six = (text for text in unique if ":" in text)
    four = (text for text in unique if ":" not in text)
    mixed = (text for pair in zip_longest(six, four) for text in pair if text is not None)
    return tuple(islice(mixed, ANSWERS_MAX))


def _tries(dns_timeout_s: float) -> int:
    """Give the tries whose timeouts together surely outlast ours: ours is the deadline, theirs only ask again."""
    return 1 + math.ceil(math.log2(dns_timeout_s / _SHORTEST_TIMEOUT_S + 1))


async def _retire(channel: aiodns.DNSResolver, lookups: list["asyncio.Task[_Answer]"]) -> None:
    """Close a channel when the lookups that may use it have ended."""
    if lookups:
        await asyncio.wait(lookups)
    await channel.close()
