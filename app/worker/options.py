"""What one job asks for: the operator's defaults, overridden by its batch, overridden by itself."""

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from msgspec import Struct, structs

from app.fetch.http import FetchRequest
from app.fetch.limits import Limits
from app.jobs.values import ClaimedJob

ATTEMPTS_DEFAULT = 3
ACCEPTED_DEFAULT = ("2xx",)

CONNECT_SHARE = 0.9
"""Of `timeout_s`: the most a connection may take, so that a silent host is told as such, and rests."""

LIMIT_NAMES = tuple(limit.name for limit in fields(Limits))
"""The limits of a fetch; the options of a batch or job that set them have the same names, and so have the settings."""


class JobOptions(Struct, frozen=True, gc=False, kw_only=True):
    """A job's request, and the rules by which its outcome is judged."""

    request: FetchRequest
    accepts: frozenset[int]
    attempts_max: int


@dataclass(frozen=True, slots=True)
class SharedOptions:
    """What the jobs of a batch ask for: `asked` as the client set it, `common` merged for a job that adds nothing."""

    defaults: Limits
    asked: dict[str, Any]
    common: JobOptions


def for_batch(asked: dict[str, Any], defaults: Limits) -> SharedOptions:
    """Merge the operator's defaults and the options of a batch, once for all its jobs."""
    return SharedOptions(defaults, asked, _merged("", asked, {}, defaults))


def for_job(job: ClaimedJob, batch: SharedOptions) -> JobOptions:
    """Merge in what a job itself asks for; its headers replace those of the batch by name."""
    common = batch.common
    if not job.request:
        return structs.replace(common, request=structs.replace(common.request, url=job.url))
    return _merged(job.url, batch.asked, job.request, batch.defaults)


def _merged(url: str, batch: dict[str, Any], job: dict[str, Any], defaults: Limits) -> JobOptions:
    asked = {**batch, **job}
    body = asked.get("body")
    return JobOptions(
        request=FetchRequest(
            url=url,
            method=asked.get("method", "GET"),
            headers=_headers(batch, job),
            body=body.encode() if body is not None else None,
            follow_redirects=asked.get("follow_redirects", True),
            limits=_limits(asked, defaults),
        ),
        accepts=accepted(tuple(asked.get("accept_statuses", ACCEPTED_DEFAULT))),
        attempts_max=asked.get("max_attempts", ATTEMPTS_DEFAULT),
    )


@lru_cache(maxsize=256)
def accepted(patterns: tuple[str, ...]) -> frozenset[int]:
    """Expand `2xx`, `404` and `200-299` to the statuses they stand for."""
    return frozenset(status for pattern in patterns for status in _expand(pattern))


def _expand(pattern: str) -> range:
    if pattern.endswith("xx"):
        first = int(pattern[0]) * 100
        return range(first, first + 100)
    first_text, _, last_text = pattern.partition("-")
    return range(int(first_text), int(last_text or first_text) + 1)


def _headers(batch_options: dict[str, Any], request: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    own = [(name, value) for name, value in request.get("headers", ())]
    if not (shared := batch_options.get("headers")):
        return tuple(own)
    own_names = {name.lower() for name, _ in own}
    return (*((name, value) for name, value in shared if name.lower() not in own_names), *own)


def _limits(asked: dict[str, Any], defaults: Limits) -> Limits:
    limits = {name: asked.get(name, getattr(defaults, name)) for name in LIMIT_NAMES}
    limits["connect_timeout_s"] = min(limits["connect_timeout_s"], limits["timeout_s"] * CONNECT_SHARE)
    return Limits(**limits)
