"""fold as a Plan: the units that stay, in their order, with the columns or rows of those that go added to them.

Nothing is taken from a manifest but hints, which the weights have to bear out: how wide the base was, and which unit
each new one copies, so that of several exact ways the one is taken that gives the base back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ckptgrow.checkpoint import MANIFEST, Checkpoint
from ckptgrow.errors import CkptgrowError
from ckptgrow.families import Architecture, Mlp, Slot
from ckptgrow.manifest import CONFIG_KEY, Manifest, load_manifest
from ckptgrow.plan import Edit, Output, Part, Plan, Term, Units, unchanged
from ckptgrow.redundancy import DEAD, Merges
from ckptgrow.tensors import TensorInfo
from ckptgrow.units import Units as Indices

TRAINED = "trained"
Recipe = tuple[tuple[int, float], ...]  # (unit, factor): what is added up
WHOLE = 1.0


# ---------------------------------------------------------------- hints


@dataclass(frozen=True, slots=True)
class Hints:
    """What config.json and ckptgrow.json say of the growth; either may be missing, stale or wrong."""

    base_width: int | None
    manifest: Manifest | None

    def partners(self, mlp: Mlp) -> Indices:
        """For each unit the base unit that it is said to copy, -1 where nothing is said: of the base's own."""
        partners = np.full(mlp.width, -1)
        if self.base_width is None:
            return partners
        partners[self.base_width :] = np.arange(self.base_width, mlp.width) % self.base_width
        for block in self.manifest.blocks if self.manifest else ():
            if (block.block, block.old_width, block.new_width) == (mlp.block, self.base_width, mlp.width):
                _note(partners, block.copies, self.base_width)
        return partners


def _note(partners: Indices, copies: Iterable[Mapping[str, tuple[int, int]]], base_width: int) -> None:
    for run in copies:
        (start, stop), (first, last) = run["new"], run["base"]
        if base_width <= start <= stop <= len(partners) and 0 <= first <= last <= base_width:
            partners[start:stop] = np.arange(first, first + stop - start) % base_width


def hints_of(trained: Checkpoint, architecture: Architecture) -> Hints:
    """The base's width by config.json, and the manifest where one lies in the folder and can be read."""
    entry: Any = trained.config.get(CONFIG_KEY)
    widths = entry.get("base_width") if isinstance(entry, Mapping) else None
    told = widths.get(architecture.width_path) if isinstance(widths, Mapping) else None
    try:
        manifest = load_manifest(trained.folder) if (trained.folder / MANIFEST).is_file() else None
    except CkptgrowError:
        manifest = None
    if told is None and manifest and manifest.blocks:
        told = manifest.blocks[0].old_width
    fits = type(told) is int and 0 < told < architecture.width
    return Hints(told if fits else None, manifest)


# ---------------------------------------------------------------- the Plan


def fold(infos: Mapping[str, TensorInfo], architecture: Architecture, chosen: Mapping[str, Merges], width: int) -> Plan:
    """The Plan that carries out these merges (by block), which leave `width` units in each MLP (METHOD.md 5)."""
    made: dict[str, Output] = {}
    for mlp in architecture.mlps:
        down, up, rows = _recipes(chosen[mlp.block])
        for name, slot in mlp.tensors.items():
            made[name] = _folded(infos[name], mlp, slot, {"down": down, "up": up}, rows)
    outputs = tuple(made.get(name) or unchanged(info, TRAINED) for name, info in infos.items())
    return Plan(outputs, (Edit(architecture.width_path, width),))


def widened(plan: Plan, names: Iterable[str], dtype: str) -> Plan:
    """The same Plan with these tensors in another dtype."""
    wanted = set(names)
    return replace(plan, outputs=tuple(replace(o, dtype=dtype) if o.name in wanted else o for o in plan.outputs))


def _recipes(merges: Merges) -> tuple[list[Recipe], list[Recipe], list[Recipe]]:
    """For each unit that stays what its column of down, its row of up, and its other rows are made of."""
    added: dict[tuple[bool, int], list[tuple[int, float]]] = defaultdict(list)
    for unit in merges.go.tolist():
        if merges.into[unit] != DEAD:
            added[bool(merges.through_up[unit]), int(merges.into[unit])].append((unit, float(merges.scale[unit])))
    stay = merges.stay.tolist()
    down, up = ([((unit, WHOLE), *added[way, unit]) for unit in stay] for way in (False, True))
    return down, up, [((unit, WHOLE),) for unit in stay]


def _folded(info: TensorInfo, mlp: Mlp, slot: Slot, recipes: Mapping[str, list[Recipe]], rows: list[Recipe]) -> Output:
    """One tensor of an MLP, narrowed."""
    parts = tuple(
        part for i, lane in enumerate(slot.lanes) for part in _parts(info.name, recipes.get(lane, rows), i * mlp.width)
    )
    size = len(rows) * len(slot.lanes)
    shape = tuple(size if axis == slot.axis else extent for axis, extent in enumerate(info.shape))
    return Output(info.name, info.dtype, shape, slot.axis, parts, mlp.member(info.name))


def _parts(name: str, recipes: list[Recipe], offset: int) -> Iterator[Part]:
    """Neighbours that are made in the same way are one part."""
    run: list[Recipe] = []
    for recipe in recipes:
        if run and _factors(recipe) != _factors(run[0]):
            yield _part(name, run, offset)
            run = []
        run.append(recipe)
    if run:
        yield _part(name, run, offset)


def _factors(recipe: Recipe) -> tuple[float, ...]:
    return tuple(factor for _, factor in recipe)


def _part(name: str, run: list[Recipe], offset: int) -> Part:
    terms = (
        Term(TRAINED, name, _picked([offset + recipe[i][0] for recipe in run]), factor)
        for i, factor in enumerate(_factors(run[0]))
    )
    return Part(len(run), tuple(terms))


def _picked(units: list[int]) -> Units:
    """A range where the units follow one another."""
    whole = range(units[0], units[0] + len(units))
    return whole if units == list(whole) else tuple(units)
