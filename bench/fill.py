"""Puts jobs into a service's database as its API would, in the service's Python; for more than a POST takes at once.

Reads `{database_url, batches: [{origins, series, first, count}, ...]}` as JSON from standard input: each batch is of so
many pages, from a first number on, over the origins in turn. Writes `{ids}` to standard output.
"""

import asyncio
import json
import sys
from typing import Any
from urllib.parse import urlsplit

from app.jobs import queue
from app.jobs.database import make_engine, make_sessions
from app.jobs.ids import new_batch_id
from app.jobs.values import NewBatch, NewJobs


async def fill(question: dict[str, Any]) -> dict[str, list[str]]:
    """Enqueue batch after batch, each in a transaction of its own."""
    engine = make_engine(question["database_url"])
    sessions = make_sessions(engine)
    ids = []
    for wanted in question["batches"]:
        jobs = _jobs(wanted)
        batch = NewBatch(id=new_batch_id(), name=None, metadata=None, options={}, skipped=[])
        async with sessions.begin() as session:
            await queue.enqueue(session, batch, jobs)
        ids.append(str(batch.id))
    await engine.dispose()
    return {"ids": ids}


def _jobs(wanted: dict[str, Any]) -> NewJobs:
    jobs, origins = NewJobs(), wanted["origins"]
    hosts = [urlsplit(origin).netloc for origin in origins]
    for number in range(wanted["first"], wanted["first"] + wanted["count"]):
        place = number % len(origins)
        jobs.add(f"{origins[place]}/{wanted['series']}/{number}.html", hosts[place])
    return jobs


if __name__ == "__main__":
    json.dump(asyncio.run(fill(json.load(sys.stdin))), sys.stdout)
