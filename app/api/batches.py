"""Batches over HTTP: submit, list, show, their jobs and results, cancel, delete."""

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import Annotated, Literal, assert_never
from uuid import UUID

from fastapi import APIRouter, Header, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.responses import Response

from app.api import examples, paging, problems, results
from app.api.context import Context, context_of
from app.api.intake import Submission
from app.api.problems import Problem
from app.api.replies import IfNoneMatch, Representation, reply, reply_page, represent
from app.api.routing import StrictRoute
from app.api.schemas import (
    BATCH_ID_EXAMPLE,
    FINISHED_BATCH,
    BatchPage,
    BatchStatus,
    BatchView,
    CustomId,
    FinishedStatus,
    JobPage,
    JobStatus,
    Name,
    batch_view,
    job_view,
)
from app.api.waiting import Prefer, applied, wait_asked_s
from app.jobs import batches, hints, queue, reads
from app.jobs.database import DATABASE_ERRORS, is_conflict, is_passing, reason
from app.jobs.values import NewBatch
from app.outcome import FailureCode

logger = logging.getLogger(__name__)

BATCHES_PAGE_MAX = 200
JOBS_PAGE_MAX = 1_000
HINT_TIMEOUT_S = 2.0
COMMIT_TRIES_MAX = 3
NO_NUL = r"^[^\x00]*$"
LOOK_AGAIN = {"Retry-After": "1"}
"""After how many seconds an unfinished batch is worth another look."""

router = APIRouter(
    prefix="/v1/batches", route_class=StrictRoute, tags=["Batches"], responses=problems.documented(*problems.EVERYWHERE)
)

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[!-~]{1,255}$",
        description="A name of your own for this request, best a UUID: sent again within 24 hours, with the same body, "
        "byte for byte, it stores nothing and is answered as the first time.",
    ),
]

BatchId = Annotated[UUID, Path(description="The batch's id.", examples=[BATCH_ID_EXAMPLE])]


@dataclass(frozen=True, slots=True)
class Seen:
    """A batch at one moment, as it is shown."""

    representation: Representation
    is_finished: bool


class BatchesQuery(BaseModel):
    """Which batches to list."""

    model_config = ConfigDict(extra="forbid")

    status: BatchStatus | None = Field(default=None, description="Only batches of this status.")
    name: Name | None = Field(default=None, pattern=NO_NUL, description="Only batches of exactly this name.")
    limit: int = Field(default=50, ge=1, le=BATCHES_PAGE_MAX, description="Most batches of one page.")
    cursor: str | None = Field(
        default=None, pattern=paging.CURSOR_PATTERN, description="`next_cursor` of the page before."
    )


class JobsQuery(BaseModel):
    """Which jobs of a batch to list."""

    model_config = ConfigDict(extra="forbid")

    status: JobStatus | None = Field(default=None, description="Only jobs of this status.")
    error: FailureCode | None = Field(default=None, description="Only jobs with this failure code.")
    http_status: int | None = Field(default=None, ge=100, le=599, description="Only jobs with this HTTP status.")
    host: str | None = Field(
        default=None, pattern=r"^[!-~]{1,300}$", description="Only jobs of this host, as jobs show it."
    )
    custom_id: CustomId | None = Field(
        default=None, pattern=NO_NUL, description="Only jobs with exactly this `custom_id`."
    )
    limit: int = Field(default=100, ge=1, le=JOBS_PAGE_MAX, description="Most jobs of one page.")
    cursor: str | None = Field(
        default=None, pattern=paging.CURSOR_PATTERN, description="`next_cursor` of the page before."
    )


class ResultsQuery(BaseModel):
    """Which results to stream, and what they show."""

    model_config = ConfigDict(extra="forbid")

    include: Literal["body", "headers", "body,headers", "headers,body"] | None = Field(
        default=None,
        description="What each line has as well: `body`, the response's `headers`, or both: `body,headers`.",
    )
    status: FinishedStatus | None = Field(default=None, description="Only jobs of this status.")
    after: int = Field(
        default=-1,
        ge=-1,
        le=paging.POSITION_MAX,
        description="Only jobs behind this `position`: that of the last whole line of a stream that broke off. Of an "
        "unfinished batch, jobs before it may have finished since: they are not shown.",
    )


@router.post(
    "",
    status_code=202,
    response_model=BatchView,
    operation_id="createBatch",
    summary="Submit a batch of URLs",
    description="Every URL becomes a job, durable before the answer is sent. One invalid entry refuses the whole "
    "batch, or, with `on_invalid: skip`, is left out and listed.",
    response_description="The batch is stored; Location says where to look for what comes of it.",
    responses={
        200: {
            "model": BatchView,
            "description": "The batch finished within the preferred wait.",
            "headers": examples.CREATED_HEADERS,
        },
        202: {"headers": examples.CREATED_HEADERS},
        **problems.documented(
            problems.INVALID_JSON,
            problems.BODY_TOO_SLOW,
            problems.BODY_TOO_LARGE,
            problems.MEDIA_TYPE_NOT_SUPPORTED,
            problems.INVALID_REQUEST,
            problems.TOO_MANY_JOBS,
            problems.INVALID_PARAMETER,
            problems.IDEMPOTENCY_KEY_IN_USE,
            problems.IDEMPOTENCY_KEY_REUSED,
            problems.BUSY,
            problems.DATABASE_UNAVAILABLE,
            problems.OVERLOADED,
            problems.STOPPING,
        ),
    },
    openapi_extra=examples.BATCH_REQUEST,
)
async def create_batch(request: Request, idempotency_key: IdempotencyKey = None, prefer: Prefer = None) -> Response:
    """Take a batch in, store it, and only then answer."""
    context, wait_s = context_of(request), wait_asked_s(prefer)
    batch_id, stored = await _store(request, context, idempotency_key)
    await _hint(context)
    headers = {"Location": f"/v1/batches/{batch_id}"}
    seen = None if wait_s is None else await _wait_until_finished(request, context, batch_id=batch_id, wait_s=wait_s)
    if seen is None:
        return _show(stored, status=202, headers=headers)
    return _show(seen, status=200 if seen.is_finished else 202, headers={**headers, **applied(wait_s)})


@router.get(
    "",
    response_model=BatchPage,
    operation_id="listBatches",
    summary="List batches, newest first",
    responses={
        200: {"headers": examples.PAGE_HEADERS},
        **problems.documented(problems.INVALID_PARAMETER, problems.INVALID_CURSOR),
    },
)
async def list_batches(request: Request, query: Annotated[BatchesQuery, Query()]) -> Response:
    """Show a page of batches."""
    before = paging.read_batch_cursor(query.cursor)
    async with context_of(request).sessions.begin() as session:
        # One more than the page, to know whether there is another.
        found = await reads.list_batches(
            session, limit=query.limit + 1, before=before, status=query.status, name=query.name
        )
    shown = found[: query.limit]
    cursor = paging.batch_cursor(shown[-1].id) if len(found) > query.limit else None
    links = paging.next_link("/v1/batches", _given(query), cursor)
    return await reply_page(map(batch_view, shown), cursor=cursor, headers=links)


@router.get(
    "/{batch_id}",
    response_model=BatchView,
    operation_id="getBatch",
    summary="Show a batch and its counts",
    description="Cheap to ask often, whatever the batch's size; cheaper with If-None-Match, or with `Prefer: wait`.",
    responses={
        200: {"headers": examples.FOLLOW_HEADERS},
        304: {"description": "The batch is still as If-None-Match says."},
        **problems.documented(problems.BATCH_NOT_FOUND, problems.INVALID_PARAMETER),
    },
)
async def get_batch(
    batch_id: BatchId, request: Request, if_none_match: IfNoneMatch = None, prefer: Prefer = None
) -> Response:
    """Show a batch, when there is news of it if the client waits."""
    context, wait_s = context_of(request), wait_asked_s(prefer)

    def is_news(seen: Seen) -> bool:
        if if_none_match is None:
            return seen.is_finished
        return seen.is_finished or not seen.representation.is_among(if_none_match)

    seen = await context.waits.until(
        lambda: _look(context, batch_id),
        is_news,
        wait_s=wait_s or 0,
        request=request,
        end_of=batch_id if if_none_match is None else None,
    )
    return _show(seen, if_none_match=if_none_match, headers=applied(wait_s))


@router.get(
    "/{batch_id}/jobs",
    response_model=JobPage,
    operation_id="listBatchJobs",
    summary="List a batch's jobs, in the order they were given",
    responses={
        200: {"headers": examples.PAGE_HEADERS},
        **problems.documented(problems.BATCH_NOT_FOUND, problems.INVALID_PARAMETER, problems.INVALID_CURSOR),
    },
)
async def list_batch_jobs(batch_id: BatchId, request: Request, query: Annotated[JobsQuery, Query()]) -> Response:
    """Show a page of jobs."""
    after = paging.read_job_cursor(query.cursor)
    where = reads.JobFilter(**query.model_dump(exclude={"limit", "cursor"}))
    async with context_of(request).sessions.begin() as session:
        await _require(session, batch_id)
        found = await reads.list_jobs(session, batch_id, after=after, limit=query.limit + 1, where=where)
    shown = found[: query.limit]
    cursor = paging.job_cursor(shown[-1].position) if len(found) > query.limit else None
    links = paging.next_link(f"/v1/batches/{batch_id}/jobs", _given(query), cursor)
    return await reply_page(map(job_view, shown), cursor=cursor, headers=links)


@router.get(
    "/{batch_id}/results",
    response_class=results.Lines,
    operation_id="streamBatchResults",
    summary="Stream the results as JSON lines",
    description="One line for each finished job, in the order they were given. On an unfinished batch: those that are "
    "finished when their turn comes.",
    responses={
        200: {"description": "A line for each finished job.", "content": examples.RESULT_LINES},
        **problems.documented(problems.BATCH_NOT_FOUND, problems.INVALID_PARAMETER),
    },
)
async def stream_batch_results(
    batch_id: BatchId, request: Request, query: Annotated[ResultsQuery, Query()]
) -> Response:
    """Stream what is finished."""
    async with context_of(request).sessions.begin() as session:
        batch = await _require(session, batch_id)
    included = query.include or ""
    lines = results.stream(
        context_of(request).sessions,
        batch_id,
        total=batch.counts.total,
        after=query.after,
        status=query.status,
        with_headers="headers" in included,
        with_bodies="body" in included,
    )
    return results.Lines(lines, media_type="application/x-ndjson")


@router.post(
    "/{batch_id}/cancel",
    status_code=202,
    response_model=BatchView,
    operation_id="cancelBatch",
    summary="Cancel a batch",
    description="Nothing of it starts any more, and what runs is stopped. Safe to repeat; a finished batch stays so.",
    response_description="Cancelling was asked for; the batch is `cancelled` once no job of it is left.",
    responses=problems.documented(problems.BATCH_NOT_FOUND, problems.INVALID_PARAMETER),
)
async def cancel_batch(batch_id: BatchId, request: Request) -> Response:
    """Ask for a batch to be cancelled, and show it."""
    async with context_of(request).sessions.begin() as session:
        await batches.cancel(session, batch_id)
        batch = await _require(session, batch_id)
    return _show(_seen(batch), status=202)


@router.delete(
    "/{batch_id}",
    status_code=204,
    response_class=Response,
    operation_id="deleteBatch",
    summary="Delete a finished batch, its jobs and bodies",
    response_description="It is gone.",
    responses=problems.documented(problems.BATCH_NOT_FOUND, problems.BATCH_NOT_FINISHED, problems.INVALID_PARAMETER),
)
async def delete_batch(batch_id: BatchId, request: Request) -> Response:
    """Hide a finished batch from every reader at once."""
    async with context_of(request).sessions.begin() as session:
        outcome = await batches.delete(session, batch_id)
    match outcome:
        case "deleted":
            return Response(status_code=204)
        case "missing":
            raise Problem(problems.BATCH_NOT_FOUND)
        case "unfinished":
            raise Problem(problems.BATCH_NOT_FINISHED)
        case _:
            assert_never(outcome)


async def _store(request: Request, context: Context, key: str | None) -> tuple[UUID, Seen]:
    """Commit the batch; what was read of it is let go of on return, before any wait."""
    async with context.intake.submission(request) as submission:
        batch = await _commit(context, submission, key)
    return batch.id, _seen(batch)


async def _commit(context: Context, submission: Submission, key: str | None) -> reads.Batch:
    new = replace(submission.batch, idempotency_key=key, request_sha256=submission.body_sha256 if key else None)
    for tries_left in reversed(range(COMMIT_TRIES_MAX)):
        try:
            async with context.sessions.begin() as session:
                if (first := await _first_of_key(session, new)) is not None:
                    return first
                await queue.enqueue(session, new, submission.jobs)
                return await _require(session, new.id)
        except DBAPIError as error:
            if not is_conflict(error) or tries_left == 0:
                raise
    raise AssertionError("the last try returns or raises")


async def _first_of_key(session: AsyncSession, new: NewBatch) -> reads.Batch | None:
    """Return the batch that this Idempotency-Key made before, as it was first answered; keep others off the key.

    The key is stored with its batch, in one transaction: should the service die in between, there is neither.
    """
    if new.idempotency_key is None:
        return None
    found = await batches.find_by_key(session, new.idempotency_key)
    if found is None:
        if not await batches.lock_key(session, new.idempotency_key):
            raise Problem(problems.IDEMPOTENCY_KEY_IN_USE)
        found = await batches.find_by_key(session, new.idempotency_key)
    if found is None:
        return None
    batch_id, request_sha256 = found
    if request_sha256 != new.request_sha256:
        raise Problem(problems.IDEMPOTENCY_KEY_REUSED)
    return _as_accepted(await _require(session, batch_id))


def _as_accepted(batch: reads.Batch) -> reads.Batch:
    """Show a batch as it was before anything ran."""
    total = batch.counts.total
    if total == 0:
        return batch
    counts = reads.Counts(total=total, queued=total, running=0, succeeded=0, failed=0, cancelled=0)
    return replace(
        batch,
        status="queued",
        counts=counts,
        errors={},
        http_statuses={},
        wire_bytes=0,
        body_bytes=0,
        started_at=None,
        finished_at=None,
        cancel_requested_at=None,
    )


async def _hint(context: Context) -> None:
    """Wake the workers. The batch is stored already, and they find it by themselves: a failure changes nothing."""
    try:
        async with asyncio.timeout(HINT_TIMEOUT_S), context.sessions.begin() as session:
            await hints.give(session)
    except DATABASE_ERRORS as error:
        if not is_passing(error):
            raise
        logger.warning("The workers could not be woken; they look by themselves: %s", type(error).__name__)


async def _wait_until_finished(request: Request, context: Context, *, batch_id: UUID, wait_s: int) -> Seen | None:
    """Look until the batch is finished or time is up; None when the database cannot answer now.

    The batch is stored already: a 503 would make a client send it again, and every URL would be fetched twice.
    """
    try:
        return await context.waits.until(
            lambda: _look(context, batch_id),
            lambda seen: seen.is_finished,
            wait_s=wait_s,
            request=request,
            end_of=batch_id,
        )
    except DATABASE_ERRORS as error:
        if not is_passing(error):
            raise
        logger.warning("A stored batch could not be waited for: %s", reason(error))
        return None


async def _look(context: Context, batch_id: UUID) -> Seen:
    async with context.lend_driver() as driver:
        batch = await reads.poll_batch(driver, batch_id)
    return _seen(_found(batch))


async def _require(session: AsyncSession, batch_id: UUID) -> reads.Batch:
    return _found(await reads.get_batch(session, batch_id))


def _found(batch: reads.Batch | None) -> reads.Batch:
    if batch is None:
        raise Problem(problems.BATCH_NOT_FOUND)
    return batch


def _seen(batch: reads.Batch) -> Seen:
    return Seen(represent(batch_view(batch)), batch.status in FINISHED_BATCH)


def _show(
    seen: Seen, *, status: int = 200, if_none_match: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    again = {} if seen.is_finished else LOOK_AGAIN
    return reply(seen.representation, status=status, if_none_match=if_none_match, headers={**again, **(headers or {})})


def _given(query: BaseModel) -> dict[str, object]:
    """The parameters the client set, as a link to the next page repeats them."""
    return query.model_dump(mode="json", exclude_unset=True, exclude={"cursor"})
