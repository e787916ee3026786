"""A PostgreSQL with the binaries and settings of the service's own, for those measured beside it.

Runs in the service's Python, over the folder named; says its URL, and runs until standard input closes.
"""

import asyncio
import sys
from pathlib import Path

from app.jobs import embedded


async def serve(data_dir: Path) -> None:
    """Run it and say where."""
    async with embedded.running(data_dir) as url:
        sys.stdout.write(f"{url}\n")
        sys.stdout.flush()
        closed = asyncio.Event()
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), closed.set)
        await closed.wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
