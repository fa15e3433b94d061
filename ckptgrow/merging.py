"""Several skills of one base in one model (METHOD.md 6): per MLP f = base + Σ λᵢ·(grownᵢ - base). Pure: Plans only.

Units whose rows a skill left as the base's are not doubled: their columns are added up in the base's own units, with
the coefficient (1 - Σ λᵢ) + Σ λᵢ·sᵢ, where sᵢ is the share of the column that skill i's frozen original keeps. With
even shares that is 1 - ½·Σ λᵢ. Where it is zero for all units of an MLP they are left out, so two skills at λ = 1 are
no wider than one. Behind them lie the units that are each skill's own, their columns times λᵢ.

A skill adds nothing to an MLP that it did not grow, so the sums are those of the skills that did: skills of other
layers, towers or experts meet nowhere. What one skill alone grew, at λ = 1, is that skill's MLP as it is, and this is
all that can be had where an MLP is no sum over its units. One that needs fewer units than its config key says is filled
up with copies of the base's units whose columns are zero (METHOD.md 7), or where it is no sum with all its own again.
Where the key is a list each has its own width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import cycle, pairwise

from ckptgrow.errors import CkptgrowError, RequestError
from ckptgrow.families import Architecture, Group, Mlp
from ckptgrow.inversion import HALF
from ckptgrow.plan import Edit, Output, Part, Plan, Share, Term, in_slices, unchanged
from ckptgrow.proof import experts_of
from ckptgrow.surgery import BASE
from ckptgrow.tensors import TensorInfo


@dataclass(frozen=True)
class Ingredient:
    """One skill: the outputs of its trained checkpoint, its weight, and whether the halves of its growth are exact.

    `moved_rows` names the MLPs of which it trained the base's own rows of gate or up. With `expert` it is what that one
    of the experts in an MLP's tensors has.
    """

    outputs: Mapping[str, Output]
    weight: Fraction
    exact_halves: bool
    moved_rows: frozenset[str]
    expert: int | None = None

    def apart(self, mlp: Mlp) -> dict[int | None, Ingredient]:
        """The same for each expert in the MLP's tensors; under None where all of them are alike."""
        flat = any(slot.flat for slot in mlp.tensors.values())
        return {
            expert: replace(self, outputs=own, expert=expert)
            for experts, own in experts_of(self.outputs, mlp)
            for expert in (mlp.numbers if flat else experts)
        }

    def grew(self, mlp: Mlp) -> bool:
        """Whether it has units of its own in that MLP."""
        output = self._any(mlp)
        if output.member is None:
            return False
        lanes = [*output.lanes()]
        own = [lanes[i] for i in mlp.lanes(output.name, self.expert)]
        return any(start < b and a < stop for _, start, stop in own for a, b in output.grown())

    def first(self, mlp: Mlp) -> int:
        """The first unit that is the skill's own and not the base's."""
        return 0 if mlp.block in self.moved_rows else mlp.width

    def width(self, mlp: Mlp) -> int:
        """How many units the MLP has in the trained checkpoint."""
        output = self._any(mlp)
        return int(output.extent // output.lane_count / mlp.tensors[output.name].places)

    def _any(self, mlp: Mlp) -> Output:
        return self.outputs[next(iter(mlp.tensors))]


@dataclass(frozen=True)
class _Mix:
    """One MLP, or an expert in its tensors, and the skills that grew it; `rigid`: it is no sum over its units."""

    mlp: Mlp
    infos: Mapping[str, TensorInfo]
    skills: tuple[Ingredient, ...]
    rigid: bool
    expert: int | None

    @property
    def alone(self) -> bool:
        """Whether it is one skill's MLP as it is."""
        return len(self.skills) == 1 and self.skills[0].weight == 1

    @cached_property
    def kept(self) -> bool:
        """Whether any of the base's own units has a column left."""
        return any(
            part.terms
            for name, slot in self.mlp.tensors.items()
            if slot.shared
            for lane in self.mlp.lanes(name, self.expert)
            for part in _columns(self.mlp, self.infos[name], lane, self.skills)
        )

    def needed(self, kept: bool) -> int:
        """How many units it has without filling."""
        if self.alone:
            return self.skills[0].width(self.mlp)
        return kept * self.mlp.width + sum(skill.width(self.mlp) - skill.first(self.mlp) for skill in self.skills)


def merge(infos: Mapping[str, TensorInfo], architecture: Architecture, skills: Sequence[Ingredient]) -> Plan:
    """The Plan of the merged checkpoint; skills with weight 0 take no part. Raises RequestError for what has none."""
    made: dict[str, Output] = {}
    edits = [*architecture.retold]
    for group in architecture.groups:
        mixes = [mix for mlp in group.mlps for mix in _mixes(mlp, infos, skills, architecture)]
        if not any(mix.skills for mix in mixes):
            continue
        # an expert without down has no column to tell: it keeps step with the others, whose rows a loader stacks
        spare = any(mix.kept for mix in mixes)
        kept = [mix.kept if mix.mlp.down else spare for mix in mixes]
        needed: dict[str, int] = {}
        for mix, own in zip(mixes, kept, strict=True):
            needed[mix.mlp.block] = max(mix.needed(own), needed.get(mix.mlp.block, 0))
        widths = _widths(group, mixes, needed)
        edits += [Edit(*edit) for edit in group.edits(widths).items()]
        for mlp in group.mlps:
            mine = [(mix, own) for mix, own in zip(mixes, kept, strict=True) if mix.mlp is mlp]
            changes = any(mix.skills for mix, _ in mine) or widths[mlp.block] != mlp.width
            for name in mlp.tensors if changes else ():
                made[name] = _merged(mine, infos[name], mlp, widths[mlp.block])
    return Plan(tuple(made.get(name) or unchanged(info, BASE) for name, info in infos.items()), tuple(edits))


def _mixes(
    mlp: Mlp, infos: Mapping[str, TensorInfo], skills: Sequence[Ingredient], architecture: Architecture
) -> Iterator[_Mix]:
    """The MLP, or where a skill did not grow all experts in its tensors alike each expert by itself."""
    rigid = architecture.family.statistics or mlp.site.template.normed
    apart = [skill.apart(mlp) for skill in skills if skill.weight]
    for expert in next((mlp.numbers for own in apart if None not in own), (None,)):
        own = [those[expert] if expert in those else those[None] for those in apart]
        mix = _Mix(mlp, infos, tuple(skill for skill in own if skill.grew(mlp)), rigid, expert)
        if rigid and mix.skills and not mix.alone:
            raise RequestError(
                "it takes statistics over its units, so it is no sum that could be merged",
                tensor=mlp.block,
                hint="Only one skill can have it, with weight 1.",
            )
        yield mix


def _widths(group: Group, mixes: Sequence[_Mix], needed: Mapping[str, int]) -> dict[str, int]:
    """The width of each MLP, by block: what it needs where the key is a list, else the least that the key can say."""
    if group.site.listed:
        return dict(needed)
    least = max(math.ceil(Fraction(needed[mlp.block] * group.width, mlp.width)) for mlp in group.mlps)
    rigid = [needed[mix.mlp.block] for mix in mixes if mix.rigid]
    step = math.lcm(group.grain, *rigid)
    first = -(-least // step) * step
    for width in range(first, first + step * (max(mlp.hidden for mlp in group.mlps) + 9), step):
        try:
            widths = {mlp.block: group.widened(mlp, group.width, width) for mlp in group.mlps}
            group.edits(widths)
        except CkptgrowError:
            continue
        if all(widths[mix.mlp.block] % needed[mix.mlp.block] == 0 for mix in mixes if mix.rigid):
            return widths
    raise RequestError(f"{group.path} cannot say a width of {least:,} units or some more", tensor=group.mlps[0].block)


def _merged(mixes: Sequence[tuple[_Mix, bool]], info: TensorInfo, mlp: Mlp, width: int) -> Output:
    """One tensor: what each expert in it, with the base's own units or without them, has in its slices or lanes."""
    slot = mlp.tensors[info.name]
    made, parts = [_units(mix, info.name, kept, width) for mix, kept in mixes], tuple[Part, ...]()
    if slot.flat:
        parts = tuple(part for own in made for part in own)
    else:
        outer = info.around(slot.axis)[0]
        each = outer // len(made)
        parts = in_slices(((range(i * each, (i + 1) * each), own) for i, own in enumerate(made)), outer)
    lane = int(width * slot.places)
    shape = tuple(lane * len(slot.lanes) if axis == slot.axis else size for axis, size in enumerate(info.shape))
    return Output(info.name, info.dtype, shape, slot.axis, parts, mlp.member(info.name))


def _units(mix: _Mix, name: str, kept: bool, width: int) -> tuple[Part, ...]:
    """In each lane the base's units, each skill's own, and the filling."""
    mlp, info, slot = mix.mlp, mix.infos[name], mix.mlp.tensors[name]
    old, new = (int(units * slot.places) for units in (mlp.width, width))
    parts: list[Part] = []
    for lane in mlp.lanes(name, mix.expert):
        mine: list[Part] = []
        rows = [Part(old, (Term(BASE, name, range(lane * old, (lane + 1) * old)),))]
        if mix.alone:
            mine += _taken(mix.skills[0], name, lane, int(mix.skills[0].first(mlp) * slot.places))
        elif kept:
            mine += _columns(mlp, info, lane, mix.skills) if slot.shared else rows
        for skill in mix.skills if not mix.alone else ():
            mine += _tail(skill, name, lane, int(skill.first(mlp) * slot.places), slot.shared)
        free = new - sum(part.size for part in mine)
        filling = [Part(free)] if slot.shared else _again(mine if mix.rigid else rows, free)
        parts += [*mine, *(filling if free else ())]
    return tuple(parts)


def _again(parts: Sequence[Part], size: int) -> Iterator[Part]:
    """These rows, in rounds, until `size` places are full. They train nothing."""
    for part in cycle(part for part in parts if part.size):
        taken = min(size, part.size)
        yield Part(taken, tuple(replace(term, units=term.units[:taken]) for term in part.terms))
        size -= taken
        if not size:
            return


def _lane(output: Output, lane: int) -> Iterator[tuple[int, Part]]:
    """The parts of one lane, each with the place in the lane where it begins."""
    extent = output.extent // output.lane_count
    for start, part in output.placed():
        if part.size and lane * extent <= start < (lane + 1) * extent:
            yield start - lane * extent, part


def _taken(skill: Ingredient, name: str, lane: int, first: int) -> Iterator[Part]:
    """All of a skill's units, its own marked as such from place `first` of the lane on."""
    for start, part in _lane(skill.outputs[name], lane):
        yield replace(part, grown=start >= first)


def _tail(skill: Ingredient, name: str, lane: int, first: int, shared: bool) -> Iterator[Part]:
    """A skill's own units; columns of down times its weight."""
    for part in _taken(skill, name, lane, first):
        if part.grown:
            terms = tuple(_scaled(term, skill.weight) for term in part.terms) if shared else part.terms
            yield replace(part, terms=terms)


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
