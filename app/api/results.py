"""The results of a batch as a stream of JSON lines, a page of jobs in memory at a time.

No transaction is open while bytes move to the client; a body is read when its line is sent, and sent in pieces.
"""

import base64
import json
from collections.abc import AsyncIterator, Iterator
from uuid import UUID

from app.api.schemas import job_view
from app.jobs import reads
from app.jobs.database import Sessions
from app.jobs.reads import Body, Job

PAGE_JOBS = 500
TEXT_PIECE_CHARS = 2**17
BASE64_PIECE_BYTES = 3 * 2**16
"""A multiple of three, so that the pieces' Base64 can be joined."""


async def stream(sessions: Sessions, batch_id: UUID, *, total: int, with_bodies: bool) -> AsyncIterator[bytes]:
    """Write a line for every job of the `total` that is finished when its turn comes, in the order they were given."""
    for start in range(0, total, PAGE_JOBS):
        async with sessions.begin() as session:
            jobs = await reads.list_finished(session, batch_id, start=start, stop=start + PAGE_JOBS)
        if with_bodies:
            async for piece in _lines_with_bodies(sessions, jobs):
                yield piece
        else:
            yield b"".join(_line(job) + b"\n" for job in jobs)


async def _lines_with_bodies(sessions: Sessions, jobs: list[Job]) -> AsyncIterator[bytes]:
    for job in jobs:
        body = await _body(sessions, job)
        yield _line(job)[:-1]
        for piece in _body_members(body):
            yield piece
        yield b"}\n"


async def _body(sessions: Sessions, job: Job) -> Body | None:
    if job.body_sha256 is None:
        return None
    async with sessions.begin() as session:
        body = await reads.get_body(session, job.id)
    return body if isinstance(body, Body) else None


def _line(job: Job) -> bytes:
    return job_view(job).model_dump_json().encode()


def _body_members(body: Body | None) -> Iterator[bytes]:
    """The rest of a line's object: `body_text` where the bytes are UTF-8, else `body_base64`."""
    if body is None:
        yield b',"body_text":null,"body_base64":null'
        return
    text = _text(body.content)
    if text is not None:
        yield b',"body_base64":null,"body_text":"'
        for start in range(0, len(text), TEXT_PIECE_CHARS):
            yield json.dumps(text[start : start + TEXT_PIECE_CHARS])[1:-1].encode()
    else:
        yield b',"body_text":null,"body_base64":"'
        for start in range(0, len(body.content), BASE64_PIECE_BYTES):
            yield base64.b64encode(body.content[start : start + BASE64_PIECE_BYTES])
    yield b'"'


def _text(content: bytes) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None
