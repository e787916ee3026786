"""The format of the log: one line an event, in UTC, on standard error. Deliberately writes to no file of its own."""

import logging
import time

FORMAT = "%(asctime)sZ %(levelname)-7s %(process)d %(name)s: %(message)s"


def configure(level: str) -> None:
    """Send log lines of at least `level` (a name such as "info") to standard error."""
    formatter = logging.Formatter(FORMAT, datefmt="%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    stream = logging.StreamHandler()
    stream.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [stream]
    root.setLevel(level.upper())
    for chatty in ("asyncio", "alembic", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
