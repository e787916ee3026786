"""The real service, started as a user starts it, with its data in a folder of the bench; and a client of it."""

import http.client
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import usage
from programs import ROOT, SERVICE_PYTHON, Broken, clean_environment, started, tail

START_S = 90.0
ANSWER_S = 90.0
WAIT_S = 30
RUN_S_MAX = 900.0
SETTLE_S = 0.3
"""What is still done for a batch after it is finished (hosts given back, say) is counted with it."""


@dataclass(frozen=True)
class Run:
    """What a batch took, from before its POST until a client saw that it is finished; CPU by part of the service."""

    wall_s: float
    cpu_s: dict[str, float]
    batch: dict[str, Any]

    @property
    def stored_s(self) -> float:
        """Seconds from the batch's creation to its end, by the service's own clock."""
        created_at, finished_at = (datetime.fromisoformat(self.batch[name]) for name in ("created_at", "finished_at"))
        return (finished_at - created_at).total_seconds()


class Service:
    """One running `fetchpool serve`."""

    def __init__(self, process: subprocess.Popen, url: str, folder: Path, log: Path) -> None:
        self.process = process
        self.url = url
        self._folder = folder
        self._log = log

    @property
    def database_url(self) -> str:
        """Where its own PostgreSQL listens; only for who may pass through the data folder."""
        return f"postgresql://fetchpool@/fetchpool?host={self._folder / 'data/socket'}"

    def run(self, urls: Sequence[str]) -> Run:
        """Submit a batch and wait for its end; all its jobs must succeed."""
        cpu_before, started_at = self.cpu_s(), time.perf_counter()
        batch = self.finished(self.submit(urls))
        wall_s = time.perf_counter() - started_at
        time.sleep(SETTLE_S)
        cpu_after = self.cpu_s()
        if batch["counts"]["succeeded"] != len(urls):
            raise Broken(f"Not all jobs succeeded: {batch['counts']} {batch['errors']}\n{tail(self._log)}")
        return Run(wall_s, usage.spent_s(cpu_before, cpu_after), batch)

    def submit(self, urls: Sequence[str]) -> str:
        """Submit a batch; return its id."""
        status, answer = self.call("POST", "/v1/batches", {"urls": urls})
        if status != 202:
            raise Broken(f"The batch was not accepted: {status} {answer}")
        return str(answer["id"])

    def finished(self, batch_id: str) -> dict[str, Any]:
        """Wait, as a client does, until the batch is finished."""
        give_up_at = time.monotonic() + RUN_S_MAX
        while time.monotonic() < give_up_at:
            status, batch = self.call("GET", f"/v1/batches/{batch_id}", prefer=f"wait={WAIT_S}")
            if status != 200:
                raise Broken(f"The batch cannot be read: {status} {batch}")
            if batch["status"] in ("completed", "cancelled"):
                return dict(batch)
        raise Broken(f"Not finished within {RUN_S_MAX:g} s: {batch['counts']}\n{tail(self._log)}")

    def call(self, method: str, path: str, body: Any = None, *, prefer: str | None = None) -> tuple[int, Any]:
        """Send one request over a connection of its own (idle ones are closed by the service); status and JSON.

        `body` is JSON already if it is bytes.
        """
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if prefer is not None:
            headers["Prefer"] = prefer
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with closing(http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=ANSWER_S)) as connection:
            connection.request(method, path, body=content, headers=headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"null")

    def cpu_s(self, *, without: int | None = None) -> dict[str, float]:
        """CPU seconds so far of all its processes, by part, but for the one `without`."""
        return usage.tree_cpu_s(self.process.pid, without=without)

    def peak_bytes(self) -> dict[str, int]:
        """The most memory that its processes had so far, by part; what they share is counted for each."""
        return usage.tree_peak_bytes(self.process.pid)

    def pss_bytes(self) -> dict[str, int]:
        """Memory of its processes now, by part; what they share is divided among them."""
        return usage.tree_pss_bytes(self.process.pid)


@contextmanager
def serving(folder: Path, *arguments: str, source: Path = ROOT, **settings: str) -> Iterator[Service]:
    """Start the service and wait until it is ready; `settings` are further variables of its environment.

    The folder's data is used again when there is some. `source` is the clone whose code runs.
    """
    folder.mkdir(mode=0o711, exist_ok=True)
    folder.chmod(0o711)
    log = folder / "service.log"
    own = {"FETCHPOOL_DATA_DIR": str(folder / "data"), "FETCHPOOL_ALLOW_NETWORKS": "127.0.0.0/8"}
    environment = clean_environment(**{"PYTHONPATH": str(source)} | own | settings)
    command = [SERVICE_PYTHON.with_name("fetchpool"), "serve", "--port", "0", *arguments]
    with started(command, environment=environment, log=log) as process:
        yield Service(process, _read_greeting(process, log), folder, log)


def _read_greeting(process: subprocess.Popen, log: Path) -> str:
    """Wait for the line that says where it listens; it must come in time."""
    assert process.stdout is not None
    late = threading.Timer(START_S, process.kill)
    late.start()
    try:
        for line in process.stdout:
            if found := re.search(rb"http://\S+(?=/docs)", line):
                return found[0].decode()
    finally:
        late.cancel()
    raise Broken(f"The service did not start:\n{tail(log)}")
