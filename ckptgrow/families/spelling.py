"""The other spellings of an MLP: where each of its matrices would lie in the tensors of another.

Sites of one part, tower, depth and width key are one MLP in other words. transformers 5 holds experts in stacks that
lie apart on disk, and calls blocks otherwise; its own files, older ones and other tools write either. What the sites
declare of both says which matrix is which, so no family has a table of its own here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ckptgrow.families.form import Family, Site, Slot
from ckptgrow.families.found import Architecture, Mlp
from ckptgrow.families.locate import pattern_of


@dataclass(frozen=True, slots=True)
class Place:
    """One projection of one expert in a tensor: the expert's number where that is a stack, and which of its lanes.

    Without a `slot` it is a whole tensor that has no units, such as a router.
    """

    name: str
    slot: Slot | None = None
    expert: int | None = None
    lane: int = 0

    @property
    def rows(self) -> bool:
        """Whether a unit is a row of the projection, not a column."""
        return self.slot is None or self.slot.axis == int(self.slot.stacked)

    @property
    def contiguous(self) -> bool:
        """Whether its bytes lie together in the tensor."""
        return self.rows or self.slot is None or len(self.slot.lanes) == 1

    def index(self, shape: tuple[int, ...]) -> tuple[int | slice, ...]:
        """Where it lies in a tensor of that shape."""
        found: list[int | slice] = [slice(None)] * len(shape)
        if self.slot is not None:
            size = shape[self.slot.axis] // len(self.slot.lanes)
            if len(self.slot.lanes) > 1:
                found[self.slot.axis] = slice(self.lane * size, (self.lane + 1) * size)
            if self.slot.stacked:
                found[0] = self.expert or 0
        return tuple(found)

    def part_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the projection in a tensor of that shape."""
        index = zip(self.index(shape), shape, strict=True)
        return tuple(len(range(size)[at]) for at, size in index if isinstance(at, slice))


@dataclass(frozen=True, slots=True)
class Twin:
    """The same projection in two spellings: where it lies in a checkpoint, and where it may lie instead."""

    own: Place
    other: Place

    @property
    def turned(self) -> bool:
        """Whether one is the transpose of the other."""
        return self.own.rows != self.other.rows

    def moved(self, name: str) -> Twin:
        """The same with another name of the tensor in which it lies instead."""
        return replace(self, other=replace(self.other, name=name))

    def part(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the projection as it lies there, where the own tensor has that shape."""
        part = self.own.part_of(shape)
        return part[::-1] if self.turned else part

    def holder(self, shape: tuple[int, ...], experts: int) -> tuple[int, ...]:
        """The shape of the tensor in which it lies instead, where the own one has that shape."""
        part, slot = self.part(shape), self.other.slot
        if slot is None:
            return part
        axis = slot.axis - int(slot.stacked)
        whole = (*part[:axis], part[axis] * len(slot.lanes), *part[axis + 1 :])
        return (experts, *whole) if slot.stacked else whole


def twins(architecture: Architecture, names: Iterable[str] = ()) -> Iterator[Twin]:
    """Every other place at which a projection of these MLPs may lie; and of `names`, tensors that lie beside them."""
    moves: dict[tuple[str, str], None] = {}
    for mlp in architecture.mlps:
        for site in _siblings(architecture.family, mlp.site):
            moves[_parents(mlp.site.stem, site.stem)] = None
            yield from _twins(mlp, site)
    patterns = [(pattern_of(before), after) for before, after in moves if before != after and "{}" not in after]
    for name in names:
        if name not in architecture.names:
            for pattern, after in patterns:
                match = pattern.fullmatch(name)
                if match:
                    block = match["prefix"] + after.replace("{layer}", match.groupdict().get("layer", ""))
                    yield Twin(Place(name), Place(f"{block}.{match['slot']}"))


def _siblings(family: Family, own: Site) -> Iterator[Site]:
    """The sites that are the same MLP in other words, whose blocks can be named from its numbers alone."""
    for site in family.sites:
        alike = (site.tower, site.part, site.width, site.depth) == (own.tower, own.part, own.width, own.depth)
        plain = all("{layer}" in stem and "*" not in stem for stem in (site.stem, own.stem))
        plain &= site.stem.count("{}") == own.stem.count("{}")
        if alike and plain and (site.stem, site.template) != (own.stem, own.template):
            yield site


def _twins(mlp: Mlp, site: Site) -> Iterator[Twin]:
    for name, slot in mlp.tensors.items():
        match = pattern_of(mlp.site.stem).fullmatch(name)
        if not match or _is_odd(slot):
            continue
        block = match["prefix"] + site.stem.replace("{layer}", match["layer"])
        for number in _numbers(mlp.site.stem, match["block"]):
            block = block.replace("{}", number, 1)
        experts = range(mlp.experts) if slot.stacked else (mlp.expert,)
        for lane, role in enumerate(slot.lanes):
            for theirs in site.template.slots:
                if role not in theirs.lanes or theirs.bias != slot.bias or _is_odd(theirs):
                    continue
                for expert in experts:
                    other = f"{block.replace('{expert}', str(expert))}.{theirs.name}"
                    yield Twin(Place(name, slot, expert, lane), Place(other, theirs, expert, theirs.lanes.index(role)))


def _numbers(stem: str, block: str) -> Iterator[str]:
    """What stands in a block for each {} of its stem, which is the end of it."""
    parts = stem.split(".")
    yield from (number for part, number in zip(parts, block.split(".")[-len(parts) :], strict=True) if part == "{}")


def _is_odd(slot: Slot) -> bool:
    """Whether its places are not simply one projection after the other."""
    return slot.extra or slot.flat or slot.span > 1 or slot.block > 1 or slot.coded


def _parents(one: str, other: str) -> tuple[str, str]:
    """The two stems without what they end in alike: the modules in which the blocks lie."""
    mine, theirs = (stem.removesuffix(".{expert}").split(".") for stem in (one, other))
    alike = next((i for i, (a, b) in enumerate(zip(mine[::-1], theirs[::-1], strict=False)) if a != b), 0)
    return ".".join(mine[: len(mine) - alike]), ".".join(theirs[: len(theirs) - alike])
