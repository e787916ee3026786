"""The results of a batch as a stream of JSON lines, a page of jobs and some megabytes of bodies in memory at a time.

With headers, where these are asked for, a page has what its servers sent: some KiB a job, `header_bytes_max` at most.

No transaction is open while bytes move to the client, and the event loop has a turn after each chunk.
"""

import asyncio
import base64
import logging
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from uuid import UUID

from msgspec import json
from starlette.responses import StreamingResponse
from starlette.types import Send

from app.api.schemas import job_view
from app.jobs import reads
from app.jobs.database import Sessions
from app.jobs.reads import Job

PAGE_JOBS = 200
"""Read in some 0.01 s, in two turns of the event loop."""
GROUP_BYTES_MAX = 4 * 2**20
"""Of bodies that are read at once; a larger one is read alone."""
CHUNK_BYTES = 2**18
TEXT_PIECE_CHARS = 2**17
BASE64_PIECE_BYTES = 3 * 2**16
"""A multiple of three, so that the pieces' Base64 can be joined."""


logger = logging.getLogger(__name__)


class Lines(StreamingResponse):
    """A stream that lets go of what it has in memory when its client goes.

    Left alone it is kept, by the traceback of the request's end, until garbage is collected: 34 MB for a large body.
    """

    async def stream_response(self, send: Send) -> None:
        """Send it all, to whoever is still there; without an end, which cuts the connection, when the batch is gone."""
        lines = self.body_iterator
        assert isinstance(lines, AsyncGenerator)
        async with aclosing(lines):
            try:
                await super().stream_response(send)
            except reads.BatchGone:
                logger.warning("Results are broken off: their batch was deleted")


async def stream(
    sessions: Sessions,
    batch_id: UUID,
    *,
    total: int,
    after: int = -1,
    status: str | None = None,
    with_headers: bool = False,
    with_bodies: bool = False,
) -> AsyncGenerator[bytes]:
    """Write a line for every job of the `total` that is finished when its turn comes, in the order they were given.

    Begins behind the position `after`.
    Raises `BatchGone`, so that the client of a batch that is deleted meanwhile sees that this is not all.
    """
    for start in range(after + 1, total, PAGE_JOBS):
        async with sessions.begin() as session:
            jobs = await reads.list_finished(
                session, batch_id, start=start, stop=start + PAGE_JOBS, status=status, with_headers=with_headers
            )
        for group in _groups(jobs) if with_bodies else [jobs]:
            bodies = await _bodies(sessions, group) if with_bodies else None
            with closing(_lines(group, bodies, with_headers=with_headers)) as pieces:
                while chunk := _next_chunk(pieces):
                    yield chunk
                    await asyncio.sleep(0)
    async with sessions.begin() as session:
        if await reads.get_batch(session, batch_id) is None:
            raise reads.BatchGone


def _groups(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Part jobs into those whose bodies are read at once."""
    group: list[Job] = []
    size = 0
    for job in jobs:
        size += job.body_bytes or 0
        if group and size > GROUP_BYTES_MAX:
            yield group
            group, size = [], job.body_bytes or 0
        group.append(job)
    if group:
        yield group


async def _bodies(sessions: Sessions, jobs: Sequence[Job]) -> dict[UUID, bytes]:
    async with sessions.begin() as session:
        return await reads.list_bodies(session, jobs)


def _next_chunk(pieces: Iterator[bytes]) -> bytes:
    """Take about `CHUNK_BYTES`; nothing at the end."""
    taken, size = [], 0
    for piece in pieces:
        taken.append(piece)
        size += len(piece)
        if size >= CHUNK_BYTES:
            break
    return b"".join(taken)


def _lines(jobs: Sequence[Job], bodies: Mapping[UUID, bytes] | None, *, with_headers: bool) -> Generator[bytes]:
    """Make the lines, in pieces; with the bodies where these are given."""
    for job in jobs:
        yield _in_one_line(job_view(job).model_dump_json().encode())[:-1]
        if with_headers:
            yield b',"response_headers":' + _in_one_line(json.encode(job.headers))
        if bodies is not None:
            yield from _body_members(bodies[job.id] if job.body_sha256 else None)
        yield b"}\n"


def _body_members(content: bytes | None) -> Iterator[bytes]:
    """The rest of a line's object: `body_text` where the bytes are UTF-8, else `body_base64`."""
    if content is None:
        yield b',"body_text":null,"body_base64":null'
        return
    text = _text(content)
    if text is not None:
        yield b',"body_base64":null,"body_text":"'
        for start in range(0, len(text), TEXT_PIECE_CHARS):
            yield _in_one_line(json.encode(text[start : start + TEXT_PIECE_CHARS])[1:-1])
    else:
        yield b',"body_text":null,"body_base64":"'
        for start in range(0, len(content), BASE64_PIECE_BYTES):
            yield base64.b64encode(content[start : start + BASE64_PIECE_BYTES])
    yield b'"'


def _in_one_line(written: bytes) -> bytes:
    """Escape what many readers of lines, unlike JSON, take for a line's end: U+0085, U+2028 and U+2029."""
    if written.isascii():
        return written
    written = written.replace(b"\xc2\x85", rb"\u0085")
    return written.replace(b"\xe2\x80\xa8", rb"\u2028").replace(b"\xe2\x80\xa9", rb"\u2029")


def _text(content: bytes) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None
