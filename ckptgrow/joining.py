"""Which unit of an MLP may be added to which, or dropped, so that the function stays (METHOD.md 5).

What may be added to what:

1. gate, up and their biases equal to the bit: the columns of down are added.
2. gate equal, columns of down parallel: the rows of up (and its biases) are added, each times its factor.
3. gate equal, rows of up (and biases) parallel: the columns of down are added, each times its factor.
4. a column of down, or a row of up and its bias, of zeros: dead.
5. gate equal, and the row of up a combination of those of others (or the column of down): its column (its row of up) is
   added to each of them, times their factors. Looked for where cases 1 and 4 leave 3 to 8 units with one gate.

Cases 2 and 3 are tried in both orders, and the one that leaves fewer units is taken; case 5 where it leaves fewer
still. A factor counts only where it is exact and short enough for float64 to hold each product, so all that rounds is
the one sum that is written. Without a gate the activation stands between up and down: then only case 1 and a zero
column remain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ckptgrow.checkpoint import Bits
from ckptgrow.combining import LOOKED_AT, MOST, Combinations, Factors, combinations, doubtful, short
from ckptgrow.numeric import FLOATS, Floats, decode, encode
from ckptgrow.units import Units, alike, largest_magnitudes, stretches

Mask = NDArray[np.bool_]
DEAD, SPREAD = -1, -2
MOST_ROUNDS = 8  # how many unlike directions are looked for among units with one gate


@dataclass(frozen=True, slots=True)
class Lane:
    """One projection (or its bias) of an MLP: [outer, units, inner] bits of that dtype."""

    role: str
    bits: Bits
    dtype: str

    def values(self, units: Units) -> Floats:
        """These units' weights, [units, elements]."""
        picked = np.ascontiguousarray(self.bits[:, units].transpose(1, 0, 2))
        return decode(picked, self.dtype).reshape(len(units), -1)

    def largest(self) -> tuple[Mask, Mask]:
        """(zero, finite): whether all weights of a unit are zero, whether none is infinite or NaN."""
        found = largest_magnitudes(self.bits)
        limit = encode(np.array([FLOATS[self.dtype].largest]), self.dtype)[0]
        return found == 0, found <= np.left_shift(limit, self.bits.dtype.type(1))


@dataclass(frozen=True, slots=True)
class Merges:
    """Where each unit goes: `into` names the unit it is added to (itself: it stays, DEAD: it is dropped), `scale` the
    factor, `through_up` whether the rows of up are added and not the columns of down.

    Of a unit that goes to several (SPREAD) `spread` has them, each with its factor.
    """

    into: Units
    scale: Floats
    through_up: Mask
    spread: Mapping[int, Factors] = field(default_factory=dict)

    @property
    def stay(self) -> Units:
        return np.flatnonzero(self.into == np.arange(len(self.into)))

    @property
    def go(self) -> Units:
        return np.flatnonzero(self.into != np.arange(len(self.into)))


def equal_ones(rows: Units, dead: Mask, finite: Mask) -> Merges:
    """Case 1 and case 4: equal units go into the first of them, dead ones nowhere."""
    kept = np.arange(len(rows))
    into = np.where(finite & finite[rows], rows, kept)
    alive = np.zeros(len(rows), bool)
    alive[into[~dead]] = True  # a unit with a zero column stays where it has to take those of its equals
    into = np.where(dead & ~((into == kept) & alive), DEAD, into)
    return Merges(into, np.ones(len(rows)), np.zeros(len(rows), bool))


@dataclass(frozen=True, slots=True)
class Parallel:
    """Cases 2 and 3 for the units of one gated MLP."""

    up: list[Lane]
    down: Lane
    gates: Units
    finite: Mask
    dead: Mask

    def merges(self, equal: Merges) -> Merges:
        """The merges that leave the fewest units for each gate."""
        members = np.flatnonzero(self.finite & ~self.dead)
        if len(np.unique(self.gates[members])) == len(np.unique(equal.into[members])):
            return equal  # one unit stays for each gate as it is
        by_up, by_down = self._solved(members, through_up=False), self._solved(members, through_up=True)
        fewer = np.zeros(len(self.gates), np.int64)
        np.add.at(fewer, self.gates[by_up.stay], 1)
        np.subtract.at(fewer, self.gates[by_down.stay], 1)
        better = (fewer > 0)[self.gates]
        into = np.where(better, by_down.into, by_up.into)
        scale = np.where(better, by_down.scale, by_up.scale)
        return Merges(into, scale, np.where(better, by_down.through_up, by_up.through_up))

    def _solved(self, members: Units, *, through_up: bool) -> Merges:
        """One way of adding first, then the other way among the units that it left alone."""
        kept = np.arange(len(self.gates))
        into = np.where(self.finite & self.dead, DEAD, kept)
        scale, raised = np.ones(len(kept)), np.zeros(len(kept), bool)
        for up in (through_up, not through_up):
            targets, factors = self._directions([self.down] if up else self.up, members)
            into[members], scale[members], raised[members] = targets, factors, up & (targets != members)
            members = members[np.bincount(targets, minlength=len(kept))[members] == 1]
        return Merges(into, scale, raised)

    def _directions(self, lanes: list[Lane], members: Units) -> tuple[Units, Floats]:
        """For each member the first with the same gate to which it is parallel in these lanes, and the factor."""
        pairs = np.stack([self.gates[members], alike([lane.bits for lane in lanes])[members]], axis=1)
        _, first, classes = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
        representatives = first[classes.reshape(-1)]
        target, factor = np.arange(len(members)), np.ones(len(members))
        waiting = np.flatnonzero(representatives == target)
        for _ in range(MOST_ROUNDS):
            _, heads, owners = np.unique(self.gates[members[waiting]], return_index=True, return_inverse=True)
            pivots = waiting[heads][owners.reshape(-1)]
            ones, others = pivots[pivots != waiting], waiting[pivots != waiting]
            if not len(others):
                break
            ratios = _ratios([*self.up, self.down], lanes, members[ones], members[others])
            hit = ratios != 0
            target[others[hit]], factor[others[hit]] = ones[hit], ratios[hit]
            waiting = others[~hit]
        return members[target[representatives]], factor[representatives]


def _ratios(every: list[Lane], lanes: list[Lane], ones: Units, others: Units) -> Floats:
    """The exact c with other = c·one in all these lanes, for each pair of units; 0 where there is none."""
    longest = max(FLOATS[lane.dtype].mantissa + 1 for lane in every)
    found = np.zeros(len(ones))
    for some in stretches(lanes[0].bits, np.arange(len(ones))):
        one, other = (np.concatenate([lane.values(u[some]) for lane in lanes], axis=1) for u in (ones, others))
        at = np.abs(one).argmax(axis=1)[:, None]
        ratio = (np.take_along_axis(other, at, 1) / np.take_along_axis(one, at, 1))[:, 0]  # no unit here is all zeros
        exact = short(ratio, 53 - longest) & (one * ratio[:, None] == other).all(axis=1)
        found[some] = np.where(exact, ratio, 0.0)
    return found


@dataclass(frozen=True, slots=True)
class Spanned:
    """Case 5 for the units of one gated MLP."""

    up: list[Lane]
    down: Lane
    gates: Units
    alive: Mask

    def merges(self, equal: Merges, full: Merges) -> tuple[Merges, frozenset[int]]:
        """The merges with those of gates that come out with fewer units, and the units whose factors are too long."""
        into, scale, raised = full.into.copy(), full.scale.copy(), full.through_up.copy()
        spread, long = dict[int, Factors](), set[int]()
        for units in self._groups(equal, full):
            own = np.flatnonzero(np.isin(equal.into, units))  # with those that equal one of them
            alone = len(own) == len(units)
            ways = [(way, self._combined(units, way)) for way in ((False, True) if alone else (False,))]
            through_up, found = max(ways, key=lambda way: len(way[1].made))
            if len(units) - len(found.made) >= int((full.into[own] == own).sum()):
                long |= {int(units[i]) for _, told in ways for i in told.long}
                continue
            into[own], scale[own], raised[own] = equal.into[own], equal.scale[own], equal.through_up[own]
            for i, factors in found.made.items():
                those = own[equal.into[own] == units[i]]
                into[those], raised[those] = SPREAD, through_up
                spread |= {int(unit): tuple((int(units[j]), f) for j, f in factors) for unit in those}
        return Merges(into, scale, raised, spread), frozenset(long)

    def _groups(self, equal: Merges, full: Merges) -> Iterator[Units]:
        """The units that cases 1 and 4 leave of each gate which the other cases leave several of, where few elements
        of their rows or columns do not show that all are independent."""
        stay = equal.stay[self.alive[equal.stay]]
        stay = stay[np.argsort(self.gates[stay], kind="stable")]
        _, starts, counts = np.unique(self.gates[stay], return_index=True, return_counts=True)
        left = np.bincount(self.gates[full.stay], minlength=len(self.gates))[self.gates[stay[starts]]]
        for count in range(3, MOST + 1):
            chosen = starts[(counts == count) & (left > 1)]
            groups = stay[chosen[:, None] + np.arange(count)]
            if len(groups):
                some = (_glance(lanes, groups) for lanes in (self.up, [self.down]))
                yield from groups[np.logical_or(*map(doubtful, some))]

    def _combined(self, units: Units, through_up: bool) -> Combinations:
        lanes = [self.down] if through_up else self.up
        longest = max(FLOATS[lane.dtype].mantissa + 1 for lane in [*self.up, self.down])
        return combinations(np.concatenate([lane.values(units) for lane in lanes], axis=1), 53 - longest)


def _glance(lanes: list[Lane], groups: Units) -> Floats:
    """A few elements of each unit's first lane: [groups, units, elements]."""
    bits, dtype = lanes[0].bits, lanes[0].dtype
    outer, _, inner = bits.shape
    places = np.unique(np.linspace(0, outer * inner - 1, LOOKED_AT).astype(np.int64))
    picked = bits[places[:, None] // inner, groups.reshape(-1)[None, :], places[:, None] % inner]
    return decode(np.ascontiguousarray(picked.T), dtype).reshape(*groups.shape, len(places))
