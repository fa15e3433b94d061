"""How revert reads in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from ckptgrow.equivalence import SHOWN
from ckptgrow.report.lines import row
from ckptgrow.reversal import Reversion


def reversion(done: Reversion) -> str:
    """What `ckptgrow revert` prints: what was checked, what moved, notes, the verdict last."""
    return "\n".join(_reversion(done))


def _reversion(done: Reversion) -> Iterator[str]:
    where = "copied from the base" if done.taken_from == "base" else "read back from the frozen part"
    yield row("base", f"{done.base}, {where}" + (f", {done.undone} growths undone" if done.undone > 1 else ""))
    same = done.tensors - len(done.moved)
    yield row("tensors", f"{same:,} of {done.tensors:,} have the digest that the base's had")
    yield from (f"  {finding.tensor}: {finding.problem}" for finding in done.moved[:SHOWN])
    if len(done.moved) > SHOWN:
        yield f"  and {len(done.moved) - SHOWN:,} more"
    yield from (row("note", note) for note in done.notes)
    yield f"{done.grown}: the frozen part MOVED, so nothing was written" if done.moved else f"wrote {done.folder}"
