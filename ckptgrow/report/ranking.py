"""How rank reads in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from ckptgrow.layers import spelled
from ckptgrow.ranking import Change, Ranking
from ckptgrow.report.lines import row

_BAR = 32


def ranking(found: Ranking) -> str:
    """What `ckptgrow rank` prints: a line with a bar for each layer, those to grow marked, and what the figures are."""
    return "\n".join(_ranking(found))


def _ranking(found: Ranking) -> Iterator[str]:
    names = list(dict.fromkeys(name for change in found.changes for name in change.projections))
    yield "  ".join(["  layer", *(f"{name:>8}" for name in names), f"{'block':>8}"])
    largest = found.changes[0].block
    for place, change in enumerate(found.changes):
        yield _line(change, names, "*" if place < found.top else " ", round(change.block / largest * _BAR))
    yield row(
        "measure", "relative Frobenius norm of the change; block: all projections together, by which it is sorted"
    )
    yield row("note", "the paper ranks by the size of the weight update and states neither the norm nor the tensors")
    yield from (row("note", note) for note in found.notes)
    chosen = spelled(sorted(found.layers[: found.top])).replace(", ", ",")
    yield f"to grow the {found.top} most changed of {len(found.layers)} layers: --layers {chosen}"


def _line(change: Change, names: list[str], mark: str, bar: int) -> str:
    figures = [f"{change.projections[name]:8.2e}" if name in change.projections else " " * 8 for name in names]
    return "  ".join([f"{mark} {change.layer:>5}", *figures, f"{change.block:8.2e}", "#" * bar]).rstrip()
