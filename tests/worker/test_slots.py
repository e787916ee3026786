"""What becomes of jobs whose host was lost while they were asked for."""

from collections import deque
from contextlib import aclosing

from app.fetch.resolver import Resolver
from app.fetch.transport import Transport
from app.jobs.database import Sessions
from app.jobs.values import Lease, Returned
from app.worker.holds import Hold
from app.worker.recorder import Recorder
from app.worker.slots import Slots
from tests.worker.conftest import LIMITS, POLICY
from tests.worker.test_options import claimed


async def test_jobs_that_come_for_a_lost_host_are_given_back(sessions: Sessions) -> None:
    hold = Hold(
        lease=Lease(shard=0, host="a.test", number=1),
        stops_at=0.0,
        began_at=0.0,
        concurrency=4,
        delay_s=0.0,
        is_lost=True,
    )
    async with aclosing(Resolver()) as resolver:
        slots = Slots(
            count=10,
            host_concurrency=4,
            limits=LIMITS,
            holds={},
            transport=Transport(policy=POLICY, resolver=resolver, user_agent="Fetchpool tests"),
            recorder=Recorder(sessions, lambda _: None),
            wake=lambda: None,
        )
        jobs = [claimed(), claimed()]
        slots.supply(hold, jobs)
    assert slots.returned == [(hold, Returned(job=job)) for job in jobs]
    assert (slots.waiting_count, hold.waiting) == (0, deque())
