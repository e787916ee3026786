"""The bare aiohttp loop: what a user would write who wants speed and keeps nothing.

Reads `{urls, warm_up, in_flight, ca_file}` as JSON from standard input, writes what it took to standard output. The
time before the first URL (imports, the TLS context) and a few pages to warm up are not counted.
"""

import asyncio
import json
import ssl
import sys
import time
from collections.abc import Iterator
from typing import Any

import aiohttp


async def fetch_all(session: aiohttp.ClientSession, urls: Iterator[str]) -> tuple[int, int]:
    """Fetch what is left of `urls`, one after the other; several of these run beside each other."""
    count = body_bytes = 0
    for url in urls:
        async with session.get(url) as response:
            body_bytes += len(await response.read())
            count += response.status == 200
    return count, body_bytes


async def measure(question: dict[str, Any]) -> dict[str, float]:
    """Fetch all URLs with so many in flight."""
    in_flight = question["in_flight"]
    context = ssl.create_default_context(cafile=question["ca_file"]) if question.get("ca_file") else True
    connector = aiohttp.TCPConnector(limit=in_flight, ssl=context)
    async with aiohttp.ClientSession(connector=connector) as session:
        await fetch_all(session, iter(question["warm_up"]))
        urls = iter(question["urls"])
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        done = await asyncio.gather(*(fetch_all(session, urls) for _ in range(in_flight)))
        return {
            "wall_s": time.perf_counter() - wall_s,
            "cpu_s": time.process_time() - cpu_s,
            "count": sum(count for count, _ in done),
            "body_bytes": sum(body_bytes for _, body_bytes in done),
        }


if __name__ == "__main__":
    json.dump(asyncio.run(measure(json.load(sys.stdin))), sys.stdout)
