"""Problem responses (RFC 9457): the closed set of codes, how they are sent, and how the OpenAPI page shows them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Mount

from app.api.faults import FORMS, Fault, faults_of
from app.jobs.database import DATABASE_ERRORS, is_passing, reason

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
ERRORS_SHOWN_MAX = 100
OBJECT_EXPECTED = 'The body must be a JSON object such as {"urls": ["https://example.com/"]}.'


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of problem: its stable code, its HTTP status, and what it says when there is nothing more precise.

    `retry_after_s` is when to ask again, where that helps.
    """

    code: str
    status: int
    detail: str
    retry_after_s: int | None = None


INVALID_JSON = Kind("invalid_json", 400, OBJECT_EXPECTED)
INVALID_REQUEST = Kind("invalid_request", 422, "The body has members that are wrong; see errors.")
INVALID_PARAMETER = Kind("invalid_parameter", 422, "A path, query or header parameter is wrong; see errors.")
INVALID_CURSOR = Kind("invalid_cursor", 422, "The cursor is not one of this list; start again without a cursor.")
TOO_MANY_JOBS = Kind("too_many_jobs", 422, "The batch has too many jobs; send several smaller batches.")
BODY_TOO_LARGE = Kind("body_too_large", 413, "The request body is too large; send several smaller batches.")
BODY_TOO_SLOW = Kind(
    "body_too_slow", 408, "The request body did not arrive in time; send it again, or in smaller batches."
)
MEDIA_TYPE_NOT_SUPPORTED = Kind(
    "media_type_not_supported",
    415,
    "Send JSON with the header Content-Type: application/json, and without a Content-Encoding.",
)
BATCH_NOT_FOUND = Kind("batch_not_found", 404, "There is no batch with this id; it may have been deleted.")
JOB_NOT_FOUND = Kind("job_not_found", 404, "There is no job with this id; its batch may have been deleted.")
BODY_NOT_FOUND = Kind("body_not_found", 404, "The job finished without a body; its error says why.")
JOB_NOT_FINISHED = Kind(
    "job_not_finished", 409, "The job has not finished; ask again when its status is terminal.", retry_after_s=1
)
BATCH_NOT_FINISHED = Kind(
    "batch_not_finished", 409, "The batch has not finished; cancel it, wait until it is finished, then delete it."
)
UNAUTHORIZED = Kind("unauthorized", 401, "Send the service's token as 'Authorization: Bearer <token>'.")
CROSS_SITE = Kind("cross_site", 403, "Requests from pages of other sites are refused.")
HOST_NOT_ALLOWED = Kind(
    "host_not_allowed",
    421,
    "The service does not answer to this Host; its operator can add it to FETCHPOOL_ALLOWED_HOSTS.",
)
NOT_FOUND = Kind("not_found", 404, "There is nothing at this path; see /docs.")
METHOD_NOT_ALLOWED = Kind(
    "method_not_allowed", 405, "This path does not take this method; see the Allow header and /docs."
)
IDEMPOTENCY_KEY_IN_USE = Kind(
    "idempotency_key_in_use",
    409,
    "A request with this Idempotency-Key is under way; send this one again later.",
    retry_after_s=1,
)
IDEMPOTENCY_KEY_REUSED = Kind(
    "idempotency_key_reused",
    422,
    "This Idempotency-Key was sent with other bytes in the last 24 hours; use a new key for a new batch.",
)
BUSY = Kind("busy", 503, "Too many large batches are being taken in; send this one again later.", retry_after_s=10)
DATABASE_UNAVAILABLE = Kind(
    "database_unavailable", 503, "The database does not answer; try again later.", retry_after_s=5
)
OVERLOADED = Kind("overloaded", 503, "Too many requests are under way; send this one again later.", retry_after_s=5)
STOPPING = Kind(
    "stopping",
    503,
    "The service is stopping and left this request undone or unanswered; send it again later, a POST under its "
    "Idempotency-Key.",
    retry_after_s=5,
)
INTERNAL_ERROR = Kind(
    "internal_error", 500, "The service failed; the request id finds the reason in its operator's log."
)

EVERYWHERE = (UNAUTHORIZED, CROSS_SITE, HOST_NOT_ALLOWED, INTERNAL_ERROR, DATABASE_UNAVAILABLE, OVERLOADED, STOPPING)
"""What any operation of the API may answer."""


class Problem(Exception):
    """Ends a request with a problem response."""

    def __init__(
        self,
        kind: Kind,
        detail: str | None = None,
        *,
        faults: Sequence[Fault] = (),
        fault_count: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(kind.code)
        self.kind = kind
        self.detail = detail or kind.detail
        self.faults = faults[:ERRORS_SHOWN_MAX]
        self.fault_count = len(faults) if fault_count is None else fault_count
        self.headers = dict(headers or {})
        if kind.retry_after_s is not None:
            self.headers["Retry-After"] = str(kind.retry_after_s)


class ProblemError(BaseModel):
    """One thing that is wrong in a request."""

    pointer: str = Field(
        description="JSON Pointer to the member of the body; `/query/…`, `/path/…` or `/header/…` for a parameter.",
        examples=["/urls/3"],
    )
    code: str = Field(description="Stable code of what is wrong.", examples=["scheme_not_allowed"])
    detail: str = Field(description="One sentence that says what to change.")


class ProblemView(BaseModel):
    """What went wrong with a request (RFC 9457)."""

    type: str = Field(description="Always `about:blank`; `code` tells problems apart.", examples=["about:blank"])
    title: str = Field(description="The HTTP status in words.")
    status: int = Field(description="The HTTP status.")
    code: str = Field(description="Stable code of the problem.")
    detail: str = Field(description="What is wrong and what to do next.")
    request_id: str | None = Field(default=None, description="The X-Request-ID of the answer.")
    errors: list[ProblemError] | None = Field(default=None, description="What is wrong in the request: the first 100.")
    errors_total: int | None = Field(default=None, description="How many things are wrong in the request.")


def respond(problem: Problem, *, request_id: str | None) -> Response:
    """Make the response of a problem."""
    return Response(
        _document(problem, request_id).model_dump_json(exclude_none=True),
        status_code=problem.kind.status,
        headers=problem.headers,
        media_type=MEDIA_TYPE,
    )


def install(app: FastAPI) -> None:
    """Answer every failure of a request with a problem, the framework's own included.

    What is caught nowhere is a bug of ours: the outermost middleware logs it and answers `internal_error`.
    """
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    for failure in DATABASE_ERRORS:
        app.add_exception_handler(failure, _on_database_failure)


def invalid_cursor() -> Problem:
    """Make the problem of a cursor that is none of the list's."""
    return Problem(INVALID_CURSOR, faults=[Fault("/query/cursor", "invalid_value", FORMS["cursor"])])


def documented(*kinds: Kind) -> dict[int | str, dict[str, Any]]:
    """Describe problems for the OpenAPI page: per status a schema and an example of each code."""
    responses: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        entry = responses.setdefault(kind.status, _empty_entry(kind))
        entry["content"][MEDIA_TYPE]["examples"][kind.code] = {"value": _example(kind)}
    return responses


async def _on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return respond(error, request_id=_request_id(request))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = Problem(_kind(error), headers=error.headers)
    if problem.kind is METHOD_NOT_ALLOWED:
        problem.headers["Allow"] = ", ".join(_allowed(request))
    return respond(problem, request_id=_request_id(request))


def _kind(error: HTTPException) -> Kind:
    phrase = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    known = {404: NOT_FOUND, 405: METHOD_NOT_ALLOWED}
    return known.get(error.status_code) or Kind(phrase, error.status_code, str(error.detail))


def _allowed(request: Request) -> list[str]:
    """All methods of the path (RFC 9110, 15.5.6); the framework names those of the first route only."""
    routes = [route for route in request.app.routes if not isinstance(route, Mount)]  # a mount takes GET alone

    def takes(method: str) -> bool:
        return any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)

    methods = [method for method in ("GET", "POST", "PUT", "PATCH", "DELETE") if takes(method)] or ["GET"]
    return ["HEAD", *methods] if "GET" in methods else methods


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = Problem(INVALID_PARAMETER, faults=faults_of(error.errors(), fields={("query",): _query_names(request)}))
    return respond(problem, request_id=_request_id(request))


def _query_names(request: Request) -> list[str]:
    path, method = request.scope["route"].path, request.method.lower()
    operation = request.app.openapi()["paths"].get(path, {}).get(method, {})
    return [parameter["name"] for parameter in operation.get("parameters", ()) if parameter["in"] == "query"]


async def _on_database_failure(request: Request, error: Exception) -> Response:
    if not is_passing(error):
        raise error
    logger.warning("The database does not answer: %s", reason(error))
    return respond(Problem(DATABASE_UNAVAILABLE), request_id=_request_id(request))


def _request_id(request: Request) -> str | None:
    request_id: str | None = request.scope.get("state", {}).get("request_id")
    return request_id


def _document(problem: Problem, request_id: str | None) -> ProblemView:
    errors = [ProblemError(pointer=f.pointer, code=f.code, detail=f.detail) for f in problem.faults]
    return ProblemView(
        type="about:blank",
        title=HTTPStatus(problem.kind.status).phrase,
        status=problem.kind.status,
        code=problem.kind.code,
        detail=problem.detail,
        request_id=request_id,
        errors=errors or None,
        errors_total=problem.fault_count if errors else None,
    )


def _empty_entry(kind: Kind) -> dict[str, Any]:
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}}
    return {"description": HTTPStatus(kind.status).phrase, "content": content}


def _example(kind: Kind) -> dict[str, Any]:
    faults = _EXAMPLE_FAULTS.get(kind.code, ())
    problem = Problem(kind, faults=faults)
    return _document(problem, "0198f2c1b5e07d3c9a4be1c02f6d7a10").model_dump(exclude_none=True)


_EXAMPLE_FAULTS = {
    INVALID_REQUEST.code: (
        Fault("/urls/1", "scheme_not_allowed", "Only http and https are fetched."),
        Fault("/options/timeout_s", "out_of_range", "It must be at most 300."),
    ),
    INVALID_PARAMETER.code: (Fault("/query/limit", "out_of_range", "It must be at most 200."),),
}
