"""Is a folded checkpoint the function of the trained one? Asked gate by gate, of the bytes of both, knowing no Plan.

The units that share a gate are, together, the linear map Σ dᵢ·uᵢᵀ behind that gate (METHOD.md 5), so two MLPs are the
same function if these maps are equal for each gate. They are tried on random inputs in float64, gate by gate and
element by element: one unit that lost a term is seen, where the output of the whole MLP would hide it. Where sums were
rounded, a map may be off by what half a unit in the last place of each weight costs it, and by no more. Where a family
takes statistics over its gates, each must moreover have kept its part of the units.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptgrow.checkpoint import Bits, Checkpoint
from ckptgrow.equivalence import SHOWN, Answer, Finding, Progress
from ckptgrow.families import Architecture, Mlp
from ckptgrow.numeric import FLOATS, Floats, decode
from ckptgrow.units import BLOCK_BYTES, Rows, Units, as_units, fast_digests, match, projections, stretches, unequal

INPUTS = 4
NOISE = 2.0**-40  # of float64 sums in another order, relative to the sum of absolute values


def regrouped(
    folded: Checkpoint, trained: Checkpoint, architecture: Architecture, progress: Progress, *, rounded: bool
) -> Answer:
    """Whether each gate of `trained` leads to the same linear map in `folded`; the figure is the largest deviation.

    It is relative to the largest value of its MLP. Weights that are infinite or NaN count as zeros in both.
    """
    often = architecture.family.statistics
    experts = [(mlp, expert) for mlp in architecture.mlps if mlp.down for expert in mlp.numbers]
    with ThreadPoolExecutor(max_workers=2) as pool:
        seen = list(pool.map(lambda one: _compare(folded, trained, one[0], one[1], progress, rounded, often), experts))
    findings = [finding for found, _ in seen for finding in found]
    figure = f"the linear maps behind the gates of {len(seen)} MLPs in float64 on {INPUTS} random inputs"
    figure += f", largest relative difference {max(worst for _, worst in seen):.1e}"
    return Answer("regrouped", "no" if findings else "yes", figure, tuple(findings[:SHOWN]))


def _compare(
    folded: Checkpoint,
    trained: Checkpoint,
    mlp: Mlp,
    expert: int | None,
    progress: Progress,
    rounded: bool,
    often: bool,
) -> tuple[list[Finding], float]:
    """What is wrong in one MLP or expert, and the largest deviation relative to the largest value."""
    theirs, mine = _gates(folded, trained, mlp, expert)
    after, before = _side(folded, mlp, expert, mine), _side(trained, mlp, expert, theirs)
    gates = int(max(mine.max(), theirs.max())) + 1
    worst, broken, largest = np.zeros(gates), np.zeros(gates, bool), 0.0
    for rows in before.rows():
        got, wanted = after.map(rows, gates), before.map(rows, gates)
        allowed = NOISE * before.absolute(rows, gates) + (after.slack(rows, gates) if rounded else 0.0)
        off = np.abs(got - wanted)
        broken |= (off > allowed).any(axis=(0, 1, 3))
        np.maximum(worst, off.max(axis=(0, 1, 3)), out=worst)
        largest = max(largest, float(np.abs(wanted).max()))
    for name in mlp.tensors:
        progress((folded.infos[name].nbytes + trained.infos[name].nbytes) // mlp.experts)
    findings = [*_elsewhere(mlp, theirs, broken, worst)]
    if (
        often
        and (np.bincount(theirs, minlength=gates) * len(mine) != np.bincount(mine, minlength=gates) * len(theirs)).any()
    ):
        findings.append(Finding(mlp.block, "it takes statistics over its gates, and some come more often than before"))
    return findings, float(worst.max()) / (largest or 1.0)


def _elsewhere(mlp: Mlp, theirs: Units, broken: NDArray[np.bool_], worst: Floats) -> Iterator[Finding]:
    for gate in np.flatnonzero(broken)[:1]:
        units = ", ".join(str(unit) for unit in np.flatnonzero(theirs == gate)[:4])
        count = int(broken.sum())
        told = f"{count:,} gates lead" if count > 1 else "one gate leads"
        told += f" to something else: units {units} are off by {worst[gate]:.2g}"
        yield Finding(mlp.down, told)


def _gates(folded: Checkpoint, trained: Checkpoint, mlp: Mlp, expert: int | None) -> tuple[Units, Units]:
    """The gate of each unit of `trained`, and of `folded`, as numbers; without a gate all rows together are one."""
    both = (projections(checkpoint, mlp, expert) for checkpoint in (folded, trained))
    rows = [
        Rows(name, mine, _widened(its, trained.infos[name].dtype, folded.infos[name].dtype))
        for (name, role, mine), (_, _, its) in zip(*both, strict=True)
        if role == "gate" or (role != "down" and not mlp.bilinear)
    ]
    copies, originals = match(rows, fast_digests)
    if unequal(rows, copies, originals) is not None:  # a digest collided: then no two gates are taken for one
        copies, originals = np.full_like(copies, -1), np.arange(len(originals))
    strangers = np.flatnonzero(copies < 0)
    copies[strangers] = len(originals) + np.arange(len(strangers))
    return copies, originals


def _widened(bits: Bits, dtype: str, wanted: str) -> Bits:
    """The same values in the dtype in which a tensor's sums were kept: a gate may lie in one tensor with its up."""
    if dtype == wanted:
        return bits
    size = FLOATS[wanted].bits // 8
    found: Bits = decode(np.ascontiguousarray(bits), dtype).astype(f"<f{size}").view(f"<u{size}")
    return found


@dataclass(frozen=True, slots=True)
class _Side:
    """One checkpoint's units of one MLP: the gate of each, and what its row of up answers to the inputs.

    `sizes` are the answers with every term taken absolutely; `errors` what rounding each weight of the row may change.
    """

    columns: Bits
    dtype: str
    owners: Units
    answers: Floats  # [units, inputs], as the two below
    sizes: Floats
    errors: Floats

    def rows(self) -> Iterator[slice]:
        """The slices before the axis, as many at a time as fill a block."""
        outer, units, inner = self.columns.shape
        step = max(1, BLOCK_BYTES // (8 * INPUTS * units * inner))
        yield from (slice(i, i + step) for i in range(0, outer, step))

    def map(self, rows: slice, gates: int) -> Floats:
        """Σ dᵢ·answerᵢ by gate: [slices, inner, gates, inputs]."""
        return self._by_gate(self._weights(rows) * self.answers, gates)

    def absolute(self, rows: slice, gates: int) -> Floats:
        return self._by_gate(np.abs(self._weights(rows)) * self.sizes, gates)

    def slack(self, rows: slice, gates: int) -> Floats:
        """What rounding the columns, and the rows, may change in the map."""
        weights, (half, least) = np.abs(self._weights(rows)), _half(self.dtype)
        error = (half * weights + least) * (np.abs(self.answers) + self.errors) + weights * self.errors
        return self._by_gate(error, gates)

    def _weights(self, rows: slice) -> Floats:
        weights: Floats = _finite(self.columns[rows], self.dtype).transpose(0, 2, 1)[..., None]
        return weights

    def _by_gate(self, values: Floats, gates: int) -> Floats:
        order = np.argsort(self.owners, kind="stable")
        found, starts = np.unique(self.owners[order], return_index=True)
        result = np.zeros((*values.shape[:2], gates, INPUTS))
        result[:, :, found] = np.add.reduceat(values[:, :, order], starts, axis=2)
        return result


def _side(checkpoint: Checkpoint, mlp: Mlp, expert: int | None, owners: Units) -> _Side:
    answers, sizes, errors = np.zeros((3, len(owners), INPUTS))
    draw = np.random.Generator(np.random.Philox(key=mlp.layer))
    for name, role, bits in projections(checkpoint, mlp, expert) if mlp.bilinear else ():
        if role != "up":
            continue
        dtype, count = checkpoint.infos[name].dtype, bits.shape[0] * bits.shape[2]
        inputs = np.ones((count, INPUTS)) if mlp.tensors[name].bias else draw.normal(size=(count, INPUTS))
        half, least = _half(dtype)
        for some in stretches(bits, np.arange(len(owners))):
            values = _finite(bits[:, some], dtype).transpose(1, 0, 2).reshape(len(some), -1)
            answers[some] += values @ inputs
            sizes[some] += np.abs(values) @ np.abs(inputs)
            errors[some] += (half * np.abs(values) + least) @ np.abs(inputs)
    if not mlp.bilinear:
        answers, sizes = np.ones((2, len(owners), INPUTS))
    down = as_units(checkpoint, mlp.down, mlp.tensors[mlp.down], mlp.grain, expert)
    return _Side(down, checkpoint.infos[mlp.down].dtype, owners, answers, sizes, errors)


def _half(dtype: str) -> tuple[float, float]:
    """Half a unit in the last place: relative to a normal number, and of a subnormal one."""
    form = FLOATS[dtype]
    return 2.0 ** -(form.mantissa + 1), 2.0 ** max(form.least - form.mantissa - 1, -1074)


def _finite(bits: Bits, dtype: str) -> Floats:
    values: Floats = np.nan_to_num(decode(np.ascontiguousarray(bits), dtype), nan=0.0, posinf=0.0, neginf=0.0)
    return values
