"""What a held host can use: slots now, and jobs soon."""

import pytest

from app.jobs.values import Lease
from app.worker.holds import AHEAD_S, TURN_JOBS_MAX, Hold
from tests.worker.test_options import claimed
from tests.worker.test_slots import REFUSED

NOW = 1_000.0


def hold(*, waiting: int = 0, **fields: object) -> Hold:
    values = {"stops_at": NOW + 30.0, "began_at": NOW, "concurrency": 4, "delay_s": 0.0, **fields}
    held = Hold(lease=Lease(shard=0, host="a.test", number=1), **values)  # type: ignore[arg-type]
    held.waiting.extend(claimed() for _ in range(waiting))
    return held


@pytest.mark.parametrize(
    ("waiting", "fields", "slots"),
    [
        (0, {}, 0),
        (3, {}, 3),
        (9, {}, 4),
        (9, {"delay_s": 0.5}, 1),
        (9, {"back_offs": 1}, 1),
        (0, {"back_offs": 1}, 0),
        (9, {"next_start_at": NOW + 0.1}, 0),
    ],
)
def test_a_host_can_fill_the_slots_in_which_its_jobs_may_start_now(
    waiting: int, fields: dict[str, float], slots: int
) -> None:
    assert hold(waiting=waiting, **fields).demand(NOW) == slots


def test_no_more_is_wanted_than_starts_soon() -> None:
    assert hold().wanted(NOW) == 4
    assert hold(back_offs=1).wanted(NOW) == 1
    assert hold(next_start_at=NOW + AHEAD_S + 0.1).wanted(NOW) == 0


def test_all_is_wanted_that_shares_a_failure() -> None:
    rests = hold(next_start_at=NOW + AHEAD_S + 0.1, shared_failure=REFUSED)
    assert (rests.failure_to_share(NOW), rests.wanted(NOW)) == (REFUSED, TURN_JOBS_MAX)
    assert (rests.failure_to_share(NOW + 0.2), rests.wanted(NOW + 0.2)) == (None, 4)
    rests.note_start(NOW + 3.0)
    assert rests.shared_failure is None
