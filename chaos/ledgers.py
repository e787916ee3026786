"""Three ledgers that must agree: what clients were promised, what the database says, what the target servers saw."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from chaos.clients import Ledger, Promise
from chaos.target import Hit, Target, Way

CANCEL_S = 2.0
"""How long after the answer to a cancel a fetch may start; a worker cut off from the database has its lease more."""

CUT_OFF = frozenset({"worker_crashed", "lease_lost", "shutdown_interrupted"})
"""How a request may end that must not be sent twice."""

CRASHES_OF_POISON = 3

BATCHES = """
    SELECT batch.id, batch.name, batch.status, batch.total, batch.deleted_at IS NOT NULL AS is_deleted,
        coalesce(t.total, 0) AS tally_total, coalesce(t.unfinished, 0) AS tally_unfinished,
        coalesce(t.succeeded, 0) AS succeeded, coalesce(t.failed, 0) AS failed, coalesce(t.cancelled, 0) AS cancelled
    FROM batch LEFT JOIN (
        SELECT batch_id, sum(total) AS total, sum(queued + running) AS unfinished, sum(succeeded) AS succeeded,
            sum(failed) AS failed, sum(cancelled) AS cancelled
        FROM tally GROUP BY batch_id
    ) AS t ON t.batch_id = batch.id
"""
JOBS = """
    SELECT batch_id, position, url, status, error, http_status, attempt, lost, crashes, body_sha256
    FROM job ORDER BY batch_id, position
"""
UNFINISHED = """
    SELECT (SELECT count(*) FROM batch WHERE finished_at IS NULL)
        + (SELECT count(*) FROM job WHERE status IN ('queued', 'running'))
"""
DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"


@dataclass
class Verdict:
    """What does not agree, and the figures of the run."""

    disagreements: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def expect(self, truth: bool, otherwise: str) -> None:
        """Note a disagreement unless it is true."""
        if not truth:
            self.disagreements.append(otherwise)


async def count_unfinished(url: str) -> int:
    """Count batches and jobs that have not ended."""
    return int(await _fetch_value(url, UNFINISHED))


async def reconcile(url: str, ledger: Ledger, target: Target, *, lease_s: float) -> Verdict:
    """Compare the three ledgers once nothing runs any more."""
    connection = await asyncpg.connect(url)
    try:
        batches = {row["id"]: row for row in await connection.fetch(BATCHES)}
        jobs: dict[Any, list[Any]] = defaultdict(list)
        for row in await connection.fetch(JOBS):
            jobs[row["batch_id"]].append(row)
        deadlocks = await connection.fetchval(DEADLOCKS)
    finally:
        await connection.close()
    verdict = Verdict()
    _compare_batches(verdict, ledger, batches, jobs)
    for promise, rows in _found(ledger, batches, jobs):
        for row, path in zip(rows, promise.paths(), strict=False):
            _compare_job(verdict, promise, row, path=path, hits=target.hits.get(path, []), lease_s=lease_s)
    verdict.expect(deadlocks == 0, f"{deadlocks} deadlocks")
    verdict.figures = _figures(ledger, target, [row for rows in jobs.values() for row in rows])
    return verdict


def _compare_batches(verdict: Verdict, ledger: Ledger, batches: dict[Any, Any], jobs: dict[Any, list[Any]]) -> None:
    by_name = {batch["name"]: batch for batch in batches.values()}
    verdict.expect(len(by_name) == len(batches), "a batch is stored twice")
    names = {promise.name for promise in ledger.promises}
    verdict.expect(by_name.keys() <= names, "there is a batch that nobody submitted")
    for promise in ledger.promises:
        batch = by_name.get(promise.name)
        if batch is None:
            verdict.expect(promise.id is None or promise.delete_was_sent, f"{promise.name} was accepted and is lost")
        elif not batch["is_deleted"]:
            _compare_batch(verdict, promise, batch, jobs[batch["id"]])
            verdict.expect(not promise.is_deleted, f"{promise.name} was deleted and is there")


def _compare_batch(verdict: Verdict, promise: Promise, batch: Any, rows: list[Any]) -> None:
    def expect(truth: bool, otherwise: str) -> None:
        verdict.expect(truth, f"{promise.name}: {otherwise}")

    expect(promise.id in (None, str(batch["id"])), "it has another id")
    expect([row["url"] for row in rows] == promise.urls, "its jobs are not those submitted")
    expect([row["position"] for row in rows] == list(range(len(rows))), "its positions have gaps")
    expect(batch["status"] in ("completed", "cancelled"), f"it is {batch['status']}")
    expect(batch["status"] == "cancelled" or not promise.must_be_cancelled, "its cancelling was lost")
    expect(batch["status"] == "completed" or promise.cancel_was_sent, "it is cancelled and nobody asked")
    counted = Counter(row["status"] for row in rows)
    for status in ("succeeded", "failed", "cancelled"):
        expect(batch[status] == counted[status], f"{status}: {batch[status]} counted, {counted[status]} rows")
    expect(batch["tally_total"] == batch["total"] == len(rows), "its total is wrong")
    expect(batch["tally_unfinished"] == 0, "its tallies say it is unfinished")
    if promise.ended is not None:
        shown = {status: promise.ended["counts"][status] for status in ("succeeded", "failed", "cancelled")}
        expect(all(batch[status] == count for status, count in shown.items()), "it changed after its end")


def _compare_job(verdict: Verdict, promise: Promise, row: Any, *, path: str, hits: list[Hit], lease_s: float) -> None:
    def expect(truth: bool, otherwise: str) -> None:
        verdict.expect(truth, f"{path}: {otherwise} ({row['status']}, {row['error']}, attempt {row['attempt']})")

    way = Way(path.rsplit("/", 1)[1])
    expect(row["status"] in ("succeeded", "failed", "cancelled"), "it has not ended")
    expect(row["status"] != "cancelled" or promise.cancel_was_sent, "it is cancelled and nobody asked")
    expect(len(hits) <= row["attempt"], f"{len(hits)} fetches are more than its attempts")
    expect(way != Way.POST or len(hits) <= 1, f"it was sent {len(hits)} times")
    if row["status"] == "succeeded":
        expect(any(hit.is_answered for hit in hits), "no server answered it")
        expect(row["body_sha256"] == hashlib.sha256(path.encode()).digest(), "its body is another's")
        expect(way not in (Way.GONE,), "it cannot have succeeded")
    if row["status"] == "failed":
        expect(_may_have_failed(way, row), "it cannot have failed like that")
    if row["status"] != "cancelled" and way in (Way.FINE, Way.SLOW, Way.POST, Way.GONE):
        expect(row["attempt"] - row["lost"] <= 1, "a fault was charged to its client")
    if promise.cancelled_at is not None and promise.must_be_cancelled:
        last_at = max((hit.at for hit in hits), default=0.0)
        expect(last_at <= promise.cancelled_at + CANCEL_S + lease_s, "it was fetched long after its cancelling")


def _may_have_failed(way: Way, row: Any) -> bool:
    if row["error"] == "poisoned":  # innocent, but killed by chance each time, the last time while it ran alone
        return bool(row["crashes"] >= CRASHES_OF_POISON)
    if way == Way.POST:
        return row["error"] in CUT_OFF
    return way == Way.GONE and (row["error"], row["http_status"]) == ("http_status", 404)


def _found(ledger: Ledger, batches: dict[Any, Any], jobs: dict[Any, list[Any]]) -> Iterator[tuple[Promise, list[Any]]]:
    promises = {promise.name: promise for promise in ledger.promises}
    for batch_id, batch in batches.items():
        if batch["name"] in promises and not batch["is_deleted"]:
            yield promises[batch["name"]], jobs[batch_id]


def _figures(ledger: Ledger, target: Target, rows: list[Any]) -> dict[str, Any]:
    paths = {"/" + row["url"].split("/", 3)[3]: row for row in rows}
    charged = {path: row["attempt"] - row["lost"] for path, row in paths.items()}
    return {
        "batches promised": sum(promise.id is not None for promise in ledger.promises),
        "batches without an answer": sum(promise.id is None for promise in ledger.promises),
        "batches deleted": sum(promise.is_deleted for promise in ledger.promises),
        "jobs": dict(Counter(row["status"] for row in rows)),
        "failures": dict(Counter(row["error"] for row in rows if row["status"] == "failed")),
        "fetches seen": sum(map(len, target.hits.values())),
        "fetched again": sum(max(0, len(target.hits.get(path, ())) - count) for path, count in charged.items()),
        "attempts lost": sum(row["lost"] for row in rows),
        "of them to crashes": sum(row["crashes"] for row in rows),
        "answers": dict(ledger.answers.most_common()),
    }


async def _fetch_value(url: str, statement: str) -> Any:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()
