"""Answers that are long to write leave the event loop free meanwhile."""

import asyncio
from collections.abc import Iterator
from itertools import pairwise

import pytest
from pydantic import BaseModel

from app.api.replies import VIEWS_PER_TURN, reply_page


class Page(BaseModel):
    """What a list answers."""

    data: list["Entry"]
    next_cursor: str | None


class Entry(BaseModel):
    """One of a list."""

    number: int


@pytest.mark.parametrize(("count", "cursor"), [(0, None), (1, None), (VIEWS_PER_TURN * 2, "abc")])
async def test_a_page_is_written_as_its_model_would_be(count: int, cursor: str | None) -> None:
    entries = [Entry(number=number) for number in range(count)]
    page = await reply_page(entries, cursor=cursor, headers={"Link": "x"})
    assert page.body == Page(data=entries, next_cursor=cursor).model_dump_json().encode()
    assert (page.headers["Content-Type"], page.headers["Link"]) == ("application/json", "x")


async def test_others_have_turns_while_a_page_is_written() -> None:
    written = 0

    def views() -> Iterator[Entry]:
        nonlocal written
        for written in range(VIEWS_PER_TURN * 5):
            yield Entry(number=written)

    writing = asyncio.create_task(reply_page(views(), cursor=None, headers={}))
    turns = [0]
    while not writing.done():
        await asyncio.sleep(0)
        turns.append(written)
    steps = [after - before for before, after in pairwise(turns)]
    assert max(steps) <= VIEWS_PER_TURN
