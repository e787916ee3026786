"""One attempt of a job: fetch, judge, and put what came back into the form in which it is stored."""

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import fields
from typing import Any

import zstandard

from app.fetch.http import fetch
from app.fetch.transport import Transport
from app.jobs.values import ClaimedJob, Result
from app.outcome import Evidence, FailureCode, Outcome, Response
from app.worker import retry
from app.worker.options import JobOptions

COMPRESS_BYTES_MIN = 512
COMPRESS_GAIN_MIN = 0.9
"""A body is kept compressed when that makes it at most this fraction of itself."""
COMPRESSOR = zstandard.ZstdCompressor(level=1)
"""Made once: making one costs more than compressing a page. Not for use by several threads."""
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
    return outcome, _result(job, outcome, verdict)


def cancelled(job: ClaimedJob) -> Result:
    """The result of a job that its client cancelled while this worker had it."""
    return Result(job=job, status="cancelled", error=FailureCode.CANCELLED)


def broken(job: ClaimedJob) -> Result:
    """The result of an attempt that a bug of ours ended; the log has the traceback under the job's id."""
    return Result(
        job=job,
        status="failed",
        error=FailureCode.INTERNAL_ERROR,
        error_detail="A fault of the service ended this attempt; the operator finds it in the log under the job's id.",
    )


def _result(job: ClaimedJob, outcome: Outcome, verdict: retry.Verdict) -> Result:
    evidence = outcome.evidence
    is_kept = isinstance(outcome, Response) and verdict.status != "queued"
    body, encoding, sha256 = (
        _stored_body(outcome.body) if is_kept and isinstance(outcome, Response) else (None, "", None)
    )
    return Result(
        job=job,
        status=verdict.status,
        delay_s=verdict.delay_s,
        error=verdict.code,
        error_detail=verdict.detail,
        http_status=outcome.status if isinstance(outcome, Response) else None,
        evidence=_evidence_json(outcome, evidence),
        body=body,
        body_sha256=sha256,
        encoding=encoding,
        wire_bytes=evidence.wire_bytes,
        body_bytes=evidence.body_bytes,
    )


def _stored_body(content: bytes) -> tuple[bytes, str, bytes]:
    sha256 = hashlib.sha256(content).digest()
    if len(content) >= COMPRESS_BYTES_MIN:
        packed = COMPRESSOR.compress(content)
        if len(packed) <= len(content) * COMPRESS_GAIN_MIN:
            return packed, "zstd", sha256
    return content, "identity", sha256


def _evidence_json(outcome: Outcome, evidence: Evidence) -> str:
    """JSON that PostgreSQL takes: without what is not known, and without the NUL it refuses."""
    stored: dict[str, Any] = {name: value for name in EVIDENCE if (value := getattr(evidence, name)) is not None}
    stored["redirects"] = [{"url": hop.url, "status": hop.status} for hop in evidence.redirects]
    if isinstance(outcome, Response):
        stored |= {"final_url": outcome.final_url, "headers": outcome.headers, "flags": outcome.flags}
    return json.dumps(stored, separators=(",", ":")).replace("\\u0000", "\\ufffd")
