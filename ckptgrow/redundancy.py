"""Which units of an MLP can go without changing the function, read from the weights alone (METHOD.md 5).

A unit is folded away by adding its column of down, or its row of up, times an exact factor to those of a unit that
stays; or by dropping it where it is dead (joining.py). Units with an infinite or NaN weight always stay.

An expert is an MLP of its own, whatever tensors it shares. Where scales stand for blocks of units a block is taken as
one unit, and only case 1 and a zero column remain; the payload of down counts as a row, its scales are what is added.
Where statistics are taken over the units these stay what they are only if equal ones go in proportion: of every gate,
or under a norm of every row (its weight included), the same share is left, and nothing under a norm is dropped as dead
or added as parallel. Where a model clamps or shifts what up says (gpt_oss, deepseek_v4), a unit is not linear in it:
then cases 2, 3 and 5 are not to be had either, and a row of zeros is not dead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from ckptgrow.checkpoint import Checkpoint
from ckptgrow.families import Architecture, Mlp
from ckptgrow.joining import DEAD, SPREAD, Lane, Mask, Merges, Parallel, Spanned, equal_ones
from ckptgrow.numeric import Floats
from ckptgrow.units import Units, alike, projections, stretches

NEIGHBOURS = 8  # with which each unit is compared where rows need not be equal


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
    long: frozenset[int] = frozenset()  # units that are combinations of others, by factors that are too long

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
        plain = (merges.scale[added] == 1.0) & ~merges.through_up[added] & (merges.into[added] != SPREAD)
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
        too_long = np.isin(stay, [*self.long])
        ungated = "gate or up" if self.mlp.site.template.gated else "up"
        what = "gate" if self.gated else "rows of a block of" if self.grain > 1 else ungated
        for reason, hit in (
            ("weights are infinite or NaN", broken),
            (f"{what} rows differ", ~broken & apart),
            (
                "gate rows are equal, but neither their up rows nor their down columns are parallel",
                ~broken & ~apart & ~too_long,
            ),
            ("they are combinations of others, but by factors too long for an exact sum", ~broken & ~apart & too_long),
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


def search(
    checkpoint: Checkpoint,
    architecture: Architecture,
    partners: Callable[[Mlp], Units],
    atol: float,
    progress: Callable[[int], None],
) -> dict[str, list[Redundancy]]:
    """What is redundant in each MLP, by block: one for each of the experts that share its tensors."""
    statistics = architecture.family.statistics
    experts = [(mlp, expert) for mlp in architecture.mlps for expert in mlp.numbers]
    found: dict[str, list[Redundancy]] = {mlp.block: [] for mlp in architecture.mlps}
    with ThreadPoolExecutor(max_workers=2) as pool:
        looked = pool.map(lambda m: find(checkpoint, m[0], m[1], partners(m[0]), atol, statistics, progress), experts)
        for one in looked:
            found[one.mlp.block].append(one)
    return found


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
    linear = [lane for lane in every if lane.role == "up"] if mlp.bilinear else []
    above = [lane for lane in every if lane.role != "down"]
    told = [(lane, *lane.largest()) for lane in every]
    finite = np.logical_and.reduce([fine for _, _, fine in told])
    dead = weightless = np.logical_and.reduce([np.ones(len(finite), bool), *_zero(told, "down")])  # no down: all are
    if linear:
        dead = weightless | np.logical_and.reduce(list(_zero(told, "up")))
    rows, apart, hinted = alike([lane.bits for lane in above]), 0.0, _blocks_of(partners, mlp.grain)
    if atol:
        rows, apart = _near(above, rows, hinted, atol)
    equal, gates = equal_ones(rows, dead & finite, finite), rows
    full, long = equal, frozenset[int]()
    if linear:
        gates = alike([lane.bits for lane in above if lane.role == "gate"])
        down = next(lane for lane in every if lane.role == "down")
        full = min(Parallel(linear, down, gates, finite, dead).merges(equal), equal, key=lambda m: len(m.stay))
        full, long = Spanned(linear, down, gates, finite & ~dead).merges(equal, full)
    for name in mlp.tensors:
        progress(checkpoint.infos[name].nbytes // mlp.experts)
    classes = rows if normed or (statistics and atol) else gates if statistics else None
    return Redundancy(
        mlp, expert, equal, full, rows, gates, finite, weightless, hinted, bool(linear), classes, apart, long
    )


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
