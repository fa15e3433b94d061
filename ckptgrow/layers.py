"""Which layers and experts grow: the words of `--layers` and `--experts`, and the rankings of `ckptgrow rank`.

3-11,20         numbers and ranges, both ends included, counted from 0
@ranking.json   {"layers": [best first, ...], "top": N}: its first `top` layers, all without `top`; or a bare list
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from typing import Any

from ckptgrow.errors import FormatError, RequestError

_SPAN = re.compile(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", re.ASCII)
_HINT = "Write numbers and ranges, such as 3-11,20, or @ranking.json."


def chosen(asked: str | Iterable[int]) -> tuple[int, ...]:
    """The layers that words or numbers name, ascending. Raises RequestError where they name none."""
    found = _read(asked, "layer") if isinstance(asked, str) else list(asked)
    if not all(map(_is_layer, found)):
        raise RequestError(f"layers {found!r}: give whole numbers from 0 up")
    if not found:
        raise RequestError("--layers names no layer", hint=_HINT)
    return tuple(sorted(set(found)))


def listed(asked: str) -> tuple[int, ...] | None:
    """The experts that the words of `--experts` name, ascending; None for `all` and `shared`. Raises RequestError."""
    if asked in ("all", "shared"):
        return None
    found = _read(asked, "expert", "Give all, shared, or numbers and ranges such as 0,4-7.")
    if not found:
        raise RequestError("--experts names no expert", hint="Give all, shared, or numbers and ranges such as 0,4-7.")
    return tuple(sorted(set(found)))


def spelled(layers: Iterable[int]) -> str:
    """Ascending layers in the words of `--layers`: 3-7, 12."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and spans[-1][-1] + 1 == layer:
            spans[-1][1:] = [layer]
        else:
            spans.append([layer])
    return ", ".join("-".join(map(str, span)) for span in spans)


def named(layers: Collection[int], what: str = "layer") -> str:
    """Ascending layers (or experts) as they are spoken of: layer 12, layers 3-7, 12."""
    return f"{what}{'s' if len(layers) > 1 else ''} {spelled(layers)}"


def ranked(text: bytes, file: str) -> tuple[int, ...]:
    """The layers that a ranking chooses, best first. Raises FormatError where it is none."""
    try:
        read = json.loads(text)
    except ValueError as error:
        raise FormatError(f"not valid JSON ({error})", file=file) from None
    ranking: Any = read if isinstance(read, dict) else {"layers": read}
    layers, top = ranking.get("layers"), ranking.get("top")
    if not isinstance(layers, list) or not all(map(_is_layer, layers)) or len(set(layers)) != len(layers):
        raise FormatError("it holds no ranking: `layers`, a list of different layers, best first", file=file)
    if top is not None and (type(top) is not int or not 1 <= top <= len(layers)):
        raise FormatError(f"`top` is {top!r}, and it ranks {len(layers)} layers", file=file)
    return tuple(layers[:top])


def _read(text: str, what: str, hint: str = _HINT) -> list[int]:
    layers: list[int] = []
    for word in text.split(",") if text.strip() else ():
        match = _SPAN.fullmatch(word)
        if match is None:
            article = "an" if what == "expert" else "a"
            raise RequestError(f"--{what}s {text}: {word!r} is neither {article} {what} nor a range", hint=hint)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise RequestError(f"--{what}s {text}: {word.strip()} runs backwards", hint=hint)
        layers += range(first, last + 1)
    return layers


def _is_layer(value: Any) -> bool:
    return type(value) is int and value >= 0
