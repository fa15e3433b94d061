"""How fold reads in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from ckptgrow.report.growing import answers
from ckptgrow.report.lines import joined, row, size, widths
from ckptgrow.results import FoldedBlock, Folding, Left

SHOWN = 40  # lines of reasons


def folding(what: Folding) -> str:
    """What `ckptgrow fold` prints: what folds and what does not, layer by layer, the verdict last."""
    return "\n".join(_folding(what))


def _folding(what: Folding) -> Iterator[str]:
    yield from widths((b.name, b.layer, _width(b, what)) for b in what.blocks)
    if what.apart:
        yield row("within", f"{what.apart:.3g}: rows that counted as equal differ by no more")
    yield from _errors(what)
    if what.width is None:
        yield from _refused(what)
        return
    yield row("parameters", f"{what.parameters_before:,} -> {what.parameters_after:,}")
    yield row("sums", _sums(what))
    if what.widened:
        yield row("float32", f"{what.widened:,} tensors are kept in float32, and config.json says so")
    if what.planned:
        yield row("writes", size(what.bytes_to_write))
    if what.files_left_out:
        yield row("left out", ", ".join(what.files_left_out))
    yield from answers(what.answers)
    if what.errors:
        yield row("note", "this is NOT the same function, and config.json and the model card say so")
    yield f"would write {what.out}" if what.planned else f"wrote {what.out}"


def _width(block: FoldedBlock, what: Folding) -> str:
    kinds = [(block.equal, "equal"), (block.parallel, "parallel"), (block.dead, "dead")]
    told = ", ".join(f"{count:,} {kind}" for count, kind in kinds if count) or "none"
    if what.width is None:
        return f"{block.width:,} units, {block.smallest:,} at least ({told})"
    return f"{block.width:,} -> {what.width:,} units ({told})"


def _errors(what: Folding) -> Iterator[str]:
    """What a fold that is not exact costs, layer by layer."""
    for off in what.errors:
        over = ", too much" if what.max_error is not None and not off.error <= what.max_error else ""
        yield row("error", f"{off.name}: off by {off.error:.2g} of its output on random inputs{over}")


def _refused(what: Folding) -> Iterator[str]:
    if what.errors:
        worst = max(off.error for off in what.errors)
        yield f"{what.trained}: does not fold within {what.max_error} (an MLP would be off by {worst:.2g})"
        return
    broken = [block for block in what.blocks if block.smallest > (what.asked or 0)]
    lines = [*joined((b.name, b.layer, _left(left, b)) for b in broken for left in b.left)]
    yield from (f"  {line}" for line in lines[:SHOWN])
    if len(lines) > SHOWN:
        yield f"  and {len(lines) - SHOWN:,} more lines"
    whose = " (the base's)" if what.asked is not None and what.asked == what.base_width else ""
    asked = f", not {what.asked:,}{whose}" if what.asked is not None else ""
    yield row("smallest", f"{what.smallest:,} units is the smallest exact width of all layers{asked}")
    if what.asked is not None and what.smallest < what.old_width:
        yield row("note", "--partial writes that width")
    yield f"{what.trained}: does not fold"


def _left(left: Left, block: FoldedBlock) -> str:
    of = f" of {block.new:,} new" if block.new is not None else ""
    more = ", ..." if left.units > len(left.first) else ""
    named = ", ".join(str(unit) for unit in left.first)
    return f"{left.units:,}{of} units do not fold: {left.why} (units {named}{more})"


def _sums(what: Folding) -> str:
    cost = what.rounding
    if not cost.rounded:
        return f"{cost.sums:,} weights are sums, none of them is rounded"
    return (
        f"{cost.rounded:,} of {cost.sums:,} weights that are sums are rounded, by a relative {cost.largest:.2g} at most"
    )
