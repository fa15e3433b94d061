"""Which units of an MLP can go without changing the function, read from the weights alone (METHOD.md 5).

A unit is folded away by adding its column of down, or its row of up, times an exact factor to those of a unit that
stays; or by dropping it where it is dead. What may be added to what:

1. gate, up and their biases equal to the bit: the columns of down are added.
2. gate equal, columns of down parallel: the rows of up (and its biases) are added, each times its factor.
3. gate equal, rows of up (and biases) parallel: the columns of down are added, each times its factor.
4. a column of down, or a row of up and its bias, of zeros: dead.

Cases 2 and 3 are tried in both orders, and the one that leaves fewer units is taken. A factor counts only where it is
exact and short enough for float64 to hold each product, so all that rounds is the one sum that is written. Without a
gate the activation stands between up and down: then only case 1 and a zero column remain. Units with an infinite or
NaN weight always stay.

An expert is an MLP of its own, whatever tensors it shares. Where scales stand for blocks of units a block is taken as
one unit, and only case 1 and a zero column remain; the payload of down counts as a row, its scales are what is added.
Where statistics are taken over the units these stay what they are only if equal ones go in proportion: of every gate,
or under a norm of every row (its weight included), the same share is left, and nothing under a norm is dropped as dead
or added as parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ckptgrow.checkpoint import Bits, Checkpoint
from ckptgrow.families import Mlp
from ckptgrow.numeric import FLOATS, Floats, decode, encode
from ckptgrow.units import Units, alike, largest_magnitudes, projections, stretches

Mask = NDArray[np.bool_]
DEAD = -1
NEIGHBOURS = 8  # with which each unit is compared where rows need not be equal
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
    factor, `through_up` whether the rows of up are added and not the columns of down."""

    into: Units
    scale: Floats
    through_up: Mask

    @property
    def stay(self) -> Units:
        return np.flatnonzero(self.into == np.arange(len(self.into)))

    @property
    def go(self) -> Units:
        return np.flatnonzero(self.into != np.arange(len(self.into)))


@dataclass(frozen=True, slots=True)
class Redundancy:
    """What was found in one MLP or expert: merges of equal and dead units alone, and with parallel ones too.

    `rows` and `gates` name for each unit the first with the same rows, and with the same gate. All of it counts in
    blocks of `grain` units.
    """

    mlp: Mlp
    expert: int | None
    equal: Merges
    full: Merges
    rows: Units
    gates: Units
    finite: Mask
    weightless: Mask  # the column of down is zero
    partners: Units  # for each block the one that it is said to copy, -1 where nobody knows
    gated: bool
    classes: Units | None = None  # of which equally many must stay in proportion, where statistics are taken
    apart: float = 0.0  # how far rows that count as equal are from each other

    @property
    def grain(self) -> int:
        return self.mlp.grain

    @property
    def needed(self) -> int:
        """The smallest exact width; an MLP keeps one unit even where all are dead."""
        units, least, step = len(self.rows), max(1, len(self.full.stay)), 1
        if self.classes is not None:  # each class can be cut in as many parts as all of them have in common
            step = units // int(np.gcd.reduce(np.bincount(self.classes)))
        widths = range(-(-least // step) * step, units + 1, step)
        return next(count for count in widths if self._holds(self.full, count)) * self.grain

    def takes(self, width: int) -> bool:
        """Whether it can have that width, which is at most its own, and be the same function."""
        return width % self.grain == 0 and self._holds(self.full, width // self.grain)

    def _holds(self, merges: Merges, count: int) -> bool:
        """Whether these merges can leave so many units, and of each class its part of them."""
        stay = merges.stay
        if self.classes is None:
            return max(1, len(stay)) <= count
        left = self._left(self.classes, count)
        return left is not None and bool((np.bincount(self.classes[stay], minlength=len(left)) <= left).all())

    def _left(self, classes: Units, count: int) -> Units | None:
        """How many units of each class stay of `count`; None where that is no whole number of each."""
        wanted, units = np.bincount(classes, minlength=len(classes)) * count, len(classes)
        return wanted // units if not (wanted % units).any() else None

    def at(self, width: int) -> Merges:
        """The merges that leave `width` units, of equal ones alone where they suffice: the last units go first.

        A unit that equals its partner is added to that one, even where it is dead: what stays is then the base's.
        """
        count, partners = width // self.grain, self.partners
        whole = self.equal if self._holds(self.equal, count) else self.full
        kept, going = np.arange(len(self.rows)), self._going(whole, count)
        into = kept.copy()
        into[going] = whole.into[going]
        partner = np.where((partners >= 0) & (self.apart == 0), partners, self.rows)
        same = (self.rows[partner] == self.rows) & (into[partner] == partner) & (into != kept)
        same &= (whole.scale == 1.0) & ~whole.through_up & self.finite[partner]
        return replace(whole, into=np.where(same, partner, into))

    def _going(self, merges: Merges, count: int) -> Units:
        """The units that go so that `count` stay: the last ones, of each class where there are any."""
        going = merges.go
        if self.classes is None:
            return going[len(going) - (len(self.rows) - count) :]
        left = self._left(self.classes, count)
        assert left is not None
        many = np.bincount(self.classes, minlength=len(left)) - left
        of = self.classes[going]
        order = np.argsort(of, kind="stable")
        behind = np.searchsorted(of[order], of[order], side="right") - np.arange(len(order))  # 1 for the last
        return np.sort(going[order[behind <= many[of[order]]]])

    def columns_only(self, merges: Merges) -> bool:
        """Whether nothing but columns of down is added, and nothing dropped but units whose column is zero."""
        if not self.mlp.down:  # a spare expert: then every unit must be one that stays
            return bool(np.isin(self.rows, self.rows[merges.stay]).all())
        dropped, added = merges.into == DEAD, merges.go[merges.into[merges.go] != DEAD]
        plain = (merges.scale[added] == 1.0) & ~merges.through_up[added]
        plain &= self.rows[added] == self.rows[merges.into[added]]
        return bool(plain.all() and self.weightless[dropped].all())

    def twins(self, merges: Merges) -> bool:
        """Whether units with the same rows stay beside each other, as they may where a width is to be filled."""
        return len(np.unique(self.rows[merges.stay])) < len(merges.stay)

    def tied_up(self) -> Iterator[tuple[str, Units]]:
        """Why units that have a partner stay beside it: (reason, units) for each reason there is."""
        stay = self.full.stay
        stay = stay[self.partners[stay] >= 0]
        theirs = self.partners[stay]
        broken, apart = ~self.finite[stay], self.gates[stay] != self.gates[theirs]
        what = "gate" if self.gated else "rows of a block of" if self.grain > 1 else "up"
        for reason, hit in (
            ("weights are infinite or NaN", broken),
            (f"{what} rows differ", ~broken & apart),
            ("gate rows are equal, but neither their up rows nor their down columns are parallel", ~broken & ~apart),
        ):
            if hit.any():
                yield reason, (stay[hit][:, None] * self.grain + np.arange(self.grain)).reshape(-1)
        if self.needed > max(1, len(self.full.stay)) * self.grain:
            yield "statistics are taken over the units, and these would not go in proportion", np.arange(0)


def _blocks_of(partners: Units, grain: int) -> Units:
    """For each block of units the block of their partners, -1 where they have none together."""
    firsts = partners.reshape(-1, grain)
    whole = (firsts == firsts[:, :1] + np.arange(grain)).all(axis=1) & (firsts[:, 0] % grain == 0)
    blocks: Units = np.where(whole & (firsts[:, 0] >= 0), firsts[:, 0] // grain, -1)
    return blocks


def lanes_in(checkpoint: Checkpoint, mlp: Mlp, expert: int | None) -> list[Lane]:
    """Every lane of every tensor of an MLP, or of one of its experts."""
    return [Lane(role, bits, checkpoint.infos[name].dtype) for name, role, bits in projections(checkpoint, mlp, expert)]


def find(
    checkpoint: Checkpoint,
    mlp: Mlp,
    expert: int | None,
    partners: Units,
    atol: float,
    statistics: bool,
    progress: Callable[[int], None],
) -> Redundancy:
    """The redundant units of one MLP or expert, streamed. `partners`: for each unit the one it is said to copy, or -1.

    Rows within `atol` of each other count as equal (case 1 alone). `statistics`: the family takes some over the gates.
    """
    every = lanes_in(checkpoint, mlp, expert)
    normed = mlp.site.template.normed
    plain = bool(mlp.down) and mlp.grain == 1 and not normed and any(lane.role == "gate" for lane in every)
    linear = [lane for lane in every if lane.role == "up"] if plain else []
    above = [lane for lane in every if lane.role != "down"]
    told = [(lane, *lane.largest()) for lane in every]
    finite = np.logical_and.reduce([fine for _, _, fine in told])
    dead = weightless = np.logical_and.reduce([np.ones(len(finite), bool), *_zero(told, "down")])  # no down: all are
    if linear:
        dead = weightless | np.logical_and.reduce(list(_zero(told, "up")))
    rows, apart, hinted = alike([lane.bits for lane in above]), 0.0, _blocks_of(partners, mlp.grain)
    if atol:
        rows, apart = _near(above, rows, hinted, atol)
    equal, gates = _equal(rows, dead & finite, finite), rows
    full = equal
    if linear:
        gates = alike([lane.bits for lane in above if lane.role == "gate"])
        down = next(lane for lane in every if lane.role == "down")
        full = min(_Parallel(linear, down, gates, finite, dead).merges(equal), equal, key=lambda m: len(m.stay))
    for name in mlp.tensors:
        progress(checkpoint.infos[name].nbytes // mlp.experts)
    classes = rows if normed or (statistics and atol) else gates if statistics else None
    return Redundancy(mlp, expert, equal, full, rows, gates, finite, weightless, hinted, bool(linear), classes, apart)


def _zero(told: list[tuple[Lane, Mask, Mask]], role: str) -> Iterator[Mask]:
    return (zero for lane, zero, _ in told if lane.role == role)


def _near(lanes: list[Lane], rows: Units, partners: Units, atol: float) -> tuple[Units, float]:
    """(the first unit whose rows are within `atol`, the largest difference met), in place of equal units alone.

    Looked for among the copies that a hint names, and among neighbours in a random projection of the rows.
    """
    own = np.flatnonzero(rows == np.arange(len(rows)))
    draw, seen, reach = np.random.default_rng(0), np.zeros(len(rows)), 0.0
    for lane in lanes:
        signs = draw.choice([-1.0, 1.0], lane.bits.shape[0] * lane.bits.shape[2])
        reach += atol * len(signs)
        for some in stretches(lane.bits, np.arange(len(rows))):
            seen[some] += np.nan_to_num(lane.values(some)) @ signs
    order, hinted = own[np.argsort(seen[own], kind="stable")], own[partners[own] >= 0]
    pairs = [(hinted, rows[partners[hinted]])]
    for step in range(1, min(NEIGHBOURS, len(order) - 1) + 1):
        one, other = order[:-step], order[step:]
        close = np.abs(seen[one] - seen[other]) <= reach * (1 + 1e-6)
        pairs.append((one[close], other[close]))
    ones, others = (np.concatenate(side) for side in zip(*pairs, strict=True))
    low, high = np.minimum(ones, others), np.maximum(ones, others)
    apart = _differences(lanes, low, high)
    into, largest = np.arange(len(rows)), 0.0
    for i in np.lexsort((high, low)):
        if low[i] != high[i] and apart[i] <= atol and into[low[i]] == low[i] and into[high[i]] == high[i]:
            into[high[i]], largest = low[i], max(largest, float(apart[i]))
    return into[rows], largest


def _differences(lanes: list[Lane], ones: Units, others: Units) -> Floats:
    """The largest difference of a weight in any lane, for each pair of units."""
    apart = np.zeros(len(ones))
    for lane in lanes:
        for some in stretches(lane.bits, np.arange(len(ones))):
            off = np.abs(lane.values(ones[some]) - lane.values(others[some])).max(axis=1)
            apart[some] = np.fmax(apart[some], np.where(np.isnan(off), np.inf, off))
    return apart


def _equal(rows: Units, dead: Mask, finite: Mask) -> Merges:
    """Case 1 and case 4: equal units go into the first of them, dead ones nowhere."""
    kept = np.arange(len(rows))
    into = np.where(finite & finite[rows], rows, kept)
    alive = np.zeros(len(rows), bool)
    alive[into[~dead]] = True  # a unit with a zero column stays where it has to take those of its equals
    into = np.where(dead & ~((into == kept) & alive), DEAD, into)
    return Merges(into, np.ones(len(rows)), np.zeros(len(rows), bool))


@dataclass(frozen=True, slots=True)
class _Parallel:
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
        exact = _short(ratio, 53 - longest) & (one * ratio[:, None] == other).all(axis=1)
        found[some] = np.where(exact, ratio, 0.0)
    return found


def _short(factors: Floats, bits: int) -> Mask:
    """Which factors have so few bits that float64 holds their product with any weight."""
    mantissa = np.abs(np.frexp(factors)[0]) * 2.0**bits
    held: Mask = (np.abs(factors) == 1) | ((mantissa == np.floor(mantissa)) & (factors != 0) & (bits > 0))
    return held
