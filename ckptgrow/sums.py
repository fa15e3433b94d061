"""What rounding the sums of a Plan will cost, known before a byte is written: how many weights, and how far.

The sums are made as the executor makes them, in float64, and what float64 itself had to round is kept apart, so that
"not rounded" means: the number written is the sum in real arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ckptgrow.execute import Piece, Sources, blocks
from ckptgrow.numeric import FLOATS, added, decode, rounded
from ckptgrow.plan import Output, Part, Plan
from ckptgrow.progress import Meter, Progress


@dataclass(frozen=True, slots=True)
class Rounding:
    """Weights that are sums, those that are rounded (or too large for their dtype), the largest relative error."""

    sums: int = 0
    rounded: int = 0
    largest: float = 0.0
    too_large: int = 0

    def __add__(self, other: Rounding) -> Rounding:
        largest, too_large = max(self.largest, other.largest), self.too_large + other.too_large
        return Rounding(self.sums + other.sums, self.rounded + other.rounded, largest, too_large)


def is_sum(part: Part) -> bool:
    """Whether the part's weights are computed, and not a source's bytes or zeros."""
    return len(part.terms) > 1 or any(term.scale != 1.0 for term in part.terms)


def costs(plan: Plan, sources: Sources, report: Progress) -> dict[str, Rounding]:
    """What is rounded in each output of a Plan that has sums."""
    summed = [output for output in plan.outputs if any(is_sum(part) for part in output.parts)]
    meter = Meter(report, "adding up", sum(output.info.nbytes for output in summed))
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = pool.map(lambda output: roundings(output, sources, meter), summed)
        return {output.name: cost for output, cost in zip(summed, found, strict=True)}


def roundings(
    output: Output, sources: Sources, progress: Callable[[int], None], wanted: Callable[[Part], bool] = is_sum
) -> Rounding:
    """What is rounded in one output, in all its sums or in those `wanted`."""
    found = Rounding()
    for block in blocks(output):
        for start, part in output.placed():
            low, high = max(start, block.start), min(start + part.size, block.stop)
            if low < high and wanted(part) and part.rows(block.rows):
                found += _rounding(output, part, part.rows(block.rows), slice(low - start, high - start), sources)
    progress(output.info.nbytes)
    return found


def _rounding(output: Output, part: Part, rows: range, picked: slice, sources: Sources) -> Rounding:
    pieces = (Piece(term, rows, picked, output.axis, sources[term.source]) for term in part.terms)
    total, lost = added(decode(piece.shared(), piece.dtype) * piece.scale for piece in pieces)
    nearest = rounded(total, output.dtype)
    beyond = ~(np.abs(nearest) <= FLOATS[output.dtype].largest)
    wrong = (nearest != total) | (lost != 0) | beyond
    error = np.abs((nearest - total) - lost)[wrong] / np.maximum(np.abs(total[wrong]), np.finfo(float).tiny)
    largest = float(error.max(initial=0.0))
    return Rounding(total.size, int(np.count_nonzero(wrong)), largest, int(np.count_nonzero(beyond)))
