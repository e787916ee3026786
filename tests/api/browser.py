"""A browser for tests: headless Chromium, driven over the WebDriver protocol (W3C), which is plain JSON over HTTP."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")

ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1300,3000",
    # Whatever is asked for beyond this machine is not found, and shows up in the log.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


@dataclass(frozen=True)
class Browser:
    """One window."""

    client: httpx2.Client
    session_url: str

    def open(self, url: str) -> None:
        self._call("/url", url=url)

    def run(self, script: str, *arguments: object) -> Any:
        """Run a script in the page; gives what it returns."""
        return self._call("/execute/sync", script=script, args=arguments)

    def wait_for(self, script: str, *, within_s: float = 60) -> Any:
        """Wait until a script returns something true."""
        until = time.monotonic() + within_s
        while not (found := self.run(script)):
            assert time.monotonic() < until, f"never true: {script}\n{self.errors()}"
            time.sleep(0.05)
        return found

    def click(self, selector: str) -> None:
        """Wait for an element, and click it."""
        self.wait_for(f"const e = document.querySelector({json.dumps(selector)}); if (e) e.click(); return !!e;")

    def errors(self) -> list[str]:
        """What the page complained about: failed requests, scripts, violations of its security policy."""
        entries = self._call("/se/log", type="browser")
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]

    def requested(self) -> list[str]:
        """The URLs of all requests of pages since the last call, answered or not; the browser's own tabs aside."""
        messages = [json.loads(entry["message"])["message"] for entry in self._call("/se/log", type="performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
            and not message["params"]["documentURL"].startswith("chrome:")
        ]

    def _call(self, path: str, **body: object) -> Any:
        response = self.client.post(self.session_url + path, json=body)
        answer = response.json()["value"]
        assert response.status_code == 200, answer
        return answer


@contextmanager
def opened(folder: Path) -> Iterator[Browser]:
    """Start a browser with a profile of its own in `folder`."""
    with _driver() as url, httpx2.Client(timeout=60) as client:
        options = {"binary": CHROMIUM, "args": [*ARGUMENTS, f"--user-data-dir={folder}", "about:blank"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        answer = client.post(f"{url}/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
        session_url = f"{url}/session/{answer['sessionId']}"
        try:
            yield Browser(client, session_url)
        finally:
            # The browser outlives its driver unless it is told to go.
            client.delete(session_url).raise_for_status()


@contextmanager
def _driver() -> Iterator[str]:
    assert CHROMEDRIVER is not None
    command = [CHROMEDRIVER, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        try:
            yield f"http://127.0.0.1:{_port(driver)}"
        finally:
            driver.terminate()


def _port(driver: subprocess.Popen[str]) -> int:
    assert driver.stdout is not None
    for line in driver.stdout:
        if "started successfully on port" in line:
            return int(line.split()[-1].rstrip("."))
    raise AssertionError("chromedriver did not start")
