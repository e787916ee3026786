"""Identifiers that carry their place: a job's id names its shard, a batch's id its time."""

import hashlib
import os
import time
from functools import lru_cache
from uuid import UUID


def new_batch_id() -> UUID:
    """Make a UUID version 7 (RFC 9562, 5.7): batches sort by the time they were accepted."""
    return _uuid(_now_ms(), version=7, middle=_random_bits(12))


def new_job_id(host: str) -> UUID:
    """Make a UUID version 8 in version 7's layout whose 12 middle bits are the host's hash."""
    return _uuid(_now_ms(), version=8, middle=host_hash(host))


def shard_of_host(host: str) -> int:
    """Return the shard, 0 to 255: the top 8 bits of the host's hash, for ever."""
    return host_hash(host) >> 4


def shard_of_job(job_id: UUID) -> int:
    """Read the shard off a job's id; any UUID gives some shard, and a foreign one finds nothing there."""
    return (job_id.int >> 68) & 0xFF


@lru_cache(maxsize=65_536)
def host_hash(host: str) -> int:
    """Hash a host to 12 bits. BLAKE2b, because Python's own hash differs from process to process."""
    digest = hashlib.blake2b(host.encode(), digest_size=2).digest()
    return int.from_bytes(digest, "big") >> 4


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _random_bits(count: int) -> int:
    return int.from_bytes(os.urandom(8), "big") >> (64 - count)


def _uuid(now_ms: int, *, version: int, middle: int) -> UUID:
    return UUID(int=(now_ms << 80) | (version << 76) | (middle << 64) | (0b10 << 62) | _random_bits(62))
