"""The closed vocabulary of failures is the one that is written down."""

import csv
from pathlib import Path

from app.outcome import MEANINGS, RETRYABLE, RETRYABLE_STATUSES, FailureCode

FILE = Path(__file__).parent / "cases" / "error_codes.csv"


def test_the_codes_and_what_is_tried_again_are_those_written_down() -> None:
    with FILE.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["code"] for row in rows] == list(FailureCode)
    assert {row["code"] for row in rows if row["retryable"] == "yes"} == RETRYABLE
    by_status = [row for row in rows if row["retryable"] not in ("yes", "no")]
    assert [row["code"] for row in by_status] == [FailureCode.HTTP_STATUS]
    assert {int(status) for status in by_status[0]["retryable"].split(",")} == RETRYABLE_STATUSES


def test_every_code_is_explained_in_a_sentence() -> None:
    assert list(MEANINGS) == list(FailureCode)
    assert [meaning for meaning in MEANINGS.values() if not meaning.endswith(".")] == []
