"""Every limit of a fetch is a setting with a unit, and an option of a batch within the operator's bounds."""

from dataclasses import fields, replace
from uuid import uuid4

import pytest

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
        assert replace(limits, connect_timeout_s=1) == replace(LIMITS, **{"connect_timeout_s": 1, name: 1})


def test_a_connection_has_less_time_than_the_whole_fetch() -> None:
    patient = replace(LIMITS, timeout_s=30.0, connect_timeout_s=10.0)
    assert for_job(claimed(), for_batch({}, patient)).request.limits == patient
    for batch, job, expected in (({"timeout_s": 5.0}, {}, 4.5), ({}, {"timeout_s": 2.0}, 1.8)):
        limits = for_job(claimed(**job), for_batch(batch, patient)).request.limits
        assert limits.connect_timeout_s == pytest.approx(expected)
    limits = for_job(claimed(timeout_s=20.0), for_batch({"timeout_s": 1.0}, patient)).request.limits
    assert limits.connect_timeout_s == 10.0


def test_a_job_goes_before_its_batch() -> None:
    assert for_job(claimed(timeout_s=2.0), for_batch({"timeout_s": 3.0}, LIMITS)).request.limits.timeout_s == 2.0
