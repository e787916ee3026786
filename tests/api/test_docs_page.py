"""The documentation pages in a real browser: they work, and ask nobody but this service for anything."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID

import pytest

from app.api.docs import STATIC
from app.outcome import FailureCode
from tests.api import browser
from tests.api.browser import Browser
from tests.api.conftest import AppMaker, served
from tests.jobs.actors import Client as Reader

pytestmark = pytest.mark.skipif(
    browser.CHROMIUM is None or browser.CHROMEDRIVER is None, reason="needs chromium and chromedriver on the PATH"
)

EXAMPLE = "return document.querySelector('#operations-Batches-createBatch textarea')?.value;"
SENT = (
    "return document.querySelector('#operations-Batches-createBatch .live-responses-table tbody .response-col_status')"
)
TOKEN = "a-token-of-16-or-more"


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser.opened(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def hosts(urls: list[str]) -> set[str]:
    return {urlsplit(url).netloc for url in urls if urlsplit(url).scheme not in ("data", "blob")}


async def test_the_example_batch_can_be_sent_from_the_page(window: Browser, make_app: AppMaker, reader: Reader) -> None:
    async with served(make_app()) as url:
        answer, filled = await asyncio.to_thread(send_example, window, f"{url}/docs")
        requested = window.requested()
        errors = window.errors()
    assert answer == "202"
    assert hosts(requested) == {urlsplit(url).netloc}
    assert errors == []
    [batch_id] = {UUID(value) for value in filled}
    assert [job.url for job in await reader.jobs(batch_id)] == ["https://example.com/", "https://example.org/"]


def send_example(window: Browser, url: str) -> tuple[str, list[str]]:
    """Open the page, send the example as it stands, then look at what the next operation has filled in."""
    window.requested()
    window.open(url)
    window.click("#operations-Batches-createBatch .opblock-summary-control")
    window.wait_for(EXAMPLE)
    window.click("#operations-Batches-createBatch .execute")
    answer = window.wait_for(f"{SENT}?.innerText;")
    filled = []
    for operation in ("getBatch", "cancelBatch", "listBatchJobs"):
        window.click(f"#operations-Batches-{operation} .opblock-summary-control")
        field = f"document.querySelector('#operations-Batches-{operation} [data-param-name=batch_id] input')"
        filled.append(window.wait_for(f"return {field}?.value;"))
    return answer.split()[0], filled


async def test_the_page_sends_the_token_it_is_given(window: Browser, make_app: AppMaker) -> None:
    async with served(make_app(api_token=TOKEN)) as url:
        before, after = await asyncio.to_thread(send_with_token, window, f"{url}/docs")
    assert (before, after) == ("401", "202")


def send_with_token(window: Browser, url: str) -> tuple[str, str]:
    window.open(url)
    window.click("#operations-Batches-createBatch .opblock-summary-control")
    window.wait_for(EXAMPLE)
    window.click("#operations-Batches-createBatch .execute")
    before = window.wait_for(f"{SENT}?.innerText;")
    window.click(".auth-wrapper .authorize")
    window.wait_for("return document.querySelector('.auth-container input');")
    window.run(TYPE, ".auth-container input", TOKEN)
    window.click(".auth-btn-wrapper .authorize")
    window.click(".auth-btn-wrapper .btn-done")
    window.click("#operations-Batches-createBatch .execute")
    after = window.wait_for(
        f"const e = {SENT.removeprefix('return ')}; return !e?.innerText.startsWith('401') && e?.innerText;"
    )
    window.errors()
    return before.split()[0], after.split()[0]


TYPE = """
    const field = document.querySelector(arguments[0]);
    Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set.call(field, arguments[1]);
    field.dispatchEvent(new Event("input", {bubbles: true}));
"""
"""React sees a value only when it is set behind its back and an event tells of it."""


async def test_the_reference_page_needs_nobody_else(window: Browser, make_app: AppMaker) -> None:
    async with served(make_app()) as url:
        await asyncio.to_thread(read_reference, window, f"{url}/redoc")
        requested = window.requested()
        errors = window.errors()
    assert hosts(requested) == {urlsplit(url).netloc}
    assert errors == []


def read_reference(window: Browser, url: str) -> None:
    window.requested()
    window.errors()
    window.open(url)
    window.wait_for("return document.body.innerText.includes('Submit a batch of URLs');")
    window.wait_for("return document.querySelector('[role=search] input');")


@pytest.mark.parametrize("page", ["docs", "redoc"])
async def test_the_failure_codes_are_a_table_that_unfolds(window: Browser, make_app: AppMaker, page: str) -> None:
    async with served(make_app()) as url:
        await asyncio.to_thread(window.open, f"{url}/{page}")
        await asyncio.to_thread(window.wait_for, "return document.querySelector('details table');")
        rows = "return document.querySelector('details table').innerText.trim().split('\\n').length;"
        await asyncio.to_thread(window.run, "document.querySelector('details').open = true;")
        shown = await asyncio.to_thread(window.run, rows)
    assert shown == 1 + len(FailureCode)


async def test_a_request_to_another_host_would_be_seen(window: Browser, make_app: AppMaker) -> None:
    async with served(make_app()) as url:
        # Not one of the pages, so that no security policy stops the request before it is made.
        await asyncio.to_thread(window.open, f"{url}/openapi.json")
        window.requested()
        await asyncio.to_thread(window.run, "new Image().src = 'http://elsewhere.example/logo.svg';")
        await asyncio.to_thread(window.run, "return fetch('/healthz').then(() => true);")
        requested = window.requested()
    window.errors()
    assert "elsewhere.example" in hosts(requested)


async def test_the_first_page_leads_to_the_documentation(window: Browser, make_app: AppMaker) -> None:
    async with served(make_app()) as url:
        await asyncio.to_thread(window.open, url)
        shown = await asyncio.to_thread(window.wait_for, "return document.title;")
    assert shown == "Fetchpool API"


def test_the_assets_come_with_their_licences() -> None:
    for name in ("swagger-ui.LICENSE.txt", "swagger-ui.NOTICE.txt", "redoc.LICENSE.txt"):
        assert Path(STATIC, "licenses", name).stat().st_size > 0
