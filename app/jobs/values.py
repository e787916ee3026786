"""The values that pass between the queue and its callers."""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

CRASHES_OF_SUSPECT = 2


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


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """One URL to fetch; `request` holds only what differs from the batch's options."""

    url: str
    host: str
    request: dict[str, Any] | None = None
    custom_id: str | None = None
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedJob:
    """A job that is this worker's to run, while it holds `lease` on the job's host; `attempt` counts from 1."""

    shard: int
    id: UUID
    batch_id: UUID
    host: str
    url: str
    request: dict[str, Any]
    repeatable: bool
    attempt: int
    lost: int
    crashes: int
    lease: int

    @property
    def is_suspect(self) -> bool:
        """Whether it was running at so many crashes that it must run alone to be cleared or convicted."""
        return self.crashes >= CRASHES_OF_SUSPECT


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The exclusive right to talk to a host; `number` is new at every claim, `back_offs` counts those in a row."""

    shard: int
    host: str
    number: int
    back_offs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What an attempt came to, as it shall be stored.

    `status` is `succeeded`, `failed` or `cancelled`, or `queued` for a retry in `delay_s` seconds. `body` is as stored,
    under `encoding`; `evidence` is JSON text.
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
    """Which results were stored, and the batches of which a shard has nothing left to run.

    `count` includes results found already stored by an earlier try; the others came too late and were dropped.
    """

    count: int
    maybe_finished: set[UUID]
