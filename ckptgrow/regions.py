"""Which elements of one tensor train: boxes read as ranges along one axis, of all slices before it or of runs of them.

A tensor is seen as [outer, along, inner]: the slices before the axis, the axis, and what lies behind it. In a stack of
experts that do not all train alike the slices come in runs, each a whole number of experts, with ranges of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from ckptgrow.errors import FormatError
from ckptgrow.plan import Output
from ckptgrow.policy import Box

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Region:
    """Of the slices `rows` the places [start, stop) along the axis."""

    rows: range
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Division:
    """What of one tensor trains: for each run of slices the ranges along the axis; the runs make up all slices."""

    shape: tuple[int, ...]
    axis: int
    runs: tuple[tuple[range, Spans], ...]

    @property
    def extent(self) -> int:
        """The length along the axis."""
        return self.shape[self.axis] if self.shape else 1

    @property
    def inner(self) -> int:
        return math.prod(self.shape[self.axis + 1 :])

    @property
    def uniform(self) -> Spans | None:
        """The ranges along the axis, where they are the same in all slices."""
        return self.runs[0][1] if len(self.runs) == 1 else None

    @property
    def whole(self) -> bool:
        """Whether all of it trains."""
        return self.uniform == ((0, self.extent),)

    @property
    def edges(self) -> tuple[int, ...]:
        """The slices with which another run begins."""
        return tuple(rows.start for rows, _ in self.runs)

    @property
    def trained(self) -> tuple[Region, ...]:
        return tuple(Region(rows, *span) for rows, spans in self.runs for span in spans)

    @property
    def frozen(self) -> tuple[Region, ...]:
        return tuple(Region(rows, *span) for rows, spans in self.runs for span in between(spans, self.extent))

    def elements(self, regions: tuple[Region, ...]) -> int:
        """How many elements these regions have."""
        return self.inner * sum(len(region.rows) * (region.stop - region.start) for region in regions)

    def at(self, row: int) -> Spans:
        """The ranges of one slice."""
        return next((spans for rows, spans in self.runs if row in rows), ())

    def sections(self, output: Output) -> Iterator[tuple[range | None, Output, Spans]]:
        """The sections of an output of this shape and axis, each with the ranges of it that train."""
        for rows, section in output.sections(self.edges):
            yield rows, section, self.at(rows.start if rows is not None else 0)


def between(spans: Spans, extent: int) -> Iterator[tuple[int, int]]:
    """The ranges of [0, extent) that are not in these."""
    edges = [0, *(edge for span in spans for edge in span), extent]
    yield from ((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)


def undivided(shape: tuple[int, ...], axis: int = 0) -> Division:
    """A tensor of which nothing trains."""
    return Division(shape, axis, ((range(math.prod(shape[:axis])), ()),))


def divided(shape: tuple[int, ...], boxes: tuple[Box, ...], axis: int = 0) -> Division:
    """Boxes read back, the inverse of policy.boxes: along `axis` where they may be ranges of several axes.

    Raises FormatError for boxes that overlap, are empty, leave the tensor or lie along two axes behind the first.
    """
    partial = {i for box in boxes for i, span in enumerate(box) if span != (0, shape[i])}
    inside = all(0 <= start < stop <= shape[i] for box in boxes for i, (start, stop) in enumerate(box))
    along = max(partial, default=0) or axis
    if len(partial - {0}) > 1 or not inside:
        raise FormatError(f"boxes {boxes} are not ranges along one axis of {shape}")
    runs: list[tuple[range, Spans]] = []
    each = math.prod(shape[1:along])
    ends = sorted({0, shape[0], *(edge for box in boxes for edge in box[0])}) if along else [0, 1]
    for first, last in pairwise(ends):
        spans = tuple(sorted(box[along] for box in boxes if not along or box[0][0] <= first < box[0][1]))
        flat = [edge for span in spans for edge in span]
        if flat != sorted(flat):
            raise FormatError(f"boxes {boxes} of {shape} overlap")
        if runs and runs[-1][1] == spans:
            runs[-1] = range(runs[-1][0].start, last * each), spans
        else:
            runs.append((range(first * each, last * each), spans))
    return Division(shape, along, tuple(runs))


def boxed(division: Division) -> tuple[Box, ...]:
    """The boxes of what trains, as `divided` reads them."""
    each = math.prod(division.shape[1 : division.axis])
    found = []
    for region in division.trained:
        box = [(0, size) for size in division.shape]
        box[0] = (region.rows.start // each, region.rows.stop // each)
        box[division.axis] = (region.start, region.stop)
        found.append(tuple(box))
    return tuple(found)
