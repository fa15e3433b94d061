"""What the MLPs of one checkpoint must have in common, so that its config can describe them before and after growth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptgrow.errors import FamilyError
from ckptgrow.families.form import Family
from ckptgrow.families.found import Group, Mlp, value_at


@dataclass(frozen=True, slots=True)
class Spot:
    """An MLP and where it was found: what stands before its stem, and where in its block the layer's number stands."""

    mlp: Mlp
    prefix: str
    start: int
    stop: int

    @property
    def numbered(self) -> bool:
        return self.stop > self.start

    def declared(self) -> Iterator[str]:
        """Every name that the declaration knows in its block."""
        yield from self.mlp.tensors
        for name in self.mlp.site.template.still:
            yield f"{self.mlp.block}.{name}"
        for name, slot in self.mlp.tensors.items():
            if slot.extra:  # the other factor of an adapter has no axis of units
                module, _, ending = name.rpartition(".")
                yield f"{module.rpartition('.')[0]}.0.{ending}"

    def name_in(self, layer: int) -> str:
        """The first tensor of the same MLP in another layer."""
        block = self.mlp.block
        return f"{block[: self.start]}{layer}{block[self.stop :]}.{self.mlp.site.template.slots[0].name}"


def check_together(family: Family, config: Mapping[str, Any], groups: Sequence[Group], spots: Sequence[Spot]) -> None:
    """One width for a key, one hidden size, the same tensors in every layer, every layer and every expert there."""
    _check_stacks(family, spots)
    for group in groups:
        if group.site.entry:
            _check_entries(group, value_at(config, group.site.under(group.site.depth)))
        _check_widths(group)
        _check_hidden(group, config)
    first: dict[int, Mlp] = {}
    for mlp in (mlp for group in groups for mlp in group.mlps):
        _check_same_slots(first.setdefault(id(mlp.site), mlp), mlp)
    _check_experts(spots)
    _check_depth(family, config, spots)


def _check_stacks(family: Family, spots: Sequence[Spot]) -> None:
    """All MLPs of a site under one prefix; layers that predict further tokens may have one of their own."""
    prefixes: dict[str, set[str]] = defaultdict(set)
    for spot in spots:
        if not (family.extra_layers and spot.prefix.endswith("mtp.")):
            prefixes[spot.mlp.site.stem].add(spot.prefix)
    for several in prefixes.values():
        if len(several) > 1:
            raise FamilyError(
                f"MLPs under several prefixes ({', '.join(sorted(several))}), where one stack was expected"
            )


def _check_widths(group: Group) -> None:
    """What one config value can say: one width, one ratio, multiples where those are declared, or a list."""
    first = next(mlp for mlp in group.mlps if mlp.width == group.width)
    listed = group.site.listed and isinstance(group.says, list)
    if listed and not group.site.entry and len(group.says) != len(group.mlps):
        raise FamilyError(f"{group.path} lists {len(group.says)} widths for {len(group.mlps)} MLPs", file="config.json")
    for mlp in group.mlps:
        if mlp.site.rule == "per hidden":
            agrees = mlp.width * first.hidden == first.width * mlp.hidden
        elif mlp.site.multiple:
            agrees = mlp.width % group.width == 0
        else:
            agrees = listed or mlp.width == group.width
        if not agrees or (mlp.site is first.site and mlp.hidden != first.hidden and mlp.site.rule != "per hidden"):
            raise FamilyError(
                f"width {mlp.width} and hidden size {mlp.hidden}, but {first.width} and {first.hidden} in"
                f" {first.block}: one config number cannot describe both",
                tensor=mlp.block,
            )


def _check_entries(group: Group, depth: Any) -> None:
    """An object for each layer, which says the width of its MLP where it has one, and none where it has none."""
    entries, path = group.says, group.path
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise FamilyError(f"{path} must be a list with an object for each layer", file="config.json")
    if isinstance(depth, int) and len(entries) != depth:
        raise FamilyError(f"{path} has {len(entries)} entries for {depth} layers", file="config.json")
    there = {mlp.layer for mlp in group.mlps}
    for layer, entry in enumerate(entries):
        if layer not in there and value_at(entry, group.site.entry) is not None:
            raise FamilyError(f"{path}[{layer}] says a width, but the layer has no MLP", file="config.json")
    for mlp in group.mlps:
        said = group.told({path: entries}, mlp)
        if said != mlp.width:
            says = f"does not say {group.site.entry}" if said is None else f"says {said:,g}"
            raise FamilyError(f"width {mlp.width:,}, but {path}[{mlp.layer}] {says}", tensor=mlp.block)


def _check_hidden(group: Group, config: Mapping[str, Any]) -> None:
    for mlp in group.mlps:
        hidden = value_at(config, mlp.site.under(mlp.site.hidden)) if mlp.site.hidden else None
        if isinstance(hidden, int) and hidden != mlp.hidden:
            raise FamilyError(f"hidden size {mlp.hidden}, but config.json says {hidden}", tensor=mlp.down)


def _check_same_slots(first: Mlp, mlp: Mlp) -> None:
    slots, theirs = (
        {s.name for s in found.tensors.values() if not s.extra and s.block == 1 and not (s.shared and found.site.spare)}
        for found in (first, mlp)
    )
    for name in sorted(slots ^ theirs):
        lacking = mlp if name in slots else first
        raise FamilyError("it is missing, but other layers have it", tensor=f"{lacking.block}.{name}")


def _check_experts(spots: Sequence[Spot]) -> None:
    """In every layer the same experts, numbered from 0, and a shared one in all of these layers or in none."""
    layers: dict[tuple[str, str, int], dict[int, Spot]] = defaultdict(dict)
    for spot in spots:
        if spot.mlp.expert is not None:
            layers[spot.mlp.site.stem, spot.prefix, spot.mlp.layer][spot.mlp.expert] = spot
    count = {stem: max(max(there) for (s, _, _), there in layers.items() if s == stem) + 1 for stem, _, _ in layers}
    for (stem, _, _), there in layers.items():
        some = next(iter(there.values())).mlp
        for expert in set(range(count[stem])) - there.keys():
            block = some.block.removesuffix(f"{some.expert}") + str(expert)
            raise FamilyError(
                "it is missing, but other experts are there", tensor=f"{block}.{some.site.template.slots[0].name}"
            )
    routed, shared = ({(s.prefix, s.mlp.layer): s for s in spots if s.mlp.site.part == p} for p in ("expert", "shared"))
    for where in routed.keys() - shared.keys() if shared else ():
        block = next(iter(shared.values())).name_in(where[1])
        raise FamilyError("it is missing, but other layers have shared experts", tensor=block)


def _check_depth(family: Family, config: Mapping[str, Any], spots: Sequence[Spot]) -> None:
    """Layers counted from 0 without a hole, as many as the config says, where it says so."""
    stacks: dict[str, list[Spot]] = defaultdict(list)
    for spot in spots:
        if spot.numbered and not (family.extra_layers and spot.prefix.endswith("mtp.")):
            stacks[spot.mlp.site.under(spot.mlp.site.depth)].append(spot)
    for path, theirs in stacks.items():
        _check_layers(family, path, value_at(config, path), theirs)


def _check_layers(family: Family, path: str, depth: Any, spots: Sequence[Spot]) -> None:
    key, present = path.rpartition(".")[2], {spot.mlp.layer for spot in spots}
    says = depth if isinstance(depth, int) else max(present) + 1
    for layer in range(max(says, max(present) + 1)):
        if layer < says and layer not in present and not family.sparse:
            why = f"{key} is {depth}" if isinstance(depth, int) else "later layers are there"
            raise FamilyError(f"it is missing, but {why}", tensor=spots[0].name_in(layer))
        if layer >= says and layer in present and not family.extra_layers:
            raise FamilyError(f"{key} is {depth}, so no loader reads it", tensor=spots[0].name_in(layer))
