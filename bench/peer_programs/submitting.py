"""Hands URLs to a peer as they come: a JSON list a line on standard input, answered by a line when all are in.

Imports the peer's module by the name its workers use, for tasks are known by it: `submitting.py on_arq`.
"""

import asyncio
import json
import sys
from importlib import import_module


def run(module_name: str) -> None:
    """Submit what is read, until standard input closes."""
    submit = import_module(module_name).submit
    _say("ready")
    for line in sys.stdin:
        submitting = submit(json.loads(line))
        if submitting is not None:
            asyncio.run(submitting)
        _say("submitted")


def _say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    run(sys.argv[1])
