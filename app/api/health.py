"""Whether this process is up, and whether it can do its work. Says nothing of the workers."""

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from app.api import problems
from app.api.context import context_of
from app.api.replies import reply_json
from app.api.schemas import HealthView
from app.jobs import database

READY_TIMEOUT_S = 3.0
NO_TOKEN: dict[str, Any] = {"security": []}

router = APIRouter(
    tags=["Health"],
    responses=problems.documented(problems.CROSS_SITE, problems.HOST_NOT_ALLOWED, problems.INTERNAL_ERROR),
)


@router.get(
    "/healthz",
    response_model=HealthView,
    operation_id="getHealth",
    summary="Tell whether the process is up",
    openapi_extra=NO_TOKEN,
)
async def get_health(request: Request) -> Response:
    """Answer, whatever the database does."""
    return reply_json(HealthView(version=request.app.version))


@router.get(
    "/readyz",
    response_model=HealthView,
    operation_id="getReadiness",
    summary="Tell whether the database answers",
    responses=problems.documented(problems.DATABASE_UNAVAILABLE),
    openapi_extra=NO_TOKEN,
)
async def get_readiness(request: Request) -> Response:
    """Ask the database for the least it can do."""
    async with asyncio.timeout(READY_TIMEOUT_S), context_of(request).sessions.begin() as session:
        await database.ping(session)
    return reply_json(HealthView(version=request.app.version))
