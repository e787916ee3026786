"""The values that pass between the queue and its callers."""

import sys

from app.jobs.values import NewJobs


def test_a_host_is_kept_once_and_no_longer_than_its_batch() -> None:
    jobs = NewJobs()
    for number in range(2):
        jobs.add(f"http://one.test/{number}", "".join(("one", ".", "test")))
    first, second = jobs.hosts
    assert first is second
    assert sys.intern("".join(("one", ".", "test"))) is not first  # what is interned stays for ever in some Pythons
