"""What growing means: an architecture and options in, a Plan out. No file is read and no number computed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ckptgrow.errors import RequestError
from ckptgrow.families import Architecture, Family, Group, Mlp, Slot, locate, recast
from ckptgrow.layers import listed, spelled
from ckptgrow.plan import Edit, Output, Part, Plan, Share, Term, in_slices, unchanged
from ckptgrow.policy import POLICIES, SHARE_CHOICES, Policy, ShareChoice, kinds, shares
from ckptgrow.tensors import TensorInfo

BASE = "base"
Deal = Callable[[int, "Growth"], tuple[Share | None, ...]]
Grows = Callable[[Mlp, "int | None"], bool]
Uneven = Literal["uniform", "native"]
UNEVEN_CHOICES: tuple[Uneven, ...] = get_args(Uneven)
MOST_COPIES = 1024  # a Plan names each copy; nobody grows a model a thousandfold


@dataclass(frozen=True, slots=True)
class Growth:
    """How to grow: by a factor or to a width, which parts will train, how the shares are made, and which layers,
    tower and experts."""

    factor: int | None = None
    width: int | None = None
    multiple_of: int = 1
    policy: str = "g-freeze"
    shares: ShareChoice = "auto"
    seed: int = 0
    layers: tuple[int, ...] | None = None  # None: every layer grows
    uneven: Uneven = "uniform"  # the other layers are filled up to one width, or keep theirs
    tower: str | None = None
    experts: str = "all"

    def __post_init__(self) -> None:
        for name in ("factor", "width", "multiple_of", "seed"):
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise RequestError(f"{name} is {value!r}, not a whole number")
        if self.factor is not None and self.width is not None:
            raise RequestError("--factor and --width exclude each other")
        if self.factor is not None and self.factor < 2:
            raise RequestError(f"--factor {self.factor} does not grow anything: give a whole number from 2 up")
        if self.multiple_of < 1:
            raise RequestError(f"--multiple-of {self.multiple_of}: give a whole number from 1 up")
        if self.policy not in POLICIES:
            raise RequestError(f"unknown policy {self.policy!r}", hint=f"One of {', '.join(POLICIES)}.")
        if self.shares not in SHARE_CHOICES:
            raise RequestError(f"unknown shares {self.shares!r}", hint=f"One of {', '.join(SHARE_CHOICES)}.")
        if self.uneven not in UNEVEN_CHOICES:
            raise RequestError(f"unknown uneven {self.uneven!r}", hint=f"One of {', '.join(UNEVEN_CHOICES)}.")
        if self.uneven == "native" and self.layers is None:
            raise RequestError("--uneven native says what becomes of the layers that do not grow: give --layers")
        if not 0 <= self.seed < 2**63:
            raise RequestError(f"--seed {self.seed}: give a whole number from 0 to 2**63 - 1")
        listed(self.experts)

    @property
    def rules(self) -> Policy:
        return POLICIES[self.policy]

    def grows(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers

    def new_width(self, old: int) -> int:
        """The width after growing from `old`, rounded up to the asked multiple."""
        wanted = self.width if self.width is not None else (self.factor or 2) * old
        rounded = -(-wanted // self.multiple_of) * self.multiple_of
        if wanted <= old:
            raise RequestError(f"--width {wanted} is not above the present width {old}")
        if rounded > MOST_COPIES * old:
            raise RequestError(f"a width of {rounded:,} makes more than {MOST_COPIES:,} copies of a unit")
        return rounded


def architecture_for(
    growth: Growth, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], family: Family | None = None
) -> Architecture:
    """What of a checkpoint a growth is about: one tower, its experts; told so that layers can differ.

    Raises FamilyError and RequestError.
    """
    architecture = locate(config, infos, growth.tower, family).only(growth.experts)
    return recast(architecture, config, infos) if growth.uneven == "native" else architecture


def expand(infos: Mapping[str, TensorInfo], architecture: Architecture, growth: Growth) -> Plan:
    """The Plan that grows MLPs by copying their first units, in rounds, without changing the function.

    Gate, up and their biases are copied as bytes; each column of down is shared out among the copies of its unit
    (METHOD.md 1, 2). MLPs and experts that do not grow are filled up to the same width: their copies have zero columns
    and are not marked as grown, so that nothing of them trains (METHOD.md 7); with `uneven` native the other layers
    stay as they are, as do all other tensors. MLPs whose width one config key says grow by one factor. Raises
    RequestError or FamilyError where a width cannot be had.
    """
    check_layers(architecture, growth)
    widths = new_widths(architecture, growth)
    mlps = [mlp for mlp in architecture.mlps if widths[mlp.block] != mlp.width]
    grows = growing(architecture, growth)
    grown = {name: _grow(infos[name], mlp, widths[mlp.block], growth, grows) for mlp in mlps for name in mlp.tensors}
    outputs = tuple(grown.get(name) or unchanged(info, BASE) for name, info in infos.items())
    edits = {edit.path: edit.value for edit in architecture.retold}
    for group in architecture.groups:
        edits |= group.edits(widths)
    return Plan(outputs, tuple(Edit(path, value) for path, value in edits.items()))


def new_widths(architecture: Architecture, growth: Growth) -> dict[str, int]:
    """The width of each MLP after the growth, by block. Raises RequestError where it cannot be had."""
    widths: dict[str, int] = {}
    for group in architecture.groups:
        _check_one_width(group, architecture, growth)
        for mlp in group.mlps:
            start = mlp.width if group.site.listed else group.width
            stays = growth.uneven == "native" and not growth.grows(mlp.layer)
            widths[mlp.block] = mlp.width if stays else group.widened(mlp, start, growth.new_width(start))
            _check_copies(mlp, widths[mlp.block], growth, architecture)
    return widths


def _check_one_width(group: Group, architecture: Architecture, growth: Growth) -> None:
    """What must be one width is one: with --width, and where layers are filled up."""
    several = len({other.width for other in architecture.groups}) > 1 or len(group.starts(growth.layers)) > 1
    if growth.uneven == "native" and not group.site.listed:
        raise RequestError(
            f"--uneven native: the config of {architecture.family.model_type!r} has one width, loaders refuse a list",
            hint="Leave it out: the other layers are filled up to the same width.",
        )
    if growth.layers is not None and growth.uneven != "native" and group.site.listed and not group.uniform:
        raise RequestError("its layers have several widths, so none can be filled up", hint="Give --uneven native.")
    if growth.width is not None and several:
        told = ", ".join(f"{other.path} {_spoken(other, growth)}" for other in architecture.groups)
        raise RequestError(
            f"--width {growth.width}: the MLPs have several widths ({told})", hint="Say how much wider: --factor K."
        )


def _spoken(group: Group, growth: Growth) -> Any:
    """The present width of a key, or the different ones of a list."""
    if group.site.listed:
        return " and ".join(f"{width:,}" for width in group.starts(growth.layers))
    return group.says or group.width


def _check_copies(mlp: Mlp, new: int, growth: Growth, architecture: Architecture) -> None:
    """Raise RequestError where the number of copies that a unit gets is one that this MLP cannot have."""
    copies, rest = divmod(new, mlp.width)
    if rest and (architecture.family.statistics or mlp.site.template.normed):
        raise RequestError(
            f"{new:,} is no multiple of its {mlp.width:,} units, and it takes statistics over them",
            hint="Every unit must come equally often: give --factor.",
        ).at(tensor=mlp.block)
    if mlp.grain > 1 and (rest or copies & (copies - 1)):
        raise RequestError(
            f"scaled blocks halve exactly, so the width can grow 2, 4, 8, ... times, not from {mlp.width:,} to {new:,}",
            hint="Give such a --factor, or grow the unquantised checkpoint.",
        ).at(tensor=mlp.down)
    if mlp.grain > 1 and growth.shares == "random":
        raise RequestError("--shares random: scaled blocks can only be shared out evenly").at(tensor=mlp.down)


def check_layers(architecture: Architecture, growth: Growth) -> None:
    """Raise RequestError unless the chosen layers are some of those that are there, but not all."""
    present = sorted({mlp.layer for mlp in architecture.mlps})
    absent = sorted(set(growth.layers or ()) - set(present))
    if absent:
        raise RequestError(
            f"--layers {spelled(absent)}: there is no such layer", hint=f"The layers are {spelled(present)}."
        )
    if growth.layers is not None and len(growth.layers) == len(present):
        raise RequestError(
            f"--layers names all {len(present)} layers",
            hint="Leave it out to grow them all; of a ranking, choose with its `top`.",
        )


def rounds(old: int, new: int) -> Iterator[range]:
    """The units that each round copies: all of them, and in the last round those that are still needed."""
    for start in range(old, new, old):
        yield range(min(old, new - start))


def growing(architecture: Architecture, growth: Growth) -> Grows:
    """Which MLPs grow, or which of the experts stacked in one: those of a layer and an expert that do."""
    return lambda mlp, expert: growth.grows(mlp.layer) and architecture.grows(mlp, expert)


def _grow(info: TensorInfo, mlp: Mlp, width: int, growth: Growth, grows: Grows) -> Output:
    """One tensor of an MLP, widened: each lane on its own, and of a stack each run of experts that grow or do not."""
    slot = mlp.tensors[info.name]
    lanes = range(len(slot.lanes))
    old, new = (int(units * slot.places) for units in (mlp.width, width))
    shape = tuple(new * len(lanes) if axis == slot.axis else size for axis, size in enumerate(info.shape))
    growing = [grows(mlp, expert) for expert in mlp.numbers]
    if slot.flat and len(lanes) == len(growing):
        parts = tuple(
            part for lane in lanes for part in _lane(info.name, slot, lane * old, old, new, growth, growing[lane])
        )
        return Output(info.name, info.dtype, shape, slot.axis, parts, mlp.member(info.name))
    each, runs = info.around(slot.axis)[0] // len(growing), list[tuple[range, tuple[Part, ...]]]()
    for expert, own in enumerate(growing):
        parts = tuple(part for lane in lanes for part in _lane(info.name, slot, lane * old, old, new, growth, own))
        runs.append((range(expert * each, (expert + 1) * each), parts))
    parts = in_slices(runs, len(growing) * each)
    return Output(info.name, info.dtype, shape, slot.axis, parts, mlp.member(info.name))


def _lane(name: str, slot: Slot, first: int, old: int, new: int, growth: Growth, grows: bool) -> Iterator[Part]:
    """One lane, which begins at `first`, of what grows or is filled up."""
    if not slot.shared:
        return _copied(name, first, old, new, grows)
    deal = _halves if slot.block > 1 else _shares
    return _shared(name, first, old, new, deal, growth) if grows else _filled(name, first, old, new)


def _copied(name: str, first: int, old: int, new: int, grows: bool) -> Iterator[Part]:
    """One lane of gate or up, which begins at `first`: all units, then the copied ones round by round."""
    for grown, units in [(False, range(old)), *((grows, units) for units in rounds(old, new))]:
        yield Part(len(units), (Term(BASE, name, range(first + units.start, first + units.stop)),), grown)


def _shared(name: str, first: int, old: int, new: int, deal: Deal, growth: Growth) -> Iterator[Part]:
    """One lane of down: each copy of a unit gets its share."""
    spans = [(units, deal(count, growth)) for count, units in kinds(old, new)]
    for turn in range(max(len(dealt) for _, dealt in spans)):
        for units, dealt in spans:
            if turn < len(dealt):
                picked = range(first + units.start, first + units.stop)
                yield Part(len(units), (Term(BASE, name, picked, share=dealt[turn]),), grown=turn > 0)


def _filled(name: str, first: int, old: int, new: int) -> Iterator[Part]:
    """One lane of down of an MLP that does not grow: its own columns, and zeros for the copies."""
    yield Part(old, (Term(BASE, name, range(first, first + old)),))
    yield Part(new - old)


def _shares(copies: int, growth: Growth) -> tuple[Share | None, ...]:
    return tuple(shares(copies, growth.rules, growth.shares, growth.seed))


def _halves(copies: int, growth: Growth) -> tuple[Share | None, ...]:
    """Shares of a scale: equal, for a number of copies that is a power of two."""
    return tuple(Share(i, copies) for i in range(copies)) if copies > 1 else (None,)
