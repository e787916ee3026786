"""Long polls: they end when there is news, when time is up, when the client leaves, and when the service stops."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import httpx2
import pytest
from fastapi import FastAPI
from sqlalchemy import make_url

from app.api import waiting
from app.api.application import hear_finishes, stop_waiting
from app.api.context import Context
from app.api.waiting import Waits
from app.jobs import database
from app.jobs.database import make_engine, make_lender
from tests.api.conftest import AppMaker, calling, served
from tests.databases import connect
from tests.jobs.actors import Client as Reader
from tests.jobs.actors import Worker, success
from tests.waiting import until

NOWHERE = "postgresql://postgres@127.0.0.1:9/none"
BODY = {"urls": ["https://example.com/"]}
WAIT = {"Prefer": "wait=30"}


def waits_of(app: FastAPI) -> Waits:
    context: Context = app.state.context
    return context.waits


async def until_waiting(app: FastAPI, count: int = 1) -> None:
    await until(lambda: waits_of(app).waiter_count == count)


async def run(worker: Worker, reader: Reader, batch_id: UUID) -> None:
    [[job]] = (await worker.claim()).values()
    await worker.record(success(job))
    await reader.finish(batch_id)


async def assert_accepted(response: httpx2.Response, reader: Reader) -> None:
    """It is answered as a batch that was not waited for, and is stored as it says."""
    assert (response.status_code, response.json()["status"]) == (202, "queued")
    assert response.headers["Location"] == f"/v1/batches/{response.json()['id']}"
    assert "Preference-Applied" not in response.headers
    assert (await reader.read(UUID(response.json()["id"]))).counts.queued == 1


async def test_a_wait_ends_with_the_batch(
    app: FastAPI, api: httpx2.AsyncClient, reader: Reader, worker: Worker
) -> None:
    batch_id = await reader.submit("h.example")
    waiting = asyncio.create_task(api.get(f"/v1/batches/{batch_id}", headers={"Prefer": "wait=30"}))
    await until_waiting(app)
    await run(worker, reader, batch_id)
    async with asyncio.timeout(10):
        response = await waiting
    assert response.json()["status"] == "completed"
    assert response.headers["Preference-Applied"] == "wait=30"


@asynccontextmanager
async def hearing(app: FastAPI, url: str) -> AsyncIterator[None]:
    """Let the application hear hints meanwhile."""
    ear = asyncio.create_task(hear_finishes(app, url))
    await until(lambda: waits_of(app).listener.is_hearing)
    try:
        yield
    finally:
        ear.cancel()
        await asyncio.gather(ear, return_exceptions=True)


async def test_a_hint_ends_a_wait_for_the_end(
    app: FastAPI,
    api: httpx2.AsyncClient,
    reader: Reader,
    worker: Worker,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Heard, it spares the looks: here the next one would come after an hour."""
    monkeypatch.setattr(waiting, "HINTED_LOOK_S", 3600.0)
    batch_id, other_id = await reader.submit("h.example"), await reader.submit("other.example")
    async with hearing(app, database_url):
        asking = [
            asyncio.create_task(api.get(f"/v1/batches/{each}", headers={"Prefer": "wait=60"}))
            for each in (batch_id, batch_id, other_id)
        ]
        await until_waiting(app, 3)
        claimed = await worker.claim()
        [job] = next(jobs for jobs in claimed.values() if jobs[0].batch_id == batch_id)
        await worker.record(success(job))
        await reader.finish(batch_id)
        async with asyncio.timeout(10):
            answers = await asyncio.gather(*asking[:2])
        assert [answer.json()["status"] for answer in answers] == ["completed", "completed"]
        assert not asking[2].done()
        stop_waiting(app)
        assert (await asking[2]).json()["status"] == "queued"


async def test_a_wait_looks_by_itself_once_hints_are_no_longer_heard(
    app: FastAPI,
    api: httpx2.AsyncClient,
    reader: Reader,
    worker: Worker,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waiting, "HINTED_LOOK_S", 3600.0)
    batch_id = await reader.submit("h.example")
    async with hearing(app, database_url):
        asking = asyncio.create_task(api.get(f"/v1/batches/{batch_id}", headers={"Prefer": "wait=60"}))
        await until_waiting(app)
    await run(worker, reader, batch_id)
    async with asyncio.timeout(10):
        assert (await asking).json()["status"] == "completed"


async def test_with_an_etag_a_wait_ends_with_any_change(app: FastAPI, api: httpx2.AsyncClient, reader: Reader) -> None:
    batch_id = await reader.submit("h.example")
    etag = (await api.get(f"/v1/batches/{batch_id}")).headers["ETag"]
    headers = {"Prefer": "wait=30", "If-None-Match": etag}
    waiting = asyncio.create_task(api.get(f"/v1/batches/{batch_id}", headers=headers))
    await until_waiting(app)
    await reader.cancel(batch_id)
    async with asyncio.timeout(10):
        response = await waiting
    assert response.status_code == 200
    assert response.json()["cancel_requested_at"] is not None


async def test_a_wait_without_news_ends_in_time(api: httpx2.AsyncClient, reader: Reader) -> None:
    batch_id = await reader.submit("h.example")
    etag = (await api.get(f"/v1/batches/{batch_id}")).headers["ETag"]
    begun = time.monotonic()
    async with asyncio.timeout(30):
        same = await api.get(f"/v1/batches/{batch_id}", headers={"Prefer": "wait=1", "If-None-Match": etag})
    assert time.monotonic() - begun > 0.9  # however slow the machine
    assert (same.status_code, same.headers["Retry-After"]) == (304, "1")


async def test_a_finished_batch_is_not_waited_for(api: httpx2.AsyncClient, reader: Reader, worker: Worker) -> None:
    batch_id = await reader.submit("h.example")
    await run(worker, reader, batch_id)
    async with asyncio.timeout(30):
        first = await api.get(f"/v1/batches/{batch_id}", headers={"Prefer": "wait=60"})
        headers = {"Prefer": "wait=60", "If-None-Match": first.headers["ETag"]}
        assert (await api.get(f"/v1/batches/{batch_id}", headers=headers)).status_code == 304


async def test_other_preferences_are_ignored(api: httpx2.AsyncClient, reader: Reader) -> None:
    batch_id = await reader.submit("h.example")
    for prefer in ("respond-async", "wait=", "wait=-1", "wait=x", "wait=1.5", "waiting=5", "", ",,;"):
        response = await api.get(f"/v1/batches/{batch_id}", headers={"Prefer": prefer})
        assert response.status_code == 200
        assert "Preference-Applied" not in response.headers


async def test_a_wait_is_at_most_a_minute(api: httpx2.AsyncClient, reader: Reader, worker: Worker) -> None:
    batch_id = await reader.submit("h.example")
    await run(worker, reader, batch_id)
    response = await api.get(f"/v1/batches/{batch_id}", headers={"Prefer": 'foo; wait=2, WAIT="99999"'})
    assert response.headers["Preference-Applied"] == "wait=60"


async def test_beyond_the_limit_of_waiters_the_answer_comes_at_once(make_app: AppMaker, reader: Reader) -> None:
    app = make_app()
    waits_of(app).waiters_max = 1
    batch_id = await reader.submit("h.example")
    async with calling(app) as api:
        waiting = asyncio.create_task(api.get(f"/v1/batches/{batch_id}", headers={"Prefer": "wait=30"}))
        await until_waiting(app)
        async with asyncio.timeout(10):
            assert (await api.get(f"/v1/batches/{batch_id}", headers={"Prefer": "wait=30"})).status_code == 200
            stop_waiting(app)
            assert (await waiting).status_code == 200


async def test_a_client_that_leaves_ends_its_wait(make_app: AppMaker, reader: Reader) -> None:
    app = make_app()
    batch_id = await reader.submit("h.example")
    async with served(app) as url:
        async with httpx2.AsyncClient(base_url=url) as client:
            waiting = asyncio.create_task(client.get(f"/v1/batches/{batch_id}", headers={"Prefer": "wait=60"}))
            await until_waiting(app)
            waiting.cancel()
        await until_waiting(app, 0)


async def test_a_service_that_stops_answers_its_waits(make_app: AppMaker, reader: Reader) -> None:
    app = make_app()
    batch_id = await reader.submit("h.example")
    async with httpx2.AsyncClient() as client, asyncio.timeout(10):
        async with served(app) as url:
            waiting = asyncio.create_task(
                client.get(f"{url}/v1/batches/{batch_id}", headers={"Prefer": "wait=60"}, timeout=60)
            )
            await until_waiting(app)
        assert (await waiting).status_code == 200


async def test_waiting_holds_no_connection(make_app: AppMaker, reader: Reader) -> None:
    app = make_app()
    batch_id = await reader.submit("h.example")
    async with calling(app) as api:
        # Twice as many as there are connections; each of them must be able to look.
        waiting = [
            asyncio.create_task(api.get(f"/v1/batches/{batch_id}", headers={"Prefer": "wait=30"})) for _ in range(20)
        ]
        await until_waiting(app, 20)
        async with asyncio.timeout(5):
            assert (await api.get(f"/v1/batches/{batch_id}")).status_code == 200
        stop_waiting(app)
        assert {response.status_code for response in await asyncio.gather(*waiting)} == {200}


async def test_a_stored_batch_is_accepted_when_the_wait_cannot_reach_the_database(
    make_app: AppMaker, reader: Reader
) -> None:
    engine = make_engine(NOWHERE)
    async with calling(make_app(lend_driver=make_lender(engine))) as api:
        first = await api.post("/v1/batches", json=BODY, headers={**WAIT, "Idempotency-Key": "first"})
        again = await api.post("/v1/batches", json=BODY, headers={**WAIT, "Idempotency-Key": "first"})
    await assert_accepted(first, reader)
    assert (again.status_code, again.content) == (202, first.content)
    await engine.dispose()


async def test_a_stored_batch_is_accepted_when_the_wait_finds_no_free_connection(
    make_app: AppMaker, reader: Reader, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "POOL_TIMEOUT_S", 0.1)
    engine = make_engine(database_url, pool_size=1)
    async with calling(make_app(lend_driver=make_lender(engine))) as api, engine.connect():
        response = await api.post("/v1/batches", json=BODY, headers=WAIT)
    await assert_accepted(response, reader)
    await engine.dispose()


async def test_a_stored_batch_is_accepted_when_postgresql_goes_down_during_the_wait(
    app: FastAPI, api: httpx2.AsyncClient, reader: Reader, server_url: str, database_url: str
) -> None:
    waiting = asyncio.create_task(api.post("/v1/batches", json=BODY, headers=WAIT))
    await until_waiting(app)
    administrator = await connect(server_url)
    name = make_url(database_url).database
    await administrator.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
    await administrator.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
    async with asyncio.timeout(10):
        response = await waiting
    await administrator.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
    await administrator.close()
    await assert_accepted(response, reader)
