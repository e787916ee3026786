"""Runs the migrations in the caller's transaction, or, from Alembic's command line, on `DATABASE_URL`."""

import asyncio

from alembic import context
from sqlalchemy import Connection

from app.jobs.database import make_engine
from app.jobs.tables import metadata
from app.settings import Settings


def run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True)
    context.run_migrations()


async def run_alone() -> None:
    settings = Settings()
    if settings.database_url is None:
        raise SystemExit("Set DATABASE_URL to the database that Alembic shall work on.")
    engine = make_engine(settings.database_url, pgbouncer=settings.pgbouncer)
    async with engine.begin() as connection:
        await connection.run_sync(run)
    await engine.dispose()


if (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    asyncio.run(run_alone())
