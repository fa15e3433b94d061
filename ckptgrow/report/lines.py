"""What all reports are made of: rows, sizes in bytes, and lines that stand for several MLPs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from ckptgrow.layers import spelled


def size(nbytes: int) -> str:
    """Bytes in decimal units: 536.2 MB."""
    amount, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.1f} {units[0]}" if units[0] != "B" else f"{nbytes} B"


def row(name: str, text: str) -> str:
    return f"{name:<11} {text}"


def widths(blocks: Iterable[tuple[str, int, str]]) -> Iterator[str]:
    """One line for MLPs that read the same."""
    yield from (row("MLPs", line) for line in joined(blocks))


def joined(blocks: Iterable[tuple[str, int, str]]) -> Iterator[str]:
    """`layers.0-17.mlp: text` for MLPs, given as (name, layer, text), that read the same: neighbouring layers.

    Where a name has more numbers than one, as experts have, they are taken together whatever lies between:
    `layers.0-47.mlp.experts.0, 2: text`.
    """
    entries: list[_Entry] = []
    runs = groupby(blocks, key=lambda b: (_NUMBER.sub("{}", b[0]), b[2]))
    for run, ((stem, text), group) in enumerate(runs):
        several = stem.count("{}") > 1
        for name, _, _ in group:
            numbers = tuple(map(int, _NUMBER.findall(name)))
            entries.append(_Entry(stem, numbers, (), text, 0 if several else run))
    while any(entry.numbers for entry in entries):
        entries = list(_shorter(entries))
    yield from (f"{entry.stem.format(*entry.spans)}: {entry.text}" for entry in entries)


_NUMBER = re.compile(r"(?<=[.\[])\d+(?=[.\]]|$)")


class _Entry(NamedTuple):
    """MLPs whose names are `stem` with `numbers` and then `spans` put in, those of one `run` where runs count."""

    stem: str
    numbers: tuple[int, ...]
    spans: tuple[str, ...]
    text: str
    run: int


def _shorter(entries: Iterable[_Entry]) -> Iterator[_Entry]:
    """The entries with their last numbers as spans."""
    found: dict[_Entry, list[int]] = {}
    for entry in entries:
        found.setdefault(entry._replace(numbers=entry.numbers[:-1]), []).extend(entry.numbers[-1:])
    for entry, last in found.items():
        yield entry._replace(spans=(spelled(dict.fromkeys(last)), *entry.spans)) if last else entry
