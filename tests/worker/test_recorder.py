"""How results are gathered on their way into the database."""

import pytest

from app.worker import recorder
from tests.web import serving
from tests.worker.conftest import Service


async def test_the_last_results_do_not_wait_for_more(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "FLUSH_PAUSE_S", 600.0)
    monkeypatch.setattr(recorder, "FLUSH_PAUSE_S_MAX", 600.0)
    async with serving() as site, service.worker():
        for count in (1, 7, 30):
            await service.finished(await service.submit(*[site.url(f"/{number}") for number in range(count)]))
