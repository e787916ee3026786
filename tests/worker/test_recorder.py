"""How results are gathered on their way into the database."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from uuid import UUID

import pytest
from msgspec import structs

from app.jobs import batches, queue
from app.jobs.database import Sessions
from app.jobs.values import Result
from app.worker import recorder
from app.worker.recorder import Recorder
from tests.jobs.actors import Client, Worker, success, waiting
from tests.waiting import until
from tests.web import serving
from tests.worker.conftest import Service


async def test_the_last_results_do_not_wait_for_more(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "FLUSH_PAUSE_S", 600.0)
    monkeypatch.setattr(recorder, "FLUSH_PAUSE_S_MAX", 600.0)
    async with serving() as site, service.worker():
        for count in (1, 7, 30):
            await service.finished(await service.submit(*[site.url(f"/{number}") for number in range(count)]))


@dataclass
class Recording:
    """A recorder at work, the batches it believes are present, and those it asked whether they are finished."""

    recorder: Recorder
    present: set[UUID]
    asked: list[set[UUID]] = field(default_factory=list)

    async def store(self, result: Result) -> None:
        self.recorder.add(result)
        await until(lambda: self.recorder.is_empty)


@pytest.fixture
async def recording(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Recording]:
    present: set[UUID] = set()
    recording = Recording(
        Recorder(sessions, autocommit=sessions, on_stored=lambda _: None, present_batches=lambda: present.copy()),
        present,
    )
    finish = batches.finish

    async def noted(session, ids):  # type: ignore[no-untyped-def]
        recording.asked.append(set(ids))
        return await finish(session, ids)

    monkeypatch.setattr(batches, "finish", noted)
    task = asyncio.create_task(recording.recorder.run())
    yield recording
    task.cancel()


async def test_a_batch_is_finished_once_this_worker_has_no_more_of_it(sessions: Sessions, recording: Recording) -> None:
    client, worker = Client(sessions), Worker(sessions)
    batch_id = await client.submit("a.test", "b.test")
    first, second = [job for jobs in (await worker.claim()).values() for job in jobs]
    recording.present.add(batch_id)
    await recording.store(success(first))
    assert recording.asked == []
    recording.present.clear()
    await recording.store(success(second))
    assert (await client.read(batch_id)).status == "completed"
    assert recording.asked == [{batch_id}]


async def test_evidence_counts_as_what_is_stored_at_once(
    sessions: Sessions, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, worker = Client(sessions), Worker(sessions)
    await client.submit(*["a.test"] * 3)
    _, jobs = await worker.claim_one()
    stored: list[int] = []
    record = queue.record

    async def noted(session, results, **how):  # type: ignore[no-untyped-def]
        stored.append(len(results))
        return await record(session, results, **how)

    monkeypatch.setattr(queue, "record", noted)
    monkeypatch.setattr(recorder, "RECORD_BYTES_MAX", 1_000)
    for job in jobs:
        recording.recorder.add(structs.replace(success(job), evidence=json.dumps({"x": "y" * 900})))
    await until(lambda: recording.recorder.is_empty)
    assert stored == [1, 1, 1]


async def test_two_workers_store_the_same_bytes_at_once(sessions: Sessions, recording: Recording) -> None:
    client, worker = Client(sessions), Worker(sessions)
    batch_id = await client.submit("a.test", "a.test")
    _, [first, second] = await worker.claim_one()
    async with sessions.begin() as session:
        await queue.record(session, [success(first)])
        recording.recorder.add(success(second))
        await until(lambda: waiting(sessions))
    await until(lambda: recording.recorder.is_empty)
    jobs = await client.jobs(batch_id)
    assert [job.status for job in jobs] == ["succeeded"] * 2
    assert len({job.body_sha256 for job in jobs}) == 1


async def test_a_batch_is_finished_though_the_job_that_was_still_here_ended_elsewhere(
    sessions: Sessions, recording: Recording
) -> None:
    client, worker = Client(sessions), Worker(sessions)
    batch_id, other_id = await client.submit("a.test"), await client.submit("b.test", "b.test")
    jobs = {job.batch_id: job for jobs in (await worker.claim()).values() for job in jobs}
    recording.present |= {batch_id, other_id}
    await recording.store(success(jobs[batch_id]))
    assert recording.asked == []
    recording.present.remove(batch_id)
    await recording.store(success(jobs[other_id]))
    assert recording.asked == [{batch_id}]
    assert (await client.read(batch_id)).status == "completed"
