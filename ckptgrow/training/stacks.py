"""Parameters in which several tensors of a manifest lie, or a part of one: transformers holds experts in stacks.

Which projection lies where is told by the family's sites (families/spelling.py), so the boxes of all experts of a layer
come together as ranges along one axis of the stack. Refused: a stack of other experts than the manifest's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ckptgrow.errors import FormatError, FreezeError
from ckptgrow.families import Slot, in_memory_name
from ckptgrow.families.spelling import Place, Twin, twins
from ckptgrow.lineage import architecture_of
from ckptgrow.manifest import Manifest, Trainable, along
from ckptgrow.plan import joined
from ckptgrow.policy import across

Shape = tuple[int, ...]
Spans = tuple[tuple[int, int], ...]
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
            axis, spans = along(self.tensor.shape, self.tensor.boxes, own.slot.axis)
        except FormatError as error:
            raise FreezeError(error.problem, tensor=self.tensor.name) from None
        if axis != own.slot.axis:
            raise FreezeError("its boxes are not ranges of units", tensor=self.tensor.name)
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
    for twin in (twin for twin in dict.fromkeys(twins(architecture)) if twin.own.name in lost):
        waiting[twin.own.name].add(twin.own)
        names = (twin.other.name, in_memory_name(architecture.family, twin.other.name))
        there = next(filter(None, map(find, names)), None)
        if there is not None:
            name, shapes[name] = there
            cells[name][twin.other.slot].append(_Cell(lost[twin.own.name], twin))
    held = {name: _joined(name, shapes[name], list(layouts.values())) for name, layouts in cells.items()}
    for cell in (cell for layouts in cells.values() for some in layouts.values() for cell in some):
        waiting[cell.tensor.name].discard(cell.twin.own)
    return held, {name for name, places in waiting.items() if not places}


def _joined(name: str, shape: Shape, layouts: Sequence[Sequence[_Cell]]) -> Trainable:
    """All that trains in one parameter: the same ranges in each of its experts."""
    for cells in layouts:
        experts = {cell.twin.other.expert for cell in cells}
        if {cell.twin.holder(cell.tensor.shape, len(experts)) for cell in cells} == {shape}:
            break
    else:
        experts = {cell.twin.other.expert for cell in layouts[0]}
        wanted = layouts[0][0].twin.holder(layouts[0][0].tensor.shape, len(experts))
        raise FreezeError(
            f"the model's parameter has the shape {list(shape)}, the manifest's experts make {list(wanted)}",
            tensor=name,
            hint="The manifest belongs to another model.",
        )
    spans: dict[int | None, list[tuple[int, int]]] = defaultdict(list)
    for cell in cells:
        spans[cell.twin.other.expert] += cell.spans(shape)
    ranges = {joined(sorted(those)) for those in spans.values()}
    slot, first = cells[0].twin.other.slot, cells[0].tensor
    assert slot is not None
    if len(ranges) > 1:
        raise FreezeError("its experts do not all train alike", tensor=name)
    boxes = across(shape, slot.axis, ranges.pop())
    return replace(first, name=name, role="_".join(slot.lanes), shape=shape, boxes=boxes)
