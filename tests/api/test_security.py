"""Who is answered: by which Host, from which page, with which token."""

import time
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from tests.api.conftest import AppMaker, calling

TOKEN = "a-token-of-16-or-more"


async def status(app: Any, method: str, path: str, **headers: str) -> tuple[int, str | None]:
    async with calling(app) as api:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        response = await api.request(method, path, headers=named)
    is_problem = response.headers.get("Content-Type") == "application/problem+json"
    return response.status_code, response.json()["code"] if is_problem else None


async def test_known_hosts_are_answered(make_app: AppMaker) -> None:
    app = make_app(host="10.1.2.3", allowed_hosts=("Fetch.Example:8000", "fd00::1"))
    for host in ("localhost", "LOCALHOST:9", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3", "fetch.example", "[fd00::1]"):
        assert await status(app, "GET", "/v1/batches", host=host) == (200, None), host


UNKNOWN_HOSTS = (
    "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.2", "[::2]", "0.0.0.0:8000", "", "a b",
    "localhost@evil.example", "localhost:x", "localhost/", "localhost\\evil.example",
)  # fmt: skip


async def test_unknown_hosts_are_refused(make_app: AppMaker) -> None:
    app = make_app(host="0.0.0.0")
    for host in UNKNOWN_HOSTS:
        for path in ("/v1/batches", "/docs", "/healthz"):
            assert await status(app, "GET", path, host=host) == (421, "host_not_allowed"), host


async def test_the_refusal_names_the_setting(api: httpx2.AsyncClient) -> None:
    response = await api.get("/docs", headers={"Host": "evil.example"})
    assert "FETCHPOOL_ALLOWED_HOSTS" in response.json()["detail"]
    assert "evil" not in response.text


FOREIGN_ORIGINS = (
    "https://evil.example", "null", "http://localhost:3000", "http://127.0.0.1:8000", "file://", "http://",
    "https://localhost:8000.evil.example", "http://localhost:8000/", "https://localhost",
)  # fmt: skip


async def test_pages_of_other_sites_are_refused(make_app: AppMaker) -> None:
    app = make_app(allowed_hosts=("localhost",))
    for origin in FOREIGN_ORIGINS:
        for method in ("GET", "POST", "DELETE", "OPTIONS"):
            assert await status(app, method, "/v1/batches", origin=origin) == (403, "cross_site"), origin


async def test_the_services_own_pages_are_answered(make_app: AppMaker) -> None:
    assert await status(make_app(), "GET", "/v1/batches", origin="http://localhost:8000") == (200, None)
    proxied = make_app(allowed_hosts=("fetch.example",))
    for host in ("fetch.example", "127.0.0.1:8000"):
        assert await status(proxied, "GET", "/v1/batches", origin="https://fetch.example", host=host) == (200, None)


async def test_a_link_on_another_site_leads_to_the_pages_only(make_app: AppMaker) -> None:
    app = make_app()
    for path, mode, answer in (
        ("/docs", "navigate", (200, None)),
        ("/", "navigate", (307, None)),
        ("/docs", "no-cors", (403, "cross_site")),
        ("/v1/batches", "navigate", (403, "cross_site")),
        ("/openapi.json", "no-cors", (403, "cross_site")),
    ):
        headers = {"sec_fetch_site": "cross-site", "sec_fetch_mode": mode, "sec_fetch_dest": "document"}
        assert await status(app, "GET", path, **headers) == answer, path


async def test_without_the_token_nothing_is_told(make_app: AppMaker) -> None:
    async with calling(make_app(api_token=TOKEN)) as api:
        for path in ("/v1/batches", "/v1/jobs/x", "/nowhere", "/v1/batches/x/results", "/v1//docs", "/static"):
            for given in ("", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer", "Bearer caf\u00e9", TOKEN):
                response = await api.get(path, headers={b"Authorization": given.encode("latin-1")} if given else {})
                assert (response.status_code, response.json()["code"]) == (401, "unauthorized"), (path, given)
                assert response.headers["WWW-Authenticate"].startswith("Bearer")


async def test_with_the_token_everything_is_answered(make_app: AppMaker) -> None:
    for scheme in ("Bearer", "bearer", "BEARER "):
        answer = await status(make_app(api_token=TOKEN), "GET", "/v1/batches", authorization=f"{scheme} {TOKEN}")
        assert answer == (200, None)


async def test_health_and_pages_need_no_token(make_app: AppMaker) -> None:
    app = make_app(api_token=TOKEN)
    for path in ("/healthz", "/readyz", "/docs", "/redoc", "/openapi.json", "/static/docs.js", "/favicon.ico"):
        assert await status(app, "GET", path) == (200, None), path


async def test_every_answer_carries_a_request_id(make_app: AppMaker) -> None:
    async with calling(make_app()) as api:
        for path in ("/v1/batches", "/nowhere", "/docs"):
            assert (await api.get(path, headers={"X-Request-ID": "mine-1"})).headers["X-Request-ID"] == "mine-1"
        made = await api.get("/nowhere", headers={"X-Request-ID": "no\tgood"})
    assert made.headers["X-Request-ID"] == made.json()["request_id"] != "no\tgood"
    assert len(made.headers["X-Request-ID"]) == 32


async def test_every_answer_is_dated(make_app: AppMaker) -> None:
    async with calling(make_app()) as api:
        for path in ("/v1/batches", "/nowhere", "/docs"):
            [date] = (await api.get(path)).headers.get_list("Date")
            assert abs(parsedate_to_datetime(date).timestamp() - time.time()) < 60
