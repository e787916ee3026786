"""The pool at work: what runs, where, how much at once, and what becomes of it."""

import asyncio
import itertools
import random
import time
from collections import Counter
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs import batches, queue
from app.jobs.database import Sessions
from app.jobs.values import ClaimedJob
from app.worker.pool import Pool
from tests.waiting import until
from tests.web import Answer, serving
from tests.worker.conftest import Service


async def statuses(sessions: Sessions) -> Counter[str]:
    async with sessions.begin() as session:
        return Counter(row.status for row in await session.execute(text("SELECT status FROM job")))


async def test_a_batch_runs_to_completion(service: Service) -> None:
    async with serving() as site, service.worker():
        urls = [site.url(f"/{number}", address=f"127.0.0.{number % 5 + 1}") for number in range(100)]
        batch = await service.finished(await service.submit(*urls))
        assert (batch.status, batch.counts.succeeded, batch.http_statuses) == ("completed", 100, {"200": 100})
        assert site.hits == Counter(f"/{number}" for number in range(100))


async def test_no_host_sees_more_at_once_than_its_limit(service: Service) -> None:
    async with serving() as site, service.worker(host_concurrency=3), service.worker(host_concurrency=3):
        batch_id = await service.submit(*(site.url(f"/held/{number}") for number in range(30)))
        await site.wait_for_hits(3)
        site.gate.set()
        await service.finished(batch_id)
        assert site.most_at_once == 3


async def test_one_slow_host_does_not_hold_up_another(service: Service) -> None:
    async with serving() as site, service.worker(slots=10, host_concurrency=4):
        slow = await service.submit(*(site.url(f"/held/{number}", address="127.0.0.2") for number in range(50)))
        await site.wait_for_hits(4)
        fast = await service.submit(*(site.url(f"/{number}") for number in range(50)))
        assert (await service.finished(fast)).counts.succeeded == 50
        assert (await service.read(slow)).counts.succeeded == 0
        site.gate.set()
        assert (await service.finished(slow)).counts.succeeded == 50


async def test_two_fetches_to_a_host_are_a_delay_apart(service: Service) -> None:
    times: list[float] = []

    def answer(path: str) -> Answer:
        times.append(time.monotonic())
        return 200, {}, b""

    async with serving(answer) as site, service.worker(host_delay_s=0.2):
        await service.finished(await service.submit(*(site.url(f"/{number}") for number in range(5))))
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert min(pauses) > 0.15


async def test_a_fetch_after_a_long_delay_does_not_wait_for_the_one_before(service: Service) -> None:
    async with serving() as site, service.worker(host_delay_s=2.5):
        batch_id = await service.submit(site.url("/held/1"), site.url("/held/2"))
        await until(lambda: site.now_count == 2)
        site.gate.set()
        assert (await service.finished(batch_id)).counts.succeeded == 2


async def test_a_failing_job_is_tried_again_and_tells_of_each_attempt(service: Service) -> None:
    answers = iter([500, 502, 200])
    async with serving(lambda _: (next(answers), {}, b"")) as site, service.worker():
        batch_id = await service.submit(site.url("/"))
        assert (await service.finished(batch_id)).counts.succeeded == 1
        [job] = await service.jobs(batch_id)
        attempts = (await service.job(job.id)).attempts_made
        assert [attempt.http_status for attempt in attempts] == [500, 502, 200]
        assert [attempt.error for attempt in attempts] == ["http_status", "http_status", None]


async def test_a_job_fails_when_its_attempts_are_used_up(service: Service) -> None:
    async with serving(lambda _: (500, {"X-Why": "no"}, b"why")) as site, service.worker():
        batch_id = await service.submit(site.url("/"), max_attempts=2)
        batch = await service.finished(batch_id)
        assert (batch.counts.failed, batch.errors, batch.http_statuses) == (1, {"http_status": 1}, {"500": 1})
        [job] = await service.jobs(batch_id)
        detail = await service.job(job.id)
        assert (detail.attempts, detail.http_status, detail.body_bytes) == (2, 500, 3)
        assert ["X-Why", "no"] in (detail.response_headers or [])


async def test_a_job_that_fails_in_the_body_shows_status_and_headers(service: Service) -> None:
    async with serving(lambda _: (203, {"X-Why": "no"}, b"too much")) as site, service.worker():
        batch_id = await service.submit(site.url("/"), wire_bytes_max=3)
        batch = await service.finished(batch_id)
        assert (batch.errors, batch.http_statuses) == ({"body_too_large": 1}, {"203": 1})
        [job] = await service.jobs(batch_id)
        detail = await service.job(job.id)
        assert (detail.http_status, detail.final_url, detail.body_sha256) == (203, site.url("/"), None)
        assert ["X-Why", "no"] in (detail.response_headers or [])


async def test_a_busy_host_is_left_alone_as_long_as_it_asks(service: Service) -> None:
    seen: list[float] = []

    def answer(path: str) -> Answer:
        seen.append(time.monotonic())
        return (429, {"Retry-After": "1"}, b"") if len(seen) == 1 else (200, {}, b"")

    async with serving(answer) as site, service.worker(host_concurrency=1):
        batch_id = await service.submit(*(site.url(f"/{number}") for number in range(5)))
        assert (await service.finished(batch_id)).counts.succeeded == 5
    assert seen[1] - seen[0] >= 1.0


async def test_a_host_that_rests_long_is_given_back_though_nothing_waits_there(
    service: Service, sessions: Sessions
) -> None:
    async with serving(lambda _: (429, {"Retry-After": "600"}, b"")) as site, service.worker() as pool:
        await service.submit(site.url("/"))
        await until(lambda: _all_rest(sessions, pool))


async def _all_rest(sessions: Sessions, pool: Pool) -> bool:
    pool.wake()  # as hints of work at other hosts do
    async with sessions.begin() as session:
        state = "SELECT bool_and(owner IS NULL AND not_before > now() + interval '500 seconds') FROM host"
        return bool(await session.scalar(text(state)))


async def test_a_post_is_sent_with_its_body_and_not_repeated(service: Service) -> None:
    async with serving(lambda _: (503, {}, b"")) as site, service.worker():
        batch_id = await service.submit(site.url("/"), request={"method": "POST", "body": "hello"})
        assert (await service.finished(batch_id)).counts.failed == 1
        assert (site.methods, site.hits) == (Counter(POST=1), Counter({"/": 1}))


async def test_cancelling_stops_what_runs_and_what_waits(service: Service, sessions: Sessions) -> None:
    async with serving() as site, service.worker(slots=4):
        batch_id = await service.submit(*(site.url(f"/held/{number}") for number in range(100)))
        await site.wait_for_hits(4)
        await _cancel(service, batch_id)
        batch = await service.finished(batch_id)
        assert (batch.status, batch.counts.cancelled, batch.errors) == ("cancelled", 100, {"cancelled": 100})
        assert sum(site.hits.values()) == 4
        assert await statuses(sessions) == Counter(cancelled=100)


async def _cancel(service: Service, batch_id: UUID) -> None:
    async with service.sessions.begin() as session:
        await batches.cancel(session, batch_id)


async def test_a_drained_worker_puts_back_what_has_not_started(service: Service) -> None:
    async with serving() as site:
        async with service.worker(slots=2, host_concurrency=2) as pool:
            batch_id = await service.submit(*(site.url(f"/held/{number}") for number in range(20)))
            await site.wait_for_hits(2)
            pool.drain()
            await service.until(batch_id, lambda batch: batch.counts.running == 2)
            site.gate.set()
            batch = await service.until(batch_id, lambda batch: batch.counts.running == 0)
            assert (batch.counts.succeeded, batch.counts.queued) == (2, 18)
        async with service.worker():
            assert (await service.finished(batch_id)).counts.succeeded == 20
        assert {job.attempts for job in await service.jobs(batch_id)} == {1}


async def test_a_stopped_worker_puts_back_what_runs_uncharged(service: Service) -> None:
    async with serving() as site:
        async with service.worker() as pool:
            batch_id = await service.submit(*(site.url(f"/held/{number}") for number in range(4)))
            await site.wait_for_hits(4)
            pool.stop()
            await service.until(batch_id, lambda batch: batch.counts.queued == 4)
        site.gate.set()
        async with service.worker():
            assert (await service.finished(batch_id)).counts.succeeded == 4
        assert {job.attempts for job in await service.jobs(batch_id)} == {1}


async def test_work_that_comes_while_a_host_is_held_is_found(service: Service) -> None:
    async with serving() as site, service.worker():
        held = await service.submit(site.url("/held"))
        await site.wait_for_hits(1)
        assert (await service.finished(await service.submit(site.url("/later")))).counts.succeeded == 1
        site.gate.set()
        await service.finished(held)


async def test_a_redirect_takes_a_place_at_its_target(service: Service) -> None:
    def answer(path: str) -> Answer:
        if path.startswith("/from"):
            return 302, {"Location": f"http://127.0.0.2:{site.port}/held{path}"}, b""
        return 200, {}, b""

    async with serving(answer) as site, service.worker(host_concurrency=2):
        batch_id = await service.submit(*(site.url(f"/from/{number}") for number in range(10)))
        await site.wait_for_hits(12)
        assert sum(count for path, count in site.hits.items() if path.startswith("/held")) == 2
        site.gate.set()
        assert (await service.finished(batch_id)).counts.succeeded == 10


async def test_a_worker_whose_lease_is_gone_stops_and_stores_nothing(service: Service, sessions: Sessions) -> None:
    async with serving() as site, service.worker(lease_s=1.5):
        batch_id = await service.submit(site.url("/held"))
        await site.wait_for_hits(1)
        async with sessions.begin() as session:
            await session.execute(text("UPDATE host SET lease = lease + 1, owner = gen_random_uuid()"))
        await until(lambda: site.closed_early)
        site.gate.set()
        assert (await service.finished(batch_id)).counts.succeeded == 1
        [job] = await service.jobs(batch_id)
        assert job.attempts == 1


async def test_a_suspect_runs_with_no_other_fetch_open(service: Service, sessions: Sessions) -> None:
    async with serving() as site:
        at_once: list[int] = []

        def answer(path: str) -> Answer:
            if "suspect" in path:
                at_once.append(site.now_count)
            return 200, {}, b""

        site.answer = answer
        paths = [f"/{number}" for number in range(30)] + ["/suspect"] + [f"/{number}" for number in range(30, 60)]
        batch_id = await service.submit(*(site.url(path) for path in paths))
        async with sessions.begin() as session:
            await session.execute(text("UPDATE job SET attempt = 2, lost = 2, crashes = 2 WHERE url LIKE '%suspect'"))
        async with service.worker():
            assert (await service.finished(batch_id)).counts.succeeded == 61
        assert at_once == [1]


async def test_a_worker_that_waits_to_run_a_suspect_leaves_other_hosts_to_others(service: Service) -> None:
    async with serving() as site, service.worker() as waits:
        held = await service.submit(site.url("/held"))
        await site.wait_for_hits(1)
        suspect = await service.submit(site.url("/suspect", address="127.0.0.2"), crashes=2)
        await until(lambda: waits._slots.is_reserved)
        async with service.worker() as other:
            for _ in range(5):
                batch_id = await service.submit(*(site.url("/", address=f"127.0.0.{host}") for host in range(3, 30)))
                waits.wake()
                other.wake()
                await service.finished(batch_id)
        assert not site.hits["/suspect"]
        site.gate.set()
        for batch_id in (held, suspect):
            assert (await service.finished(batch_id)).counts.succeeded == 1


async def test_a_host_that_runs_dry_is_not_kept_by_a_worker_with_no_room_for_more(service: Service) -> None:
    async with serving() as site, service.worker(slots=5) as worker:
        paths = [*(f"/{number}" for number in range(100)), *(f"/held/{number}" for number in range(100))]
        await service.submit(*(site.url(path) for path in paths))
        await until(lambda: worker._refill_room() <= 0 and site.hits["/held/0"])
        other = await service.submit(*(site.url(f"/{number}", address="127.0.0.2") for number in range(5)))
        assert (await service.finished(other)).counts.succeeded == 5
        assert not site.closed_early  # what is held still is


async def test_an_accused_job_is_convicted_without_another_fetch(service: Service, sessions: Sessions) -> None:
    async with serving() as site:
        batch_id = await service.submit(site.url("/poison"), site.url("/innocent"))
        async with sessions.begin() as session:
            accuse = "UPDATE job SET attempt = 3, lost = 3, crashes = 3, accused = true WHERE url LIKE '%poison'"
            await session.execute(text(accuse))
        async with service.worker():
            batch = await service.finished(batch_id)
        assert (batch.counts.succeeded, batch.errors) == (1, {"poisoned": 1})
        assert site.hits == Counter({"/innocent": 1})


async def test_a_result_that_comes_after_its_lease_is_counted_and_its_job_cleared(
    service: Service, sessions: Sessions
) -> None:
    async with serving() as site, service.worker():
        batch_id = await service.submit(site.url("/held"))
        await site.wait_for_hits(1)
        await until(lambda: is_renewed(sessions))  # or it would learn of what follows at once, and stop
        async with sessions.begin() as session:  # as another's claim did, though the lease had not ended
            await session.execute(text("UPDATE host SET lease = lease + 1, owner = NULL, next_at = 'infinity'"))
            await session.execute(
                text("UPDATE job SET status = 'queued', lease = NULL, lost = 1, crashes = 1, run_at = 'infinity'")
            )
            await session.execute(
                text(
                    "INSERT INTO attempt (shard, job_id, number, started_at, finished_at, error, charged) "
                    "SELECT shard, id, 1, now(), now(), 'lease_lost', true FROM job"
                )
            )
            await session.execute(text("UPDATE tally SET queued = 1, running = 0"))
        site.gate.set()
        await until(lambda: dropped(sessions))
        async with sessions.begin() as session:
            assert (await session.execute(text("SELECT status, crashes FROM job"))).one() == ("queued", 0)
        await _cancel(service, batch_id)
        await service.finished(batch_id)
    async with sessions.begin() as session:
        assert not await session.scalar(text("SELECT count(*) FROM worker"))


async def is_renewed(sessions: Sessions) -> bool:
    """Whether the only host's lease ends later than its claim, which also started the job, had it end."""
    ends_later = text("SELECT next_at > started_at + make_interval(secs => 30) FROM host CROSS JOIN job")
    async with sessions.begin() as session:
        return bool(await session.scalar(ends_later))


async def dropped(sessions: Sessions) -> int:
    async with sessions.begin() as session:
        return int(await session.scalar(text("SELECT sum(dropped) FROM worker")) or 0)


async def test_a_result_that_cannot_be_stored_fails_its_job_alone(service: Service, sessions: Sessions) -> None:
    async with sessions.begin() as session:
        await session.execute(text("ALTER TABLE job ADD CONSTRAINT odd CHECK (http_status <> 299)"))
    answers: dict[str, Answer] = {"/odd": (299, {}, b"")}
    async with serving(lambda path: answers.get(path, (200, {}, b""))) as site, service.worker():
        batch_id = await service.submit(*(site.url(path) for path in ("/1", "/odd", "/2")))
        batch = await service.finished(batch_id)
        assert batch.counts.succeeded == 2
        assert batch.errors == {"storage_error": 1}
        [odd] = [job for job in await service.jobs(batch_id) if job.error]
        assert [made.error for made in (await service.job(odd.id)).attempts_made] == ["storage_error"]


async def test_a_result_refused_in_every_form_holds_up_no_other(service: Service, sessions: Sessions) -> None:
    async with serving(lambda _: (200, {}, b"")) as site, service.worker():
        refused = await service.submit(site.url("/refused"))
        async with sessions.begin() as session:
            await session.execute(
                text(f"ALTER TABLE tally ADD CHECK (batch_id <> '{refused}' OR running = 1) NOT VALID")
            )
        good = await service.submit(*(site.url(f"/{number}") for number in range(3)))
        assert (await service.finished(good)).counts.succeeded == 3


async def test_a_post_that_runs_when_its_worker_is_stopped_is_not_sent_again(service: Service) -> None:
    async with serving() as site:
        async with service.worker() as pool:
            batch_id = await service.submit(site.url("/held/1"), request={"method": "POST", "body": "pay"})
            await site.wait_for_hits(1)
            pool.stop()
        site.gate.set()
        async with service.worker():
            await service.finished(batch_id)
        assert site.hits == Counter({"/held/1": 1})
        [job] = await service.jobs(batch_id)
        assert (job.status, job.error) == ("failed", "shutdown_interrupted")
        assert [made.error for made in (await service.job(job.id)).attempts_made] == ["shutdown_interrupted"]


async def test_the_shortest_lease_is_renewed_in_time(service: Service) -> None:
    async with serving() as site, service.worker(lease_s=1.0):
        batch_id = await service.submit(site.url("/held/1"))
        await site.wait_for_hits(1)
        await renewed(service.sessions, times=4)
        site.gate.set()
        await service.finished(batch_id)
        assert site.hits == Counter({"/held/1": 1})


async def renewed(sessions: Sessions, *, times: int) -> None:
    """Wait until the end of the one lease was moved so often."""
    ends = set[object]()
    async with asyncio.timeout(20):
        while len(ends) <= times:
            async with sessions.begin() as session:
                ends.add(await session.scalar(text("SELECT next_at FROM host")))
            await asyncio.sleep(0.05)


async def test_what_runs_stops_before_the_lease_ends_though_the_renewal_hangs(
    service: Service, sessions: Sessions
) -> None:
    async with serving() as site, service.worker(lease_s=3.0):
        batch_id = await service.submit(site.url("/held/1"))
        await site.wait_for_hits(1)
        async with sessions.begin() as session:
            await session.execute(text("SELECT 1 FROM host FOR UPDATE"))
            await until(lambda: not site.now_count)
        site.gate.set()
        assert (await service.finished(batch_id)).counts.succeeded == 1


async def test_large_bodies_are_stored_a_few_at_a_time(service: Service) -> None:
    page = random.Random(1).randbytes(2**20)
    async with serving(lambda _: (200, {}, page)) as site, service.worker(slots=40, host_concurrency=40):
        batch_id = await service.submit(*(site.url(f"/{number}") for number in range(80)))
        batch = await service.finished(batch_id)
        assert (batch.counts.succeeded, batch.body_bytes) == (80, 80 * 2**20)


async def test_a_host_that_refuses_is_tried_by_one_fetch_at_a_time(service: Service) -> None:
    async with serving() as site:
        port = site.port
    async with service.worker():
        batch_id = await service.submit(*(f"http://127.0.0.1:{port}/{number}" for number in range(40)), max_attempts=10)
        await service.until(batch_id, lambda batch: batch.counts.running == 0)
        details = [await service.job(job.id) for job in await service.jobs(batch_id)]
        assert sum(len(detail.attempts_made) for detail in details) <= 8
        async with serving(port=port):
            assert (await service.finished(batch_id)).counts.succeeded == 40


async def lease_count(sessions: Sessions) -> int:
    """Under how many leases all jobs ran."""
    async with sessions.begin() as session:
        return int(await session.scalar(text("SELECT count(DISTINCT lease) FROM job")) or 0)


async def test_a_host_is_kept_while_there_are_batches_that_a_turn_did_not_look_at(
    service: Service, sessions: Sessions
) -> None:
    async with serving() as site:
        ids = [await service.submit(site.url(f"/{number}")) for number in range(250)]
        async with service.worker(slots=150, host_concurrency=150):
            for batch_id in ids:
                await service.finished(batch_id)
    assert await lease_count(sessions) == 1


async def test_a_host_with_a_delay_is_kept_between_its_fetches(service: Service, sessions: Sessions) -> None:
    async with serving() as site, service.worker(host_delay_s=0.05):
        await service.finished(await service.submit(*(site.url(f"/{number}") for number in range(20))))
    assert await lease_count(sessions) == 1


async def test_a_host_goes_on_when_its_renewal_comes_late_but_in_time(service: Service) -> None:
    async with serving() as site, service.worker(slots=100, lease_s=6.0) as pool:
        await service.submit(*(site.url(f"/{number}") for number in range(10_000)))
        # so many that none are looked for until some of them have run
        await until(lambda: any(len(hold.waiting) > 120 for hold in pool._holds.values()))
        [hold] = pool._holds.values()
        hold.stops_at = time.monotonic()
        await until(lambda: not hold.running)
        hold.stops_at = time.monotonic() + 6.0
        before = site.hits.total()
        await until(lambda: site.hits.total() > before)


async def test_jobs_of_a_refill_that_was_not_confirmed_do_not_wait_for_their_host_to_run_dry(
    service: Service, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refill(session: AsyncSession, owner: UUID, wanted: Any, *, jobs_max: int) -> list[ClaimedJob]:
        if lost or not site.hits:
            return await refill_really(session, owner, wanted, jobs_max=jobs_max)
        async with sessions.begin() as other:
            lost.extend(await refill_really(other, owner, wanted, jobs_max=jobs_max))
        raise OSError("the connection broke at the commit")

    async def found() -> bool:
        async with sessions.begin() as session:
            stranded = "SELECT count(*) FROM job WHERE id = ANY(:ids) AND lost = 0"
            return not await session.scalar(text(stranded), {"ids": [job.id for job in lost]})

    lost: list[ClaimedJob] = []
    refill_really = queue.refill
    monkeypatch.setattr(queue, "refill", refill)
    async with serving() as site, service.worker():
        await service.submit(*(site.url(f"/{number}") for number in range(10_000)))
        await until(lambda: bool(lost))
        await until(found)
        assert site.hits.total() < 9_000
