"""One attempt of a job: fetch, judge, and put what came back into the form in which it is stored."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace
from typing import Any

from app.fetch.http import fetch
from app.fetch.transport import Transport
from app.jobs import bodies
from app.jobs.values import ClaimedJob, Result
from app.outcome import Evidence, Failure, FailureCode, Outcome, Response
from app.worker import retry
from app.worker.options import JobOptions

INLINE_BYTES_MAX = 128 * 2**10
"""Larger bodies are hashed and compressed in a thread: 16 MiB take 0.1 s, in which nothing else would run."""

EVIDENCE = tuple(part.name for part in fields(Evidence))


async def run(
    job: ClaimedJob, options: JobOptions, *, transport: Transport, move: Callable[[str], Awaitable[None]]
) -> tuple[Outcome, Result]:
    """Fetch once; return the outcome and the result to store. Raises nothing but `CancelledError`."""
    outcome = await fetch(options.request, transport=transport, move=move)
    verdict = retry.decide(
        outcome,
        accepts=options.accepts,
        attempts_made=job.attempt - job.lost,
        attempts_max=options.attempts_max,
        repeatable=job.repeatable,
    )
    return outcome, await _result(job, outcome, verdict, places=transport.decoders.places)


def cancelled(job: ClaimedJob) -> Result:
    """The result of a job that its client cancelled while this worker had it."""
    return Result(job=job, status="cancelled", error=FailureCode.CANCELLED)


def interrupted(job: ClaimedJob, *, is_lease_lost: bool) -> Result:
    """The result of a fetch that this worker had to cut off and that must not be repeated: it may have been sent."""
    why = "its lease on the host was lost" if is_lease_lost else "it was told to stop"
    return Result(
        job=job,
        status="failed",
        error=FailureCode.LEASE_LOST if is_lease_lost else FailureCode.SHUTDOWN_INTERRUPTED,
        error_detail=f"The worker cut this request off, which may have been sent, because {why}. "
        "Set the option retry_unsafe to have such methods sent again.",
    )


def broken(job: ClaimedJob) -> Result:
    """The result of an attempt that a bug of ours ended; the log has the traceback under the job's id."""
    return Result(
        job=job,
        status="failed",
        error=FailureCode.INTERNAL_ERROR,
        error_detail="A fault of the service ended this attempt; the operator finds it in the log under the job's id.",
    )


async def _result(job: ClaimedJob, outcome: Outcome, verdict: retry.Verdict, *, places: asyncio.Semaphore) -> Result:
    evidence = outcome.evidence
    result = Result(
        job=job,
        status=verdict.status,
        delay_s=verdict.delay_s,
        error=verdict.code,
        error_detail=verdict.detail,
        http_status=outcome.status if isinstance(outcome, Response) else None,
        evidence=_evidence_json(outcome, evidence),
        wire_bytes=evidence.wire_bytes,
        body_bytes=evidence.body_bytes,
    )
    if isinstance(outcome, Failure) or verdict.status == "queued":
        return result
    if len(outcome.body) <= INLINE_BYTES_MAX:
        return _with_body(result, outcome.body)
    async with places:
        return await asyncio.to_thread(_with_body, result, outcome.body)


def _with_body(result: Result, content: bytes) -> Result:
    body, encoding = bodies.pack(content)
    return replace(result, body=body, encoding=encoding, body_sha256=hashlib.sha256(content).digest())


def _evidence_json(outcome: Outcome, evidence: Evidence) -> str:
    """JSON that PostgreSQL takes: without what is not known, and without the NUL it refuses."""
    stored: dict[str, Any] = {name: value for name in EVIDENCE if (value := getattr(evidence, name)) is not None}
    stored["redirects"] = [{"url": hop.url, "status": hop.status} for hop in evidence.redirects]
    if isinstance(outcome, Response):
        stored |= {"final_url": outcome.final_url, "headers": outcome.headers, "flags": outcome.flags}
    return json.dumps(stored, separators=(",", ":")).replace("\\u0000", "\\ufffd")
