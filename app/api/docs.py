"""The OpenAPI document and the pages that show it, with every asset served from here: no request leaves the machine."""

import json
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from app.api.context import Context
from app.api.problems import ProblemView
from app.api.schemas import BATCH_ID_EXAMPLE, JOB_ID_EXAMPLE, BatchRequest, Bounds, ResultView
from app.jobs import reads
from app.jobs.database import DATABASE_ERRORS, is_passing
from app.outcome import MEANINGS, RETRYABLE, RETRYABLE_STATUSES, FailureCode

STATIC = Path(__file__).parent / "static"

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; worker-src 'self' blob:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""Both pages write styles of their own into the document; scripts come from files only."""

PAGE_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

DESCRIPTION = """\
Fetches URLs for you, asynchronously: **POST a batch**, every URL of it becomes a durable job, workers fetch them
politely and safely, and you **poll** the batch, or stream its results.

1. `POST /v1/batches` with `{"urls": [...]}` answers 202 and a `Location`.
2. `GET` that location until `status` is `completed` or `cancelled`: with `Prefer: wait=30` it answers when it is, with
   `If-None-Match` only when something has changed, and `Retry-After` says when to look again.
3. `GET .../results` streams every result, `GET .../jobs` pages through them, `GET /v1/jobs/{id}/body` has the bytes.

Errors are `application/problem+json` (RFC 9457) with a stable `code`; ids are UUIDs, times are UTC. A job fails with
one of a closed set of codes; below is what each means, and whether another try may cure it.
"""

TAGS = [
    {"name": "Batches", "description": "Lists of URLs, submitted together and watched together."},
    {"name": "Jobs", "description": "One URL each: how its fetch went, and what came back."},
    {"name": "Health", "description": "For load balancers and supervisors; these need no token."},
]

TOKEN_SCHEME = "token"
SCHEMAS = "#/components/schemas/"


def install(app: FastAPI) -> None:
    """Add the pages, their assets and the document."""
    app.openapi = partial(describe, app)  # type: ignore[method-assign]  # FastAPI's own way to extend the document
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.add_route("/", _home, include_in_schema=False)
    app.add_route("/docs", _swagger_ui, include_in_schema=False)
    app.add_route("/redoc", _redoc, include_in_schema=False)
    app.add_route("/favicon.ico", _favicon, include_in_schema=False)
    app.add_route("/openapi.json", _openapi, include_in_schema=False)


def describe(app: FastAPI) -> dict[str, Any]:
    """Write the OpenAPI document: what the routes declare, the models no route names, and the token."""
    if app.openapi_schema is None:
        context: Context = app.state.context
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=f"{DESCRIPTION}\n<details><summary>Failure codes</summary>\n\n{_vocabulary()}\n\n</details>\n",
            routes=app.routes,
            tags=TAGS,
        )
        components = document["components"]
        components["schemas"] = {**components["schemas"], **_further_schemas()}
        components["schemas"]["FailureCode"]["description"] = _vocabulary()
        _tell_bounds(components["schemas"], context.intake.bounds)
        if not context.is_open:
            components["securitySchemes"] = {TOKEN_SCHEME: {"type": "http", "scheme": "bearer"}}
            document["security"] = [{TOKEN_SCHEME: []}]
        app.openapi_schema = _polish(document)
    return app.openapi_schema


def _further_schemas() -> dict[str, Any]:
    """The models that no route declares, because their bodies are read or written piece by piece."""
    _, schemas = models_json_schema(
        [(BatchRequest, "validation"), (ResultView, "serialization"), (ProblemView, "serialization")],
        ref_template=SCHEMAS + "{model}",
    )
    found: dict[str, Any] = schemas["$defs"]
    return found


def _tell_bounds(schemas: dict[str, Any], bounds: Bounds) -> None:
    """Describe what the operator has set, in words only: generated clients would send or insist on what is declared."""
    entries = f" At most {bounds.batch_jobs_max}, in a request of at most {bounds.request_bytes_max} bytes."
    for name in ("urls", "jobs"):
        schemas["BatchRequest"]["properties"][name]["description"] += entries
    for name, described in schemas["BatchOptions"]["properties"].items():
        if (default := getattr(bounds, name, None)) is not None:
            most = bounds.timeout_s_max if name.endswith("timeout_s") else default
            told = "Default and maximum: " if most == default else f"At most {most:.12g}, default: "
            described["description"] += f" {told}{default:.12g}."


def _vocabulary() -> str:
    """Write the closed set of failure codes down as a table: what each means, and whether another try may cure it."""
    rows = (f"| `{code}` | {_retried(code)} | {meaning} |" for code, meaning in MEANINGS.items())
    return "\n".join(
        ("Why a job failed, or an attempt of it.\n", "| code | retryable | meaning |", "|---|---|---|", *rows)
    )


def _retried(code: FailureCode) -> str:
    if code is FailureCode.HTTP_STATUS:
        return ", ".join(map(str, sorted(RETRYABLE_STATUSES)))
    return "yes" if code in RETRYABLE else "no"


def _polish(document: dict[str, Any]) -> dict[str, Any]:
    """Name schemas as generated clients shall (`Batch`, not `BatchView`), and drop `null` where no parameter has it."""
    text = json.dumps(document)
    for name in document["components"]["schemas"]:
        text = text.replace(f'"{SCHEMAS}{name}"', f'"{SCHEMAS}{_public(name)}"')
    polished: dict[str, Any] = json.loads(text)
    schemas = polished["components"]["schemas"]
    polished["components"]["schemas"] = {
        _public(name): {**schema, "title": _public(name)} for name, schema in sorted(schemas.items())
    }
    for operations in polished["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = _without_null(parameter["schema"])
                if parameter["in"] == "path":
                    parameter["example"] = parameter["schema"]["examples"][0]
    return polished


def _public(name: str) -> str:
    return name.removesuffix("View")


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    options = [option for option in schema.get("anyOf", ()) if option != {"type": "null"}]
    if len(options) != 1:
        return schema
    return {**{name: value for name, value in schema.items() if name != "anyOf"}, **options[0]}


async def _home(_: Request) -> Response:
    return RedirectResponse("/docs")


async def _swagger_ui(_: Request) -> Response:
    return FileResponse(STATIC / "docs.html", headers=PAGE_HEADERS)


async def _redoc(_: Request) -> Response:
    return FileResponse(STATIC / "redoc.html", headers=PAGE_HEADERS)


async def _favicon(_: Request) -> Response:
    return FileResponse(STATIC / "favicon.svg")


async def _openapi(request: Request) -> Response:
    """Send the document, with the ids of a stored batch and job as examples, which work as they stand."""
    app: FastAPI = request.app
    context: Context = app.state.context
    document = json.dumps(app.openapi())
    if context.is_open:
        for example, stored in (await _stored_ids(context)).items():
            document = document.replace(str(example), str(stored))
    return Response(document, media_type="application/json", headers={"Cache-Control": "no-cache"})


async def _stored_ids(context: Context) -> dict[UUID, UUID]:
    """Find a batch and a job worth showing, best a finished one; none where the database does not answer."""
    try:
        async with context.sessions.begin() as session:
            found = await reads.list_batches(session, limit=1, status="completed")
            found = found or await reads.list_batches(session, limit=1)
            jobs = await reads.list_jobs(session, found[0].id, limit=1, where=reads.JobFilter()) if found else []
    except DATABASE_ERRORS as error:
        if not is_passing(error):
            raise
        return {}
    examples = (BATCH_ID_EXAMPLE, found), (JOB_ID_EXAMPLE, jobs)
    return {example: stored[0].id for example, stored in examples if stored}
