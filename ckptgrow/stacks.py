"""Parameters of a model in which several tensors of a manifest lie, or a part of one: transformers stacks experts.

Which projection lies where is told by the family's sites (families/spelling.py), so the boxes of all experts of a layer
come together as ranges along one axis of the stack, for each run of experts that train alike. Refused: a stack of other
experts than the manifest's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptgrow.errors import FormatError, FreezeError
from ckptgrow.families import Architecture, Slot, in_memory_name
from ckptgrow.families.spelling import Place, Twin, twins
from ckptgrow.lineage import architecture_of, described
from ckptgrow.manifest import Manifest, Trainable
from ckptgrow.plan import joined
from ckptgrow.policy import Box, across
from ckptgrow.regions import Division, Spans, boxed
from ckptgrow.tensors import TensorInfo

Shape = tuple[int, ...]
Find = Callable[[str], "tuple[str, Shape] | None"]


@dataclass(frozen=True, slots=True)
class _Cell:
    """One projection of one expert in a parameter, and what of it trains: ranges along the parameter's axis."""

    tensor: Trainable
    twin: Twin

    def spans(self, shape: Shape) -> Spans:
        own, other = self.twin.own, self.twin.other
        if own.slot is None or other.slot is None:
            return ()
        try:
            division = self.tensor.division(own.slot.axis)
        except FormatError as error:
            raise FreezeError(error.problem, tensor=self.tensor.name) from None
        if division.axis != own.slot.axis:
            raise FreezeError("its boxes are not ranges of units", tensor=self.tensor.name)
        spans = division.at((own.expert or 0) * math.prod(division.shape[1 : division.axis]) if own.slot.stacked else 0)
        size = shape[other.slot.axis] // len(other.slot.lanes)
        first = own.lane * size
        inside = ((max(a, first) - first, min(b, first + size) - first) for a, b in spans)
        return tuple((a + other.lane * size, b + other.lane * size) for a, b in inside if a < b)


def held_in(tensors: Sequence[Trainable], manifest: Manifest, find: Find) -> tuple[dict[str, Trainable], set[str]]:
    """The parameters in which these tensors lie, by name, with what trains of each; and the tensors that lie in one.

    `find` gives a model's parameter by a name it may have: its own name, and its shape. Raises FreezeError.
    """
    architecture, lost = architecture_of(manifest), {tensor.name: tensor for tensor in tensors}
    cells: dict[str, dict[Slot | None, list[_Cell]]] = defaultdict(lambda: defaultdict(list))
    shapes: dict[str, Shape] = {}
    waiting: dict[str, set[Place]] = defaultdict(set)
    numbers: dict[tuple[str, Slot | None], set[int | None]] = defaultdict(set)
    for twin in dict.fromkeys(twins(architecture)):
        numbers[twin.other.name, twin.other.slot].add(twin.other.expert)
        if twin.own.name not in lost:
            continue
        waiting[twin.own.name].add(twin.own)
        names = (twin.other.name, in_memory_name(architecture.family, twin.other.name))
        there = next(filter(None, map(find, names)), None)
        if there is not None:
            name, shapes[name] = there
            cells[name][twin.other.slot].append(_Cell(lost[twin.own.name], twin))
    held: dict[str, Trainable] = {}
    for name, layouts in cells.items():
        counted = [(some, len(numbers[some[0].twin.other.name, slot])) for slot, some in layouts.items()]
        one = _joined(name, shapes[name], counted)
        held |= {name: one} if one.boxes else {}
    for cell in (cell for layouts in cells.values() for some in layouts.values() for cell in some):
        waiting[cell.tensor.name].discard(cell.twin.own)
    return held, {name for name, places in waiting.items() if not places}


@dataclass(frozen=True)
class Held:
    """How transformers 5 is going to hold a grown checkpoint, told without a model.

    `stacks`: the parameters in which experts lie that have tensors of their own on disk, those in `apart`; `places`: of
    each of the latter that trains its stack, and its boxes there; `trainable`: all that trains, stacks in one piece.
    """

    stacks: tuple[str, ...]
    apart: frozenset[str]
    places: Mapping[str, tuple[str, tuple[Box, ...]]]
    trainable: tuple[Trainable, ...]


def held_by(manifest: Manifest, infos: Mapping[str, TensorInfo]) -> Held:
    """What the family's sites say of the model that is made of these tensors; without experts, nothing changes."""
    shapes, twin_of = _stacks(architecture_of(manifest), infos)
    inside = [tensor for tensor in manifest.trainable if tensor.name in twin_of]
    held, _ = held_in(inside, manifest, lambda name: (name, shapes[name]) if name in shapes else None)
    places = {}
    for tensor in inside:
        twin = twin_of[tensor.name]
        spans = _Cell(tensor, twin).spans(shapes[twin.other.name])
        assert twin.other.slot is not None
        assert twin.other.expert is not None
        boxes = across(shapes[twin.other.name], twin.other.slot.axis, spans)
        one = (twin.other.expert, twin.other.expert + 1)
        places[tensor.name] = twin.other.name, tuple((one, *box[1:]) for box in boxes)
    apart = [tensor for tensor in manifest.trainable if tensor.name not in twin_of]
    return Held(tuple(shapes), frozenset(twin_of), places, (*apart, *held.values()))


def in_stacks(manifest: Manifest) -> bool:
    """Whether transformers 5 holds experts of this growth in stacks that have tensors of their own on disk."""
    return bool(_stacks(architecture_of(manifest), described(manifest.base).infos)[0])


def _stacks(architecture: Architecture, infos: Mapping[str, TensorInfo]) -> tuple[dict[str, Shape], dict[str, Twin]]:
    """The stacks of tensors that lie apart on disk, by their names in memory, and where each of these lies."""
    layouts: dict[tuple[str, Slot], dict[Place, Twin]] = defaultdict(dict)
    for twin in twins(architecture):
        own, other = twin.own.slot, twin.other.slot
        if own and other and other.stacked and not own.stacked and len(own.lanes) == 1 and not twin.turned:
            name = in_memory_name(architecture.family, twin.other.name)
            layouts[name, other][twin.own] = twin.moved(name)
    twin_of: dict[str, Twin] = {}
    shapes: dict[str, Shape] = {}
    for (name, slot), places in layouts.items():
        experts = len({twin.other.expert for twin in places.values()})
        if len(places) == experts * len(slot.lanes):  # of several spellings the last one is that in memory
            twin_of |= {place.name: twin for place, twin in places.items()}
            first = next(iter(places.values()))
            shapes[name] = first.holder(infos[first.own.name].shape, experts)
    used = {twin.other.name for twin in twin_of.values()}
    return {name: shape for name, shape in shapes.items() if name in used}, twin_of


def _joined(name: str, shape: Shape, layouts: Sequence[tuple[Sequence[_Cell], int]]) -> Trainable:
    """All that trains in one parameter, in whichever of the layouts, each with the number of its experts, it fits."""
    for cells, experts in layouts:
        if {cell.twin.holder(cell.tensor.shape, experts) for cell in cells} == {shape}:
            break
    else:
        cells, experts = layouts[0]
        wanted = cells[0].twin.holder(cells[0].tensor.shape, experts)
        raise FreezeError(
            f"the model's parameter has the shape {list(shape)}, the manifest's experts make {list(wanted)}",
            tensor=name,
            hint="The manifest belongs to another model.",
        )
    spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for cell in cells:
        spans[cell.twin.other.expert or 0] += cell.spans(shape)
    slot, first = cells[0].twin.other.slot, cells[0].tensor
    assert slot is not None
    count = experts if slot.stacked else 1
    each = math.prod(shape[: slot.axis]) // count
    runs: list[tuple[range, Spans]] = []
    for expert in range(count):
        own = joined(sorted(spans[expert]))
        start = runs.pop()[0].start if runs and runs[-1][1] == own else expert * each
        runs.append((range(start, (expert + 1) * each), own))
    boxes = boxed(Division(shape, slot.axis, tuple(runs)))
    return replace(first, name=name, role="_".join(slot.lanes), shape=shape, boxes=boxes)
