"""Debian's PostgreSQL 15 and PgBouncer, for stories on what operators run; tests are skipped where one is missing."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import make_url

from app.jobs.account import Account, find_account, give_folder

POSTGRESQL_15 = Path("/usr/lib/postgresql/15/bin")
PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
START_S = 30.0

needs_postgresql_15 = pytest.mark.skipif(
    not (POSTGRESQL_15 / "postgres").exists(), reason="needs PostgreSQL 15 (apt install postgresql-15)"
)
needs_pgbouncer = pytest.mark.skipif(PGBOUNCER is None, reason="needs PgBouncer (apt install pgbouncer)")

PGBOUNCER_INI = """\
[databases]
fetchpool = {target}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {users}
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 500
log_connections = 0
log_disconnections = 0
"""


@asynccontextmanager
async def postgresql_15(folder: Path) -> AsyncIterator[str]:
    """Run PostgreSQL 15 over a folder that does not exist yet; yield its URL. Neither it nor PgBouncer may be root."""
    account = find_account()
    give_folder(folder, account)
    initdb = (str(POSTGRESQL_15 / "initdb"), "-D", str(folder), "-U", "fetchpool", "-A", "trust", "-E", "UTF8", "-N")
    subprocess.run(initdb, cwd="/", check=True, capture_output=True, **account.run_as)
    socket_dir = folder / "s"
    give_folder(socket_dir, account)
    options = ("-c", "listen_addresses=", "-k", str(socket_dir), "-c", "max_connections=200", "-c", "fsync=off")
    command = (str(POSTGRESQL_15 / "postgres"), "-D", str(folder), *options)
    async with _running(*command, account=account, answers=lambda: _answers_at(socket_dir / ".s.PGSQL.5432")):
        yield f"postgresql://fetchpool@/postgres?host={socket_dir}"


@asynccontextmanager
async def pgbouncer(database_url: str, folder: Path, *, pool_size: int = 8) -> AsyncIterator[str]:
    """Run PgBouncer in transaction mode before a database; yield the URL through it.

    It lets no start-up parameter pass, and any user in without a password.
    """
    address = make_url(database_url)
    target = {
        "host": address.host or address.query.get("host"),
        "port": address.port or address.query.get("port", 5432),
        "dbname": address.database,
        "user": address.username,
        "password": address.password,
    }
    port = _free_port()
    users = _written(folder / "pgbouncer.users", '"fetchpool" ""\n')
    said = " ".join(f"{name}='{value}'" for name, value in target.items() if value is not None)
    text = PGBOUNCER_INI.format(target=said, port=port, users=users, pool_size=pool_size)
    command = (str(PGBOUNCER), str(_written(folder / "pgbouncer.ini", text)))
    async with _running(*command, account=find_account(), answers=lambda: _answers_at(port)):
        yield f"postgresql://fetchpool@127.0.0.1:{port}/fetchpool?sslmode=disable"


@asynccontextmanager
async def _running(*command: str, account: Account, answers: Callable[[], Awaitable[bool]]) -> AsyncIterator[None]:
    """Run a server until the end; what it says goes to standard error."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd="/", stdin=asyncio.subprocess.DEVNULL, stdout=sys.__stderr__, **account.run_as
    )
    try:
        async with asyncio.timeout(START_S):
            while not await answers():
                assert process.returncode is None, f"{command[0]} ended at its start"
                await asyncio.sleep(0.05)
        yield
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGQUIT if "postgres" in command[0] else signal.SIGTERM)
        await asyncio.wait_for(process.wait(), START_S)


async def _answers_at(place: Path | int) -> bool:
    try:
        if isinstance(place, Path):
            connection = await asyncpg.connect(host=str(place.parent), user="fetchpool", database="postgres")
            await connection.close()
        else:
            _, writer = await asyncio.open_connection("127.0.0.1", place)
            writer.close()
    except (OSError, asyncpg.CannotConnectNowError):
        return False
    return True


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o644)
    return path


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
