"""What Prometheus reads: the workers, as their heartbeats have them. Counts no jobs: that would read them all."""

import asyncio
from collections.abc import Iterator, Sequence

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from app.api.context import context_of
from app.jobs import workers
from app.jobs.workers import Heartbeat

TIMEOUT_S = 3.0
WORKERS_MAX = 10_000

router = APIRouter()


@router.get("/metrics", include_in_schema=False)
async def get_metrics(request: Request) -> Response:
    """Answer the same whichever API process is asked: all of it comes from the database."""
    async with asyncio.timeout(TIMEOUT_S), context_of(request).sessions.begin() as session:
        heartbeats = await workers.list_workers(session, limit=WORKERS_MAX)
    registry = CollectorRegistry()
    registry.register(_Workers(heartbeats))
    return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


class _Workers(Collector):
    def __init__(self, heartbeats: Sequence[Heartbeat]) -> None:
        self._heartbeats = heartbeats

    def collect(self) -> Iterator[Metric]:
        """Yield what each worker said last; of a silent one only what it counted so far."""
        labels = ("worker", "machine")
        known = InfoMetricFamily("fetchpool_worker", "Which process the worker is.", labels=labels)
        started = GaugeMetricFamily("fetchpool_worker_start_time_seconds", "Unix time of its start.", labels=labels)
        slots = GaugeMetricFamily("fetchpool_worker_slots", "Fetches the worker has room for.", labels=labels)
        running = GaugeMetricFamily("fetchpool_worker_running", "Fetches under way at the last beat.", labels=labels)
        dropped = CounterMetricFamily(
            "fetchpool_worker_results_dropped",
            "Results that came after their lease and were not stored.",
            labels=labels,
        )
        for beat in self._heartbeats:
            values = (str(beat.id), beat.machine)
            dropped.add_metric(values, beat.dropped)
            if beat.is_heard:
                known.add_metric(values, {"pid": str(beat.pid), "version": beat.version})
                started.add_metric(values, beat.started_at.timestamp())
                slots.add_metric(values, beat.slots)
                running.add_metric(values, beat.running)
        yield from (known, started, slots, running, dropped)
