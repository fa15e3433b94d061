"""Which units of two checkpoints, or of one, are equal: rows are found by digest and then compared bit for bit.

Everything streams over mapped files in small blocks. A tensor of an MLP is seen as [outer, units, inner], whatever its
axis; a lane is one projection of a fused one. Where scales stand for blocks of units, a block is taken as one unit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptgrow.checkpoint import Bits, Tensors
from ckptgrow.families import Mlp, Slot
from ckptgrow.numeric import decode

Digests = NDArray[Any]
Units = NDArray[np.int64]
Picked = slice | Units

BLOCK_BYTES = 1 << 20
BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True)
class Rows:
    """One lane of a gate, up or bias in both checkpoints, seen as [outer, units, inner]."""

    name: str
    base: Bits
    grown: Bits

    def apart(self, unit: int, original: int, dtype: str) -> float:
        """The largest difference of an element of a new unit's row from that base unit's."""
        its, mine = (
            decode(np.ascontiguousarray(bits), dtype) for bits in (self.grown[:, unit], self.base[:, original])
        )
        return float(np.abs(its - mine).max())


def lanes(
    base: Tensors, grown: Tensors, name: str, slot: Slot, grain: int = 1, expert: int | None = None
) -> Iterator[Rows]:
    """The lanes of one tensor in both checkpoints; of one expert, where several share it."""
    both = (lanes_of(checkpoint, name, slot, grain, expert) for checkpoint in (base, grown))
    for (_, mine), (_, its) in zip(*both, strict=True):
        yield Rows(name, mine, its)


def lanes_of(
    checkpoint: Tensors, name: str, slot: Slot, grain: int = 1, expert: int | None = None
) -> Iterator[tuple[str, Bits]]:
    """Each lane of a tensor, by its projection, as [outer, units, inner]."""
    bits = as_units(checkpoint, name, slot, grain, expert)
    own = slot.lanes[:1] if slot.flat and expert is not None else slot.lanes
    for i, lane in enumerate(own):
        yield lane, _lane(bits, i, len(own))


def projections(checkpoint: Tensors, mlp: Mlp, expert: int | None = None) -> Iterator[tuple[str, str, Bits]]:
    """(tensor, role, [outer, units, inner]) of every projection of an MLP or of one of its experts.

    Interleaved projections come apart, unless scales take several units as one. The bytes of a coded tensor have the
    role "code".
    """
    for name, slot in mlp.tensors.items():
        for role, bits in lanes_of(checkpoint, name, slot, mlp.grain, expert):
            if slot.coded or slot.span == 1 or mlp.grain > 1:
                yield name, "code" if slot.coded else role, bits
                continue
            inner = bits.shape[2] // slot.span
            for i, one in enumerate(role.split("_")):
                yield name, one, bits[:, :, i * inner : (i + 1) * inner]


def _lane(bits: Bits, i: int, count: int) -> Bits:
    width = bits.shape[1] // count
    return bits[:, i * width : (i + 1) * width]


def as_units(checkpoint: Tensors, name: str, slot: Slot, grain: int = 1, expert: int | None = None) -> Bits:
    """A tensor as [outer, units, inner]: units of all lanes, `grain` of them taken as one.

    Without `expert`, stacked experts are in outer, and flat ones are lanes. Interleaved places lie in inner.
    """
    info = checkpoint.infos[name]
    outer, extent, inner = info.around(slot.axis)
    places = int(slot.places * grain)
    bits = checkpoint.bits(name).reshape(outer, extent // places, places * inner)
    if expert is None:
        return bits
    if slot.flat:
        return _lane(bits, expert, len(slot.lanes))
    each = outer // info.shape[0]
    return bits[expert * each : (expert + 1) * each] if slot.stacked else bits


def side_by_side(one: Bits, other: Bits) -> Iterator[tuple[Bits, Bits]]:
    """The same elements of two tensors of one shape [outer, units, inner], some at a time."""
    yield from ((one[cut], other[cut]) for cut in cuts(one.shape))


def cuts(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """A tensor [outer, units, inner] in pieces of a bounded number of elements."""
    outer, units, inner = shape
    places = max(1, min(units, BLOCK_ELEMENTS // max(1, inner)))
    rows = max(1, BLOCK_ELEMENTS // max(1, inner * places))
    for row in range(0, outer, rows):
        for start in range(0, units, places):
            yield slice(row, row + rows), slice(start, start + places)


def match(rows: list[Rows], digests: Callable[[Bits], Digests]) -> tuple[Units, Units]:
    """For each new unit the first base unit with the same digests, or -1; the same for the base's own units."""
    width = rows[0].base.shape[1]
    earliest = firsts([np.concatenate([digests(lane.base), digests(lane.grown)]) for lane in rows])
    return np.where(earliest[width:] < width, earliest[width:], -1), earliest[:width]


def firsts(digests: list[Digests]) -> Units:
    """For each unit the first one with the same digest in every lane."""
    together = np.zeros(len(digests[0]), np.uint64)
    for lane in digests:  # an odd factor between tensors, so that equal digests of gate and up do not cancel
        together *= np.uint64(0x9E3779B97F4A7C15)
        together += lane
    _, first, classes = np.unique(together, return_index=True, return_inverse=True)
    return first[classes].astype(np.int64)


def alike(stacks: list[Bits]) -> Units:
    """For each unit of one checkpoint the first one whose bits are the same in every stack, itself if there is none.

    Every equality that a digest claims is checked on the bits; a unit that a digest confused stands alone.
    """
    found = firsts([fast_digests(bits) for bits in stacks])
    if any(_unlike(bits, found).any() for bits in stacks):
        found = firsts([slow_digests(bits) for bits in stacks])
        wrong = np.logical_or.reduce([_unlike(bits, found) for bits in stacks])
        found = np.where(wrong, np.arange(len(found)), found)
    return found


def _unlike(bits: Bits, found: Units) -> NDArray[np.bool_]:
    """Which units differ from the one that is said to be like them."""
    wrong = np.zeros(len(found), bool)
    doubles = np.flatnonzero(found != np.arange(len(found)))
    for some in stretches(bits, doubles):
        wrong[some] = (bits[:, span(some)] != bits[:, span(found[some])]).any(axis=(0, 2))
    return wrong


def stretches(bits: Bits, units: Units) -> Iterator[Units]:
    """These units, as many at a time as fill a block."""
    outer, _, inner = bits.shape
    step = max(1, BLOCK_BYTES // max(1, outer * inner * bits.itemsize))
    yield from (units[i : i + step] for i in range(0, len(units), step))


def largest_magnitudes(bits: Bits, initial: int = 0) -> NDArray[np.unsignedinteger[Any]]:
    """The largest bit pattern of each unit with the sign shifted out: 0 where all is zero, and magnitudes in order."""
    outer, units, inner = bits.shape
    found = np.full(units, initial, bits.dtype)
    step = max(1, BLOCK_BYTES // max(1, units * inner * bits.itemsize))
    one = bits.dtype.type(1)
    for i in range(0, outer, step):
        if outer == 1:  # rows: a stretch of units at a time
            for some in stretches(bits, np.arange(units)):
                found[span(some)] = np.left_shift(bits[0, span(some)], one).max(axis=-1, initial=initial)
        else:
            np.maximum(found, np.left_shift(bits[i : i + step], one).max(axis=(0, 2), initial=initial), out=found)
    return found


def fast_digests(bits: Bits) -> Digests:
    """64 bits for each unit: its words times random odd numbers, added up modulo 2^64."""
    outer, units, inner = bits.shape
    random = np.random.Generator(np.random.Philox(key=0x636B707467726F77))
    if outer == 1 and inner * bits.itemsize % 8 == 0:
        words = bits[0].view("<u8")
        factors = random.integers(0, 2**64, words.shape[1], np.uint64) | np.uint64(1)
        step = max(1, BLOCK_BYTES // max(1, inner * bits.itemsize))
        return np.concatenate([words[i : i + step] @ factors for i in range(0, units, step)])
    total = np.zeros(units, np.uint64)
    step = max(1, BLOCK_BYTES // max(1, units * 8))
    flat = bits.transpose(0, 2, 1) if inner > 1 else bits.reshape(outer, 1, units)
    for slices in flat:
        for i in range(0, inner, step):
            some = slices[i : i + step].astype(np.uint64)
            total += (random.integers(0, 2**64, len(some), np.uint64) | np.uint64(1)) @ some
    return total


def slow_digests(bits: Bits) -> Digests:
    """64 cryptographic bits for each unit."""
    strong = (hashlib.blake2b(bits[:, unit].tobytes(), digest_size=8).digest() for unit in range(bits.shape[1]))
    return np.frombuffer(b"".join(strong), "<u8")


def unequal(rows: list[Rows], copies: Units, originals: Units) -> tuple[str, int] | None:
    """(tensor, unit) whose rows are not those of the unit that its digest names; None if there is none."""
    for lane in rows:
        doubles = np.flatnonzero(originals != np.arange(len(originals)))
        for bits, units, sources in (
            (lane.grown, np.flatnonzero(copies >= 0), copies[copies >= 0]),
            (lane.base, doubles, originals[doubles]),
        ):
            unit = _first_difference(bits, units, lane.base, sources)
            if unit is not None:
                return lane.name, unit
    return None


def _first_difference(one: Bits, units: Units, other: Bits, sources: Units) -> int | None:
    for places in stretches(one, np.arange(len(units))):
        some, theirs = span(units[places]), span(sources[places])
        same = (one[:, some] == other[:, theirs]).all(axis=(0, 2))
        if not same.all():
            return int(units[places[int(np.flatnonzero(~same)[0])]])
    return None


def span(picked: Units) -> Picked:
    """A slice where the units follow one another, which reads without a copy."""
    if len(picked) and (np.diff(picked) == 1).all():
        return slice(int(picked[0]), int(picked[-1]) + 1)
    return picked


def turns(owners: Units) -> Iterator[tuple[Picked, Picked]]:
    """(units, their base units): in each turn a base unit is met at most once, so that sums can be made at once."""
    members = np.flatnonzero(owners >= 0)
    order = members[np.argsort(owners[members], kind="stable")]
    owned = owners[order]
    starts = np.flatnonzero(np.diff(owned, prepend=-1))
    turn = np.arange(len(owned)) - np.repeat(starts, np.diff(np.append(starts, len(owned))))
    for i in range(int(turn.max(initial=-1)) + 1):
        yield span(order[turn == i]), span(owned[turn == i])
