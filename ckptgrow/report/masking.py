"""How mask reads in a terminal."""

from __future__ import annotations

from ckptgrow.report.lines import row
from ckptgrow.results import Mask


def mask(made: Mask) -> str:
    """What `ckptgrow mask` prints: the text itself, or what was written where."""
    if made.out is None and made.text is not None:
        return made.text
    counted = f"{made.trainable:,} elements in {made.tensors:,} tensors, {made.frozen:,} elements frozen"
    return "\n".join([row("trainable", counted), f"wrote {made.out}"])
