"""Whether an attempt is tried again, when, and how long its host is left alone."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from app.fetch.http import FetchRequest
from app.outcome import RETRYABLE, Evidence, Failure, FailureCode, Hop, Outcome, Response
from app.worker import retry
from app.worker.options import accepted
from tests.fetch.servers import LIMITS

OK = accepted(("2xx",))
REFUSED = Failure(code=FailureCode.CONNECT_REFUSED, detail="Refused.")


def request(url: str = "http://h/", **limits: float) -> FetchRequest:
    return FetchRequest(url=url, limits=replace(LIMITS, **limits))  # type: ignore[arg-type]


def response(status: int, **headers: str) -> Response:
    pairs = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return Response(status=status, headers=pairs, body=b"", final_url="http://h/")


def decide(outcome: Outcome, *, attempts_made: int = 1, repeatable: bool = True) -> retry.Verdict:
    return retry.decide(outcome, accepts=OK, attempts_made=attempts_made, attempts_max=3, repeatable=repeatable)


@pytest.mark.parametrize("status", [200, 204, 299])
def test_an_accepted_status_succeeds(status: int) -> None:
    assert decide(response(status)).status == "succeeded"


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_passing_trouble_is_tried_again_until_the_attempts_are_used_up(status: int) -> None:
    assert [decide(response(status), attempts_made=made).status for made in (1, 2, 3)] == ["queued", "queued", "failed"]


@pytest.mark.parametrize("status", [301, 304, 400, 404, 410, 501])
def test_a_lasting_answer_is_final(status: int) -> None:
    verdict = decide(response(status))
    assert (verdict.status, verdict.code) == ("failed", FailureCode.HTTP_STATUS)


@pytest.mark.parametrize("code", list(FailureCode))
def test_only_curable_failures_are_tried_again(code: FailureCode) -> None:
    verdict = decide(Failure(code=code, detail="It failed."))
    assert verdict.status == ("queued" if code in RETRYABLE else "failed")
    assert verdict.code == code


def test_a_request_that_may_not_be_repeated_is_tried_again_only_when_nothing_was_sent() -> None:
    unsent = Failure(code=FailureCode.CONNECT_REFUSED, detail="Refused.", sent=False)
    sent = Failure(code=FailureCode.READ_TIMEOUT, detail="Silence.", sent=True)
    assert decide(unsent, repeatable=False).status == "queued"
    assert decide(sent, repeatable=False).status == "failed"
    assert decide(response(503), repeatable=False).status == "failed"


def test_the_pause_before_an_attempt_doubles_up_to_a_bound() -> None:
    broken = Failure(code=FailureCode.READ_TIMEOUT, detail="Silence.")
    for made, longest_s in ((1, 1.0), (2, 2.0), (5, 16.0), (20, 300.0)):
        pauses = [
            retry.decide(broken, accepts=OK, attempts_made=made, attempts_max=99, repeatable=True).delay_s
            for _ in range(200)
        ]
        assert 0 <= min(pauses) <= longest_s / 4
        assert longest_s * 3 / 4 <= max(pauses) <= longest_s


@pytest.mark.parametrize("value", ["7", " 7 "])
def test_the_server_says_when_to_come_again(value: str) -> None:
    assert 7.0 <= decide(response(429, Retry_After=value)).delay_s <= 7.0 * 1.1


def test_the_server_may_say_when_by_the_date() -> None:
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=61), usegmt=True)
    assert 50.0 <= decide(response(429, Retry_After=in_a_minute)).delay_s <= 61.0 * 1.1


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("99999999999999999999", 3600.0),
        ("-5", None),
        ("soon", None),
        ("Mon, 99999999999999999999 Jan 2024 00:00:00 GMT", None),
        ("٣", None),
    ],
)
def test_a_silly_retry_after_is_bounded_or_ignored(value: str, seconds: float | None) -> None:
    assert retry.retry_after_s(response(503, retry_after=value)) == seconds


def test_a_date_that_has_passed_means_now() -> None:
    assert retry.retry_after_s(response(503, retry_after="Wed, 21 Oct 2015 07:28:00 GMT")) == 0.0


def test_a_busy_host_is_left_alone_longer_each_time() -> None:
    assert [retry.back_off_s(response(503), back_offs=number) for number in (0, 1, 2, 10, 1000)] == [1, 2, 4, 60, 60]
    assert retry.back_off_s(response(429, retry_after="120"), back_offs=5) == 120
    assert retry.back_off_s(response(500), back_offs=0) is None
    assert retry.back_off_s(Failure(code=FailureCode.READ_TIMEOUT, detail="Silence."), back_offs=0) is None
    assert retry.back_off_s(Failure(code=FailureCode.CONNECT_REFUSED, detail="Refused."), back_offs=3) == 8


def test_accepted_statuses_are_single_ranged_or_by_the_hundred() -> None:
    assert accepted(("2xx", "404", "500-502")) == frozenset({*range(200, 300), 404, 500, 501, 502})


def test_a_redirect_to_a_dead_host_leaves_the_host_it_is_from_in_peace() -> None:
    redirected = Evidence(redirects=(Hop("http://h/", 302),))
    failure = Failure(code=FailureCode.CONNECT_REFUSED, detail="Refused.", evidence=redirected)
    assert retry.back_off_s(failure, back_offs=3) is None
    assert retry.got_through(failure)
    assert not retry.got_through(REFUSED)


def test_a_busy_answer_that_breaks_off_is_one_all_the_same() -> None:
    cut = Failure(code=FailureCode.BODY_TRUNCATED, detail="Cut.", status=503, headers=(("Retry-After", "7"),))
    assert retry.back_off_s(cut, back_offs=0) == 7
    cut = Failure(code=FailureCode.BODY_TRUNCATED, detail="Cut.", status=200)
    assert retry.back_off_s(cut, back_offs=0) is None
    assert retry.got_through(cut)


def test_a_failure_is_shared_once_a_host_was_not_to_be_connected_to_for_a_minute() -> None:
    count = next(count for count in range(100) if retry.shared_failure(REFUSED, request(), connect_failures=count))
    assert 60 < sum(retry.back_off_s(REFUSED, back_offs=number) or 0 for number in range(count - 1)) < 120
    shared = retry.shared_failure(REFUSED, request(), connect_failures=count)
    assert shared is not None
    assert (shared.failure.code, shared.failure.evidence, shared.failure.sent) == (REFUSED.code, Evidence(), False)
    assert shared.failure.detail.endswith("Refused.")
    assert retry.shared_failure(response(503), request(), connect_failures=100) is None


def test_a_failure_is_shared_with_requests_to_the_same_port_that_are_no_more_patient() -> None:
    refused = retry.shared_failure(REFUSED, request(), connect_failures=100)
    silent = Failure(code=FailureCode.CONNECT_TIMEOUT, detail="Silence.")
    timeout = retry.shared_failure(silent, request(connect_timeout_s=5.0), connect_failures=100)
    assert refused is not None
    assert timeout is not None
    assert refused.applies_to(request("http://h/other", connect_timeout_s=60.0))
    assert not refused.applies_to(request("https://h/"))
    assert timeout.applies_to(request(connect_timeout_s=5.0))
    assert not timeout.applies_to(request(connect_timeout_s=5.1))
