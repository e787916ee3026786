"""The command line: help, version, and one clear line instead of a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app import __version__
from tests import databases


def fetchpool(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FETCHPOOL_")}
    kept.pop("DATABASE_URL", None)
    return subprocess.run(
        [sys.executable, "-m", "app.cli", *arguments],
        env=kept | {"PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "120"} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def assert_one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode != 0
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("fetchpool: ")
    for word in words:
        assert word in line


def test_the_version_is_told(tmp_path: Path) -> None:
    done = fetchpool("--version", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"fetchpool {__version__}\n")


def test_help_names_the_commands_and_their_options(tmp_path: Path) -> None:
    assert {"serve", "worker", "migrate"} <= set(fetchpool("--help", folder=tmp_path).stdout.split())
    assert {"--host", "--port", "--workers"} <= set(fetchpool("serve", "--help", folder=tmp_path).stdout.split())
    assert "--of-a-service" not in fetchpool("worker", "--help", folder=tmp_path).stdout


@pytest.mark.parametrize("command", ["serve", "worker", "migrate"])
def test_a_bad_setting_is_one_line_that_names_it(tmp_path: Path, command: str) -> None:
    done = fetchpool(command, folder=tmp_path, FETCHPOOL_SLOTS="many")
    assert_one_line(done, "FETCHPOOL_SLOTS")
    assert done.returncode == 2


def test_a_mistyped_setting_is_one_line_with_the_right_name(tmp_path: Path) -> None:
    done = fetchpool("serve", folder=tmp_path, FETCHPOOL_SLOT="50")
    assert_one_line(done, "FETCHPOOL_SLOT ", "FETCHPOOL_SLOTS")
    assert done.returncode == 2


def test_a_worker_alone_is_told_what_it_needs(tmp_path: Path) -> None:
    assert_one_line(fetchpool("worker", folder=tmp_path), "DATABASE_URL")


@pytest.mark.parametrize("command", ["serve", "worker", "migrate"])
def test_an_unreachable_database_is_one_line_without_the_password(tmp_path: Path, command: str) -> None:
    options = ["--port", "0"] if command == "serve" else []
    done = fetchpool(command, *options, folder=tmp_path, DATABASE_URL="postgresql://someone:hunter2@127.0.0.1:1/none")
    assert_one_line(done, "DATABASE_URL")
    assert "hunter2" not in done.stderr


OLD_SERVER = """
    CREATE SCHEMA old;
    CREATE FUNCTION old.current_setting(text) RETURNS text LANGUAGE sql AS $$ SELECT '140020' $$;
    ALTER DATABASE "{name}" SET search_path = old, pg_catalog;
"""
"""A server that says it is PostgreSQL 14.20 to whoever asks for its version; the words were tried on a real one."""


async def test_too_old_a_postgresql_is_one_line(tmp_path: Path, server_url: str) -> None:
    name = f"fetchpool_old_{os.getpid()}"
    await databases.recreate(server_url, name, template="template0")
    url = databases.with_database(server_url, name)
    connection = await databases.connect(url)
    await connection.execute(OLD_SERVER.format(name=name))
    for command in (("serve", "--port", "0"), ("worker",), ("migrate",)):
        assert_one_line(fetchpool(*command, folder=tmp_path, DATABASE_URL=url), "PostgreSQL 14", "15 or newer")
    assert await connection.fetchval("SELECT to_regclass('public.alembic_version')") is None
    await connection.close()
    await databases.drop(server_url, name)


def test_nothing_listens_beyond_this_machine_without_a_token(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::"):
        done = fetchpool("serve", "--host", host, "--port", "0", folder=tmp_path)
        assert_one_line(done, host, "FETCHPOOL_API_TOKEN", "127.0.0.1")


def test_a_host_that_is_none_is_one_line(tmp_path: Path) -> None:
    assert_one_line(fetchpool("serve", "--host", "no..host", folder=tmp_path), "no..host", "FETCHPOOL_HOST")


def test_an_argument_that_is_none_is_refused(tmp_path: Path) -> None:
    assert fetchpool("serve", "--speed", "9", folder=tmp_path).returncode == 2
