"""Reading a JSON object element by element gives what `json.loads` gives, and refuses what is not JSON."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api import json_text
from app.api.json_text import (
    HANDED_OUT,
    VALUE_CHARS_MAX,
    WINDOW_CHARS,
    depth,
    find_unstorable,
    may_be_unstorable,
    read_object,
)
from app.api.problems import Problem

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
WINDOWS = st.sampled_from([10, 40, WINDOW_CHARS])


def read(text: str, *, window_chars: int = WINDOW_CHARS) -> tuple[dict[str, Any], list[Any]]:
    elements: list[Any] = []

    def take(index: int, value: Any) -> None:
        assert index == len(elements)
        elements.append(value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "WINDOW_CHARS", window_chars)
        return read_object(text, lists={"urls": take}), elements


@given(
    members=st.dictionaries(st.text().filter(lambda name: name != "urls"), VALUES, max_size=5),
    urls=st.lists(VALUES, max_size=5),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    window_chars=WINDOWS,
)
def test_it_reads_what_json_loads_reads(
    members: dict[str, Any], urls: list[Any], indent: int | None, ascii_only: bool, window_chars: int
) -> None:
    text = json.dumps({**members, "urls": urls}, indent=indent, ensure_ascii=ascii_only)
    found, elements = read(text, window_chars=window_chars)
    assert found.pop("urls") is HANDED_OUT
    expected = json.loads(text)
    assert elements == expected.pop("urls")
    assert found == expected


@given(text=st.text(alphabet='{}[]":,0123 \\untrueurlsx\n'), window_chars=WINDOWS)
def test_it_accepts_only_what_json_loads_accepts(text: str, window_chars: int) -> None:
    with contextlib.suppress(Problem):
        found, elements = read(text, window_chars=window_chars)
        expected = json.loads(text)
        assert isinstance(expected, dict)
        assert found.keys() == expected.keys()
        assert elements == (expected["urls"] if found.get("urls") is HANDED_OUT else [])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '"urls"',
        '{"urls": ["a"',
        '{"urls": ["a",]}',
        '{"urls": ["a"]} x',
        '{"urls": ["a"], "urls": ["b"]}',
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": 1e999}',
        '{"a": "\n"}',
        '{"a": ' + "9" * 5000 + "}",
        '{"a": ' + "[" * 200_000 + "}",
        '{"urls": ["' + "x" * (VALUE_CHARS_MAX + 1) + '"]}',
        "{" + ",".join(f'"m{number}": 1' for number in range(1000)) + "}",
    ],
)
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(Problem) as refused:
        read(text)
    assert refused.value.kind.code == "invalid_json"


@pytest.mark.parametrize("length", [8 * 2**10 - 2, 8 * 2**10 - 1, 8 * 2**10, 8 * 2**10 + 1, VALUE_CHARS_MAX - 2])
def test_a_value_may_end_at_the_edge_of_a_window(length: int) -> None:
    number = "1" * 100
    members, elements = read('{"urls": ["' + "x" * length + f'", {number}, {number}], "a": {number}}}')
    assert elements == ["x" * length, int(number), int(number)]
    assert members["a"] == int(number)


def test_space_may_be_long() -> None:
    space = " " * (VALUE_CHARS_MAX + 10)
    members, elements = read(f'{space}{{{space}"urls"{space}:{space}[{space}1{space},{space}2{space}]{space}}}{space}')
    assert (elements, members["urls"]) == ([1, 2], HANDED_OUT)


def test_an_escape_is_found_where_two_pieces_meet() -> None:
    for length in range(VALUE_CHARS_MAX - 8, VALUE_CHARS_MAX + 1):
        assert may_be_unstorable(" " * length + r"\u0000")


def test_what_cannot_be_stored_is_found() -> None:
    assert find_unstorable({"a": [{"b": "x\0"}]}) == ("a", 0, "b")
    assert find_unstorable({"a": {"\ud800": 1}}) == ("a",)
    assert find_unstorable({"a": ["\N{GRINNING FACE}", 1, None]}) is None
    assert may_be_unstorable(json.dumps(["\0"]))
    assert may_be_unstorable(json.dumps(["\ud800"]))
    assert not may_be_unstorable(json.dumps(["caf\N{LATIN SMALL LETTER E WITH ACUTE}"]))


def test_depth_counts_lists_and_objects() -> None:
    values: list[Any] = [1, [], {"a": []}, {"a": [{"b": 1}], "c": 2}]
    assert list(map(depth, values)) == [0, 1, 2, 3]
