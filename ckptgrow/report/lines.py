"""What all reports are made of: rows, sizes in bytes, and lines that stand for several MLPs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

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
    """One line for neighbouring MLPs that read the same."""
    yield from (row("MLPs", line) for line in joined(blocks))


def joined(blocks: Iterable[tuple[str, int, str]]) -> Iterator[str]:
    """`layers.0-17.mlp: text` for neighbouring MLPs, given as (name, layer, text), that read the same."""
    for (stem, text), group in groupby(blocks, key=lambda b: (b[0].replace(f".{b[1]}.", ".{}.", 1), b[2])):
        layers = dict.fromkeys(layer for _, layer, _ in group)  # several in a layer: experts
        yield f"{stem.replace('{}', spelled(layers))}: {text}"
