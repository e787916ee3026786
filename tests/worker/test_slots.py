"""What the slots decide about jobs whose host is lost, and about suspects."""

import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing
from uuid import uuid4

import pytest
from msgspec import structs

from app.fetch.http import FetchRequest
from app.fetch.resolver import Resolver
from app.fetch.transport import Transport
from app.jobs.database import Sessions
from app.jobs.values import ClaimedJob, Lease, Result, Returned
from app.outcome import Failure, FailureCode
from app.worker.holds import Hold
from app.worker.recorder import Recorder
from app.worker.retry import SharedFailure
from app.worker.slots import Slots
from tests.fetch.servers import LIMITS, LOOPBACK
from tests.worker.test_options import claimed

REFUSED = SharedFailure(
    failure=Failure(code=FailureCode.CONNECT_REFUSED, detail="Refused."), scheme="http", connect_timeout_s=10.0
)


@pytest.fixture
async def slots(sessions: Sessions) -> AsyncIterator[Slots]:
    async with aclosing(Resolver()) as resolver:
        yield Slots(
            count=10,
            host_concurrency=4,
            limits=LIMITS,
            holds={},
            transport=Transport(policy=LOOPBACK, resolver=resolver, user_agent="Fetchpool tests"),
            recorder=Recorder(sessions, autocommit=sessions, on_stored=lambda _: None, present_batches=set),
            wake=lambda: None,
        )


def hold_of(host: str, *, is_lost: bool = False) -> Hold:
    return Hold(
        lease=Lease(shard=0, host=host, number=1),
        stops_at=float("inf"),
        began_at=0.0,
        concurrency=4,
        delay_s=0.0,
        is_lost=is_lost,
    )


def dead_host() -> Hold:
    """A host that rests for a minute, and whose jobs share what the last one met."""
    hold = hold_of("a.test")
    hold.next_start_at, hold.shared_failure = time.monotonic() + 60.0, REFUSED
    return hold


@pytest.fixture
def offered(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """What is offered to be stored."""
    results: list[Result] = []
    monkeypatch.setattr(slots._recorder, "add", results.append)
    return results


async def test_jobs_that_come_for_a_lost_host_are_given_back(slots: Slots) -> None:
    hold = hold_of("a.test", is_lost=True)
    jobs = [claimed(), claimed()]
    slots.supply(hold, jobs)
    assert slots.returned == [(hold, Returned(job=job)) for job in jobs]
    assert (slots.waiting_count, hold.waiting) == (0, deque())


async def test_a_suspect_that_is_another_workers_by_now_is_given_back_to_be_cleared(slots: Slots) -> None:
    hold, suspect = await _await_suspect(slots)
    slots.start_suspect(hold, is_ours=False)
    assert slots.returned == [(hold, Returned(job=suspect))]


async def test_a_suspect_that_is_lost_holds_up_nothing_though_others_run(slots: Slots) -> None:
    hold, _ = await _await_suspect(slots)
    other = claimed()
    slots.supply(hold_of("b.test"), [other])
    slots.learn_options({})
    slots.running_count = 1
    assert slots.next_suspect() is None
    slots.start_ready()
    assert slots.unknown == set()
    hold.is_lost = True
    assert slots.next_suspect() is None
    slots.start_ready()
    assert slots.unknown == {other.batch_id}  # looked at again, to be started


async def test_a_suspect_whose_options_were_forgotten_waits_for_them_again(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.worker.slots.BATCH_OPTIONS_MAX", 2)
    _, suspect = await _await_suspect(slots)
    slots.learn_options({uuid4(): {} for _ in range(3)})
    slots.learn_options({})
    assert slots.next_suspect() is None
    slots.start_ready()
    assert slots.unknown == {suspect.batch_id}


async def test_what_a_try_met_is_shared_by_all_but_the_convicted_and_those_of_unknown_options(
    slots: Slots, offered: list[Result]
) -> None:
    hold = dead_host()
    known, unknown = claimed(), claimed()
    suspect = structs.replace(claimed(), crashes=2, batch_id=known.batch_id)
    convicted = structs.replace(suspect, id=uuid4(), accused=True)
    slots.learn_options({known.batch_id: {"max_attempts": 2}})
    slots.supply(hold, [unknown, known, suspect, convicted])
    slots.start_ready()
    assert [(result.job, result.status, result.error) for result in offered] == [
        (known, "queued", "connect_refused"),
        (suspect, "queued", "connect_refused"),
        (convicted, "failed", "poisoned"),
    ]
    assert 55.0 < offered[0].delay_s < 60.0
    assert (list(hold.waiting), slots.waiting_count, slots.unknown) == ([unknown], 1, {unknown.batch_id})
    assert hold.shared_failure is REFUSED


async def test_a_connection_that_stood_ends_the_row_of_failures_to_connect(slots: Slots) -> None:
    hold = hold_of("a.test")
    hold.back_offs = hold.connect_failures = 3
    silent = Failure(code=FailureCode.FIRST_BYTE_TIMEOUT, detail="Silence.", sent=True)
    slots._note_host(hold, silent, FetchRequest(url="http://a.test/", limits=LIMITS), started_at=time.monotonic())
    assert (hold.back_offs, hold.connect_failures) == (3, 0)


async def test_jobs_of_another_scheme_share_nothing_and_end_the_sharing(slots: Slots, offered: list[Result]) -> None:
    hold = dead_host()
    first, last = claimed(), claimed()
    secure = structs.replace(first, id=uuid4(), url="https://a.test/")
    slots.learn_options({first.batch_id: {}, last.batch_id: {}})
    slots.supply(hold, [first, secure, last])
    slots.start_ready()
    assert [result.job for result in offered] == [first, last]
    assert list(hold.waiting) == [secure]
    assert hold.is_asleep(time.monotonic())
    assert hold.is_ready  # with a timer, should it not be given back


async def _await_suspect(slots: Slots) -> tuple[Hold, ClaimedJob]:
    hold, suspect = hold_of("a.test"), structs.replace(claimed(), crashes=2)
    slots.supply(hold, [suspect])
    slots.learn_options({suspect.batch_id: {}})
    slots.start_ready()
    assert slots.next_suspect() == (hold, suspect)
    return hold, suspect
