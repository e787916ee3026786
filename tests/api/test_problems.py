"""Whatever goes wrong is answered with a problem document."""

import asyncio
import logging
from uuid import uuid4

import httpx2
import pytest
from fastapi import FastAPI
from sqlalchemy import make_url, text
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api import batches
from app.api.security import Outermost
from app.jobs import database, hints
from app.jobs.database import make_engine, make_sessions
from tests.api.conftest import AppMaker, calling
from tests.databases import connect
from tests.jobs.actors import Client as Reader
from tests.waiting import until

NOWHERE = "postgresql://postgres@127.0.0.1:9/none"
A_BATCH = "/v1/batches/0198f2c1-b5e0-7d3c-9a4b-e1c02f6d7a10"


def assert_problem(response: httpx2.Response, status: int, code: str) -> None:
    assert response.headers["Content-Type"] == "application/problem+json"
    document = response.json()
    assert (response.status_code, document["status"], document["code"]) == (status, status, code)
    assert document["detail"].endswith(".")
    assert document["request_id"] == response.headers["X-Request-ID"]


async def test_unknown_paths_and_methods(api: httpx2.AsyncClient) -> None:
    for path in (
        "/nowhere",
        "/v1/batches/",
        "/v1",
        "/static/none.js",
        "/static/../schemas.py",
        "/static/%2e%2e/docs.py",
    ):
        assert_problem(await api.get(path), 404, "not_found")


async def test_a_method_that_is_not_taken_is_told_which_are(api: httpx2.AsyncClient) -> None:
    for method, path, allowed in (
        ("PUT", "/v1/batches", "HEAD, GET, POST"),
        ("PATCH", f"/v1/batches/{uuid4()}", "HEAD, GET, DELETE"),
        ("GET", f"/v1/batches/{uuid4()}/cancel", "POST"),
        ("HEAD", f"/v1/batches/{uuid4()}/cancel", "POST"),
        ("POST", "/healthz", "HEAD, GET"),
        ("POST", "/docs", "HEAD, GET"),
        ("DELETE", "/static/docs.js", "HEAD, GET"),
    ):
        refused = await api.request(method, path)
        assert (refused.status_code, refused.headers["Allow"]) == (405, allowed), (method, path)
    assert_problem(await api.put("/v1/batches"), 405, "method_not_allowed")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/batches"),
        ("GET", A_BATCH),
        ("DELETE", A_BATCH),
        ("POST", f"{A_BATCH}/cancel"),
        ("GET", f"/v1/jobs/{uuid4()}"),
        ("GET", f"/v1/jobs/{uuid4()}/body"),
    ],
)
async def test_a_parameter_is_refused_where_there_are_none(api: httpx2.AsyncClient, method: str, path: str) -> None:
    refused = await api.request(method, f"{path}?colour=red", json={"urls": ["https://h.example/"]})
    assert_problem(refused, 422, "invalid_parameter")
    [error] = refused.json()["errors"]
    assert (error["pointer"], error["code"]) == ("/query/colour", "unknown_field")
    assert error["detail"] == "There is no such parameter; leave it out."
    assert (await api.request(method, f"{path}?&", json={"urls": []})).status_code in (202, 404)
    assert (await api.get("/v1/batches?status=queued")).json()["data"] == []


async def test_a_wait_among_the_parameters_is_told_its_header_where_there_is_one(api: httpx2.AsyncClient) -> None:
    for method, path in (("POST", "/v1/batches"), ("GET", A_BATCH)):
        refused = await api.request(method, f"{path}?wait=30", json={"urls": ["https://h.example/"]})
        [error] = refused.json()["errors"]
        assert (error["pointer"], error["code"]) == ("/query/wait", "unknown_field")
        assert error["detail"] == "There is no such parameter; to wait, send the header Prefer: wait=30."
    [error] = (await api.get(f"/v1/jobs/{uuid4()}?wait=30")).json()["errors"]
    assert error["detail"] == "There is no such parameter; leave it out."


async def test_a_parameter_that_is_given_twice_is_refused(api: httpx2.AsyncClient) -> None:
    for path in ("/v1/batches", f"{A_BATCH}/jobs"):
        refused = await api.get(f"{path}?status=queued&limit=5&status=running")
        assert_problem(refused, 422, "invalid_parameter")
        [error] = refused.json()["errors"]
        assert (error["pointer"], error["code"]) == ("/query/status", "repeated")
        assert error["detail"] == "It is given more than once; give it once."


async def test_more_requests_than_it_takes_are_told_to_come_again() -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        entered.set()
        await leave.wait()
        await Response()(scope, receive, send)

    async with calling(Outermost(slow, requests_max=1)) as api:
        first = asyncio.create_task(api.get("/"))
        await entered.wait()
        refused = await api.get("/")
        leave.set()
        assert (await first).status_code == 200
        assert (await api.get("/")).status_code == 200
    assert_problem(refused, 503, "overloaded")
    assert int(refused.headers["Retry-After"]) > 0


async def test_a_database_that_is_away_is_a_503(make_app: AppMaker) -> None:
    engine = make_engine(NOWHERE)
    async with calling(make_app(sessions=make_sessions(engine))) as api:
        for response in (
            await api.get("/readyz"),
            await api.get("/v1/batches"),
            await api.post("/v1/batches", json={"urls": []}),
            await api.get(A_BATCH),
            await api.delete(A_BATCH),
        ):
            assert_problem(response, 503, "database_unavailable")
            assert int(response.headers["Retry-After"]) > 0
            assert "9" not in response.json()["detail"]
        assert (await api.get("/healthz")).status_code == 200
        assert (await api.get("/openapi.json")).status_code == 200
    await engine.dispose()


@pytest.mark.parametrize(("path", "status"), [("/v1/batches", 200), (A_BATCH, 404)])
async def test_connections_that_were_cut_are_a_503_once(
    api: httpx2.AsyncClient, server_url: str, database_url: str, path: str, status: int
) -> None:
    assert (await api.get("/readyz")).json() == {"status": "ok", "version": "1.2.3"}
    await asyncio.gather(*(api.get(path) for _ in range(5)))  # so many connections there are now
    administrator = await connect(server_url)
    name = make_url(database_url).database
    await administrator.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
    all_ended = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = $1)"
    await until(lambda: administrator.fetchval(all_ended, name))
    await administrator.close()
    assert_problem(await api.get(path), 503, "database_unavailable")
    answers = await asyncio.gather(*(api.get(path) for _ in range(5)))
    assert {answer.status_code for answer in answers} == {status}


@pytest.mark.parametrize("path", ["/v1/batches", A_BATCH])
async def test_no_free_connection_is_a_503(
    make_app: AppMaker, database_url: str, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(database, "POOL_TIMEOUT_S", 0.1)
    engine = make_engine(database_url, pool_size=1)
    sessions = make_sessions(engine)
    async with calling(make_app(sessions=sessions)) as api, sessions.begin() as session:
        await session.execute(text("SELECT 1"))
        assert_problem(await api.get(path), 503, "database_unavailable")
    await engine.dispose()


@pytest.mark.parametrize(("path", "status"), [("/v1/batches", 200), (A_BATCH, 404)])
async def test_a_database_that_refuses_connections_is_a_503(
    make_app: AppMaker, server_url: str, database_url: str, path: str, status: int
) -> None:
    engine = make_engine(database_url)
    administrator = await connect(server_url)
    name = make_url(database_url).database
    await administrator.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
    async with calling(make_app(sessions=make_sessions(engine))) as api:
        assert_problem(await api.get(path), 503, "database_unavailable")
        await administrator.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        assert (await api.get(path)).status_code == status
    await administrator.close()
    await engine.dispose()


@pytest.mark.parametrize("path", ["/v1/batches", A_BATCH])
async def test_a_lock_that_is_not_given_is_a_503(
    make_app: AppMaker, database_url: str, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(database, "LOCK_TIMEOUT_S", 0.1)
    engine = make_engine(database_url)
    holder = await connect(database_url)
    async with calling(make_app(sessions=make_sessions(engine))) as api, holder.transaction():
        await holder.execute("LOCK TABLE batch")
        assert_problem(await api.get(path), 503, "database_unavailable")
    await holder.close()
    await engine.dispose()


async def test_a_bug_is_a_500_and_logged_once(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> None:
        raise ValueError("CANARY")

    monkeypatch.setattr(batches, "_look", broken)
    async with calling(app) as api:
        response = await api.get(A_BATCH, headers={"X-Request-ID": "r1"})
    assert_problem(response, 500, "internal_error")
    assert "CANARY" not in response.text
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "r1" in record.getMessage()
    assert record.exc_info is not None


async def test_workers_that_cannot_be_woken_change_nothing(
    api: httpx2.AsyncClient, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object) -> None:
        raise ConnectionRefusedError

    monkeypatch.setattr(hints, "give", away)
    response = await api.post("/v1/batches", json={"urls": ["https://example.com/"]})
    assert response.status_code == 202


async def test_no_answer_goes_out_before_the_commit(api: httpx2.AsyncClient, database_url: str) -> None:
    """A commit that fails, here by a deferred constraint, refuses the batch: nothing was promised."""
    administrator = await connect(database_url)
    await administrator.execute(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'not now' USING ERRCODE = '57P03'; END $$;
        CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON batch DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION refuse();
        """
    )
    response = await api.post("/v1/batches", json={"urls": ["https://example.com/"]})
    assert_problem(response, 503, "database_unavailable")
    assert await administrator.fetchval("SELECT count(*) FROM job") == 0
    await administrator.close()


async def test_a_deadlock_is_tried_again(api: httpx2.AsyncClient, database_url: str) -> None:
    administrator = await connect(database_url)
    await administrator.execute(
        """
        CREATE SEQUENCE tries;
        CREATE FUNCTION refuse_twice() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN
                IF nextval('tries') < 3 THEN RAISE EXCEPTION 'deadlock' USING ERRCODE = '40P01'; END IF;
                RETURN NULL;
            END $$;
        CREATE TRIGGER refuse_twice AFTER INSERT ON batch FOR EACH ROW EXECUTE FUNCTION refuse_twice();
        """
    )
    assert (await api.post("/v1/batches", json={"urls": ["https://example.com/"]})).status_code == 202
    assert await administrator.fetchval("SELECT count(*) FROM job") == 1
    await administrator.close()


async def test_two_hundred_at_once_are_all_answered(api: httpx2.AsyncClient) -> None:
    posts = [api.post("/v1/batches", json={"urls": [f"https://h{n % 7}.example/{n}"] * 3}) for n in range(200)]
    answers = await asyncio.gather(*posts)
    assert {response.status_code for response in answers} == {202}
    assert len({response.json()["id"] for response in answers}) == 200
