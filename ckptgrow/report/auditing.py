"""How audit reads in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from ckptgrow.drift import Audit, Drift
from ckptgrow.equivalence import SHOWN
from ckptgrow.report.lines import row
from ckptgrow.traces import CAUSES


def audit(seen: Audit) -> str:
    """What `ckptgrow audit` prints: totals, the cause, the tensors that moved most, findings, the verdict last."""
    return "\n".join(_audit(seen))


def _audit(seen: Audit) -> Iterator[str]:
    frozen, moved, before = (seen.total(name) for name in ("frozen", "moved", "moved_before_cast"))
    touched = [drift for drift in seen.tensors if drift.moved or drift.moved_before_cast]
    yield row("frozen", f"{moved:,} of {frozen:,} elements moved" + _where(touched))
    if before != moved:
        yield row("as trained", f"{before:,} moved in the trained dtype, before casting to the grown one")
    factor = f" (x {_range(*seen.factor)})" if seen.factor else ""
    yield row("cause", f"{CAUSES[seen.cause]}{factor}")
    still = "" if seen.total("changed") else ": nothing was trained"
    yield row("trainable", f"{seen.total('changed'):,} of {seen.total('trainable'):,} elements changed{still}")
    for drift in sorted(touched, key=lambda d: -d.largest)[:SHOWN]:
        yield f"  {_far(drift)}"
    if len(touched) > SHOWN:
        yield f"  and {len(touched) - SHOWN:,} more tensors"
    yield from (f"  {finding.tensor}: {finding.problem}" for finding in seen.findings[:SHOWN])
    if len(seen.findings) > SHOWN:
        yield f"  and {len(seen.findings) - SHOWN:,} more findings"
    yield from (row("note", note) for note in seen.notes)
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
    place = f" (in {drift.found_as})" if "[" in drift.found_as else ""
    return f"{drift.tensor}{place}: {count:,} of {drift.frozen:,} frozen elements moved {far}{lost}{hidden}"


def _verdict(seen: Audit) -> str:
    if seen.repaired:
        return f"repaired in {seen.repaired}"
    return {0: "the frozen part is untouched", 1: "the frozen part MOVED", 2: "cannot tell"}[seen.exit_code]
