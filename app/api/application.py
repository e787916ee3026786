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
from app.jobs.database import Sessions
from app.jobs.hints import Listener


def create_app(
    *,
    sessions: Sessions,
    autocommit: Sessions,
    finishes: Listener,
    policy: Policy,
    version: str,
    host: str,
    api_token: str | None,
    allowed_hosts: Sequence[str],
    bounds: Bounds,
) -> FastAPI:
    """Make the ASGI application; `host` is the address it listens on; each statement of `autocommit` commits.

    `finishes` hears that batches are finished, and is to call `wake_waiting`. Call `stop_waiting` when the server is
    told to stop, or long polls hold it up.
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
        autocommit=autocommit,
        intake=Intake(policy=policy, bounds=bounds),
        waits=Waits(finishes),
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


def wake_waiting(app: FastAPI, batch_id: str) -> None:
    """Have the long polls for the end of a batch look whether it came; of an empty string, all of them."""
    context: Context = app.state.context
    context.waits.wake(batch_id)


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
