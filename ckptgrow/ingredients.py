"""Growths as ingredients of a merge, and the merge made again from what its manifest says of them.

A merge's manifest has, of each skill, the options of its growth and its weight. With the base's description that is all
its Plan follows from, so that it can be read backwards as a growth can (inversion.py); what the skills learned is not
in it, and not needed. Nothing here reads a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from ckptgrow.errors import CkptgrowError, FormatError, RequestError
from ckptgrow.families import Architecture, Group, Mlp
from ckptgrow.lineage import Past, made_again, recall
from ckptgrow.manifest import EXPAND, MERGE, Manifest, Trainable, growth_from, previous
from ckptgrow.merging import Ingredient, merge
from ckptgrow.plan import Plan
from ckptgrow.policy import POLICIES, boxes
from ckptgrow.surgery import BASE, Growth

SKILL = "skill"
POLICY = "g-freeze"  # of what is merged: all that is the skills' trains


def source_of(i: int) -> str:
    """What the Plan of a merge calls its skills."""
    return f"{SKILL}{i}"


def ingredient(past: Past, weight: Fraction, source: str) -> Ingredient:
    """A growth as it goes into a merge."""
    outputs = past.spliced(source).named
    return Ingredient(outputs, weight, past.manifest.inexact_halves == 0, moved_rows(past))


def moved_rows(past: Past) -> frozenset[str]:
    """The MLPs of which it trains the base's own rows of gate or up."""
    return frozenset(mlp.block for mlp in past.architecture.mlps if _moves_rows(past, mlp))


def _moves_rows(past: Past, mlp: Mlp) -> bool:
    for name, slot in mlp.tensors.items():
        division = past.trained.get(name)
        if slot.shared or division is None:
            continue
        old = int(mlp.width * slot.places)
        lane = division.extent // len(slot.lanes)
        starts = [i * lane for i in range(len(slot.lanes))]
        if any(at.start < start + old and start < at.stop for start in starts for at in division.trained):
            return True
    return False


def union(pasts: Sequence[Past], names: Sequence[str]) -> Architecture:
    """All MLPs that any of them grew. Raises RequestError where they do not read the base as the same family."""
    first = pasts[0].architecture
    _check_told(pasts, names)
    groups: dict[str, Group] = {}
    for past, name in zip(pasts, names, strict=True):
        shared = (g for g in past.architecture.groups if groups.setdefault(g.path, g).mlps != g.mlps)
        if past.architecture.family != first.family or any(shared):
            raise RequestError(f"it was grown by another declaration of the family than {names[0]}", file=name)
    return replace(first, groups=tuple(groups.values()))


def _check_told(pasts: Sequence[Past], names: Sequence[str]) -> None:
    """Raise RequestError where one was given a width for each layer in another family's words and another was not."""
    told = [past.architecture.recast for past in pasts]
    if any(told) and not all(told):
        native, plain = next(n for n, t in zip(names, told, strict=True) if t), names[told.index(())]
        raise RequestError(
            f"its layers have one width, and those of {native} have widths of their own",
            file=plain,
            hint="Grow both with --uneven native, or neither.",
        )


def check_shareable(past: Past) -> None:
    """Raise RequestError where a merge has more of its skills in it than what trains: filling that repeats theirs."""
    for output in past.spliced(SKILL).outputs:
        for term in (term for part in output.parts for term in part.terms):
            if term.source not in (BASE, SKILL):
                raise RequestError(
                    "its filling repeats units of a skill, which are in no box, so they would be lost",
                    tensor=output.name,
                    hint="Share the skills that were merged.",
                )


def trainable(plan: Plan) -> Iterator[Trainable]:
    """What trains in a merge: the skills' own units."""
    for output in plan.outputs:
        found = boxes(output, POLICIES[POLICY]) if output.member else ()
        if output.member and found:
            yield Trainable(output.name, output.member.role, output.member.layer, output.shape, output.dtype, found)


# ---------------------------------------------------------------- made again


def pasts(manifest: Manifest, file: str, *, every: bool) -> tuple[Past, ...]:
    """The growths and merges to undo, the last one first: that one, or all.

    Raises RequestError where the manifest of an earlier one is lost.
    """
    found = [recalled(manifest, file)]
    while every and found[-1].manifest.history:
        earlier = previous(found[-1].manifest)
        if earlier is None:
            raise RequestError("of an earlier growth only the digest is known, so it cannot be undone", file=file)
        found.append(recalled(earlier, file))
    return tuple(found)


def recalled(manifest: Manifest, file: str) -> Past:
    """The growth or the merge that a manifest describes. Raises FormatError where it does not say enough."""
    if manifest.operation != MERGE:
        return recall(manifest, file)
    try:
        skills = [(_skill(manifest, told, file), Fraction(told["fraction"])) for told in manifest.skills]
        architecture = union([past for past, _ in skills], [file] * len(skills))
        mixed = (ingredient(past, weight, source_of(i)) for i, (past, weight) in enumerate(skills))
        plan = merge(skills[0][0].base.infos, architecture, list(mixed))
        told = [(t.name, t.shape, t.boxes) for t in manifest.trainable]
        again = [(t.name, t.shape, t.boxes) for t in trainable(plan)]
    except CkptgrowError as error:
        raise FormatError(f"its merge cannot be made again: {error}", file=file) from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FormatError(f"not a ckptgrow manifest ({error!r})", file=file) from None
    if told != again:
        raise FormatError(
            "merging again does not give what it describes: it was edited, or written by another version", file=file
        )
    return Past(manifest, skills[0][0].base, architecture, plan)


def _skill(manifest: Manifest, told: Any, file: str) -> Past:
    """The growth of one skill of a merge."""
    growth: Growth = growth_from(told["growth"])
    own = replace(manifest, operation=EXPAND, policy=growth.policy, inexact_halves=int(told["inexact_halves"]))
    return made_again(own, growth, file)
