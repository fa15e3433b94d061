"""How extract and apply read in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from ckptgrow.equivalence import SHOWN
from ckptgrow.report.lines import row, size
from ckptgrow.results import Application, Extraction


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
