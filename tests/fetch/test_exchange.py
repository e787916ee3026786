"""Bytes to head and body: however the network cuts an answer up, the same comes of it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.fetch.exchange import Exchange
from app.fetch.limits import Failed
from tests.fetch.servers import LIMITS

HEAD = b"HTTP/1.1 200 OK\r\nX-A: 1\r\n"
ANSWERS = [
    HEAD + b"Content-Length: 5\r\n\r\nhello",
    HEAD + b"Content-Length: 5\r\n\r\nhello and more",
    HEAD + b"Content-Length: 0\r\n\r\n",
    HEAD + b"\r\nuntil the end",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n1 \r\n!\r\n0\r\nX-T: 1\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"Content-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloXX",
    HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX-A : 1\r\n\r\n",
    b"not http at all",
]


def outcome_of(pieces: list[bytes]) -> object:
    """Feed the pieces and say all that can be seen of the result."""
    exchange = Exchange("GET", LIMITS, sent_at=0.0)
    try:
        for piece in pieces:
            if not exchange.complete:
                exchange.take(piece)
        ended = exchange.end()
    except Failed as failure:
        return failure.code
    if ended is not None:
        return ended.code
    assert exchange.head is not None
    return exchange.head.status, exchange.head.fields, bytes(exchange.body), exchange.wire_bytes, exchange.complete


@given(answer=st.sampled_from(ANSWERS), cuts=st.lists(st.integers(0, 120), max_size=8))
def test_the_way_an_answer_is_cut_up_changes_nothing(answer: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(answer)}), len(answer)]
    pieces = [answer[start:end] for start, end in pairwise(edges)]
    assert outcome_of(pieces) == outcome_of([answer])


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_same_comes_of_single_bytes(answer: bytes) -> None:
    assert outcome_of([answer[index : index + 1] for index in range(len(answer))]) == outcome_of([answer])


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_a_failure(noise: bytes) -> None:
    for start in (b"", b"HTTP/1.1 200 OK\r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\n", HEAD + b"\r\n"):
        outcome_of([start + noise])


@given(
    st.lists(
        st.sampled_from([b"\r\n", b":", b" ", b"\t", b"Content-Length", b"1", b"chunked", b"Transfer-Encoding", b"\0"])
    )
)
def test_no_head_raises_anything_but_a_failure(parts: list[bytes]) -> None:
    outcome_of([b"HTTP/1.1 200 OK\r\n" + b"".join(parts) + b"\r\n\r\n" + b"x"])
