"""Identifiers that carry their place: a job's id names its shard, a batch's id its time."""

import hashlib
import os
import struct
import time
from collections.abc import Sequence
from functools import lru_cache
from uuid import UUID

_HALVES = struct.Struct(">QQ")


def new_batch_id() -> UUID:
    """Make a UUID version 7 (RFC 9562, 5.7): batches sort by the time they were accepted."""
    middle, last = struct.unpack(">HQ", os.urandom(10))
    return UUID(bytes=_id_bytes(_now_ms(), version=7, middle=middle & 0xFFF, last=last))


def new_job_ids(host_hashes: Sequence[int]) -> list[bytes]:
    """Make a UUID version 8 for each host hash given, in version 7's layout, whose 12 middle bits are the hash.

    Those of a host are in the order given, so that jobs whose keys are neighbours lie in neighbouring rows. As 16
    bytes: UUID objects, and entropy asked for one by one, took four times as long.
    """
    now_ms = _now_ms()
    entropy = sorted(struct.unpack(f">{len(host_hashes)}Q", os.urandom(8 * len(host_hashes))))
    return [
        _id_bytes(now_ms, version=8, middle=host_hash, last=last)
        for host_hash, last in zip(host_hashes, entropy, strict=True)
    ]


def shard_of_host(host: str) -> int:
    """Return the shard, 0 to 255, for ever."""
    return shard_of_hash(host_hash(host))


def shard_of_hash(host_hash: int) -> int:
    """Return the shard of a host hash: its top 8 bits."""
    return host_hash >> 4


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


def _id_bytes(now_ms: int, *, version: int, middle: int, last: int) -> bytes:
    variant_and_random = last >> 2 | 0x8000_0000_0000_0000
    return _HALVES.pack(now_ms << 16 | version << 12 | middle, variant_and_random)
