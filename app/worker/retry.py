"""Whether a job is done, failed or tried again, how long its host is left alone, and what that tells its other jobs.

Decides only; does nothing.
"""

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from msgspec import Struct

from app.fetch.http import FetchRequest
from app.outcome import RETRYABLE, RETRYABLE_STATUSES, Failure, FailureCode, Outcome, Response

RETRY_FIRST_S = 1.0
RETRY_MAX_S = 300.0
RETRY_AFTER_MAX_S = 3600.0
RETRY_AFTER_JITTER = 0.05
BACK_OFF_FIRST_S = 1.0
BACK_OFF_MAX_S = 60.0
BACK_OFF_STATUSES = frozenset({429, 503})
BACK_OFF_CODES = frozenset({FailureCode.CONNECT_REFUSED, FailureCode.CONNECT_TIMEOUT, FailureCode.CONNECT_UNREACHABLE})
CONNECT_FAILURES_SHARED = 7
"""After so many in a row, which take over a minute, other jobs need not find out for themselves."""


class Verdict(Struct, frozen=True, gc=False, kw_only=True):
    """What becomes of the job: `succeeded`, `failed`, or `queued` again in `delay_s` seconds."""

    status: str
    delay_s: float = 0.0
    code: FailureCode | None = None
    detail: str | None = None


class SharedFailure(Struct, frozen=True, gc=False, kw_only=True):
    """A failure to connect that others need not meet for themselves, and of what request it was."""

    failure: Failure
    scheme: str
    connect_timeout_s: float

    def applies_to(self, request: FetchRequest) -> bool:
        """Whether this request to the same host has the same scheme, and is no more patient where that matters."""
        is_patient = request.limits.connect_timeout_s > self.connect_timeout_s
        return _scheme(request) == self.scheme and not (is_patient and self.failure.code is FailureCode.CONNECT_TIMEOUT)


def decide(
    outcome: Outcome, *, accepts: frozenset[int], attempts_made: int, attempts_max: int, repeatable: bool
) -> Verdict:
    """Judge an attempt by the job's own rule; `attempts_made` counts those charged, this one included.

    A request that must not be repeated is tried again only when nothing of it was sent.
    """
    if isinstance(outcome, Response) and outcome.status in accepts:
        return Verdict(status="succeeded")
    code, detail = _failure(outcome)
    may_retry = _is_curable(outcome) and (repeatable or _nothing_was_sent(outcome))
    if may_retry and attempts_made < attempts_max:
        return Verdict(status="queued", delay_s=_delay_s(outcome, attempts_made), code=code, detail=detail)
    return Verdict(status="failed", code=code, detail=detail)


def back_off_s(outcome: Outcome, *, back_offs: int) -> float | None:
    """Seconds to leave the whole host alone, `None` when it need not be; `back_offs` are those before, in a row.

    A host that only redirects to one that cannot be connected to is not left alone.
    """
    if outcome.status is not None:
        if outcome.status not in BACK_OFF_STATUSES:
            return None
        asked_s = retry_after_s(outcome)
    elif outcome.code in BACK_OFF_CODES and not outcome.evidence.redirects:
        asked_s = None
    else:
        return None
    return asked_s if asked_s is not None else min(BACK_OFF_MAX_S, BACK_OFF_FIRST_S * 2.0 ** min(back_offs, 10))


def got_through(outcome: Outcome) -> bool:
    """Whether the host answered, be it by leading elsewhere: its back-off, if there is one, is over."""
    return outcome.status is not None or bool(outcome.evidence.redirects)


def shared_failure(outcome: Outcome, request: FetchRequest, *, connect_failures: int) -> SharedFailure | None:
    """Make of what a host was backed off for what its other jobs may be told; `connect_failures` are those in a row.

    `None` while each has to try for itself: until it is certain enough that none can connect.
    """
    if isinstance(outcome, Response) or connect_failures < CONNECT_FAILURES_SHARED:
        return None
    detail = f"Not tried for itself: the last {connect_failures} tries could not connect to this host. {outcome.detail}"
    return SharedFailure(
        failure=Failure(code=outcome.code, detail=detail),
        scheme=_scheme(request),
        connect_timeout_s=request.limits.connect_timeout_s,
    )


def retry_after_s(answer: Outcome) -> float | None:
    """Read Retry-After as seconds from now, at most an hour (RFC 9110, 10.2.3); `None` without a usable one."""
    value = next((value.strip() for name, value in answer.headers if name.lower() == "retry-after"), None)
    if value is None:
        return None
    seconds = float(value[:10]) if value.isascii() and value.isdigit() else _seconds_until(value)
    return None if seconds is None else min(RETRY_AFTER_MAX_S, max(0.0, seconds))


def _scheme(request: FetchRequest) -> str:
    return request.url.partition(":")[0]


def _seconds_until(value: str) -> float | None:
    try:
        at = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return (at - datetime.now(UTC)).total_seconds()


def _failure(outcome: Outcome) -> tuple[FailureCode, str]:
    if isinstance(outcome, Failure):
        return outcome.code, outcome.detail
    return FailureCode.HTTP_STATUS, f"The server answered {outcome.status}, which accept_statuses does not accept."


def _is_curable(outcome: Outcome) -> bool:
    if isinstance(outcome, Failure):
        return outcome.code in RETRYABLE
    return outcome.status in RETRYABLE_STATUSES


def _nothing_was_sent(outcome: Outcome) -> bool:
    return isinstance(outcome, Failure) and not outcome.sent


def _delay_s(outcome: Outcome, attempts_made: int) -> float:
    """Full jitter over an exponential window (AWS, "Exponential Backoff And Jitter"), unless the server said when."""
    if isinstance(outcome, Response) and (asked_s := retry_after_s(outcome)) is not None:
        return min(RETRY_AFTER_MAX_S, asked_s * random.uniform(1.0, 1.0 + RETRY_AFTER_JITTER))
    return random.uniform(0.0, min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** (attempts_made - 1)))
