"""Jobs over HTTP: everything known of one, and the bytes that came back, sent so that no browser runs them."""

import re
from typing import Annotated, Literal, assert_never
from uuid import UUID

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from app.api import examples, problems
from app.api.context import context_of
from app.api.problems import Problem
from app.api.replies import REVALIDATE, IfNoneMatch, Representation, reply_json
from app.api.routing import StrictRoute
from app.api.schemas import JOB_ID_EXAMPLE, JobDetailView, job_detail_view
from app.jobs import reads
from app.jobs.reads import Body

HARMLESS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox; default-src 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Strangers wrote these bytes: a browser that opens them gives them no scripts and no place among our own pages."""

_TOKEN = r"[A-Za-z0-9!#$&^_.+-]{1,64}"
_CONTENT_TYPE = re.compile(rf"{_TOKEN}/{_TOKEN}(?:; ?charset=[A-Za-z0-9_.:-]{{1,40}})?")

router = APIRouter(
    prefix="/v1/jobs", route_class=StrictRoute, tags=["Jobs"], responses=problems.documented(*problems.EVERYWHERE)
)

JobId = Annotated[UUID, Path(description="The job's id.", examples=[JOB_ID_EXAMPLE])]


@router.get(
    "/{job_id}",
    response_model=JobDetailView,
    operation_id="getJob",
    summary="Show everything known of a job",
    responses=problems.documented(problems.JOB_NOT_FOUND, problems.INVALID_PARAMETER),
)
async def get_job(job_id: JobId, request: Request) -> Response:
    """Show a job."""
    async with context_of(request).sessions.begin() as session:
        job = await reads.get_job(session, job_id)
    if job is None:
        raise Problem(problems.JOB_NOT_FOUND)
    return reply_json(job_detail_view(job))


@router.get(
    "/{job_id}/body",
    response_class=Response,
    operation_id="getJobBody",
    summary="Download the body that came back",
    description="The decoded bytes, always as a download. Content-Type is the response's own where it is well formed.",
    responses={
        200: {"description": "The bytes.", "content": examples.BYTES, "headers": examples.BODY_HEADERS},
        304: {"description": "The bytes are those that If-None-Match says."},
        **problems.documented(
            problems.JOB_NOT_FOUND, problems.BODY_NOT_FOUND, problems.JOB_NOT_FINISHED, problems.INVALID_PARAMETER
        ),
    },
)
async def get_job_body(job_id: JobId, request: Request, if_none_match: IfNoneMatch = None) -> Response:
    """Send the bytes."""
    async with context_of(request).sessions.begin() as session:
        found = await reads.get_body(session, job_id)
    body = _require_body(found)
    representation = Representation(body.content, f'"{body.sha256}"')
    headers = {**REVALIDATE, **HARMLESS, "ETag": representation.etag}
    if representation.is_among(if_none_match):
        return Response(status_code=304, headers=headers)
    headers["Content-Disposition"] = f'attachment; filename="{job_id}"'
    # Set as a header, or the framework would add a charset to text types.
    headers["Content-Type"] = _content_type(body.content_type)
    return Response(body.content, headers=headers)


def _require_body(found: Body | Literal["missing", "unfinished", "none"]) -> Body:
    match found:
        case Body():
            return found
        case "missing":
            raise Problem(problems.JOB_NOT_FOUND)
        case "unfinished":
            raise Problem(problems.JOB_NOT_FINISHED)
        case "none":
            raise Problem(problems.BODY_NOT_FOUND)
        case _:
            assert_never(found)


def _content_type(stored: str | None) -> str:
    """Repeat the server's Content-Type only where it is a plain media type: it was written by a stranger."""
    return stored if stored is not None and _CONTENT_TYPE.fullmatch(stored) else "application/octet-stream"
