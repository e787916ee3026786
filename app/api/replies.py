"""The forms an answer takes: JSON of a view, and representations with an ETag that may have been seen before."""

import asyncio
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

from fastapi import Header
from pydantic import BaseModel
from starlette.responses import Response

IfNoneMatch = Annotated[
    str | None,
    Header(alias="If-None-Match", description="An ETag from before: answered with 304 while nothing has changed."),
]

VIEWS_PER_TURN = 100
"""Written at once: of jobs in some 5 ms, in which nothing else runs."""

REVALIDATE = {"Cache-Control": "private, no-cache"}


@dataclass(frozen=True, slots=True)
class Representation:
    """A view as it is sent, and the strong ETag of these bytes."""

    content: bytes
    etag: str

    def is_among(self, etags: str | None) -> bool:
        """Tell whether an If-None-Match names it (weak comparison, RFC 9110, 13.1.2)."""
        given = [etag.strip().removeprefix("W/") for etag in (etags or "").split(",")]
        return self.etag in given or "*" in given


def represent(view: BaseModel) -> Representation:
    """Write a view as JSON, with its ETag."""
    content = view.model_dump_json().encode()
    return Representation(content, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def reply(
    representation: Representation,
    *,
    status: int = 200,
    if_none_match: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Send a representation, or 304 when the client has it."""
    sent = {**REVALIDATE, "ETag": representation.etag, **(headers or {})}
    if representation.is_among(if_none_match):
        return Response(status_code=304, headers=sent)
    return Response(representation.content, status_code=status, headers=sent, media_type="application/json")


def reply_json(view: BaseModel, *, headers: Mapping[str, str] | None = None) -> Response:
    """Send a view that has no ETag."""
    return Response(view.model_dump_json(), headers=headers, media_type="application/json")


async def reply_page(views: Iterable[BaseModel], *, cursor: str | None, headers: Mapping[str, str]) -> Response:
    """Send a page of a list: `data` and `next_cursor`. The event loop has turns while it is written."""
    written = []
    for number, view in enumerate(views, start=1):
        written.append(view.model_dump_json())
        if number % VIEWS_PER_TURN == 0:
            await asyncio.sleep(0)
    content = f'{{"data":[{",".join(written)}],"next_cursor":{json.dumps(cursor)}}}'
    return Response(content, headers=headers, media_type="application/json")
