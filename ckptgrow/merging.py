"""Several skills of one base in one model (METHOD.md 6): per MLP f = base + Σ λᵢ·(grownᵢ - base). Pure: Plans only.

Units whose rows a skill left as the base's are not doubled: their columns are added up in the base's own units, with
the coefficient (1 - Σ λᵢ) + Σ λᵢ·sᵢ, where sᵢ is the share of the column that skill i's frozen original keeps. With
even shares that is 1 - ½·Σ λᵢ. Where it is zero for all units of an MLP they are left out, so two skills at λ = 1 are
no wider than one. Behind them lie the units that are each skill's own, their columns times λᵢ. An MLP that needs fewer
units than the widest is filled up with copies of the base's units whose columns are zero (METHOD.md 7).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

from ckptgrow.errors import RequestError
from ckptgrow.families import Architecture, Group, Mlp
from ckptgrow.inversion import HALF
from ckptgrow.plan import Edit, Output, Part, Plan, Share, Term, unchanged
from ckptgrow.surgery import BASE, rounds
from ckptgrow.tensors import TensorInfo


@dataclass(frozen=True)
class Ingredient:
    """One skill: the outputs of its trained checkpoint, its weight, and whether the halves of its growth are exact.

    `moved_rows` names the MLPs of which it trained the base's own rows of gate or up.
    """

    outputs: Mapping[str, Output]
    weight: Fraction
    exact_halves: bool
    moved_rows: frozenset[str]

    def first(self, mlp: Mlp) -> int:
        """The first unit that is the skill's own and not the base's."""
        return 0 if mlp.block in self.moved_rows else mlp.width


def merge(infos: Mapping[str, TensorInfo], architecture: Architecture, skills: Sequence[Ingredient]) -> Plan:
    """The Plan of the merged checkpoint; skills with weight 0 take no part. Raises RequestError for what has none."""
    live = [skill for skill in skills if skill.weight]
    made: dict[str, Output] = {}
    edits: list[Edit] = []
    for group in architecture.groups:
        _check_group(architecture, group)
        kept = {mlp.block: _is_kept(mlp, infos, live) for mlp in group.mlps}
        needed = {
            mlp.block: kept[mlp.block] * mlp.width + sum(_own(mlp, skill) for skill in live) for mlp in group.mlps
        }
        width = max(needed.values())
        if width == group.width and all(kept.values()) and not any(_own(m, s) for m in group.mlps for s in live):
            continue
        edits += [Edit(*edit) for edit in group.edits(dict.fromkeys(needed, width)).items()]
        for mlp in group.mlps:
            for name in mlp.tensors:
                made[name] = _merged(mlp, infos[name], live, kept[mlp.block], width)
    return Plan(tuple(made.get(name) or unchanged(info, BASE) for name, info in infos.items()), tuple(edits))


def _check_group(architecture: Architecture, group: Group) -> None:
    """Raise RequestError where an MLP is no sum over its units, or not all have one width."""
    for mlp in group.mlps:
        if architecture.family.statistics or mlp.site.template.normed:
            raise RequestError(
                "it takes statistics over its units, so it is no sum that could be merged", tensor=mlp.block
            )
        if mlp.grain > 1 or any(slot.extra or slot.coded for slot in mlp.tensors.values()):
            raise RequestError(
                "scaled blocks and adapters cannot be merged: merge the plain checkpoints", tensor=mlp.block
            )
    if not group.uniform or group.site.listed:
        raise RequestError("its MLPs have several widths: merging gives one", tensor=group.mlps[0].block)


def _own(mlp: Mlp, skill: Ingredient) -> int:
    """How many units of an MLP are a skill's own."""
    output = skill.outputs[mlp.down]
    if not output.grown():
        return 0
    places = output.extent // output.lane_count
    return int(places / mlp.tensors[mlp.down].places) - skill.first(mlp)


def _is_kept(mlp: Mlp, infos: Mapping[str, TensorInfo], skills: Sequence[Ingredient]) -> bool:
    """Whether any of the base's own units has a column left."""
    return any(
        part.terms
        for name, slot in mlp.tensors.items()
        if slot.shared
        for lane in range(len(slot.lanes))
        for part in _columns(mlp, infos[name], lane, skills)
    )


def _merged(mlp: Mlp, info: TensorInfo, skills: Sequence[Ingredient], kept: bool, width: int) -> Output:
    """One tensor: in each lane the base's units, each skill's own, and the filling."""
    slot = mlp.tensors[info.name]
    old, new = (int(units * slot.places) for units in (mlp.width, width))
    parts: list[Part] = []
    for lane in range(len(slot.lanes)):
        mine: list[Part] = []
        if kept and slot.shared:
            mine += _columns(mlp, info, lane, skills)
        elif kept:
            mine.append(Part(old, (Term(BASE, info.name, range(lane * old, (lane + 1) * old)),)))
        for skill in skills:
            mine += _tail(skill, info.name, lane, int(skill.first(mlp) * slot.places), slot.shared)
        free = new - sum(part.size for part in mine)
        for units in rounds(old, old + free):
            source = range(lane * old + units.start, lane * old + units.stop)
            mine.append(Part(len(units), () if slot.shared else (Term(BASE, info.name, source),)))
        parts += mine
    shape = tuple(new * len(slot.lanes) if axis == slot.axis else size for axis, size in enumerate(info.shape))
    return Output(info.name, info.dtype, shape, slot.axis, tuple(parts), mlp.member(info.name))


def _lane(output: Output, lane: int) -> Iterator[tuple[int, Part]]:
    """The parts of one lane, each with the place in the lane where it begins."""
    extent = output.extent // output.lane_count
    for start, part in output.placed():
        if part.size and lane * extent <= start < (lane + 1) * extent:
            yield start - lane * extent, part


def _tail(skill: Ingredient, name: str, lane: int, first: int, shared: bool) -> Iterator[Part]:
    """A skill's own units, from place `first` of the lane on; columns of down times its weight."""
    output = skill.outputs[name]
    if not output.grown():
        return
    for start, part in _lane(output, lane):
        if start >= first:
            terms = tuple(_scaled(term, skill.weight) for term in part.terms) if shared else part.terms
            yield replace(part, terms=terms, grown=True)


def _scaled(term: Term, weight: Fraction) -> Term:
    if not isinstance(term.scale, float):
        raise RequestError("its skill has a scale for each unit, which cannot be merged", tensor=term.name)
    return replace(term, scale=float(Fraction(term.scale) * weight))


def _columns(mlp: Mlp, info: TensorInfo, lane: int, skills: Sequence[Ingredient]) -> list[Part]:
    """The columns of the base's own units in one lane of down: nothing where they cancel."""
    slot = mlp.tensors[info.name]
    old = int(mlp.width * slot.places)
    pieces = [[*_originals(skill, info.name, lane, old)] for skill in skills if skill.first(mlp)]
    weights = [(skill.weight, skill.exact_halves) for skill in skills if skill.first(mlp)]
    edges = sorted({0, old, *(edge for own in pieces for start, part in own for edge in (start, start + part.size))})
    rest = 1 - sum((skill.weight for skill in skills), Fraction(0))
    parts = []
    for low, high in pairwise(edges):
        units = range(lane * old + low, lane * old + high)
        shares = [
            next(part.terms[0].share for start, part in own if start <= low < start + part.size) for own in pieces
        ]
        parts.append(Part(high - low, tuple(_sum(info.name, units, rest, shares, weights))))
    return parts


def _originals(skill: Ingredient, name: str, lane: int, old: int) -> Iterator[tuple[int, Part]]:
    """What a skill's frozen originals keep of the base's columns, stretch by stretch."""
    output = skill.outputs[name]
    for start, part in _lane(output, lane):
        if start < old:
            term = part.terms[0] if len(part.terms) == 1 else None
            if term is None or term.source != BASE or term.scale != 1.0:
                raise RequestError("the columns of its original units trained, which cannot be merged", tensor=name)
            yield start, part


def _sum(
    name: str,
    units: range,
    rest: Fraction,
    shares: Sequence[Share | None],
    weights: Sequence[tuple[Fraction, bool]],
) -> Iterator[Term]:
    """(1 - Σ λ)·W + Σ λᵢ·(share of W), with what is a plain multiple of W put into one term."""
    known, others = rest, []
    for share, (weight, exact_halves) in zip(shares, weights, strict=True):
        if share is None:
            known += weight
        elif share == HALF and exact_halves:
            known += weight / 2
        else:
            others.append(Term(BASE, name, units, float(weight), share))
    if known:
        yield Term(BASE, name, units, float(known))
    yield from others
