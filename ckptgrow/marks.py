"""The freeze mask, read off a Plan before anything is written: which units are new, which train, what is filling."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ckptgrow.checkpoint import Checkpoint
from ckptgrow.families import Architecture, Mlp
from ckptgrow.manifest import Counts, Grown, GrownBlock, Trainable
from ckptgrow.plan import Output, Plan
from ckptgrow.policy import boxes
from ckptgrow.proof import experts_of, picks
from ckptgrow.surgery import Growth
from ckptgrow.tensors import DTYPE_BITS


def read_mask(plan: Plan, base: Checkpoint, architecture: Architecture, growth: Growth) -> Grown:
    """The freeze mask and its counts: a reading of the Plan with the policy."""
    members = {output.name: output for output in plan.outputs if output.member}
    blocks = tuple(_block(members, mlp, base) for mlp in architecture.mlps if members.keys() & mlp.tensors.keys())
    trainable = tuple(_trainable(members.values(), growth))
    count, total = sum(tensor.elements for tensor in trainable), sum(output.info.elements for output in plan.outputs)
    share = round(count / base.parameters, 6)
    counts = Counts(count, total - count, base.parameters, share, *_filled(members.values(), base))
    return Grown(blocks, trainable, counts)


def _block(outputs: Mapping[str, Output], mlp: Mlp, base: Checkpoint) -> GrownBlock:
    """The copies of one MLP, read off the first of its gate or up projections, and which of its experts grew."""
    name = next(name for name in mlp.tensors if name != mlp.down)
    alike = [(experts, own[name]) for experts, own in experts_of(outputs, mlp)]
    first = alike[0][1]
    grown = tuple(sorted(number for experts, own in alike for number in _grown(mlp, experts, own)))
    runs = picks(first, base.infos)
    copies = tuple(
        {"new": (run.start, run.stop), "base": (run.unit, run.unit + run.stop - run.start)}
        for run in runs
        if run.start >= mlp.width
    )
    some = grown if 0 < len(grown) < mlp.experts else None
    return GrownBlock(mlp.block, mlp.layer, mlp.width, runs[-1].stop, copies, filled=not grown, experts=some)


def _grown(mlp: Mlp, experts: tuple[int | None, ...], own: Output) -> Iterator[int]:
    """The numbers of those of these experts, which are alike, that have new units; 0 where they have no number."""
    numbers = [0 if number is None else number for number in (mlp.numbers if experts == (None,) else experts)]
    spans, lanes = own.grown(), [*own.lanes()]
    for number in numbers:
        _, start, stop = lanes[number] if mlp.tensors[own.name].flat else ("", 0, own.extent)
        if any(a < stop and start < b for a, b in spans):
            yield number


def _filled(outputs: Iterable[Output], base: Checkpoint) -> tuple[int, int]:
    """(elements, bytes) by which MLPs and experts that do not grow become larger: what is added and not marked."""
    elements = nbytes = 0
    for output in outputs:
        added = output.info.elements - base.infos[output.name].elements
        for rows, section in output.sections():
            outer, inner = output.steps
            marked = sum(stop - start for start, stop in section.grown())
            added -= marked * inner * (outer if rows is None else len(rows))
        elements, nbytes = elements + added, nbytes + added * DTYPE_BITS[output.dtype] // 8
    return elements, nbytes


def _trainable(outputs: Iterable[Output], growth: Growth) -> Iterator[Trainable]:
    for output in outputs:
        member, found = output.member, boxes(output, growth.rules)
        if member and found:
            yield Trainable(output.name, member.role, member.layer, output.shape, output.dtype, found)
