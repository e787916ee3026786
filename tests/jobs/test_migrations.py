"""The migrations build exactly the tables that the code believes in."""

import asyncio
import os
from collections.abc import Callable

from alembic import command
from alembic.config import Config

from app.jobs.database import make_engine
from app.jobs.migration import alembic_config, migrate
from app.jobs.tables import metadata
from tests.databases import connect, drop, recreate, with_database
from tests.waiting import until

SCHEMA = """
    SELECT 'column', c.relname || '.' || a.attname,
        format_type(a.atttypid, a.atttypmod) || ' ' || a.attnotnull || ' ' || a.attstorage::text || ' '
        || coalesce(pg_get_expr(d.adbin, d.adrelid), '')
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
    LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
    WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped
    UNION ALL
    SELECT 'constraint', conrelid::regclass || '.' || conname, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE connamespace = 'public'::regnamespace
    UNION ALL
    SELECT 'index', indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
    UNION ALL
    SELECT 'table', relname, coalesce(array_to_string(reloptions, ' '), '') FROM pg_class
    WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
"""


async def schema(url: str) -> set[tuple[str, ...]]:
    connection = await connect(url)
    try:
        rows = await connection.fetch(SCHEMA)
    finally:
        await connection.close()
    return {tuple(row) for row in rows if "alembic_version" not in row[1]}


async def run_alembic(url: str, run: Callable[[Config, str], None], revision: str) -> None:
    engine = make_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(lambda connection: run(alembic_config(connection), revision))
    await engine.dispose()


async def test_migrations_and_models_are_equal(server_url: str, database_url: str) -> None:
    name = f"fetchpool_models_{os.getpid()}"
    await recreate(server_url, name, template="template0")
    url = with_database(server_url, name)
    engine = make_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    await engine.dispose()
    from_models, from_migrations = await schema(url), await schema(database_url)
    await drop(server_url, name)
    assert from_models == from_migrations


async def test_a_migration_gives_way_to_a_transaction_at_work_and_comes_again(
    server_url: str, database_url: str
) -> None:
    """One that wrote the tables in another order: each waits for the other, and one must give way."""
    name = f"fetchpool_deadlock_{os.getpid()}"
    await recreate(server_url, name, template="template0")
    url = with_database(server_url, name)
    await run_alembic(url, command.upgrade, "0004")
    other = await connect(url)
    await other.execute("SET deadlock_timeout = '1min'; BEGIN; LOCK TABLE attempt IN ACCESS SHARE MODE")
    migration = asyncio.create_task(migrate(url))
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'relation'"
    await until(lambda: other.fetchval(waiting))
    await other.execute("LOCK TABLE job IN ACCESS SHARE MODE")
    await other.execute("COMMIT")
    await migration
    await other.close()
    migrated = await schema(url)
    await drop(server_url, name)
    assert migrated == await schema(database_url)


async def test_each_migration_can_be_undone(server_url: str, database_url: str) -> None:
    name = f"fetchpool_undone_{os.getpid()}"
    await recreate(server_url, name, template="template0")
    url = with_database(server_url, name)
    await migrate(url)
    await run_alembic(url, command.downgrade, "base")
    undone = await schema(url)
    await migrate(url)
    migrated = await schema(url)
    await drop(server_url, name)
    assert undone == set()
    assert migrated == await schema(database_url)


async def test_many_processes_may_migrate_one_database_at_once(server_url: str) -> None:
    name = f"fetchpool_many_{os.getpid()}"
    await recreate(server_url, name, template="template0")
    url = with_database(server_url, name)
    await asyncio.gather(*(migrate(url) for _ in range(5)))
    tables = {key for kind, key, _ in await schema(url) if kind == "table"}
    await drop(server_url, name)
    assert tables == set(metadata.tables)
