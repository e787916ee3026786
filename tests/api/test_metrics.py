"""What Prometheus reads."""

from uuid import UUID

import httpx2
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from app.jobs import workers
from app.jobs.database import Sessions
from app.jobs.workers import Identity
from tests.api.conftest import AppMaker, calling

HEARD = Identity(id=UUID(int=1), machine="one", pid=1, version="0", slots=100)
SILENT = Identity(id=UUID(int=2), machine="two", pid=2, version="0", slots=50)


async def beat(sessions: Sessions, identity: Identity, *, running: int, dropped: int) -> None:
    async with sessions.begin() as session:
        await workers.beat(session, identity, running=running, dropped=dropped)


def samples(answer: httpx2.Response) -> dict[tuple[str, str], float]:
    return {
        (sample.name, sample.labels["machine"]): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


async def test_metrics_tell_what_workers_said_last(api: httpx2.AsyncClient, sessions: Sessions) -> None:
    await beat(sessions, HEARD, running=3, dropped=0)
    await beat(sessions, HEARD, running=7, dropped=2)
    await beat(sessions, SILENT, running=9, dropped=1)
    async with sessions.begin() as session:
        await session.execute(text("UPDATE worker SET started_at = to_timestamp(1.5e9)"))
        silence = text("UPDATE worker SET beat_at = now() - interval '2 minutes' WHERE id = :id")
        await session.execute(silence, {"id": SILENT.id})
    answer = await api.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    assert f'pid="{HEARD.pid}",version="{HEARD.version}"' in answer.text
    assert samples(answer) == {
        ("fetchpool_worker_info", "one"): 1,
        ("fetchpool_worker_start_time_seconds", "one"): 1.5e9,
        ("fetchpool_worker_slots", "one"): 100,
        ("fetchpool_worker_running", "one"): 7,
        ("fetchpool_worker_results_dropped_total", "one"): 2,
        ("fetchpool_worker_results_dropped_total", "two"): 1,
    }


async def test_metrics_need_the_token_and_are_not_in_the_docs(make_app: AppMaker) -> None:
    app = make_app(api_token="a-token-of-16-or-more")
    async with calling(app) as api:
        assert (await api.get("/metrics")).status_code == 401
        headers = {"Authorization": "Bearer a-token-of-16-or-more"}
        assert (await api.get("/metrics", headers=headers)).status_code == 200
    assert "/metrics" not in app.openapi()["paths"]
