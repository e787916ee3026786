"""The composition root: builds the API, the workers and what they stand on from the settings.

The only place where the parts meet. It decides in which order they, uvicorn included, start and stop.
"""

import asyncio
import gc
import itertools
import logging
import os
import platform
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    aclosing,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import fields
from pathlib import Path
from uuid import uuid4

import uvicorn
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncEngine

from app import __version__
from app.api.application import create_app, hear_finishes, stop_waiting
from app.api.schemas import Bounds
from app.fetch.limits import Limits
from app.fetch.policy import Policy
from app.fetch.resolver import Resolver
from app.fetch.transport import Transport
from app.jobs import embedded
from app.jobs.database import make_autocommit, make_engine, make_lender, make_sessions
from app.jobs.hints import Listener
from app.jobs.migration import migrate
from app.jobs.silence import watching
from app.jobs.workers import Identity
from app.listening import bound_socket, check_exposure, let_in, own_addresses
from app.settings import Settings
from app.worker.options import LIMIT_NAMES
from app.worker.pool import Pool, PoolSettings
from app.worker.processes import Processes
from app.worker.upkeep import Upkeep

API_CONNECTIONS = 10
WORKER_CONNECTIONS = 5
SPARE_CONNECTIONS = 30
"""For migrations, and people with psql."""

API_SWITCH_S = 0.001
"""How long the thread that checks a large batch keeps the loop waiting whenever the loop has let it run; Python's own
5 ms, several times in one turn of the loop, held polls up for 0.1 s."""
GC_YOUNG_MAX = 5_000
"""New objects between two looks for garbage, in a worker: jobs come and go by the hundred and leave hardly any. With
Python's own 700 they cost twice as much; with more, no less."""
API_GRACE_S = 5
"""What requests under way get at shutdown."""
WORKER_NICENESS = 3
"""Of the workers of a service: half the weight of others, so a GET waits less for them. With a tenth it waits no less,
and a server on the same machine interrupts them with each answer, where it would give several at once."""

logger = logging.getLogger(__name__)


class CannotRun(Exception):
    """The settings rule it out, or the API did not start; the message is one line that says what to do."""


async def serve(settings: Settings) -> None:
    """Run the whole service until told to stop: PostgreSQL unless one is given, the API, and the worker processes.

    Raises `CannotRun`, `CannotListen`, `EmbeddedUnusable` or `DatabaseUnusable` when it cannot start, and
    `CancelledError` when told to stop before it has.
    """
    _cancel_on_signal()
    if settings.api_token is None:
        check_exposure(settings.host, settings.port)
    _say_what_is_open(settings)
    with bound_socket(settings.host, settings.port) as listener:
        async with _with_database(settings) as ready_settings:
            await _migrate(ready_settings)
            let_in(listener, settings.host, settings.port)
            await _serve_until_stopped(ready_settings, listener)


async def work(settings: Settings, *, of_a_service: bool = False) -> None:
    """Run one worker until told to stop: the first time it drains, the second time it ends at once.

    `of_a_service`: it was started by `serve`, which has migrated already; when standard input closes that service is
    gone, and the worker drains. Raises `CannotRun` or `DatabaseUnusable`.
    """
    if settings.database_url is None:
        raise CannotRun(
            "A worker of its own needs DATABASE_URL, the same as the service's; with its embedded PostgreSQL, "
            "`fetchpool serve --workers N` starts the workers."
        )
    if not of_a_service:
        _cancel_on_signal()
        _say_what_is_open(settings)
        await _migrate(settings)
    _allow_many_files()
    resolver = Resolver(servers=settings.dns_servers, dns_timeout_s=settings.dns_timeout_s)
    async with aclosing(resolver), aclosing(_make_transport(settings, resolver)) as transport:
        await _work_until_stopped(settings, transport, of_a_service=of_a_service)


async def migrate_database(settings: Settings) -> None:
    """Bring the schema of the database up to date, the embedded one's too. Raises as `serve` does."""
    _cancel_on_signal()
    async with _with_database(settings) as ready_settings:
        await _migrate(ready_settings)


# The service


async def _serve_until_stopped(settings: Settings, listener: socket.socket) -> None:
    port: int = listener.getsockname()[1]
    engine = make_engine(_database_url(settings), pgbouncer=settings.pgbouncer, pool_size=API_CONNECTIONS)
    api = _make_api(settings, engine, port)
    server = _Server(_uvicorn_config(api))
    workers = _make_workers(settings, port)
    try:
        async with _watched(engine, settings), asyncio.TaskGroup() as group:
            serving = group.create_task(server.serve(sockets=[listener]))
            if await server.is_started(serving):
                running = group.create_task(workers.run())
                beside = []
                if not settings.pgbouncer:
                    beside.append(group.create_task(hear_finishes(api, _database_url(settings))))
                _keep_loop_free()
                _on_signal(lambda: _stop_as_told(settings, api, server, workers))
                _greet(settings, port)
                await asyncio.wait({serving, running}, return_when=asyncio.FIRST_COMPLETED)
                if not server.should_exit:  # asked again, workers would not finish what they run
                    _stop(api, server, workers)
                for task in beside:
                    task.cancel()
    finally:
        await engine.dispose()
    if not server.started:
        raise CannotRun("The API could not start; the log says why.")


def _make_api(settings: Settings, engine: AsyncEngine, port: int) -> FastAPI:
    return create_app(
        sessions=make_sessions(engine),
        lend_driver=make_lender(engine),
        policy=_make_policy(settings, port),
        version=__version__,
        host=settings.host,
        api_token=settings.api_token,
        allowed_hosts=settings.allowed_hosts,
        bounds=Bounds(**{bound.name: getattr(settings, bound.name) for bound in fields(Bounds)}),
    )


def _keep_loop_free() -> None:
    """Let nothing else in this process hold the API's loop for long."""
    sys.setswitchinterval(API_SWITCH_S)
    # What was made by now stays: without this, each full pass of the garbage collector goes over it, for 0.1 s.
    gc.collect()
    gc.freeze()


def _stop_as_told(settings: Settings, api: FastAPI, server: "_Server", workers: Processes) -> None:
    if not server.should_exit:
        _say(f"Finishing what runs, at most {settings.drain_grace_s:g} s. Once more stops at once.\n")
    _stop(api, server, workers)


def _stop(api: FastAPI, server: "_Server", workers: Processes) -> None:
    stop_waiting(api)
    server.stop()
    workers.end()


class _Server(uvicorn.Server):
    """uvicorn, except that signals are the composition root's: it has more to stop than this."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop; when cancelled, as by a signal during the start, end the application in order."""
        try:
            await super().serve(sockets)
        except asyncio.CancelledError:
            await (self.shutdown(sockets) if self.started else self.lifespan.shutdown())
            raise

    async def is_started(self, serving: asyncio.Task[None]) -> bool:
        """Wait until requests are answered; False when that failed, and uvicorn has logged why."""
        while not self.started and not serving.done():  # noqa: ASYNC110 (uvicorn has no event for it)
            await asyncio.sleep(0.01)
        return self.started

    async def main_loop(self) -> None:
        """Wait to be told to stop; uvicorn's own would look ten times a second."""
        await self._stopping.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shut down as uvicorn does, and end the application's lifespan even when forced to hurry."""
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()

    def stop(self) -> None:
        """End the requests under way within `API_GRACE_S`; when asked again, at once."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._stopping.set()


def _uvicorn_config(api: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        api,
        lifespan="on",
        http="httptools",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,  # the application has it
        # No proxy is trusted to name the client or the scheme: nothing here depends on them.
        proxy_headers=False,
        timeout_graceful_shutdown=API_GRACE_S,
    )


def _make_workers(settings: Settings, port: int) -> Processes:
    """Workers get what this process found out by their environment; a password does not show there in `ps`."""
    source = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {
        "DATABASE_URL": _database_url(settings),
        "FETCHPOOL_PGBOUNCER": str(settings.pgbouncer),
        "FETCHPOOL_HOST": settings.host,
        "FETCHPOOL_PORT": str(port),
        # malloc asks Linux for huge pages: a job takes its worker 2 % less, and no more memory (docs/decisions/0016).
        # Not as the first of them: setproctitle would not find the command line, which lies before it.
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
        "PYTHONPATH": os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    # -P: not whatever folder called `app` the service was started beside
    command = [sys.executable, "-P", "-m", "app.cli", "worker", "--of-a-service"]
    return Processes(command, count=settings.workers, environment=environment, grace_s=settings.drain_grace_s)


def _greet(settings: Settings, port: int) -> None:
    """Tell on standard output where the service is; the curl line works as pasted."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "") else "::1" if settings.host == "::" else settings.host
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    token = '-H "Authorization: Bearer $FETCHPOOL_API_TOKEN" ' if settings.api_token else ""
    _say(
        f"Fetchpool {__version__} is ready.\n\n"
        f"  Docs:    {url}/docs\n"
        f"  Try it:  curl -g {url}/v1/batches {token}"
        """-H 'Content-Type: application/json' -d '{"urls": ["https://example.com/"]}'\n\n"""
        "Stop it with Ctrl-C.\n"
    )


def _say(text: str) -> None:
    """Write to standard output; whoever read it may be gone, and that must not keep the service from its work."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError:
        # What is left in the buffer would fail once more at the end, and with it the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# One worker


async def _work_until_stopped(settings: Settings, transport: Transport, *, of_a_service: bool) -> None:
    engine = make_engine(
        _database_url(settings), pgbouncer=settings.pgbouncer, pool_size=WORKER_CONNECTIONS, generic_plans=True
    )
    sessions = make_sessions(engine)
    autocommit = make_autocommit(engine)
    listener = Listener()
    pool = Pool(
        sessions=sessions,
        autocommit=autocommit,
        transport=transport,
        listener=listener,
        identity=_identity(settings),
        settings=_pool_settings(settings),
    )
    upkeep = Upkeep(sessions, autocommit=autocommit, listener=listener, lease_s=settings.lease_s)
    stops = itertools.chain([pool.drain], itertools.repeat(pool.stop))
    _on_signal(lambda: next(stops)())
    if of_a_service:
        _lower_priority()
        _on_closed_stdin(pool.drain)
    else:
        _greet_worker(settings)
    try:
        async with _watched(engine, settings), asyncio.TaskGroup() as group:
            beside = [group.create_task(upkeep.run())]
            if not settings.pgbouncer:
                wakes = (lambda _: pool.wake(), lambda _: upkeep.wake())
                hearing = listener.hear(_database_url(settings), *wakes, ask=pool.ask)
                beside.append(group.create_task(hearing))
            _settle_down()
            await pool.run()
            for task in beside:
                task.cancel()
    finally:
        await engine.dispose()


def _lower_priority() -> None:
    """Let the API and PostgreSQL, which clients wait for, have the CPU before this worker, which takes all it gets.

    Where Linux shares the CPU among sessions first (autogroup), a process's niceness counts within its own only.
    """
    os.nice(WORKER_NICENESS)
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(WORKER_NICENESS))


def _settle_down() -> None:
    """Spare a worker the garbage collector: it took a fifth of the CPU of a job."""
    # What was made by now stays: without this, each full pass goes over it.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_YOUNG_MAX)


def _greet_worker(settings: Settings) -> None:
    _say(f"Fetchpool {__version__}: this worker is ready, with {settings.slots} slots.\nStop it with Ctrl-C.\n")


def _identity(settings: Settings) -> Identity:
    return Identity(id=uuid4(), machine=platform.node(), pid=os.getpid(), version=__version__, slots=settings.slots)


def _pool_settings(settings: Settings) -> PoolSettings:
    return PoolSettings(
        slots=settings.slots,
        host_concurrency=settings.host_concurrency,
        host_delay_s=settings.host_delay_s,
        lease_s=settings.lease_s,
        drain_grace_s=settings.drain_grace_s,
        limits=default_limits(settings),
    )


def default_limits(settings: Settings) -> Limits:
    """Return the limits of a fetch for which the client set none."""
    return Limits(**{limit: getattr(settings, limit) for limit in LIMIT_NAMES})


def _make_transport(settings: Settings, resolver: Resolver) -> Transport:
    return Transport(
        policy=_make_policy(settings, settings.port),
        resolver=resolver,
        user_agent=settings.user_agent,
        ca_file=settings.ca_file,
        decoders=settings.decoders,
    )


def _allow_many_files() -> None:
    """Raise the soft limit of open files, often 1,024, to the hard one: a slot needs one and an idle connection too."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# What may be reached, and by whom


def _make_policy(settings: Settings, port: int) -> Policy:
    return Policy(
        allow_networks=settings.allow_networks,
        own_names=frozenset(name.lower() for name in settings.allowed_hosts),
        own_addresses=own_addresses(settings.host),
        own_port=port,
    )


def _say_what_is_open(settings: Settings) -> None:
    if settings.api_token is not None and not settings.allowed_hosts:
        logger.warning(
            "Only clients that address the service as %s are answered; see FETCHPOOL_ALLOWED_HOSTS", settings.host
        )
    if settings.allow_networks:
        networks = ", ".join(map(str, settings.allow_networks))
        logger.warning("Fetches may reach non-public networks (FETCHPOOL_ALLOW_NETWORKS): %s", networks)


# The database, and signals


@asynccontextmanager
async def _with_database(settings: Settings) -> AsyncIterator[Settings]:
    """Yield settings whose `database_url` is set; while this runs, an embedded PostgreSQL does."""
    if settings.database_url is not None:
        yield settings
        return
    api_connections = API_CONNECTIONS + 1  # which hears hints, as one of each worker does
    connections_max = SPARE_CONNECTIONS + api_connections + settings.workers * (WORKER_CONNECTIONS + 1)
    async with embedded.running(settings.data_dir, connections_max=connections_max) as url:
        yield settings.model_copy(update={"database_url": url, "pgbouncer": False})


async def _migrate(settings: Settings) -> None:
    await migrate(_database_url(settings), pgbouncer=settings.pgbouncer)


def _watched(engine: AsyncEngine, settings: Settings) -> AbstractAsyncContextManager[None]:
    """Have connections ended that died without a word, where that can be told."""
    return nullcontext() if settings.pgbouncer else watching(engine, _database_url(settings))


def _database_url(settings: Settings) -> str:
    assert settings.database_url is not None, "_with_database comes first"
    return settings.database_url


def _cancel_on_signal() -> None:
    """Until something else is said: a signal ends the start, and what was started is stopped on the way out."""
    task = asyncio.current_task()
    assert task is not None
    _on_signal(lambda: None if task.cancelling() else task.cancel())


def _on_signal(act: Callable[[], object]) -> None:
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(signal_number, act)


def _on_closed_stdin(act: Callable[[], object]) -> None:
    loop = asyncio.get_running_loop()
    stdin = sys.stdin.fileno()

    def read() -> None:
        if not os.read(stdin, 1024):
            loop.remove_reader(stdin)
            act()

    loop.add_reader(stdin, read)
