"""The manifest of a merged checkpoint: which skills are in it, and that all of their own units train.

It is a grown checkpoint to train on and to grow again. Of each skill it says how it was grown and its weight, so that
the merge can be made again (ingredients.py), and undone as far as the weights leave something of the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction

from ckptgrow.checkpoint import Checkpoint, digest_of
from ckptgrow.families import Architecture, in_memory_name, ties
from ckptgrow.ingredients import POLICY, trainable
from ckptgrow.manifest import MERGE, SCHEMA, Counts, GrownBlock, Manifest, history
from ckptgrow.plan import Plan
from ckptgrow.surgery import Growth
from ckptgrow.version import __version__


@dataclass(frozen=True)
class Mixed:
    """A merge that has been carried out: its Plan, and the growths that the skills come from."""

    plan: Plan
    base: Checkpoint
    architecture: Architecture
    skills: Sequence[Manifest]
    weights: Sequence[Fraction]
    inexact: int  # multiples of the base's weights that were rounded


def merge_manifest(mixed: Mixed) -> Manifest | None:
    """The manifest; None where no unit is a skill's own, so that nothing could train."""
    trains, blocks = tuple(trainable(mixed.plan)), tuple(_blocks(mixed))
    if not trains:
        return None
    base, family, first = mixed.base, mixed.architecture.own, mixed.skills[0]
    count = sum(tensor.elements for tensor in trains)
    total = sum(output.info.elements for output in mixed.plan.outputs)
    names = {tensor.name: in_memory_name(family, tensor.name) for tensor in trains}
    return Manifest(
        schema=SCHEMA,
        tool={"name": "ckptgrow", "version": __version__},
        operation=MERGE,
        base=first.base,
        family=family.model_type,
        policy=POLICY,
        growth=asdict(Growth(width=max(block.new_width for block in blocks))),
        shares={
            "asked": "auto",
            "used": sorted({rule for skill in mixed.skills for rule in skill.shares["used"]}),
            "seed": 0,
        },
        blocks=blocks,
        trainable=trains,
        counts=Counts(count, total - count, base.parameters, round(count / base.parameters, 6)),
        inexact_halves=mixed.inexact,
        ties=ties(base.config, family, base.infos),
        in_memory_names={disk: memory for disk, memory in names.items() if disk != memory},
        history=history(base),
        layers=None,
        declaration=first.declaration,
        recast=first.recast,
        skills=tuple(
            {
                "manifest": digest_of(skill.text().encode()),
                "policy": skill.policy,
                "weight": float(weight),
                "fraction": str(weight),
                "growth": dict(skill.growth),
                "inexact_halves": skill.inexact_halves,
            }
            for skill, weight in zip(mixed.skills, mixed.weights, strict=True)
        ),
    )


def _blocks(mixed: Mixed) -> Iterator[GrownBlock]:
    """Each MLP; which base unit a unit copies cannot be said of a skill's own."""
    outputs = mixed.plan.named
    for mlp in mixed.architecture.mlps:
        first = outputs[next(iter(mlp.tensors))]
        if first.member:
            width = int(first.extent // first.lane_count / mlp.tensors[first.name].places)
            yield GrownBlock(mlp.block, mlp.layer, mlp.width, width, (), filled=not first.grown())
