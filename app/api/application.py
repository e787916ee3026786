"""Puts the API together: the routes, what guards them, and what they share. Reads no setting of its own."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI

from app.api import batches, docs, health, jobs, metrics, problems
from app.api.context import Context
from app.api.heads import Heads
from app.api.intake import Intake
from app.api.schemas import Bounds
from app.api.security import Gate, Outermost
from app.api.waiting import Waits
from app.fetch.policy import Policy
from app.jobs.database import LendDriver, Sessions


def create_app(
    *,
    sessions: Sessions,
    lend_driver: LendDriver,
    policy: Policy,
    version: str,
    host: str,
    api_token: str | None,
    allowed_hosts: Sequence[str],
    bounds: Bounds,
) -> FastAPI:
    """Make the ASGI application; `host` is the address it listens on; polls use `lend_driver`.

    Let `hear_finishes` run beside it. Call `stop_waiting` when the server is told to stop, or long polls hold it up.
    """
    app = FastAPI(
        title="Fetchpool",
        version=version,
        lifespan=_lifespan,
        openapi_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.context = Context(
        sessions=sessions,
        lend_driver=lend_driver,
        intake=Intake(policy=policy, bounds=bounds),
        waits=Waits(),
        is_open=api_token is None,
    )
    for router in (batches.router, jobs.router, health.router, metrics.router):
        app.include_router(router)
    docs.install(app)
    problems.install(app)
    # The last one added is the outermost.
    app.add_middleware(Heads)
    app.add_middleware(Gate, host=host, allowed_hosts=allowed_hosts, api_token=api_token)
    app.add_middleware(Outermost)
    return app


async def hear_finishes(app: FastAPI, url: str) -> None:
    """End long polls as soon as their batches are finished, for ever; without it they look now and then."""
    context: Context = app.state.context
    await context.waits.hear(url)


def stop_waiting(app: FastAPI) -> None:
    """Answer all long polls now, and later ones at once."""
    context: Context = app.state.context
    context.waits.close()


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.openapi()
    yield
    context: Context = app.state.context
    context.waits.close()
    context.intake.close()
