"""fold as a Plan: the units that stay, in their order, with the columns or rows of those that go added to them.

Nothing is taken from a manifest but hints, which the weights have to bear out: how wide the base was, and which unit
each new one copies, so that of several exact ways the one is taken that gives the base back.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from ckptgrow.checkpoint import MANIFEST, Checkpoint
from ckptgrow.config import edited, set_value, without
from ckptgrow.configs import width_keys
from ckptgrow.errors import CkptgrowError
from ckptgrow.families import Architecture, Group, Mlp, Slot, scoped
from ckptgrow.joining import DEAD, SPREAD, Merges
from ckptgrow.manifest import CONFIG_KEY, Manifest, load_manifest, previous
from ckptgrow.plan import Edit, Output, Part, Plan, Term, Units, in_slices, unchanged
from ckptgrow.redundancy import Redundancy
from ckptgrow.tensors import TensorInfo
from ckptgrow.units import Units as Indices

TRAINED = "trained"
Recipe = tuple[tuple[int, float], ...]  # (unit, factor): what is added up
Recipes = Mapping[str, list[Recipe]]  # for gate, up and down: the recipe of each unit (block of units) of the result
WHOLE = 1.0
FLOAT32 = "F32"


# ---------------------------------------------------------------- hints


@dataclass(frozen=True, slots=True)
class Hints:
    """What config.json and ckptgrow.json say of the growth; either may be missing, stale or wrong.

    `said` has the base's values of config keys, `widths` the base's widths by block; only of keys that have grown.
    """

    said: Mapping[str, Any]
    widths: Mapping[str, int]
    manifest: Manifest | None

    def partners(self, mlp: Mlp) -> Indices:
        """For each unit the base unit that it is said to copy, -1 where nothing is said: of the base's own."""
        partners, base = np.full(mlp.width, -1), self.widths.get(mlp.block)
        if base is None:
            return partners
        partners[base:] = np.arange(base, mlp.width) % base
        for block in self.manifest.blocks if self.manifest else ():
            if (block.block, block.old_width, block.new_width) == (mlp.block, base, mlp.width):
                _note(partners, block.copies, base)
        return partners


def _note(partners: Indices, copies: Iterable[Mapping[str, tuple[int, int]]], base_width: int) -> None:
    for run in copies:
        (start, stop), (first, last) = run["new"], run["base"]
        if base_width <= start <= stop <= len(partners) and 0 <= first <= last <= base_width:
            partners[start:stop] = np.arange(first, first + stop - start) % base_width


def hints_of(trained: Checkpoint, architecture: Architecture) -> Hints:
    """The base's widths by config.json, and the manifest where one lies in the folder and can be read."""
    entry: Any = trained.config.get(CONFIG_KEY)
    told = entry.get("base_width") if isinstance(entry, Mapping) else None
    values: Mapping[str, Any] = told if isinstance(told, Mapping) else {}
    try:
        manifest = load_manifest(trained.folder) if (trained.folder / MANIFEST).is_file() else None
    except CkptgrowError:
        manifest = None
    before = {block.block: block.old_width for block in manifest.blocks} if manifest else {}
    said: dict[str, Any] = {}
    found: dict[str, int] = {}
    for group in architecture.groups:
        value = values.get(group.path)
        widths = {mlp.block: _told(group, value, mlp) for mlp in group.mlps}
        if value is None:
            widths = {mlp.block: before.get(mlp.block, mlp.width) for mlp in group.mlps}
        whole = {block: int(width) for block, width in widths.items() if width is not None and width == int(width)}
        fits = [0 < whole.get(mlp.block, 0) <= mlp.width for mlp in group.mlps]
        if all(fits) and any(whole[mlp.block] < mlp.width for mlp in group.mlps):
            found |= whole
            whole_key = not group.site.entry or group.beside(value) == group.beside(group.says)
            said |= {group.path: value} if value is not None and whole_key else {}
    return Hints(said, found, manifest)


def _told(group: Group, value: Any, mlp: Mlp) -> float | None:
    """What a value of the group's key says of an MLP, None where that is nothing."""
    try:
        return group.told({group.path: value}, mlp)
    except (ArithmeticError, ValueError):  # not a finite number
        return None


# ---------------------------------------------------------------- the Plan


def fold(
    infos: Mapping[str, TensorInfo],
    architecture: Architecture,
    made: Mapping[str, Sequence[Recipes]],
    widths: Mapping[str, int],
    hints: Hints,
) -> Plan:
    """The Plan in which each MLP has the width of its block, and each of its experts units made by its recipes
    (METHOD.md 5). A key that gets the base's widths again says what it said in the base."""
    folded = {
        name: _folded(infos[name], mlp, slot, made[mlp.block])
        for mlp in architecture.mlps
        for name, slot in mlp.tensors.items()
    }
    outputs = tuple(folded.get(name) or unchanged(info, TRAINED) for name, info in infos.items())
    edits: dict[str, Any] = {}
    for group in architecture.groups:
        if any(widths[mlp.block] != mlp.width for mlp in group.mlps):
            edits |= group.edits(widths)
            if all(widths[mlp.block] == hints.widths.get(mlp.block) for mlp in group.mlps):
                edits |= {group.path: hints.said.get(group.path, edits[group.path])}
    return Plan(outputs, tuple(Edit(path, value) for path, value in edits.items()))


def widened(plan: Plan, names: Iterable[str], trained: Checkpoint, architecture: Architecture) -> Plan:
    """The same Plan with these tensors in float32, and a config that says so.

    A loader that takes its dtype from there must not round the sums after all.
    """
    wanted, outputs = set(names), plan.outputs
    outputs = tuple(replace(output, dtype=FLOAT32) if output.name in wanted else output for output in outputs)
    scope = architecture.groups[0].site.scope
    nested = scoped(trained.config, scope, architecture.family)
    found = [(key, trained.config) for key in ("dtype", "torch_dtype")]
    found += [(f"{scope}.{key}", nested) for key in ("dtype", "torch_dtype") if scope]
    edits = (Edit(path, "float32") for path, config in found if isinstance(config.get(path.rpartition(".")[2]), str))
    return Plan(outputs, (*plan.config, *edits))


def texts(
    text: str, plan: Plan, manifest: Manifest | None, architecture: Architecture | None = None
) -> tuple[str, str | None]:
    """(config.json, ckptgrow.json) of the result: without the growth that `manifest` tells of, with the one before it.

    Where the base's own config says the same, it is that text.
    """
    text = edited(without(text, CONFIG_KEY), plan.config)
    if manifest is None or architecture is None:
        return text, None
    try:
        was = json.loads(manifest.base.config)
        entry = was.pop(CONFIG_KEY, None)
        told = [Edit(path, value) for path, value in (manifest.recast or {}).items()]
        told += [edit for edit in plan.config if edit.path in width_keys(architecture)]
        bare = edited(without(manifest.base.config, CONFIG_KEY), told)
    except (CkptgrowError, ValueError, AttributeError):
        return text, None
    if json.loads(bare) == json.loads(text):
        text = manifest.base.config
    elif entry is not None:
        text = set_value(text, CONFIG_KEY, entry)
    before = previous(manifest)
    known = before is not None and isinstance(entry, dict) and entry.get("manifest") == before.digest
    return text, before.text() if known and before is not None else None


def every_recipe(chosen: Iterable[tuple[Redundancy, Merges]]) -> dict[tuple[str, int | None], Recipes]:
    """The recipes of each MLP and expert; those whose units go the same way share them."""
    known: dict[Hashable, Recipes] = {}
    made = {}
    for one, merges in chosen:
        told = (*(array.tobytes() for array in (merges.into, merges.scale, merges.through_up)), *merges.spread.items())
        made[one.mlp.block, one.expert] = known.get(told) or known.setdefault(told, recipes(merges))
    return made


def recipes(merges: Merges) -> Recipes:
    """For each unit that stays what its column of down, its row of up, and its other rows are made of."""
    added: dict[tuple[bool, int], list[tuple[int, float]]] = defaultdict(list)
    for unit in merges.go.tolist():
        into, way = int(merges.into[unit]), bool(merges.through_up[unit])
        once = ((into, float(merges.scale[unit])),) if into != DEAD else ()
        for target, factor in merges.spread[unit] if into == SPREAD else once:
            added[way, target].append((unit, factor))
    stay = merges.stay.tolist()
    down, up = ([((unit, WHOLE), *added[way, unit]) for unit in stay] for way in (False, True))
    return {"down": down, "up": up, "gate": [((unit, WHOLE),) for unit in stay]}


def _folded(info: TensorInfo, mlp: Mlp, slot: Slot, made: Sequence[Recipes]) -> Output:
    """One tensor of an MLP, narrowed: of a stack each expert's slices, of a flat one its lane, by its own recipes."""

    def laid(expert: int | None, recipes: Recipes) -> tuple[Part, ...]:
        lanes = (_placed(mlp, slot, lane, recipes) for lane in mlp.lanes(info.name, expert))
        return tuple(part for lane in lanes for part in _parts(info.name, lane))

    if slot.flat:
        parts = tuple(part for expert, recipes in enumerate(made) for part in laid(expert, recipes))
        size = sum(part.size for part in parts)
    else:
        outer = info.around(slot.axis)[0]
        each = outer // len(made)
        alike = [(recipes, [*experts]) for recipes, experts in groupby(range(len(made)), key=made.__getitem__)]
        runs = [(range(own[0] * each, (own[-1] + 1) * each), laid(None, recipes)) for recipes, own in alike]
        parts = in_slices(runs, outer)
        size = sum(part.size for part in runs[0][1])
    shape = tuple(size if axis == slot.axis else extent for axis, extent in enumerate(info.shape))
    return Output(info.name, info.dtype, shape, slot.axis, parts, mlp.member(info.name))


def _placed(mlp: Mlp, slot: Slot, lane: int, recipes: Recipes) -> list[Recipe]:
    """The recipe of every place of a lane: a unit may have several, of one projection or of several in turn."""
    each = int(slot.places * mlp.grain)
    first = lane * (mlp.width // mlp.grain) * each
    woven = slot.lanes[lane].split("_") if slot.span > 1 else [slot.lanes[lane]]
    roles = ["gate" if slot.coded or role == "norm" else role for role in woven]
    return [
        tuple((first + unit * each + place, factor) for unit, factor in recipes[roles[place % len(roles)]][i])
        for i in range(len(recipes["gate"]))
        for place in range(each)
    ]


def _parts(name: str, made: list[Recipe]) -> Iterator[Part]:
    """Neighbours that are sums of equally many are one part."""
    for _, run in groupby(made, key=len):
        yield _part(name, list(run))


def _part(name: str, run: list[Recipe]) -> Part:
    terms = (
        Term(TRAINED, name, _picked([place for place, _ in turn]), _scale([factor for _, factor in turn]))
        for turn in zip(*run, strict=True)
    )
    return Part(len(run), tuple(terms))


def _scale(factors: list[float]) -> float | tuple[float, ...]:
    return factors[0] if len(set(factors)) == 1 else tuple(factors)


def _picked(units: list[int]) -> Units:
    """A range where the units follow one another."""
    whole = range(units[0], units[0] + len(units))
    return whole if units == list(whole) else tuple(units)
