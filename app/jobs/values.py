"""The values that pass between the queue and its callers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from msgspec import Struct

from app.jobs.ids import host_hash

CRASHES_OF_SUSPECT = 2
NO_EVIDENCE = "{}"
"""Of an attempt that counts, and of whose fetch nothing is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBatch:
    """A batch as accepted; `options` holds what the client set, `skipped` the entries left out."""

    id: UUID
    name: str | None
    metadata: dict[str, Any] | None
    options: dict[str, Any]
    skipped: list[dict[str, Any]]
    idempotency_key: str | None = None
    request_sha256: bytes | None = None


class Extras(Struct, frozen=True, gc=False):
    """What a new job has beyond its URL; `request` and `metadata` are JSON text, `method` is that of the request."""

    method: str | None
    request: str | None
    custom_id: str | None
    metadata: str | None


@dataclass(frozen=True, slots=True)
class NewJobs:
    """The jobs of a new batch, column by column; a job's position is its index, and its key in `extras` if it has any.

    Not an object for each that is garbage to collect: full passes over 100,000 of them stopped every thread for 0.3 s.
    """

    urls: list[str] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    host_hashes: list[int] = field(default_factory=list)
    extras: dict[int, Extras] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """Count the jobs."""
        return len(self.urls)

    def add(
        self,
        url: str,
        host: str,
        *,
        request: dict[str, Any] | None = None,
        custom_id: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Add one URL to fetch; `request` holds only what differs from the batch's options."""
        if request or custom_id is not None or metadata is not None:
            method = request.get("method") if request else None
            self.extras[len(self.urls)] = Extras(method, to_json(request or None), custom_id, to_json(metadata))
        self.urls.append(url)
        self.hosts.append(self._names.setdefault(host, host))  # once in memory, however many URLs it has
        self.host_hashes.append(host_hash(host))


class ClaimedJob(Struct, frozen=True, gc=False):
    """A job that is this worker's to run, while it holds `lease` on the job's host; `attempt` counts from 1.

    Its fields are columns of `job`, in the order in which claims return them. `request` has what it asks for other than
    its batch, if anything.
    """

    shard: int
    id: UUID
    batch_id: UUID
    host: str
    url: str
    request: dict[str, Any] | None
    repeatable: bool
    attempt: int
    lost: int
    crashes: int
    lease: int
    accused: bool = False

    @property
    def is_suspect(self) -> bool:
        """Whether it was running at so many crashes that it must run alone to be cleared or convicted."""
        return self.crashes >= CRASHES_OF_SUSPECT


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The exclusive right to talk to a host; `number` is new at every claim.

    `back_offs` counts those in a row, `connect_failures` the latest of them in a row that were failures to connect.
    """

    shard: int
    host: str
    number: int
    back_offs: int = 0
    connect_failures: int = 0

    def first_jobs(self, most: int) -> int:
        """Jobs to claim together with it: those that can start at once, one where the host is backed off."""
        return 1 if self.back_offs else most


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A host with running jobs that no lease covers.

    `was_leased` is false where its worker gave it back, and so lives, but never knew of these jobs: the commit of its
    refill was not confirmed.
    """

    shard: int
    host: str
    was_leased: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """A job put back; `error` says why its fetch was cut off, `None` that nothing was sent."""

    job: ClaimedJob
    error: str | None = None
    error_detail: str | None = None


class Result(Struct, frozen=True, gc=False, kw_only=True):
    """What an attempt came to, as it shall be stored.

    `status` is `succeeded`, `failed` or `cancelled`, or `queued` for a retry in `delay_s` seconds. `body` is as stored,
    under `encoding`; `evidence` is JSON text, `None` when this was no attempt.
    """

    job: ClaimedJob
    status: str
    delay_s: float = 0.0
    error: str | None = None
    error_detail: str | None = None
    http_status: int | None = None
    evidence: str | None = None
    body: bytes | None = None
    body_sha256: bytes | None = None
    encoding: str = "identity"
    wire_bytes: int = 0
    body_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The batches of which a shard has nothing left to run, and the jobs whose results came too late."""

    maybe_finished: set[UUID]
    dropped: Sequence[ClaimedJob]


def to_json(value: dict[str, Any] | list[dict[str, Any]] | None) -> str | None:
    """Write a value as JSON text for PostgreSQL, `None` as NULL."""
    return None if value is None else _JSON.encode(value)


_JSON = json.JSONEncoder(separators=(",", ":"))
"""Kept, for `json.dumps` makes a new one each time it is told the separators: half the cost of a small value."""
