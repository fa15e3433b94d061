"""Edits to the text of config.json: the value asked for changes, every other byte stays.

Loading and dumping JSON would rewrite numbers (1e-5 becomes 1e-05), escapes and indentation; a config that ckptgrow
hands on must differ from the base's by exactly the keys it says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from ckptgrow.errors import FormatError
from ckptgrow.plan import Edit

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def set_value(text: str, path: str, value: Any) -> str:
    """The JSON text with the value at the dotted `path` set; a missing last key is added at the end of its object.

    Raises FormatError where the text is not a JSON object or an outer key of the path is missing.
    """
    try:
        if not isinstance(json.loads(text), dict):
            raise FormatError("a JSON object was expected", file="config.json")
    except ValueError as error:
        raise FormatError(f"not valid JSON ({error})", file="config.json") from None
    *outer, key = path.split(".")
    start = _skip(text, 0)
    for name in outer:
        span = _members(text, start).get(name)
        if span is None:
            raise FormatError(f"it has no {name}, which should hold {key}", file="config.json")
        start = span[0]
    members = _members(text, start)
    if key in members:
        first, last = members[key]
        return text[:first] + _dump(value, _indent_at(text, first)) + text[last:]
    return _added(text, start, members, key, value)


def without(text: str, key: str) -> str:
    """The JSON text without that key of the outermost object; the inverse of adding it with `set_value`."""
    start = _skip(text, 0)
    members = _members(text, start)
    if key not in members:
        return text
    last, names = members[key][1], list(members)
    place = names.index(key)
    if place:  # from the end of the member before it
        return text[: members[names[place - 1]][1]] + text[last:]
    after = _skip(text, last)
    return text[: start + 1] + text[after + (text[after] == ",") :]


def edited(text: str, edits: Iterable[Edit]) -> str:
    """The text with the changes of a Plan."""
    for edit in edits:
        text = set_value(text, edit.path, edit.value)
    return text


def _members(text: str, start: int) -> dict[str, tuple[int, int]]:
    """Where each value of the object that begins at `start` lies: {key: (first, last)} in the text."""
    if text[start : start + 1] != "{":
        raise FormatError("a JSON object was expected", file="config.json")
    spans: dict[str, tuple[int, int]] = {}
    position = _skip(text, start + 1)
    while text[position] != "}":
        key, position = _DECODER.raw_decode(text, position)
        position = _skip(text, _skip(text, position) + 1)
        _, end = _DECODER.raw_decode(text, position)
        spans[key] = (position, end)
        position = _skip(text, end)
        if text[position] == ",":
            position = _skip(text, position + 1)
    return spans


def _added(text: str, start: int, members: dict[str, tuple[int, int]], key: str, value: Any) -> str:
    if not members:
        return f"{text[: start + 1]}{json.dumps(key)}: {_dump(value, '')}{text[_skip(text, start + 1) :]}"
    first, last = list(members.values())[-1]
    indent = _indent_at(text, first)
    newline = "\r\n" if "\r\n" in text else "\n"
    separator = newline + indent if "\n" in text[start:first] else " "
    return f"{text[:last]},{separator}{json.dumps(key)}: {_dump(value, indent)}{text[last:]}"


def _dump(value: Any, indent: str) -> str:
    """The value as JSON; the lines of an object after the first are indented to stand under its key."""
    return json.dumps(value, indent=2 if indent else None).replace("\n", "\n" + indent)


def _indent_at(text: str, position: int) -> str:
    """The white space at the beginning of the line."""
    line = text[text.rfind("\n", 0, position) + 1 : position]
    return line[: len(line) - len(line.lstrip())]


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position
