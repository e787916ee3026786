"""Content codings: every coding there and back, in any slices, and everything that can be wrong with one."""

import asyncio
import gzip
import random
import zlib
from collections.abc import Callable

import brotli
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from app.fetch import decoding
from app.fetch.decoding import SMALL_BYTES, TRAILING_JUNK, Decoded, Decoders, codings, decode
from app.fetch.limits import Failed
from app.outcome import FailureCode


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstd.compress,
}
CODINGS = sorted(ENCODERS)


async def decoded(wire: bytes, *applied: str, body_bytes_max: int = 10**9) -> Decoded:
    return await decode(wire, applied, body_bytes_max=body_bytes_max, decoders=Decoders(1))


async def refusal(wire: bytes, *applied: str, body_bytes_max: int = 10**9) -> FailureCode:
    with pytest.raises(Failed) as caught:
        await decoded(wire, *applied, body_bytes_max=body_bytes_max)
    return caught.value.code


def sample(size: int) -> bytes:
    """Something that compresses by half, so that wire and body both span many steps."""
    numbers = random.Random(size)
    return bytes(numbers.randrange(16) for _ in range(min(size, 2**18))) * (size // 2**18 or 1)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("size", [0, 1, 1000, SMALL_BYTES, SMALL_BYTES + 1, 2**21])
async def test_a_body_comes_back_whatever_its_size(coding: str, size: int) -> None:
    body = sample(size)[:size]
    assert await decoded(ENCODERS[coding](body), coding) == Decoded(body)


@given(body=st.binary(max_size=2000), applied=st.lists(st.sampled_from(CODINGS), max_size=3))
def test_stacked_codings_are_undone_last_first(body: bytes, applied: list[str]) -> None:
    wire = body
    for coding in applied:
        wire = ENCODERS[coding](wire)
    assert asyncio.run(decoded(wire, *applied)).body == body


async def test_raw_deflate_is_taken_for_deflate() -> None:
    assert (await decoded(raw_deflate(b"hello" * 100), "deflate")).body == b"hello" * 100


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("size", [1000, 2**20])
async def test_a_body_cut_anywhere_is_truncated(coding: str, size: int) -> None:
    wire = ENCODERS[coding](sample(size)[:size])
    for kept in {1, 2, 5, len(wire) // 2, len(wire) - 1}:
        assert await refusal(wire[:kept], coding) is FailureCode.BODY_TRUNCATED, kept


@pytest.mark.parametrize("coding", CODINGS)
async def test_plain_text_is_no_compressed_data(coding: str) -> None:
    assert await refusal(b"this is plain text, of some length", coding) is FailureCode.DECODE_ERROR


@pytest.mark.parametrize("coding", CODINGS)
async def test_an_empty_body_needs_no_decoding(coding: str) -> None:
    assert await decoded(b"", coding) == Decoded(b"")


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
async def test_every_member_is_decoded(coding: str) -> None:
    wire = b"".join(ENCODERS[coding](part) for part in (b"one ", b"", b"two ", sample(2**20)))
    assert (await decoded(wire, coding)).body == b"one two " + sample(2**20)


@pytest.mark.parametrize("coding", ["gzip", "zstd", "deflate"])
@pytest.mark.parametrize("size", [5, 2**20])
async def test_junk_after_the_end_is_flagged(coding: str, size: int) -> None:
    body = sample(size)[:size]
    assert await decoded(ENCODERS[coding](body) + b"junk", coding) == Decoded(body, (TRAILING_JUNK,))


async def test_junk_after_br_is_a_decode_error() -> None:
    assert await refusal(brotli.compress(b"hello") + b"junk", "br") is FailureCode.DECODE_ERROR


async def test_a_broken_second_member_is_not_dropped() -> None:
    second = gzip.compress(b"second")
    assert await refusal(gzip.compress(b"first") + second[:-4], "gzip") is FailureCode.BODY_TRUNCATED
    assert await refusal(gzip.compress(b"first") + second[:-4] + b"oops", "gzip") is FailureCode.DECODE_ERROR


@pytest.mark.parametrize("coding", CODINGS)
async def test_a_body_of_exactly_the_limit_passes(coding: str) -> None:
    for size in (1000, 2**20):
        wire = ENCODERS[coding](bytes(size))
        assert len((await decoded(wire, coding, body_bytes_max=size)).body) == size
        assert await refusal(wire, coding, body_bytes_max=size - 1) is FailureCode.DECOMPRESSED_TOO_LARGE


@pytest.mark.parametrize("coding", CODINGS)
async def test_the_limit_holds_for_every_layer(coding: str) -> None:
    inner = gzip.compress(b"x" * 10)
    padded = inner + bytes(2**20)  # decodes to ten bytes, by way of a million
    outcome = await refusal(ENCODERS[coding](padded), "gzip", coding, body_bytes_max=2**19)
    assert outcome is FailureCode.DECOMPRESSED_TOO_LARGE


async def test_a_zstd_window_beyond_8_mib_is_refused() -> None:
    packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 25})
    wire = packer.compress(bytes(2**25)) + packer.flush()
    assert await refusal(wire, "zstd") is FailureCode.DECODE_ERROR


def test_a_body_of_many_steps_is_not_decoded_at_once_though_it_is_small() -> None:
    wire = gzip.compress(b"") * 6_000
    assert len(wire) < SMALL_BYTES
    assert decoding._decode_small(wire, ("gzip",), 10**9) is None


async def test_many_empty_members_do_not_hold_the_loop() -> None:
    wire = gzip.compress(b"") * 200_000
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    beside = asyncio.create_task(take_turns())
    assert await decoded(wire, "gzip") == Decoded(b"")
    beside.cancel()
    assert turns >= 20  # in one go it would be one or two


async def test_no_more_large_bodies_are_decoded_at_once_than_there_are_decoders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = most = 0
    original = decoding._pieces

    def counting(wire: bytes, *args: object, **kwargs: object) -> object:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            yield from original(wire, *args, **kwargs)  # type: ignore[arg-type]
        finally:
            running -= 1

    monkeypatch.setattr(decoding, "_pieces", counting)
    wire = gzip.compress(bytes(2**23))
    decoders = Decoders(2)
    bodies = await asyncio.gather(
        *(decode(wire, ("gzip",), body_bytes_max=2**24, decoders=decoders) for _ in range(10))
    )
    assert {len(each.body) for each in bodies} == {2**23}
    assert most <= 3  # two large ones and the first, short look at another


async def test_a_cancelled_body_gives_its_place_back() -> None:
    decoders = Decoders(1)
    wire = gzip.compress(bytes(2**25))
    for _ in range(3):
        task = asyncio.create_task(decode(wire, ("gzip",), body_bytes_max=2**26, decoders=decoders))
        for _ in range(4):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    async with asyncio.timeout(5):
        assert len((await decode(wire, ("gzip",), body_bytes_max=2**26, decoders=decoders)).body) == 2**25


def test_codings_are_listed_in_the_order_they_were_applied() -> None:
    assert codings(["GZIP , br", "x-gzip", "identity", ""], encodings_max=3) == ("gzip", "br", "gzip")


@pytest.mark.parametrize(
    ("values", "code"),
    [
        (["gzip, gzip, gzip, gzip"], "too_many_encodings"),
        (["compress"], "content_encoding_not_supported"),
        (["gzip, foo"], "content_encoding_not_supported"),
        (["gzip;q=1"], "content_encoding_not_supported"),
    ],
)
def test_codings_that_are_not_ours_are_refused(values: list[str], code: str) -> None:
    with pytest.raises(Failed) as caught:
        codings(values, encodings_max=3)
    assert caught.value.code == code
