"""The way to PostgreSQL: engine, sessions, connections, and what their errors mean."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import asyncpg
from sqlalchemy import Connection, event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

CONNECT_TIMEOUT_S = 5.0
POOL_TIMEOUT_S = 5.0
STATEMENT_TIMEOUT_S = 15.0
COMMAND_TIMEOUT_S = STATEMENT_TIMEOUT_S + 5.0
"""The driver's own, for a server that does not answer at all."""
LOCK_TIMEOUT_S = 10.0
IDLE_IN_TRANSACTION_TIMEOUT_S = 5.0
"""No transaction waits for anything but PostgreSQL: one that stands still belongs to a process frozen or cut off. Every
claim passes over the hosts it has locked until this ends it (with 30 s they waited 30 s, whatever the lease)."""

ASYNCPG = "postgresql+asyncpg://"
URL_PARAMETERS = frozenset({"host", "port", "sslmode"})
KEEPALIVES = {"tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "3"}
"""Seconds, and how many: PostgreSQL misses a client whose machine is gone, even while it waits for the rest of a COPY,
for which it has no time-out of its own."""
APPLICATION = "fetchpool"
SESSION = {"application_name": APPLICATION, "timezone": "UTC", "jit": "off"} | KEEPALIVES
BY_INDEX = {"enable_seqscan": "off", "enable_bitmapscan": "off"}
"""No session of an engine reads jobs or tallies as they lie, however few: what a statement locks, it locks in the order
of its values or of an index (docs/decisions/0018)."""
GENERIC_PLANS = {"plan_cache_mode": "force_generic_plan"}
WITHOUT_PREPARED: dict[str, Any] = {
    "statement_cache_size": 0,
    "prepared_statement_cache_size": 0,
    # Nameless, so that the next one replaces it: a named one would be closed later, on whatever connection PgBouncer
    # gives then, and stay for ever on the one it is on.
    "prepared_statement_name_func": str,
}

logger = logging.getLogger(__name__)

MISTAKES = ("0A", "21", "22", "23", "42")
"""Classes by which PostgreSQL says that a statement or a value is wrong: a fault of ours. All others say "not now"."""

CONFLICTS = ("40001", "40P01")
"""Serialization failure and deadlock."""

Sessions = async_sessionmaker[AsyncSession]
LendDriver = Callable[[], AbstractAsyncContextManager[asyncpg.Connection]]

DATABASE_ERRORS = (
    DBAPIError,
    PoolTimeout,
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # for a statement on a connection that has heard of its end and not yet ended
)
"""What a statement raises when PostgreSQL is away, overloaded or refuses: worth another try, and no bug of ours."""


class DatabaseUnusable(Exception):
    """PostgreSQL cannot serve as the store; the message is one line that says what to do."""


def is_refused_value(error: BaseException) -> bool:
    """Say whether PostgreSQL or its driver refused a value or a row: trying the same again is no use."""
    return sqlstate(error)[:2] in ("22", "23") or isinstance(getattr(error, "__cause__", None), asyncpg.DataError)


def is_passing(error: BaseException) -> bool:
    """Tell a database that cannot answer now from a statement or a value that is wrong, whenever it is tried.

    SQLAlchemy calls most of what asyncpg raises a plain DBAPIError, so that only the SQLSTATE can decide.
    """
    if not isinstance(error, DATABASE_ERRORS) or is_refused_value(error):
        return False
    return not sqlstate(error).startswith(MISTAKES)


def is_conflict(error: BaseException) -> bool:
    """Tell a transaction that met another one, and changed nothing: the same again may well succeed."""
    return sqlstate(error) in CONFLICTS


def sqlstate(error: BaseException) -> str:
    """Return PostgreSQL's five-character code of an error, empty when it never came to that."""
    return str(getattr(getattr(error, "orig", error), "sqlstate", None) or "")


def log_failure(logger: logging.Logger, what: str, error: BaseException) -> None:
    """Log an outage in one line, and anything else, which is a fault of ours, with its traceback."""
    if is_passing(error):
        logger.warning("%s: %s", what, reason(error))
    else:
        logger.error("%s, and should not have to", what, exc_info=error)


def reason(error: BaseException) -> str:
    """Say in one line why PostgreSQL could not do it, without the statement: an outage must not fill the log."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__


def make_engine(url: str, *, pgbouncer: bool = False, pool_size: int = 5, generic_plans: bool = False) -> AsyncEngine:
    """Make an engine of at most `pool_size` connections whose statements, locks and pauses all have a deadline.

    `generic_plans`: a connection plans each statement once, for all values, and not five times more before it does so:
    for a worker, whose statements are few and fit one plan each. Behind PgBouncer in transaction mode no prepared
    statement is kept and no start-up parameter sent: each transaction then sets its own deadlines. Raises
    `DatabaseUnusable` for a URL it cannot follow.
    """
    arguments = driver_arguments(url)
    if pgbouncer:
        arguments |= WITHOUT_PREPARED
    else:
        arguments["server_settings"] = SESSION | BY_INDEX | _deadlines() | (GENERIC_PLANS if generic_plans else {})
    engine = create_async_engine(
        ASYNCPG,
        pool_size=pool_size,
        max_overflow=0,
        pool_use_lifo=True,  # the same few connections work: they have their plans, and shared memory mapped
        pool_timeout=POOL_TIMEOUT_S,
        hide_parameters=True,  # they hold what clients sent, secrets among it
        connect_args=arguments,
    )
    if pgbouncer:
        event.listen(engine.sync_engine, "begin", _set_locally)
    event.listen(engine.sync_engine, "close", hang_up)
    return engine


def make_sessions(engine: AsyncEngine) -> Sessions:
    """Make sessions; `async with sessions.begin() as session` is one transaction."""
    return async_sessionmaker(engine, expire_on_commit=False, autoflush=False)


def make_autocommit(engine: AsyncEngine) -> Sessions:
    """Make sessions whose every statement is a transaction: without BEGIN and COMMIT, two round trips of three.

    Behind PgBouncer, where it takes a transaction to set deadlines, they are as others.
    """
    return make_sessions(engine if _is_bounced(engine) else engine.execution_options(isolation_level="AUTOCOMMIT"))


def make_lender(engine: AsyncEngine) -> LendDriver:
    """Make a way to the driver's own connections, for a SELECT that is asked for often (docs/decisions/0020).

    What is lent is in no transaction; behind PgBouncer it is in one, which sets its deadlines.
    """
    return partial(_lend_in_transaction if _is_bounced(engine) else _lend, engine)


@asynccontextmanager
async def _lend(engine: AsyncEngine) -> AsyncIterator[asyncpg.Connection]:
    try:
        pooled = await engine.raw_connection()
    except engine.dialect.loaded_dbapi.Error as error:
        raise DBAPIError(None, None, error) from error  # as SQLAlchemy's own connections do
    driver = pooled.driver_connection
    assert driver is not None
    try:
        yield driver
    except BaseException:
        if driver.is_closed():
            engine.pool._invalidate(pooled)  # and all made before, as SQLAlchemy does: they have most likely ended too
        else:
            pooled.invalidate()  # in the middle of a statement, perhaps
        raise
    pooled.close()


@asynccontextmanager
async def _lend_in_transaction(engine: AsyncEngine) -> AsyncIterator[asyncpg.Connection]:
    async with engine.begin() as connection:
        try:
            yield (await connection.get_raw_connection()).driver_connection
        except BaseException:
            await connection.invalidate()
            raise


async def driver(session: AsyncSession) -> asyncpg.Connection:
    """Return the driver's own connection, for what SQLAlchemy cannot do, in the transaction of a session.

    One that has executed a statement: SQLAlchemy begins a transaction no earlier.
    """
    pooled = await (await session.connection()).get_raw_connection()
    connection: asyncpg.Connection = pooled.driver_connection
    assert connection.is_in_transaction()
    return connection


async def ping(session: AsyncSession) -> None:
    """Ask for the least that PostgreSQL can do."""
    await session.execute(text("SELECT 1"))


async def connect(url: str) -> asyncpg.Connection:
    """Open a connection beside the engine's, not for PgBouncer; the caller closes it."""
    return await asyncpg.connect(**driver_arguments(url), server_settings=SESSION)


def driver_arguments(url: str) -> dict[str, Any]:
    """Translate a libpq-style URL to the arguments of asyncpg's connect; only some parameters can be followed."""
    address = make_url(url)
    query = {name: str(value) for name, value in address.query.items()}
    if unknown := sorted(query.keys() - URL_PARAMETERS):
        raise DatabaseUnusable(
            f"DATABASE_URL has parameters that cannot be followed: {', '.join(unknown)}. Leave them out; "
            f"{', '.join(sorted(URL_PARAMETERS))} can be given."
        )
    port = address.port or query.get("port")
    return {
        "host": address.host or query.get("host"),
        "port": int(port) if port else None,
        "user": address.username,
        "password": address.password,
        "database": address.database,
        "ssl": query.get("sslmode"),
        "timeout": CONNECT_TIMEOUT_S,
        "command_timeout": COMMAND_TIMEOUT_S,
    }


def hang_up(adapted: Any, _: object) -> None:
    """Close without a farewell, for the answer to which asyncpg waits as for a statement's, on a dead line too."""
    adapted.driver_connection.terminate()


def _deadlines() -> dict[str, str]:
    return {
        "statement_timeout": str(int(STATEMENT_TIMEOUT_S * 1000)),
        "lock_timeout": str(int(LOCK_TIMEOUT_S * 1000)),
        "idle_in_transaction_session_timeout": str(int(IDLE_IN_TRANSACTION_TIMEOUT_S * 1000)),
    }


def _is_bounced(engine: AsyncEngine) -> bool:
    """Whether it was made for PgBouncer."""
    return event.contains(engine.sync_engine, "begin", _set_locally)


def _set_locally(connection: Connection) -> None:
    calls = ", ".join(
        f"set_config('{name}', '{value}', true)" for name, value in (BY_INDEX | _deadlines() | {"jit": "off"}).items()
    )
    connection.exec_driver_sql(f"SELECT {calls}")
