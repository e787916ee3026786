"""One attempt of a job: fetch, judge, and put what came back into the form in which it is stored."""

import asyncio
import hashlib
from typing import Any

from msgspec import json

from app.fetch.http import Move, OnConnection, fetch
from app.fetch.transport import Transport
from app.jobs import bodies
from app.jobs.values import NO_EVIDENCE, ClaimedJob, Result, Returned
from app.outcome import Failure, FailureCode, Outcome, Response
from app.worker import retry
from app.worker.options import JobOptions

CUT_OFF_WHEN = {
    FailureCode.LEASE_LOST: "its lease on the host was lost",
    FailureCode.SHUTDOWN_INTERRUPTED: "it was told to stop",
}


async def run(
    job: ClaimedJob, options: JobOptions, *, transport: Transport, move: Move, on_connection: OnConnection | None
) -> tuple[Outcome, Result]:
    """Fetch once; return the outcome and the result to store. Raises nothing but `CancelledError`."""
    outcome = await fetch(options.request, transport=transport, move=move, on_connection=on_connection)
    verdict = _decide(job, options, outcome)
    return outcome, await _result(job, outcome, verdict, places=transport.decoders.places)


def shared(job: ClaimedJob, options: JobOptions, failure: Failure, *, delay_s: float) -> Result:
    """The result of a job to which another one's failure applies; its next attempt is at least `delay_s` away."""
    verdict = _decide(job, options, failure)
    return Result(
        job=job,
        status=verdict.status,
        delay_s=max(verdict.delay_s, delay_s),
        error=verdict.code,
        error_detail=verdict.detail,
        evidence=NO_EVIDENCE,
    )


def cancelled(job: ClaimedJob, *, was_running: bool) -> Result:
    """The result of a job that its client cancelled while this worker had it, running or not."""
    evidence = NO_EVIDENCE if was_running else None
    return Result(job=job, status="cancelled", error=FailureCode.CANCELLED, evidence=evidence)


def interrupted(job: ClaimedJob, code: FailureCode) -> Result:
    """The result of a fetch that this worker had to cut off and that must not be repeated: it may have been sent."""
    return Result(
        job=job,
        status="failed",
        error=code,
        error_detail=f"The worker cut this request off, which may have been sent, because {CUT_OFF_WHEN[code]}. "
        "Set the option retry_unsafe to have such methods sent again.",
        evidence=NO_EVIDENCE,
    )


def returned(job: ClaimedJob, code: FailureCode) -> Returned:
    """Put back the job of a fetch that this worker had to cut off and that may be repeated."""
    detail = f"The worker cut this fetch off because {CUT_OFF_WHEN[code]}; the job was put back."
    return Returned(job=job, error=code, error_detail=detail)


def poisoned(job: ClaimedJob) -> Result:
    """The result of a job that brought its worker down while nothing else ran; it is not run again."""
    return Result(
        job=job,
        status="failed",
        error=FailureCode.POISONED,
        error_detail="Three workers were lost while they ran this job, the last one with nothing else to run.",
    )


def broken(job: ClaimedJob) -> Result:
    """The result of an attempt that a bug of ours ended; the log has the traceback under the job's id."""
    return Result(
        job=job,
        status="failed",
        error=FailureCode.INTERNAL_ERROR,
        error_detail="A fault of the service ended this attempt; the operator finds it in the log under the job's id.",
        evidence=NO_EVIDENCE,
    )


def _decide(job: ClaimedJob, options: JobOptions, outcome: Outcome) -> retry.Verdict:
    return retry.decide(
        outcome,
        accepts=options.accepts,
        attempts_made=job.attempt - job.lost,
        attempts_max=options.attempts_max,
        repeatable=job.repeatable,
    )


async def _result(job: ClaimedJob, outcome: Outcome, verdict: retry.Verdict, *, places: asyncio.Semaphore) -> Result:
    if isinstance(outcome, Failure) or verdict.status == "queued":
        return _assemble(job, outcome, verdict)
    if len(outcome.body) <= bodies.SMALL_BYTES_MAX:
        return _assemble(job, outcome, verdict, content=outcome.body)
    async with places:  # 16 MiB take 0.1 s, in which nothing else would run
        return await asyncio.to_thread(_assemble, job, outcome, verdict, content=outcome.body)


def _assemble(job: ClaimedJob, outcome: Outcome, verdict: retry.Verdict, *, content: bytes | None = None) -> Result:
    body, encoding = (None, "identity") if content is None else bodies.pack(content)
    return Result(
        job=job,
        status=verdict.status,
        delay_s=verdict.delay_s,
        error=verdict.code,
        error_detail=verdict.detail,
        http_status=outcome.status,
        evidence=_evidence_json(job, outcome),
        body=body,
        body_sha256=None if content is None else hashlib.sha256(content).digest(),
        encoding=encoding,
        wire_bytes=outcome.evidence.wire_bytes,
        body_bytes=outcome.evidence.body_bytes,
    )


def _evidence_json(job: ClaimedJob, outcome: Outcome) -> str:
    """JSON that PostgreSQL takes: without what is not known, is empty or the job's own, and the NUL it refuses."""
    stored = json.encode(outcome.evidence)
    if outcome.status is not None:
        more: dict[str, Any] = {"headers": outcome.headers}
        if isinstance(outcome, Response) and outcome.flags:
            more["flags"] = outcome.flags
        if outcome.final_url != job.url:
            more["final_url"] = outcome.final_url
        stored = stored[:-1] + b"," + json.encode(more)[1:]  # of two objects, neither of them empty, one
    return stored.decode().replace("\\u0000", "\\ufffd")
