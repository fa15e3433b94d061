"""How frozen elements moved, and what that says of the cause: the trace of weight decay, of rounding, of training.

Added up block by block in float64, all in the trained dtype; nothing is kept of the elements.

- decay: one factor below 1 explains every frozen element of the touched tensors, the unmoved ones too, within rounding
- averaging: no element moved farther than to the neighbouring value of its dtype
- rounding: equal values moved equally wherever they lie, up to sign and powers of two, as in a moving average of
  equal values; gradients know the place of an element, so training does not do that
- narrowed: nothing but what the trained dtype cannot hold
- trained: anything else
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from ckptgrow.checkpoint import Bits
from ckptgrow.numeric import Float, Floats, encode

Cause = Literal["nothing", "decay", "averaging", "rounding", "narrowed", "trained"]

CAUSES: Mapping[Cause, str] = {
    "nothing": "nothing moved",
    "decay": "weight decay: one factor explains every frozen element of the touched tensors",
    "averaging": "averaging: nothing moved by more than one unit in the last place",
    "rounding": "rounding over and over, as in a moving average: equal values moved equally, wherever they lie",
    "narrowed": "the trained dtype cannot hold the frozen values; nothing else moved",
    "trained": "training: no factor and no rounding explains it, so the mask was not in force",
}


class Trace:
    """How the frozen elements of one tensor moved. `form` is the trained float format; None: not a float."""

    def __init__(self, form: Float | None) -> None:
        self.form, self.largest, self.relative, self.not_finite = form, 0.0, 0.0, 0
        self.neighbours = self.shrank = form is not None
        self.strict = _Factor(0.51)
        self.loose = _Factor(8.0 if form and form.mantissa > 10 else 1.01, spread=0.4)
        self.product = self.square = 0.0

    def add(self, was: Floats, now: Floats) -> None:
        """Take in the same elements before and after."""
        finite = np.isfinite(was) & np.isfinite(now)
        self.not_finite += int(np.count_nonzero(np.isfinite(was) & ~finite))
        was, now = was[finite], now[finite]
        if not was.size or self.form is None:
            return
        size, gap = np.abs(was), np.abs(now - was)
        weighty = size > 0
        ratio = now[weighty] / was[weighty]
        self.largest = max(self.largest, float(gap.max()))
        self.relative = max(self.relative, float((gap[weighty] / size[weighty]).max(initial=0.0)))
        self.neighbours &= bool((gap <= _unit(np.minimum(size, np.abs(now)), self.form)).all())
        self.shrank &= bool(((np.abs(now) < size) | (size < 2.0**self.form.least)).all())
        self.product += float(was @ now)
        self.square += float(was @ was)
        unit = _unit(np.abs(now[weighty]), self.form) / size[weighty]
        for factor in (self.strict, self.loose):
            factor.add(ratio, unit)
            factor.low = math.inf if bool(now[~weighty].any()) else factor.low


def _unit(size: Floats, form: Float) -> Floats:
    """The distance from these values to the next larger one that the format holds."""
    exponent = np.where(size == 0, form.least, np.maximum(np.frexp(size)[1] - 1, form.least))
    step: Floats = np.ldexp(1.0, exponent - form.mantissa)
    return step


class _Factor:
    """The factors that explain all elements seen: each within so many units of its last place, and a spread.

    Strict is one rounding of the product. Loose allows for a rounding at every step: some units, and a share of what
    the factor takes away, since an element's own roundings may always go the same way.
    """

    def __init__(self, units: float, spread: float = 0.0) -> None:
        self.units, self.spread, self.low, self.high = units, spread, 0.0, math.inf

    def add(self, ratio: Floats, unit: Floats) -> None:
        if self.low > self.high or not ratio.size:
            return
        slack = self.units * unit + self.spread
        self.low = max(self.low, float((ratio - slack).max()) / (1 - self.spread))
        self.high = min(self.high, float((ratio + slack).min()) / (1 + self.spread))


def cause_of(traces: Sequence[Trace], narrowed: bool) -> tuple[Cause, tuple[float, float] | None]:
    """The cause that explains all that moved, and the factor where it is one. `traces` are of the tensors touched."""
    if not traces:
        return ("narrowed" if narrowed else "nothing"), None
    if any(trace.form is None or trace.not_finite for trace in traces):
        return "trained", None
    factor = _common([trace.strict for trace in traces])
    if factor is not None:
        return "decay", factor
    if all(trace.neighbours for trace in traces):
        return "averaging", None
    if all(trace.shrank for trace in traces) and _common([trace.loose for trace in traces]) is not None:
        mean = sum(trace.product for trace in traces) / sum(trace.square for trace in traces)
        return "decay", (mean, mean)
    return "trained", None


def _common(factors: list[_Factor]) -> tuple[float, float] | None:
    """Between which the factors below 1 lie that fit all tensors; None where there are none."""
    low, high = max(factor.low for factor in factors), min(factor.high for factor in factors)
    return (low, high) if low <= high < 1 else None


# ---------------------------------------------------------------- equal values, equal fates

# A value is known again by its mantissa: scaling by a power of two commutes with every rounding but the subnormals'.
_MOST_MANTISSA = 23  # six bytes a mantissa: 48 MiB at most
LEAST_EVIDENCE = 100  # moved elements whose mantissa was met before
FARTHEST = 0.125  # relative; no rounding of a format in which models are trained goes farther


def may_be_rounding(traces: Sequence[Trace]) -> bool:
    """Whether it is worth looking for rounding: all in one float format, finite, and not too far."""
    forms = {trace.form for trace in traces}
    return len(forms) == 1 and all(
        trace.form is not None
        and trace.form.mantissa <= _MOST_MANTISSA
        and not trace.not_finite
        and trace.relative <= FARTHEST
        for trace in traces
    )


class Fates:
    """What became of each mantissa: how many places of the format it moved by, the same wherever it was met."""

    def __init__(self, form: Float, dtype: str) -> None:
        self.form, self.dtype, self.broken = form, dtype, False
        self._moved_by = np.zeros(2**form.mantissa, np.int32)
        self._met, self._again = (np.zeros(2**form.mantissa, np.bool_) for _ in range(2))
        self._evidence = 0

    def add(self, was: Floats, its: Bits, now: Floats) -> None:
        """Take in the same elements before and after, `now` being the values of `its`."""
        normal = np.abs(was) >= 2.0**self.form.least
        self.broken |= bool((np.abs(now[~normal]) > np.abs(was[~normal]) * 2).any())
        places = np.int64(2 ** (self.form.bits - 1) - 1)  # without the sign, neighbours differ by one
        before = encode(was[normal], self.dtype).astype(np.int64) & places
        step = (its[normal].astype(np.int64) & places) - before
        mantissa = before % 2**self.form.mantissa
        again = self._met[mantissa]  # in an earlier block: those that meet in this one are checked, but no evidence
        self._moved_by[mantissa[~again]] = step[~again]
        self.broken |= bool((self._moved_by[mantissa] != step).any())
        self._met[mantissa] = True
        self._again[mantissa[again]] = True
        self._evidence += int(np.count_nonzero(step[again]))

    @property
    def explained(self) -> bool:
        """Whether all mantissas that were met twice moved equally, enough of them, and no other one farther."""
        if self.broken:
            return False
        steps, again = self._moved_by[self._met], self._moved_by[self._again]
        low, high = int(again.min(initial=0)), int(again.max(initial=0))
        return self._evidence >= LEAST_EVIDENCE and bool(((low <= steps) & (steps <= high)).all())
