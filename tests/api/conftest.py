"""The API over a real database: called directly, or served on a port."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from app.api.application import create_app, stop_waiting
from app.api.schemas import Bounds
from app.fetch.policy import Policy
from app.jobs.database import Sessions, make_lender
from tests.jobs.actors import Client as Reader
from tests.jobs.actors import Worker

BOUNDS = Bounds(
    request_bytes_max=16 * 2**20,
    batch_jobs_max=100_000,
    timeout_s=30.0,
    connect_timeout_s=10.0,
    read_timeout_s=20.0,
    timeout_s_max=300.0,
    wire_bytes_max=2**24,
    body_bytes_max=2**24,
    header_bytes_max=2**17,
    header_count_max=256,
    redirects_max=10,
    informational_max=16,
    encodings_max=3,
)
DEFAULTS: dict[str, Any] = {
    "policy": Policy(),
    "version": "1.2.3",
    "host": "127.0.0.1",
    "api_token": None,
    "allowed_hosts": (),
    "bounds": BOUNDS,
}

AppMaker = Callable[..., FastAPI]


@pytest.fixture
def make_app(sessions: Sessions) -> AppMaker:
    """Make the application, with other settings than the usual ones."""

    def make(**settings: Any) -> FastAPI:
        own = settings.get("sessions", sessions)
        return create_app(**{**DEFAULTS, "sessions": own, "lend_driver": make_lender(own.kw["bind"]), **settings})

    return make


@pytest.fixture
def app(make_app: AppMaker) -> FastAPI:
    return make_app()


@pytest.fixture
async def api(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the application."""
    async with calling(app) as client:
        yield client


@pytest.fixture
def reader(sessions: Sessions) -> Reader:
    return Reader(sessions)


@pytest.fixture
def worker(sessions: Sessions) -> Worker:
    return Worker(sessions)


def calling(app: ASGIApp, **headers: str) -> httpx2.AsyncClient:
    """A client that calls the application without a socket; what it does not catch is answered, as in service."""
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport, base_url="http://localhost:8000", headers=headers, timeout=30)


@asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[str]:
    """Serve the application on a free port of 127.0.0.1; gives its URL."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="warning", date_header=False, timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    # Signals belong to pytest.
    serving = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        stop_waiting(app)
        server.should_exit = True
        await serving
