"""How fold reads in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from ckptgrow.report.growing import answers
from ckptgrow.report.lines import joined, row, size, widths
from ckptgrow.results import FoldedBlock, FoldedGroup, Folding, Left, Widths

SHOWN = 40  # lines of reasons


def folding(what: Folding) -> str:
    """What `ckptgrow fold` prints: what folds and what does not, layer by layer, the verdict last."""
    return "\n".join(_folding(what))


def _folding(what: Folding) -> Iterator[str]:
    yield from widths(_experts((b, _width(b, what)) for b in what.blocks))
    if what.apart:
        yield row("within", f"{what.apart:.3g}: rows that counted as equal differ by no more")
    yield from _errors(what)
    if not what.folds:
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


def _experts(lines: Iterable[tuple[FoldedBlock, str]]) -> Iterator[tuple[str, int, str]]:
    """(name, layer, text), neighbouring experts of a layer that read the same as one."""
    told = ((*_named(block), block, text) for block, text in lines)
    for (head, tail, layer, text), group in groupby(told, key=lambda one: (*one[:2], one[2].layer, one[3])):
        numbers = [str(block.expert) for _, _, block, _ in group if block.expert is not None]
        yield f"{head}{'-'.join(dict.fromkeys([*numbers[:1], *numbers[-1:]]))}{tail}", layer, text


def _named(block: FoldedBlock) -> tuple[str, str]:
    """What stands before and behind the number of an expert: of one with tensors of its own, or of one in a stack."""
    if block.expert is None:
        return block.name, ""
    head = block.name.removesuffix(str(block.expert))
    return (head, "") if head != block.name else (f"{block.name}[", "]")


def _width(block: FoldedBlock, what: Folding) -> str:
    kinds = [(block.equal, "equal"), (block.parallel, "parallel"), (block.combined, "combined"), (block.dead, "dead")]
    told = ", ".join(f"{count:,} {kind}" for count, kind in kinds if count) or "none"
    if not what.folds:
        return f"{block.width:,} units, {block.smallest:,} at least ({told})"
    return f"{block.width:,} -> {block.to:,} units ({told})"


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
    lines = [*joined(_experts((b, _left(left, b)) for b in what.blocks for left in b.left))]
    yield from (f"  {line}" for line in lines[:SHOWN])
    if len(lines) > SHOWN:
        yield f"  and {len(lines) - SHOWN:,} more lines"
    for group in what.groups:
        key = f"{group.path}: " if len(what.groups) > 1 else ""
        yield row("smallest", key + _smallest(group))
    if any(group.asked is not None and group.smallest != group.old_width for group in what.groups):
        yield row("note", "--partial writes the smallest exact widths")
    yield f"{what.trained}: does not fold"


def _smallest(group: FoldedGroup) -> str:
    whose = " (the base's)" if group.asked is not None and group.asked == group.base_width else ""
    asked = f", not {_said(group.asked)}{whose}" if group.asked is not None and group.width is None else ""
    return f"{_said(group.smallest)} units is the smallest exact width of all layers{asked}"


def _said(width: Widths | None) -> str:
    return ", ".join(f"{one:,}" for one in (width if isinstance(width, tuple) else (width,)) if one is not None)


def _left(left: Left, block: FoldedBlock) -> str:
    of = f" of {block.new:,} new" if block.new is not None else ""
    more = ", ..." if left.units > len(left.first) else ""
    named = ", ".join(str(unit) for unit in left.first)
    if not left.units:
        return left.why
    return f"{left.units:,}{of} units do not fold: {left.why} (units {named}{more})"


def _sums(what: Folding) -> str:
    cost = what.rounding
    if not cost.rounded:
        return f"{cost.sums:,} weights are sums, none of them is rounded"
    return (
        f"{cost.rounded:,} of {cost.sums:,} weights that are sums are rounded, by a relative {cost.largest:.2g} at most"
    )
