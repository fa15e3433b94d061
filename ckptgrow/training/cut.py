"""Where one tensor divides into what trains and what is frozen: ranges along one axis, and the acts on them.

In a stack of experts that do not all train alike each run of experts has ranges of its own.

The only arithmetic of training: take the slices, put them together again, and tell by a number whether bits moved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ckptgrow.regions import Division

Span = tuple[int, int]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22
_PRIME, _WORD = 1_000_003, (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Cut:
    """The half-open ranges along an axis that train, in order and apart; the rest of [0, size) is frozen."""

    axis: int
    size: int
    trained: tuple[Span, ...]

    def pieces(self) -> Iterator[tuple[int, int, bool]]:
        """The whole axis in order: start, stop, and whether it trains."""
        place = 0
        for start, stop in self.trained:
            if start > place:
                yield place, start, False
            yield start, stop, True
            place = stop
        if place < self.size:
            yield place, self.size, False

    @property
    def frozen(self) -> tuple[Span, ...]:
        return tuple((start, stop) for start, stop, trains in self.pieces() if not trains)

    @property
    def order(self) -> tuple[tuple[int, bool], ...]:
        """Lengths instead of places: what `interleave` needs."""
        return tuple((stop - start, trains) for start, stop, trains in self.pieces())

    def within(self, start: int, stop: int) -> Cut:
        """The same cut seen from a shard that holds only [start, stop) of the axis."""
        clipped = ((max(a, start) - start, min(b, stop) - start) for a, b in self.trained)
        return Cut(self.axis, stop - start, tuple(span for span in clipped if span[0] < span[1]))

    def shard(self, offset: Sequence[int], shape: Sequence[int]) -> Cut:
        """The same cut seen from the part of the tensor that begins at `offset` and has this shape."""
        return self.within(offset[self.axis], offset[self.axis] + shape[self.axis])

    def frozen_in(self, tensor: Tensor) -> Iterator[Tensor]:
        """Views of all that is frozen."""
        return self.slices(tensor, self.frozen)

    def slices(self, tensor: Tensor, spans: Iterable[Span]) -> Iterator[Tensor]:
        """Views."""
        for start, stop in spans:
            yield tensor.narrow(self.axis, start, stop - start)

    def take(self, tensor: Tensor, spans: Iterable[Span]) -> Tensor:
        """A fresh tensor of these ranges: it shares no memory, which safetensors and optimizers rely on."""
        return torch.cat(list(self.slices(tensor, spans)), self.axis)


@dataclass(frozen=True, slots=True)
class StackCut:
    """The cut of each run [start, stop) of the first dimension, one after the other through all of it."""

    runs: tuple[tuple[Span, Cut], ...]

    def shard(self, offset: Sequence[int], shape: Sequence[int]) -> StackCut:
        """The same seen from the part of the tensor that begins at `offset` and has this shape."""
        low, high = offset[0], offset[0] + shape[0]
        clipped = ((max(a, low) - low, min(b, high) - low, cut.shard(offset, shape)) for (a, b), cut in self.runs)
        return StackCut(tuple(((a, b), cut) for a, b, cut in clipped if a < b))

    def frozen_in(self, tensor: Tensor) -> Iterator[Tensor]:
        """Views of all that is frozen."""
        for (start, stop), cut in self.runs:
            yield from cut.frozen_in(tensor.narrow(0, start, stop - start))


def interleave(frozen: Tensor, trained: Tensor, axis: int, order: tuple[tuple[int, bool], ...]) -> Tensor:
    """The whole tensor again, fresh. Takes plain numbers, so that torch.compile can trace it."""
    if len(order) == 2:
        return torch.cat([trained, frozen] if order[0][1] else [frozen, trained], axis)
    taken, parts = [0, 0], []
    for length, trains in order:
        parts.append((trained if trains else frozen).narrow(axis, taken[trains], length))
        taken[trains] += length
    return torch.cat(parts, axis)


def cut_of(division: Division) -> Cut | StackCut | None:
    """The cut that says the same; None where the whole tensor trains."""
    if division.whole:
        return None
    cuts = [(rows, Cut(division.axis, division.extent, spans)) for rows, spans in division.runs]
    if len(cuts) == 1:
        return cuts[0][1]
    each = math.prod(division.shape[1 : division.axis])
    return StackCut(tuple(((rows.start // each, rows.stop // each), cut) for rows, cut in cuts))


def fingerprint(parts: Iterable[Tensor]) -> int:
    """A number that changes when a bit moves or two elements change places."""
    total = 0
    for part in parts:
        flat = part.detach().contiguous().view(-1)
        for chunk in torch.split(flat.view(_INTEGERS[flat.element_size()]), _CHUNK):
            weights = torch.arange(1, 2 * chunk.numel() + 1, 2, device=chunk.device)
            total = (total * _PRIME + int((chunk.long() * weights).sum())) & _WORD
    return total
