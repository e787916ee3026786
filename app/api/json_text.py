"""Reads a large JSON object element by element, so that a worker thread never keeps the event loop from running.

`json.loads` holds the interpreter for the whole text (0.3 s for 100,000 jobs); here no single step sees more than
`VALUE_CHARS_MAX` characters. Knows nothing of batches.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from app.api.problems import INVALID_JSON, OBJECT_EXPECTED, Problem

VALUE_CHARS_MAX = 2**20
"""Longest single value: one element of a list that is read element by element, or one other member."""

WINDOW_CHARS = 8 * 2**10
ESCAPE_CHARS = len(r"\u0000")
MEMBERS_MAX = 100

HANDED_OUT = object()

Each = Callable[[int, Any], None]
"""Takes the index and the value of one element."""

_SPACE = re.compile(rf"[ \t\n\r]{{0,{VALUE_CHARS_MAX}}}")
_SIGN = re.compile(r"[ \t\n\r]*([,\]])[ \t\n\r]*")
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_UNSTORABLE_ESCAPE = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")


def read_object(text: str, *, lists: Mapping[str, Each]) -> dict[str, Any]:
    """Return the members of a JSON object, but hand the lists named in `lists`, element by element, to their function.

    The value of a list handed out is `HANDED_OUT`. Raises the problem `invalid_json`.
    """
    members: dict[str, Any] = {}
    at = _skip(text, _expect(text, _skip(text, 0), "{"))
    closed = text[at : at + 1] == "}"
    at += closed
    while not closed:
        name, at = _name(text, at, members)
        each = lists.get(name)
        if each is not None and text[at : at + 1] == "[":
            members[name], at = HANDED_OUT, _read_list(text, at, each)
        else:
            members[name], at = _value(text, at)
        at, closed = _next(text, _skip(text, at), "}")
    if _skip(text, at) != len(text):
        raise _invalid(text, "Something follows the JSON object", at)
    return members


def may_be_unstorable(text: str) -> bool:
    """Tell whether any string in the text could hold what PostgreSQL cannot store; most texts cannot, and are cheap."""
    starts = range(0, len(text), VALUE_CHARS_MAX)
    return any(_UNSTORABLE_ESCAPE.search(text, start, start + VALUE_CHARS_MAX + ESCAPE_CHARS) for start in starts)


def find_unstorable(value: Any, path: tuple[str | int, ...] = ()) -> tuple[str | int, ...] | None:
    """Return the path to the first string or name with a NUL or half of a surrogate pair, None without one."""
    if isinstance(value, str):
        return path if _UNSTORABLE.search(value) else None
    if isinstance(value, dict):
        if any(_UNSTORABLE.search(name) for name in value):
            return path
        inner: Any = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    else:
        return None
    return next((found for key, item in inner if (found := find_unstorable(item, (*path, key))) is not None), None)


def depth(value: Any) -> int:
    """Count how deep lists and objects lie in each other."""
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 0


def _read_list(text: str, at: int, each: Each) -> int:
    at = _skip(text, at + 1)
    closed = text[at : at + 1] == "]"
    at += closed
    indexes = itertools.count()
    while not closed:
        values, at, closed = _elements(text, at)
        for value in values:
            each(next(indexes), value)
    return at


def _elements(text: str, at: int) -> tuple[list[Any], int, bool]:
    """Parse the elements that lie in one window of the text, at least one; say whether the list ends with them."""
    window, end, closed = text[at : at + WINDOW_CHARS], 0, False
    comma = window.rfind("},") + 1 if window.startswith("{") else window.rfind(",")  # probably between two elements
    if values := _all_of(window[: max(0, comma)]):
        return values, _skip(text, at + comma + 1), False
    with suppress(ValueError, RecursionError):  # cut off by the window, or no JSON: tried again below
        while not closed:
            value, value_end = _DECODER.raw_decode(window, end)
            sign = _SIGN.match(window, value_end)
            if sign is None or sign.end() == len(window):
                break
            values.append(value)
            end, closed = sign.end(), sign[1] == "]"
    if values:
        return values, at + end, closed
    value, at = _value(text, at)
    at, closed = _next(text, _skip(text, at), "]")
    return [value], at, closed


def _all_of(elements: str) -> list[Any]:
    """Parse elements at once, in a fifth of the time; none where that fails: cut within one, or behind the list's end.

    Cut there, a text is never JSON: some string, list or object lacks its end, or something follows the list.
    """
    try:
        found: list[Any] = _DECODER.decode(f"[{elements}]")
    except (ValueError, RecursionError):
        return []
    return found


def _name(text: str, at: int, members: Mapping[str, object]) -> tuple[str, int]:
    if text[at : at + 1] != '"':
        raise _invalid(text, "Expected a name in double quotes", at)
    name, end = _value(text, at)
    if name in members or len(members) >= MEMBERS_MAX:
        raise _invalid(text, "The object has a member twice, or too many of them,", at)
    return name, _skip(text, _expect(text, _skip(text, end), ":"))


def _value(text: str, at: int) -> tuple[Any, int]:
    """Parse one value from a window of the text; a value that reaches the window's end may go on behind it."""
    for width in (WINDOW_CHARS, VALUE_CHARS_MAX):
        # One character more, so that a value of exactly this width is seen to end.
        window = text[at : at + width + 1]
        cut = at + len(window) < len(text)
        try:
            value, end = _DECODER.raw_decode(window)
        except RecursionError:
            raise _invalid(text, "Lists and objects lie too deep in each other", at) from None
        except ValueError as error:
            if not cut or (width == VALUE_CHARS_MAX and not _is_cut_off(error, window)):
                raise _no_value(text, error, at) from None
        else:
            if end < len(window) or not cut:
                return value, at + end
    raise _invalid(text, f"A value is longer than {VALUE_CHARS_MAX:,} characters", at)


def _next(text: str, at: int, closing: str) -> tuple[int, bool]:
    if text[at : at + 1] == closing:
        return at + 1, True
    if text[at : at + 1] != ",":
        raise _invalid(text, f"Expected ',' or '{closing}'", at)
    return _skip(text, at + 1), False


def _expect(text: str, at: int, sign: str) -> int:
    if text[at : at + 1] != sign:
        raise _invalid(text, f"Expected '{sign}'", at)
    return at + 1


def _skip(text: str, at: int) -> int:
    while (space := _SPACE.match(text, at)) and space.end() > at:
        at = space.end()
    return at


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError("out of the range of a double")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_cut_off(error: ValueError, window: str) -> bool:
    """Tell whether a value is no JSON only because the window ends within it."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos > len(window) - WINDOW_CHARS


def _no_value(text: str, error: ValueError, at: int) -> Problem:
    if not isinstance(error, json.JSONDecodeError):
        return _invalid(text, "Found NaN, Infinity or a number that is too large, in the value", at)
    return _invalid(text, error.msg.removesuffix(" at").rstrip(": "), at + error.pos)


def _invalid(text: str, what: str, at: int) -> Problem:
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    return Problem(INVALID_JSON, f"{what} at line {line}, column {column}. {OBJECT_EXPECTED}")


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse_constant)
