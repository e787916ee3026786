"""What a held host can use: slots now, and jobs soon."""

import asyncio
from typing import Any, cast

import pytest

from app.jobs.values import Lease
from app.worker.holds import AHEAD_S, TURN_JOBS_MAX, Hold
from tests.worker.test_options import claimed
from tests.worker.test_slots import REFUSED

NOW = 1_000.0


def hold(*, waiting: int = 0, running: int = 0, **fields: object) -> Hold:
    values = {"stops_at": NOW + 30.0, "began_at": NOW, "concurrency": 4, "delay_s": 0.0, **fields}
    held = Hold(lease=Lease(shard=0, host="a.test", number=1), **values)  # type: ignore[arg-type]
    held.waiting.extend(claimed() for _ in range(waiting))
    held.running = {cast("asyncio.Task[None]", number): claimed() for number in range(running)}
    return held


@pytest.mark.parametrize(
    ("waiting", "fields", "slots"),
    [
        (0, {}, 0),
        (3, {}, 3),
        (9, {}, 4),
        (9, {"delay_s": 0.5}, 1),
        (9, {"delay_s": 0.5, "running": 2}, 3),
        (9, {"delay_s": 0.5, "running": 4}, 4),
        (9, {"running": 3}, 4),
        (9, {"back_offs": 1}, 1),
        (0, {"back_offs": 1}, 0),
        (9, {"back_offs": 1, "running": 1}, 1),
        (9, {"back_offs": 1, "running": 3}, 3),
        (9, {"next_start_at": NOW + 0.1}, 0),
        (9, {"next_start_at": NOW + 0.1, "running": 2}, 2),
    ],
)
def test_a_host_can_fill_the_slots_in_which_its_jobs_may_start_now(
    waiting: int, fields: dict[str, Any], slots: int
) -> None:
    assert hold(waiting=waiting, **fields).demand(NOW) == slots


def test_no_more_is_wanted_than_starts_soon() -> None:
    assert hold().wanted(NOW) == 4
    assert hold(back_offs=1).wanted(NOW) == 1
    assert hold(next_start_at=NOW + AHEAD_S + 0.1).wanted(NOW) == 0


def test_as_many_as_a_turn_has_are_on_their_way_to_share_a_failure() -> None:
    rests = hold(next_start_at=NOW + AHEAD_S + 0.1, shared_failure=REFUSED)
    assert (rests.failure_to_share(NOW), rests.wanted(NOW)) == (REFUSED, TURN_JOBS_MAX)
    rests.unrecorded = 150
    assert rests.wanted(NOW) == TURN_JOBS_MAX - 150
    assert (rests.failure_to_share(NOW + 0.2), rests.wanted(NOW + 0.2)) == (None, 4)
    rests.note_start(NOW + 3.0)
    assert rests.shared_failure is None


def test_what_shared_a_failure_is_due_before_the_next_try_but_when_nothing_is_shared_any_more() -> None:
    rests = hold(next_start_at=NOW + 60.0, shared_failure=REFUSED)
    due_at = NOW + rests.sharing_delay_s(NOW)
    assert due_at < rests.next_start_at
    assert rests.failure_to_share(due_at) is None


def test_only_failures_to_connect_count_as_such_and_in_a_row() -> None:
    backed_off = hold()
    counts = []
    for answered in (False, False, True, False):
        backed_off.note_back_off(NOW, 1.0, answered=answered)
        counts.append((backed_off.back_offs, backed_off.connect_failures))
    assert counts == [(1, 1), (2, 2), (3, 0), (4, 1)]
    assert (backed_off.back_off(1.0).count, backed_off.back_off(1.0).connect_failures) == (4, 1)
    backed_off.end_back_off()
    assert (backed_off.back_offs, backed_off.connect_failures) == (0, 0)


def test_no_turn_ends_while_its_only_try_runs() -> None:
    assert hold(running=1, started_count=1).is_turn_over(NOW + 60.0)
    assert hold(running=1, started_count=2, back_offs=1).is_turn_over(NOW + 60.0)
    trying = hold(running=1, started_count=1, back_offs=1)
    assert not trying.is_turn_over(NOW + 60.0)
    trying.share(NOW + 60.0, REFUSED)
    trying.running.clear()
    assert not trying.is_turn_over(NOW + 60.0)
