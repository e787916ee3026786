"""The service's own fetch in the same loop as the bare one, without jobs and database. Runs in the service's Python.

Reads and writes what bench/bare.py does.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import uvloop

from app.fetch.http import FetchRequest, fetch
from app.fetch.limits import Limits
from app.fetch.policy import Policy
from app.fetch.resolver import Resolver
from app.fetch.transport import Transport
from app.main import default_limits
from app.outcome import Response
from app.settings import Settings


async def fetch_all(transport: Transport, urls: Iterator[str], limits: Limits) -> tuple[int, int]:
    """Fetch what is left of `urls`, one after the other; several of these run beside each other."""
    count = body_bytes = 0
    for url in urls:
        outcome = await fetch(FetchRequest(url=url, limits=limits), transport=transport)
        if isinstance(outcome, Response):
            body_bytes += len(outcome.body)
            count += outcome.status == 200
    return count, body_bytes


async def measure(question: dict[str, Any]) -> dict[str, float]:
    """Fetch all URLs with so many in flight."""
    settings = Settings()
    limits = default_limits(settings)
    ca_file = Path(question["ca_file"]) if question.get("ca_file") else None
    policy = Policy(allow_networks=(ip_network("127.0.0.0/8"),))
    resolver = Resolver()
    transport = Transport(policy=policy, resolver=resolver, user_agent=settings.user_agent, ca_file=ca_file)
    async with aclosing(resolver), aclosing(transport):
        await fetch_all(transport, iter(question["warm_up"]), limits)
        urls = iter(question["urls"])
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        done = await asyncio.gather(*(fetch_all(transport, urls, limits) for _ in range(question["in_flight"])))
        return {
            "wall_s": time.perf_counter() - wall_s,
            "cpu_s": time.process_time() - cpu_s,
            "count": sum(count for count, _ in done),
            "body_bytes": sum(body_bytes for _, body_bytes in done),
        }


if __name__ == "__main__":
    json.dump(uvloop.run(measure(json.load(sys.stdin))), sys.stdout)  # as a worker does
