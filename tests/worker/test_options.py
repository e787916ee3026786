"""Every limit of a fetch is a setting with a unit, and an option of a batch within the operator's bounds."""

from dataclasses import fields, replace
from uuid import uuid4

from app.api.schemas import BatchOptions, Bounds
from app.jobs.values import ClaimedJob
from app.settings import Settings
from app.worker.options import LIMIT_NAMES, for_batch, for_job
from tests.fetch.servers import LIMITS

TIMEOUTS = {"timeout_s", "connect_timeout_s", "read_timeout_s"}


def claimed(**request: object) -> ClaimedJob:
    return ClaimedJob(
        shard=0,
        id=uuid4(),
        batch_id=uuid4(),
        host="a.test",
        url="http://a.test/",
        request=request or None,
        repeatable=True,
        attempt=1,
        lost=0,
        crashes=0,
        lease=1,
    )


def test_every_limit_is_a_setting_and_an_option_with_a_bound() -> None:
    assert set(LIMIT_NAMES) <= set(BatchOptions.model_fields)
    assert set(LIMIT_NAMES) <= set(Settings.model_fields)
    bounds = {bound.name for bound in fields(Bounds)}
    assert set(LIMIT_NAMES) - TIMEOUTS <= bounds
    assert "timeout_s_max" in bounds


def test_an_option_of_the_batch_sets_its_limit_and_no_other() -> None:
    for name in LIMIT_NAMES:
        limits = for_job(claimed(), for_batch({name: 1}, LIMITS)).request.limits
        assert limits == replace(LIMITS, **{name: 1})


def test_a_job_goes_before_its_batch() -> None:
    assert for_job(claimed(timeout_s=2.0), for_batch({"timeout_s": 3.0}, LIMITS)).request.limits.timeout_s == 2.0
