"""Idempotency-Key: a request that is sent again makes no second batch."""

import asyncio
from uuid import UUID

import httpx2
from sqlalchemy import text

from app.jobs import batches
from app.jobs.database import Sessions
from tests.jobs.actors import Client as Reader
from tests.jobs.actors import Worker, success

BODY = {"urls": ["https://example.com/"]}
KEY = {"Idempotency-Key": "first"}


async def count_batches(sessions: Sessions) -> int:
    async with sessions.begin() as session:
        return int(await session.scalar(text("SELECT count(*) FROM batch")) or 0)


async def test_a_key_sent_again_is_answered_as_the_first_time(
    api: httpx2.AsyncClient, reader: Reader, worker: Worker, sessions: Sessions
) -> None:
    first = await api.post("/v1/batches", json=BODY, headers=KEY)
    _, [job] = await worker.claim_one()
    await worker.record(success(job))
    await reader.finish(UUID(first.json()["id"]))
    again = await api.post("/v1/batches", json=BODY, headers=KEY)
    assert (again.status_code, again.json()) == (202, first.json())
    assert again.headers["Location"] == first.headers["Location"]
    assert await count_batches(sessions) == 1


async def test_a_key_with_another_body_is_refused(api: httpx2.AsyncClient, sessions: Sessions) -> None:
    await api.post("/v1/batches", json=BODY, headers=KEY)
    other = await api.post("/v1/batches", json={"urls": ["https://example.org/"]}, headers=KEY)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert await count_batches(sessions) == 1


async def test_a_key_under_way_is_refused_for_the_moment(api: httpx2.AsyncClient, sessions: Sessions) -> None:
    async with sessions.begin() as session:
        await batches.lock_key(session, "first")
        busy = await api.post("/v1/batches", json=BODY, headers=KEY)
    assert (busy.status_code, busy.json()["code"]) == (409, "idempotency_key_in_use")
    assert int(busy.headers["Retry-After"]) > 0
    assert (await api.post("/v1/batches", json=BODY, headers=KEY)).status_code == 202


async def test_many_requests_with_one_key_make_one_batch(api: httpx2.AsyncClient, sessions: Sessions) -> None:
    async def send() -> httpx2.Response:
        while (response := await api.post("/v1/batches", json=BODY, headers=KEY)).status_code in (409, 503):
            await asyncio.sleep(0)
        return response

    responses = await asyncio.gather(*(send() for _ in range(60)))
    assert {response.status_code for response in responses} == {202}
    assert len({response.json()["id"] for response in responses}) == 1
    assert await count_batches(sessions) == 1


async def test_requests_without_a_key_are_batches_of_their_own(api: httpx2.AsyncClient, sessions: Sessions) -> None:
    for _ in range(2):
        await api.post("/v1/batches", json=BODY)
    assert await count_batches(sessions) == 2


async def test_a_deleted_batch_frees_its_key(api: httpx2.AsyncClient, reader: Reader, worker: Worker) -> None:
    first = (await api.post("/v1/batches", json=BODY, headers=KEY)).json()["id"]
    _, [job] = await worker.claim_one()
    await worker.record(success(job))
    await reader.finish(UUID(first))
    await api.delete(f"/v1/batches/{first}")
    assert (await api.post("/v1/batches", json=BODY, headers=KEY)).json()["id"] != first


async def test_a_silly_key_is_refused(api: httpx2.AsyncClient) -> None:
    for key in ("", "a b", "x" * 256):
        response = await api.post("/v1/batches", json=BODY, headers={"Idempotency-Key": key})
        assert response.status_code == 422, key
