"""How results read in a terminal: text from the frozen values of results.py, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from ckptgrow.drift import CAUSES, Audit, Drift
from ckptgrow.equivalence import SHOWN, Answer
from ckptgrow.results import Expansion, Inspection, Proposal, Verification

_VERDICTS = {0: "the same function", 1: "NOT the same function", 2: "cannot tell"}


def inspection(seen: Inspection) -> str:
    """What `ckptgrow inspect` prints."""
    return "\n".join(_inspection(seen))


def proposal(what: Proposal) -> str:
    """What `ckptgrow expand --plan` prints."""
    return "\n".join(_proposal(what))


def expansion(done: Expansion) -> str:
    """What `ckptgrow expand` prints at its end."""
    return "\n".join(_expansion(done))


def verification(result: Verification) -> str:
    """What `ckptgrow verify` prints: a line for each answer, its findings below, the verdict last."""
    lines = [line for answer in result.answers for line in _answer(answer)]
    skipped = [answer.name for answer in result.answers if answer.verdict == "not run"]
    how = f" (proved on the weights, {' and '.join(skipped)} not run)" if skipped and result.same else ""
    return "\n".join([*lines, f"{result.grown}: {_VERDICTS[result.exit_code]}{how}"])


def size(nbytes: int) -> str:
    """Bytes in decimal units: 536.2 MB."""
    amount, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.1f} {units[0]}" if units[0] != "B" else f"{nbytes} B"


def _row(name: str, text: str) -> str:
    return f"{name:<11} {text}"


def _inspection(seen: Inspection) -> Iterator[str]:
    yield _row("source", f"{seen.source}" + (f" @ {seen.revision}" if seen.revision else ""))
    kind = "" if seen.gated is None else ", gated MLPs" if seen.gated else ", MLPs without gate"
    yield _row("model_type", f"{seen.model_type}{kind}")
    yield from _widths((block.name, block.layer, f"{block.width:,} units x {block.hidden:,}") for block in seen.blocks)
    dtypes = ", ".join(f"{dtype} {count:,}" for dtype, count in seen.dtypes.items())
    yield _row("parameters", f"{seen.parameters:,} ({dtypes})")
    yield _row("bytes", f"{size(seen.bytes)} in {seen.shards} shard{'s' if seen.shards != 1 else ''}")
    for name, owner in seen.ties.items():
        yield _row("tied", f"{name} is {owner}")
    if seen.grown_before:
        yield _row("history", f"grown {seen.grown_before} time{'s' if seen.grown_before > 1 else ''} before")
    if seen.norm_after:
        yield _row(
            "note", "a norm follows each MLP: outputs cannot see the scale of down, so trust verify's second line"
        )
    if seen.growable:
        yield _row("can grow", f"the {len(seen.blocks)} MLPs above, to any larger width")
    else:
        yield _row("cannot grow", f"{seen.reason}")


def _widths(blocks: Iterable[tuple[str, int, str]]) -> Iterator[str]:
    """One line for neighbouring MLPs that read the same."""
    for (stem, text), group in groupby(blocks, key=lambda b: (b[0].replace(f".{b[1]}.", ".{}.", 1), b[2])):
        layers = [layer for _, layer, _ in group]
        span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
        yield _row("MLPs", f"{stem.replace('{}', span)}: {text}")


def _proposal(what: Proposal) -> Iterator[str]:
    yield _row("grow", f"{what.source} ({what.family}) -> {what.out}")
    yield from _widths((b.block, b.layer, f"{b.old_width:,} -> {b.new_width:,} units") for b in what.blocks)
    more = what.parameters_after / what.parameters_before - 1
    yield _row("parameters", f"{what.parameters_before:,} -> {what.parameters_after:,} (+{more:.1%})")
    yield _row("policy", f"{what.policy}: {what.policy_about}")
    yield _row("trainable", f"{what.trainable:,} parameters, {what.trainable_share_of_base:.1%} of the base")
    for sentence in what.shares:
        yield _row("shares", sentence)
    yield _row("writes", f"{size(what.bytes_to_write)}, {size(what.bytes_free)} free on that disk")
    yield _row("shards", f"{what.shards_rewritten} rewritten, {what.shards_copied} copied as they are")
    if what.files_copied:
        yield _row("copies", ", ".join(what.files_copied))
    if what.files_left_out:
        yield _row("leaves out", ", ".join(what.files_left_out))


def _expansion(done: Expansion) -> Iterator[str]:
    what = done.proposal
    yield from _widths((b.block, b.layer, f"{b.old_width:,} -> {b.new_width:,} units") for b in what.blocks)
    yield _row("parameters", f"{what.parameters_before:,} -> {what.parameters_after:,}")
    yield _row(
        "trainable", f"{what.trainable:,} ({what.trainable_share_of_base:.1%} of the base), policy {what.policy}"
    )
    for sentence in what.shares:
        yield _row("shares", sentence)
    if done.manifest.inexact_halves:
        count = done.manifest.inexact_halves
        yield _row(
            "note", f"{count:,} shared weights have no exact half in their dtype; their shares still add up exactly"
        )
    if what.files_left_out:
        yield _row("left out", ", ".join(what.files_left_out))
    if done.verification:
        yield from (line for answer in done.verification.answers for line in _answer(answer))
    yield f"wrote {done.folder}" + ("" if done.verification else " (not verified)")


def _answer(answer: Answer) -> Iterator[str]:
    yield _row(answer.name, f"{answer.verdict}: {answer.figure}")
    yield from (f"  {finding.tensor}: {finding.problem}" for finding in answer.findings)


def audit(seen: Audit) -> str:
    """What `ckptgrow audit` prints: totals, the cause, the tensors that moved most, findings, the verdict last."""
    return "\n".join(_audit(seen))


def _audit(seen: Audit) -> Iterator[str]:
    frozen, moved, before = (seen.total(name) for name in ("frozen", "moved", "moved_before_cast"))
    touched = [drift for drift in seen.tensors if drift.moved or drift.moved_before_cast]
    yield _row("frozen", f"{moved:,} of {frozen:,} elements moved" + _where(touched))
    if before != moved:
        yield _row("as trained", f"{before:,} moved in the trained dtype, before casting to the grown one")
    factor = f" (x {_range(*seen.factor)})" if seen.factor else ""
    yield _row("cause", f"{CAUSES[seen.cause]}{factor}")
    still = "" if seen.total("changed") else ": nothing was trained"
    yield _row("trainable", f"{seen.total('changed'):,} of {seen.total('trainable'):,} elements changed{still}")
    for drift in sorted(touched, key=lambda d: -d.largest)[:SHOWN]:
        yield f"  {_far(drift)}"
    if len(touched) > SHOWN:
        yield f"  and {len(touched) - SHOWN:,} more tensors"
    yield from (f"  {finding.tensor}: {finding.problem}" for finding in seen.findings[:SHOWN])
    if len(seen.findings) > SHOWN:
        yield f"  and {len(seen.findings) - SHOWN:,} more findings"
    yield from (_row("note", note) for note in seen.notes)
    yield f"{seen.trained}: {_verdict(seen)}"


def _where(touched: list[Drift]) -> str:
    count = sum(drift.moved > 0 for drift in touched)
    return f", in {count:,} tensor{'s' if count > 1 else ''}" if count else ""


def _range(low: float, high: float) -> str:
    """A number, to as many digits as are known."""
    for digits in range(7, 2, -1):
        if f"{low:.{digits}f}" == f"{high:.{digits}f}":
            return f"{low:.{digits}f}"
    return f"{low:.4f} to {high:.4f}"


def _far(drift: Drift) -> str:
    count = max(drift.moved, drift.moved_before_cast)
    far = f"by up to {drift.largest:.3g} (relative {drift.largest_relative:.2g})"
    lost = f", {drift.not_finite:,} not finite" if drift.not_finite else ""
    hidden = "" if drift.moved else f", none of it in {drift.dtype}"
    return f"{drift.tensor}: {count:,} of {drift.frozen:,} frozen elements moved {far}{lost}{hidden}"


def _verdict(seen: Audit) -> str:
    if seen.repaired:
        return f"repaired in {seen.repaired}"
    return {0: "the frozen part is untouched", 1: "the frozen part MOVED", 2: "cannot tell"}[seen.exit_code]
