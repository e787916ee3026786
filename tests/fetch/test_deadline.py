"""Deadlines end what is due and nothing else, and leave nothing behind."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable

import pytest

from app.fetch.deadline import Deadlines
from app.fetch.limits import Failed
from app.outcome import FailureCode

SHORT_S = 0.05
LONG_S = 60.0


@pytest.fixture
async def deadlines() -> AsyncIterator[Deadlines]:
    deadlines = Deadlines()
    yield deadlines
    assert not deadlines._open
    assert not deadlines._timers


async def bounded(deadlines: Deadlines, length_s: float, work: Awaitable[object]) -> object:
    try:
        with deadlines.within(length_s):
            return await work
    except Failed as failure:
        return failure.code


async def test_those_that_are_due_end_and_the_others_go_on(deadlines: Deadlines) -> None:
    gate = asyncio.Event()
    kinds = {SHORT_S: [], LONG_S: []}  # type: dict[float, list[asyncio.Task[object]]]
    for _ in range(5):
        for length_s, tasks in kinds.items():
            tasks.append(asyncio.create_task(bounded(deadlines, length_s, gate.wait())))
        await asyncio.sleep(SHORT_S / 10)
    assert await asyncio.gather(*kinds[SHORT_S]) == [FailureCode.DEADLINE_EXCEEDED] * 5
    assert not any(task.done() for task in kinds[LONG_S])
    gate.set()
    assert await asyncio.gather(*kinds[LONG_S]) == [True] * 5


async def test_each_of_a_length_has_its_own_time(deadlines: Deadlines) -> None:
    first = asyncio.create_task(bounded(deadlines, SHORT_S, asyncio.sleep(0, "in time")))
    await asyncio.sleep(SHORT_S / 2)
    began_at = time.monotonic()
    second = asyncio.create_task(bounded(deadlines, SHORT_S, asyncio.sleep(LONG_S)))
    assert await first == "in time"
    assert await second == FailureCode.DEADLINE_EXCEEDED
    assert time.monotonic() - began_at >= SHORT_S


async def test_one_of_several_that_ends_in_time_takes_no_other_s_timer_along(deadlines: Deadlines) -> None:
    gate = asyncio.Event()
    first = asyncio.create_task(bounded(deadlines, SHORT_S, gate.wait()))
    second = asyncio.create_task(bounded(deadlines, SHORT_S, asyncio.sleep(LONG_S)))
    await asyncio.sleep(0)
    gate.set()
    assert [*await asyncio.gather(first, second)] == [True, FailureCode.DEADLINE_EXCEEDED]


async def test_a_task_that_is_cancelled_from_outside_is_cancelled(deadlines: Deadlines) -> None:
    task = asyncio.create_task(bounded(deadlines, LONG_S, asyncio.sleep(LONG_S)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_task_that_is_cancelled_when_it_is_due_is_cancelled(deadlines: Deadlines) -> None:
    task = asyncio.create_task(bounded(deadlines, 0.0, asyncio.sleep(LONG_S)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("ours_is_due_first", [True, False], ids=["ours is due first", "that within is due first"])
async def test_a_timeout_within_is_told_from_ours(deadlines: Deadlines, ours_is_due_first: bool) -> None:
    ours_s, within_s = (SHORT_S, LONG_S) if ours_is_due_first else (LONG_S, SHORT_S)

    async def work() -> str:
        try:
            async with asyncio.timeout(within_s):
                await asyncio.sleep(LONG_S)
        except TimeoutError:
            pass
        return "within"

    found = await bounded(deadlines, ours_s, work())
    assert found == (FailureCode.DEADLINE_EXCEEDED if ours_is_due_first else "within")


async def test_two_that_are_due_at_once_leave_the_task_uncancelled(deadlines: Deadlines) -> None:
    async def work() -> None:
        async with asyncio.timeout(SHORT_S):
            await asyncio.sleep(LONG_S)

    with pytest.raises((Failed, TimeoutError)), deadlines.within(SHORT_S):
        await work()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_other_errors_pass(deadlines: Deadlines) -> None:
    with pytest.raises(TimeoutError), deadlines.within(LONG_S):
        raise TimeoutError
