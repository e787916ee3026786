"""What is wrong in a request: the place, a stable code, and a sentence that says what to change.

Never repeats what a client sent, except the names of its fields.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pydantic_core import ErrorDetails

UNSTORABLE = "NUL characters and halves of surrogate pairs cannot be stored; leave them out."
POINTER_PART_CHARS_MAX = 100

Fields = Mapping[tuple[str | int, ...], Iterable[str]]
"""The names there are, by the place they are at."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong in a request: where (a JSON Pointer), a stable code, and one sentence."""

    pointer: str
    code: str
    detail: str


def faults_of(
    errors: Iterable[ErrorDetails | dict[str, Any]],
    *,
    prefix: tuple[str | int, ...] = (),
    fields: Fields = MappingProxyType({}),
) -> list[Fault]:
    """Turn what pydantic found into faults; its messages name types and bounds, never the input.

    `fields` are for whoever mistook a name.
    """
    return [
        Fault(
            pointer((*prefix, *error["loc"])),
            _FAULT_CODES.get(error["type"], error["type"]),
            _detail(error, known=fields.get(error["loc"][:-1], ())),
        )
        for error in errors
    ]


def pointer(parts: Iterable[str | int]) -> str:
    """Write a JSON Pointer (RFC 6901); names are cut to 100 characters."""
    return "".join("/" + _escape(str(part)) for part in parts)


_FAULT_CODES = {
    "extra_forbidden": "unknown_field",
    "wait_forbidden": "unknown_field",
    "missing": "missing",
    "string_type": "invalid_type",
    "int_type": "invalid_type",
    "int_from_float": "invalid_type",
    "float_type": "invalid_type",
    "bool_type": "invalid_type",
    "list_type": "invalid_type",
    "dict_type": "invalid_type",
    "model_type": "invalid_type",
    "model_attributes_type": "invalid_type",
    "int_parsing": "invalid_type",
    "uuid_parsing": "invalid_type",
    "uuid_type": "invalid_type",
    "enum": "invalid_value",
    "literal_error": "invalid_value",
    "string_pattern_mismatch": "invalid_value",
    "string_unicode": "invalid_text",
    "finite_number": "invalid_value",
    "greater_than_equal": "out_of_range",
    "less_than_equal": "out_of_range",
    "string_too_long": "too_long",
    "too_short": "too_short",
    "too_long": "too_long",
}
"""Pydantic's error types in the API's own words, so that they stay when pydantic changes; others pass as they are."""

_SENTENCES = {
    "wait_forbidden": "There is no such parameter; to wait, send the header Prefer: wait=30.",
    "missing": "It is missing; give it.",
    "repeated": "It is given more than once; give it once.",
    "string_type": "It must be a string, in double quotes.",
    "int_type": "It must be a whole number.",
    "int_from_float": "It must be a whole number.",
    "int_parsing": "It must be a whole number.",
    "float_type": "It must be a number.",
    "bool_type": "It must be true or false.",
    "list_type": "It must be a list.",
    "dict_type": "It must be a JSON object.",
    "model_type": "It must be a JSON object.",
    "model_attributes_type": "It must be a JSON object.",
    "uuid_parsing": "It must be an id as the service gave it, a UUID.",
    "uuid_type": "It must be an id as the service gave it, a UUID.",
    "enum": "It must be {expected}.",
    "literal_error": "It must be {expected}.",
    "string_unicode": UNSTORABLE,
    "finite_number": "It must be a finite number.",
    "greater_than_equal": "It must be at least {ge}.",
    "less_than_equal": "It must be at most {le}.",
    "string_too_long": "It must be at most {max_length} characters long.",
    "too_short": "It must have at least {min_length} entries.",
    "too_long": "It must have at most {max_length} entries.",
}
"""What is said of pydantic's error types; others, our own, say it themselves."""

FORMS = {
    "Idempotency-Key": "It must be 1 to 255 visible ASCII characters without spaces, best a UUID.",
    "cursor": "It must be next_cursor of the page before, unchanged; leave it out for the first page.",
    "custom_id": UNSTORABLE,
    "host": "It must be a host as jobs show it, such as example.com or example.com:8080.",
    "name": UNSTORABLE,
}
"""How parameters are written whose form is a pattern, which pydantic would show."""


def _escape(part: str) -> str:
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in part[:POINTER_PART_CHARS_MAX])
    return printable.replace("~", "~0").replace("/", "~1")


def _detail(error: ErrorDetails | dict[str, Any], *, known: Iterable[str]) -> str:
    name, where = str(error["loc"][-1]) if error["loc"] else "", error["loc"][:1]
    match error["type"]:
        case "extra_forbidden":
            return _unknown(name, sorted(known), what="parameter" if where == ("query",) else "field")
        case "string_pattern_mismatch":
            return FORMS.get(name, "It is not written as it must be; /docs describes it.")
    if sentence := _SENTENCES.get(error["type"]):
        return sentence.format(**error.get("ctx", {}))
    return _sentence(error["msg"])


def _unknown(name: str, known: Sequence[str], *, what: str) -> str:
    if alike := difflib.get_close_matches(name[:POINTER_PART_CHARS_MAX], known, n=2):
        return f"There is no such {what}; did you mean {' or '.join(alike)}?"
    if known:
        return f"There is no such {what}; there {'are' if known[1:] else 'is'} {', '.join(known)}."
    return f"There is no such {what}; leave it out."


def _sentence(message: str) -> str:
    return message[:1].upper() + message[1:] + ("" if message.endswith(".") else ".")
