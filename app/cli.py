"""The command `fetchpool`: options into settings, errors into one line and an exit code. Does nothing else."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, NoReturn

import setproctitle
import typer
import uvloop

from app import __version__, main, telemetry
from app.jobs.account import EmbeddedUnusable
from app.jobs.database import DatabaseUnusable
from app.listening import CannotListen
from app.settings import Settings, SettingsInvalid, read_settings

EXIT_CANNOT_RUN = 1
EXIT_SETTINGS = 2
EXIT_STOPPED = 130
"""Stopped by a signal before it was up: 128 + SIGINT, as shells have it."""

app = typer.Typer(
    name="fetchpool",
    help="Fetch batches of URLs: a REST service with durable jobs.\n\n"
    "Settings are environment variables FETCHPOOL_* (and DATABASE_URL) or a file .env; .env.example lists them all.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fetchpool {__version__}")
        raise typer.Exit


@app.callback()
def fetchpool(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Name the process; the commands do the rest."""


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.  [FETCHPOOL_HOST; 127.0.0.1]")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0 takes a free one.  [FETCHPOOL_PORT; 8000]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes; 0 for an API alone.  [FETCHPOOL_WORKERS; one for each core]")
    ] = None,
) -> None:
    """Run the whole service: API, docs and workers.

    With a PostgreSQL of its own, unless DATABASE_URL names one. Ctrl-C lets running fetches finish, for at most
    FETCHPOOL_DRAIN_GRACE_S seconds; a second one does not.
    """
    setproctitle.setproctitle("fetchpool serve")
    settings = _settings(host=host, port=port, workers=workers)
    _run(main.serve(settings))


@app.command()
def worker(of_a_service: Annotated[bool, typer.Option("--of-a-service", hidden=True)] = False) -> None:
    """Run one more worker on the same database.

    DATABASE_URL names it, and the other settings must be the service's too. SIGTERM or Ctrl-C lets running fetches
    finish; a second one does not.
    """
    setproctitle.setproctitle("fetchpool worker")
    # Not so the service: uvloop cannot start PostgreSQL under another user.
    _run(main.work(_settings(), of_a_service=of_a_service), run=uvloop.run)


@app.command()
def migrate() -> None:
    """Bring the database up to date.

    `serve` and `worker` do so by themselves at start.
    """
    setproctitle.setproctitle("fetchpool migrate")
    _run(main.migrate_database(_settings()))


def _settings(**given: Any) -> Settings:
    try:
        settings = read_settings(**given)
    except SettingsInvalid as error:
        _end(str(error), EXIT_SETTINGS)
    telemetry.configure(settings.log_level)
    return settings


def _run(program: Coroutine[Any, Any, None], *, run: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run) -> None:
    try:
        run(program)
    except (main.CannotRun, CannotListen, EmbeddedUnusable, DatabaseUnusable) as error:
        _end(str(error), EXIT_CANNOT_RUN)
    except (asyncio.CancelledError, KeyboardInterrupt):
        sys.exit(EXIT_STOPPED)


def _end(line: str, exit_code: int) -> NoReturn:
    typer.echo(f"fetchpool: {line}", err=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    app(prog_name="fetchpool")
