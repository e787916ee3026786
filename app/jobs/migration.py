"""Bringing the schema up to date, at each start of a program."""

import logging
from contextlib import nullcontext
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from app.jobs.database import (
    ASYNCPG,
    CONFLICTS,
    DATABASE_ERRORS,
    SESSION,
    WITHOUT_PREPARED,
    DatabaseUnusable,
    driver_arguments,
    hang_up,
    reason,
    sqlstate,
)
from app.jobs.silence import watching

POSTGRESQL_VERSION_MIN = 15
MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"
TRIES = 5
LOCK = 7_306_080_214
"""Key of the transaction-level advisory lock under which migrations run; any number, the same for ever."""
LOCK_NOT_AVAILABLE = "55P03"
IDLE_S_MAX = 15.0
"""A program that falls silent in its migration, frozen or cut off, holds up the starts of all others this long."""
SILENCE_MAX = "SELECT set_config('idle_in_transaction_session_timeout', :ms, true)"

logger = logging.getLogger(__name__)


async def migrate(url: str, *, pgbouncer: bool = False) -> None:
    """Bring the schema up to date, in one transaction under an advisory lock, so that many may start at once.

    Raises `DatabaseUnusable` when PostgreSQL is unreachable, refuses, falls silent or is older than version 15, and
    when a table is kept locked by others, try after try.
    """
    # Without deadlines: a migration may take long, and others wait for it.
    arguments = driver_arguments(url) | {"command_timeout": None}
    arguments |= WITHOUT_PREPARED if pgbouncer else {"server_settings": SESSION}
    engine = create_async_engine(ASYNCPG, poolclass=NullPool, connect_args=arguments)
    event.listen(engine.sync_engine, "close", hang_up)
    # Behind PgBouncer a program that is cut off does not come to know: no server is a connection's own.
    watched = nullcontext() if pgbouncer else watching(engine, url)
    try:
        async with watched:
            await _migrate_among_others(engine)
    except DATABASE_ERRORS as error:
        raise DatabaseUnusable(_advice(error)) from error
    finally:
        await engine.dispose()


async def _migrate_among_others(engine: AsyncEngine) -> None:
    """Try again when the transactions of services at work were in the way: a deadlock, or a lock not had in time."""
    for tries_left in reversed(range(TRIES)):
        try:
            async with engine.begin() as connection:
                await _require_version(connection)
                await connection.execute(text(SILENCE_MAX), {"ms": f"{IDLE_S_MAX * 1000:.0f}"})
                await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
                await connection.run_sync(_upgrade)
            return
        except DBAPIError as error:
            if not tries_left or sqlstate(error) not in (*CONFLICTS, LOCK_NOT_AVAILABLE):
                raise
            logger.warning("The migration gives way to a transaction at work: %s", reason(error))


def alembic_config(connection: Connection) -> Config:
    """Make the configuration with which Alembic's commands run in the transaction of a connection."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    return config


def _upgrade(connection: Connection) -> None:
    command.upgrade(alembic_config(connection), "head")


async def _require_version(connection: AsyncConnection) -> None:
    number = await connection.scalar(text("SELECT current_setting('server_version_num')::int"))
    version = int(number or 0) // 10_000
    if version < POSTGRESQL_VERSION_MIN:
        raise DatabaseUnusable(
            f"DATABASE_URL leads to PostgreSQL {version}, and Fetchpool needs {POSTGRESQL_VERSION_MIN} or newer: "
            "upgrade it, name another one, or leave DATABASE_URL unset for an embedded PostgreSQL."
        )


def _advice(error: BaseException) -> str:
    if sqlstate(error) in (*CONFLICTS, LOCK_NOT_AVAILABLE):
        return (
            f"The tables at DATABASE_URL could not be migrated: {reason(error)}, {TRIES} times. "
            "End the transactions that hold them (pg_stat_activity shows them) and start again."
        )
    return f"PostgreSQL at DATABASE_URL cannot be used: {reason(error)}. Check that it runs and that the URL is right."
