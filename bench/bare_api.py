"""The least that answers a GET of a batch: FastAPI and one raw asyncpg query, the service's own; runs in its Python.

Reads `{database_url}` as JSON in its first argument, says its port, and runs until it is told to end.
"""

import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg
import uvicorn
from fastapi import FastAPI

from app.jobs.reads import POLLED_BATCH


def make_app(database_url: str) -> FastAPI:
    """An application with one route."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with asyncpg.create_pool(database_url) as app.state.pool:
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/v1/batches/{batch_id}")
    async def get_batch(batch_id: UUID) -> dict[str, Any]:
        return dict(await app.state.pool.fetchrow(POLLED_BATCH, batch_id))

    return app


if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or each answer waits 40 ms for the client's ACK
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    config = uvicorn.Config(make_app(json.loads(sys.argv[1])["database_url"]), log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])
