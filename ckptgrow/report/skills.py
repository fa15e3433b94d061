"""How extract, apply and merge read in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from ckptgrow.equivalence import SHOWN
from ckptgrow.report.growing import answers
from ckptgrow.report.lines import row, size, widths
from ckptgrow.results import Application, Extraction, Merging


def extraction(done: Extraction) -> str:
    """What `ckptgrow extract` prints: what the skill holds, what moved, notes, the verdict last."""
    return "\n".join(_extraction(done))


def application(done: Application) -> str:
    """What `ckptgrow apply` prints."""
    told = f"{done.tensors:,}, in {done.learned:,} of them lies what the skill learned, the rest is {done.base}'s"
    return "\n".join([row("tensors", told), f"wrote {done.out}"])


def _extraction(done: Extraction) -> Iterator[str]:
    yield row("base", done.base)
    yield row("skill", f"{done.elements:,} elements of {done.tensors:,} tensors, {size(done.bytes)}")
    yield from (f"  {finding.tensor}: {finding.problem}" for finding in done.moved[:SHOWN])
    if len(done.moved) > SHOWN:
        yield f"  and {len(done.moved) - SHOWN:,} more"
    yield from (row("note", note) for note in done.notes)
    lost = f"{done.trained}: the frozen part MOVED, and a skill would lose that: nothing was written"
    yield lost if done.moved else f"wrote {done.skill}"


def merging(done: Merging) -> str:
    """What `ckptgrow merge` prints: the skills, the widths, what was rounded, what the check said."""
    return "\n".join(_merging(done))


def _merging(done: Merging) -> Iterator[str]:
    for skill, weight in done.skills:
        yield row("skill", f"{skill} x {weight:g}")
    yield from widths((b.block, b.layer, f"{b.old_width:,} -> {b.new_width:,} units") for b in done.blocks)
    yield row("parameters", f"{done.parameters_before:,} -> {done.parameters_after:,}")
    cost = done.rounding
    lost = (
        f"{cost.rounded:,} are rounded, by up to a relative {cost.largest:.2g}" if cost.rounded else "none is rounded"
    )
    yield row("sums", f"{cost.sums:,} weights are sums or multiples, {lost}")
    yield from answers(done.answers)
    yield f"wrote {done.out}"
