"""The stores of those measured beside the service: a PostgreSQL with its settings, a Redis, each of their own."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import usage
from programs import ROOT, SERVICE_PYTHON, Broken, clean_environment, free_ports, started, tail, wait_for_port


class Store:
    """One running store; `address` is a URL of PostgreSQL, a port of Redis."""

    def __init__(self, address: str, pid: int) -> None:
        self.address = address
        self._pid = pid

    def cpu_s(self) -> float:
        """CPU seconds so far of all its processes."""
        return sum(usage.tree_cpu_s(self._pid).values())


@contextmanager
def postgresql(folder: Path) -> Iterator[Store]:
    """Run a PostgreSQL with its data in the folder."""
    log = folder / "postgresql.log"
    command = [SERVICE_PYTHON, ROOT / "bench/postgresql_server.py", folder / "postgresql"]
    with started(command, environment=clean_environment(), log=log) as process:
        assert process.stdout is not None
        url = process.stdout.readline().decode().strip()
        if not url:
            raise Broken(f"PostgreSQL did not start:\n{tail(log)}")
        yield Store(url, process.pid)


@contextmanager
def redis(folder: Path) -> Iterator[Store]:
    """Run a Redis that keeps nothing on disk, which is the fastest it can be."""
    if shutil.which("redis-server") is None:
        raise Broken("arq, Celery and taskiq need Redis (apt install redis-server)")
    log = folder / "redis.log"
    [port] = free_ports(1)
    quiet = ["--save", "", "--appendonly", "no", "--loglevel", "warning"]
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), *quiet]
    with started(command, environment=clean_environment(), log=log) as process:
        wait_for_port(process, "127.0.0.1", port, log)
        yield Store(str(port), process.pid)
