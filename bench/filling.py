"""Fills a service's database with more jobs than one wants to send, by way of bench/fill.py."""

from dataclasses import asdict, dataclass
from pathlib import Path

import programs
from programs import SERVICE_PYTHON
from service import Service


@dataclass(frozen=True)
class Pages:
    """A batch: so many pages of a series, from a first number on, over the origins in turn."""

    origins: list[str]
    series: str
    count: int
    first: int = 0


def fill(service: Service, batches: list[Pages], folder: Path) -> list[str]:
    """Enqueue them, and return their ids; nobody is told: a worker at rest finds them within a quarter of a minute."""
    question = {"database_url": service.database_url, "batches": [asdict(pages) for pages in batches]}
    return list(programs.ask(SERVICE_PYTHON, "fill.py", question, log=folder / "fill.log")["ids"])
