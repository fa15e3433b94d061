"""Are two checkpoints the same function? Read from their bytes alone, knowing nothing of Plans and manifests.

Three answers, strongest first:

- untouched: every tensor outside the MLPs is byte-identical, none is missing, none is extra, and config.json says the
  same but for the width.
- proved: in every MLP each new unit's rows of gate, up and their biases equal some base unit's bit for bit, and the
  columns of down of each base unit's copies add up to its column exactly. A unit whose column is zero is free. Base
  units with equal rows count as one. This is M·S = I (METHOD.md 1) on the weights, whatever tool grew them.
- probed (probe.py): one forward of each MLP on random inputs.

This module shares no code with the writer but the reader and the decoding of bit patterns. Sums are made in float64 and
made again without rounding where float64 was too short, so "exactly" holds for every format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ckptgrow import configs
from ckptgrow.checkpoint import Bits, Checkpoint
from ckptgrow.errors import FormatError, PlanError
from ckptgrow.families import Architecture, Mlp
from ckptgrow.numeric import Floats, decode, rounded
from ckptgrow.units import (
    BLOCK_BYTES,
    Picked,
    Rows,
    Units,
    as_units,
    fast_digests,
    lanes,
    match,
    slow_digests,
    turns,
    unequal,
)

Verdict = Literal["yes", "no", "cannot tell", "not run"]
Progress = Callable[[int], None]

SHOWN = 20  # findings kept for an answer


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be, and in which tensor (or file)."""

    tensor: str
    problem: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the answers: its verdict, a figure to show, and the findings that speak against it."""

    name: str
    verdict: Verdict
    figure: str
    findings: tuple[Finding, ...] = ()


def not_the_same(finding: Finding) -> PlanError:
    """The error of a result that was made to be the same function and is not: a bug, not the user's."""
    return PlanError(
        f"what was written is not the same function ({finding.problem})",
        tensor=finding.tensor,
        hint="Nothing was kept. This is a bug in ckptgrow or a failing disk: please report it.",
    )


def untouched(base: Checkpoint, grown: Checkpoint, architecture: Architecture, progress: Progress) -> Answer:
    """Every tensor outside the MLPs byte-identical, none missing, none extra; config.json differs in the width only."""
    inside = architecture.names
    findings = [Finding(name, "it is missing") for name in base.infos if name not in grown.infos]
    findings += [Finding(name, "the base has no such tensor") for name in grown.infos if name not in base.infos]
    shared = [name for name in base.infos if name in grown.infos and name not in inside]
    with _pool() as pool:
        problems = pool.map(lambda name: _difference(base, grown, name, progress), shared)
        findings += [Finding(name, problem) for name, problem in zip(shared, problems, strict=True) if problem]
    findings += map(_in_config, configs.changes(base.config, grown.config, architecture))
    unclear = [*map(_in_config, configs.unclear(base.config, grown.config, architecture))]
    verdict: Verdict = "no" if findings else "cannot tell" if unclear else "yes"
    same = len(set(shared) - {finding.tensor for finding in findings})
    figure = f"{same:,} of {len(base.infos) - len(inside):,} tensors outside the MLPs are byte-identical"
    return Answer("untouched", verdict, figure, tuple((findings + unclear)[:SHOWN]))


def proved(
    base: Checkpoint, grown: Checkpoint, architecture: Architecture, progress: Progress, *, rounded_once: bool = False
) -> Answer:
    """M·S = I, MLP by MLP, on the weights; the figure is the largest error of a sum of columns.

    `rounded_once`: the base's columns may be such sums rounded to the base's dtype, which need not be the grown one's.
    """

    def prove(mlp: Mlp) -> list[_Proof]:
        often = architecture.family.statistics or mlp.site.template.normed
        return [_prove(base, grown, mlp, expert, often, rounded_once, progress) for expert in mlp.numbers]

    with _pool() as pool:
        proofs = list(pool.map(prove, architecture.mlps))
    results = [result for proof in proofs for result in proof]
    findings = [finding for result in results for finding in result.findings]
    widths = {mlp.block: proof[0].width for mlp, proof in zip(architecture.mlps, proofs, strict=True)}
    findings += map(_in_config, configs.untold(base.config, grown.config, architecture, widths))
    error = max(result.error for result in results)
    units, copies = sum(m.width * m.experts for m in architecture.mlps), sum(result.width for result in results)
    zero = sum(result.zero for result in results)
    loose = f" and {zero:,} unit{'s' if zero != 1 else ''} with a zero column" if zero else ""
    off = "each sum rounded once" if rounded_once and not error else f"largest error {error!r}"
    figure = f"{copies - zero:,} units{loose} are {units:,} base units in {len(results)} MLPs, {off}"
    if findings:
        broken = len({finding.tensor for finding in findings})
        figure = f"wrong in {broken} tensor{'s' if broken != 1 else ''}, largest error {error!r}"
    return Answer("proved", "no" if findings else "yes", figure, tuple(findings[:SHOWN]))


def _in_config(problem: str) -> Finding:
    return Finding("config.json", problem)


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=2)


# ---------------------------------------------------------------- untouched


def _difference(base: Checkpoint, grown: Checkpoint, name: str, progress: Progress) -> str | None:
    """How a tensor that should be unchanged differs, or None."""
    one, other = base.infos[name], grown.infos[name]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return f"{other.dtype} {list(other.shape)}, in the base {one.dtype} {list(one.shape)}"
    (path, offset, nbytes), (theirs, start, _) = base.span(name), grown.span(name)
    differing = 0
    with path.open("rb", buffering=0) as left, theirs.open("rb", buffering=0) as right:
        left.seek(offset)
        right.seek(start)
        for done in range(0, nbytes, BLOCK_BYTES):
            size = min(BLOCK_BYTES, nbytes - done)
            mine, its = _exactly(left, size), _exactly(right, size)
            if mine != its:
                differing += int((np.frombuffer(mine, np.uint8) != np.frombuffer(its, np.uint8)).sum())
            progress(2 * size)
    return f"{differing:,} of its {nbytes:,} bytes differ" if differing else None


def _exactly(file: Any, size: int) -> bytes:
    data: bytes = file.read(size)
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            raise FormatError("the file became shorter while it was read", file=str(file.name))
        data += more
    return data


# ---------------------------------------------------------------- proved


@dataclass(frozen=True, slots=True)
class _Proof:
    """What came out for one MLP: its width in the grown checkpoint, the largest error, what is wrong, zero columns."""

    width: int
    error: float
    findings: tuple[Finding, ...]
    zero: int = 0


def _prove(
    base: Checkpoint,
    grown: Checkpoint,
    mlp: Mlp,
    expert: int | None,
    often: bool,
    rounded_once: bool,
    progress: Progress,
) -> _Proof:
    """One MLP, or one of the experts that share its tensors; `often`: each unit must come equally often."""
    misfits = list(_misfits(base, grown, mlp, mlp.down if rounded_once else None))
    if misfits:
        return _Proof(0, 0.0, tuple(misfits))
    rows = [
        lane
        for name, slot in mlp.tensors.items()
        if name != mlp.down
        for lane in lanes(base, grown, name, slot, mlp.grain, expert)
    ]
    copies, originals = match(rows, fast_digests)
    wrong = unequal(rows, copies, originals)
    if wrong is not None:  # the fast digest may collide: ask a slow one before saying no
        copies, originals = match(rows, slow_digests)
        wrong = unequal(rows, copies, originals)
    for name in mlp.tensors:
        progress((base.infos[name].nbytes + grown.infos[name].nbytes) // mlp.experts)
    width = len(copies) * mlp.grain
    if wrong is not None:
        return _Proof(width, 0.0, (Finding(wrong[0], f"unit {wrong[1]} equals no unit of the base"),))
    if not mlp.down:
        return _Proof(width, 0.0, tuple(_lost(rows, copies)))
    sums = _Sums(base, grown, mlp, expert, copies, originals, rounded_once)
    dtypes = {name: base.infos[name].dtype for name in mlp.tensors}
    findings = [*_strangers(rows, dtypes, sums.unmatched()), *_broken(rows, dtypes, sums.free()), *sums.findings()]
    findings += _uneven(mlp, copies, originals) if often else ()
    return _Proof(width, sums.error, tuple(findings), int(sums.zero.sum()) * mlp.grain)


def _lost(rows: list[Rows], copies: Units) -> Iterator[Finding]:
    """A spare expert has no columns that could be zero: all its units must be the base's."""
    for unit in np.flatnonzero(copies < 0)[:1]:
        yield Finding(rows[0].name, f"unit {unit} equals no unit of the base")


def _uneven(mlp: Mlp, copies: Units, originals: Units) -> Iterator[Finding]:
    """Statistics over the width stay what they are only if every base unit comes equally often."""
    times, before = (np.bincount(found[found >= 0], minlength=len(originals)) for found in (copies, originals))
    if (copies < 0).any() or (times * len(originals) != before * len(copies)).any():
        yield Finding(mlp.block, "it takes statistics over its units, and some come more often than others")


def _misfits(base: Checkpoint, grown: Checkpoint, mlp: Mlp, any_dtype: str | None) -> Iterator[Finding]:
    """Tensors of the grown MLP that are missing or do not have the shape of one MLP of the base's hidden size.

    They have the base's dtypes too, but for the tensor `any_dtype`.
    """
    missing = [name for name in mlp.tensors if name not in grown.infos]
    yield from (Finding(name, "it is missing") for name in missing)
    if missing:
        return
    first = mlp.down or next(iter(mlp.tensors))
    shape, slot = grown.infos[first].shape, mlp.tensors[first]
    width = Fraction(shape[slot.axis] if slot.axis < len(shape) else 0, len(slot.lanes)) / slot.places
    for name, slot in mlp.tensors.items():
        mine, its = base.infos[name], grown.infos[name]
        places = width * slot.places * len(slot.lanes)
        expected = tuple(places if i == slot.axis else n for i, n in enumerate(mine.shape))
        if its.shape != expected or (its.dtype != mine.dtype and name != any_dtype):
            shown = f"[{', '.join(map(str, expected))}]"
            problem = f"{its.dtype} {list(its.shape)}, where {mine.dtype} {shown} belongs to width {width}"
            yield Finding(name, problem)


def _strangers(rows: list[Rows], dtypes: Mapping[str, str], strangers: Units) -> Iterator[Finding]:
    """New units that carry weight in down and equal no base unit: in which tensor, and by how much."""
    owners = [match([lane], fast_digests)[0] for lane in rows] if len(strangers) else []
    for unit in strangers[:SHOWN]:
        others = {int(owner[unit]) for owner in owners} - {-1}
        lost = [lane for lane, owner in zip(rows, owners, strict=True) if owner[unit] < 0]
        for lane in lost:
            problem = f"the row of unit {unit} is in no unit of the base"
            if len(others) == 1:
                (original,) = others
                problem += f"; it is {lane.apart(unit, original, dtypes[lane.name])!r} from unit {original}'s"
            yield Finding(lane.name, problem)
        if not lost:
            told = ", ".join(f"{lane.name} unit {owner[unit]}" for lane, owner in zip(rows, owners, strict=True))
            yield Finding(rows[0].name, f"unit {unit} mixes rows of different base units: {told}")
    if len(strangers) > SHOWN:
        yield Finding(rows[0].name, f"and {len(strangers) - SHOWN:,} more units")


def _broken(rows: list[Rows], dtypes: Mapping[str, str], free: Units) -> Iterator[Finding]:
    """Free units whose rows are not finite: zero times infinity is not zero."""
    for lane in rows:
        for i in range(0, len(free), 64):
            values = decode(np.ascontiguousarray(lane.grown[:, free[i : i + 64]]), dtypes[lane.name])
            for unit in free[i : i + 64][~np.isfinite(values).all(axis=(0, 2))][:1]:
                yield Finding(lane.name, f"the column of unit {unit} is zero, but its row is infinite or NaN")


class _Sums:
    """The columns of down, added up over the copies of each base unit, streamed over the slices before the axis."""

    def __init__(
        self,
        base: Checkpoint,
        grown: Checkpoint,
        mlp: Mlp,
        expert: int | None,
        copies: Units,
        originals: Units,
        rounded_once: bool,
    ) -> None:
        self.name, slot = mlp.down, mlp.tensors[mlp.down]
        self._dtypes = (base.infos[mlp.down].dtype, grown.infos[mlp.down].dtype)
        self.copies, self.originals, self._rounded_once = copies, originals, rounded_once
        self._mine, self._its = (as_units(c, mlp.down, slot, mlp.grain, expert) for c in (base, grown))
        self._turns, self._base_turns = list(turns(copies)), list(turns(originals))
        self._lost = np.flatnonzero(copies < 0)
        self._seen = np.zeros(len(copies), self._its.dtype)
        self.errors = np.zeros(len(originals))
        for rows, inner in self._blocks():
            self._add(self._mine[rows, :, inner], self._its[rows, :, inner])

    @property
    def error(self) -> float:
        """The largest difference of an element of a sum from the base's."""
        return float(self.errors.max())

    @property
    def zero(self) -> NDArray[np.bool_]:
        """Of each new unit whether its whole column is zero: no bit of it is set but signs."""
        return np.asarray(np.left_shift(self._seen, 1) == 0)

    def unmatched(self) -> Units:
        """New units that equal no base unit although their column is not zero."""
        return self._lost[~self.zero[self._lost]]

    def free(self) -> Units:
        """New units that equal no base unit and need not: their column is zero."""
        return self._lost[self.zero[self._lost]]

    def findings(self) -> Iterator[Finding]:
        wrong = np.flatnonzero(self.errors)
        for unit in wrong[:1]:
            made = np.flatnonzero(self.copies == unit)
            shown = ", ".join(str(u) for u in made[:4]) + (", ..." if len(made) > 4 else "")
            yield Finding(
                self.name,
                f"{len(wrong):,} of {len(self.errors):,} base units do not get their column back: unit {unit}"
                f" (now unit{'s' if len(made) != 1 else ''} {shown or 'gone'}) is off by {float(self.errors[unit])!r}",
            )

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        outer, units, inner = self._its.shape
        columns = max(1, BLOCK_BYTES // (units * self._its.itemsize))
        if columns >= inner:
            step = max(1, columns // max(1, inner))
            yield from ((slice(i, i + step), slice(None)) for i in range(0, outer, step))
        else:
            yield from (
                (slice(o, o + 1), slice(i, i + columns)) for o in range(outer) for i in range(0, inner, columns)
            )

    def _add(self, mine: Bits, its: Bits) -> None:
        base, values = (decode(np.ascontiguousarray(b), d) for b, d in zip((mine, its), self._dtypes, strict=True))
        self._seen |= np.bitwise_or.reduce(its, axis=(0, 2))
        shape = (mine.shape[0], len(self.errors), mine.shape[2])
        (got, unsure), (wanted, unsure_too) = _added(values, self._turns, shape), _added(base, self._base_turns, shape)
        off = np.abs(got - wanted)
        if not np.isfinite(off).all():
            raise FormatError("it has weights that are infinite or NaN: nothing can be proved", tensor=self.name)
        for row, unit, i in np.argwhere(unsure | unsure_too):  # float64 was too short for a sum: add up exactly
            terms = [*values[row, self.copies == unit, i], *-base[row, self.originals == unit, i]]
            off[row, unit, i] = abs(math.fsum(terms))
        if self._rounded_once:
            off[rounded(got, self._dtypes[0]) == wanted] = 0.0
        np.maximum(self.errors, off.max(axis=(0, 2), initial=0.0), out=self.errors)


def _added(
    values: Floats, owned: Iterable[tuple[Picked, Picked]], shape: tuple[int, ...]
) -> tuple[Floats, NDArray[np.bool_]]:
    """Sums by owner in float64, and where one was rounded (the error of Knuth's two-sum is not zero)."""
    total, unsure = np.zeros(shape), np.zeros(shape, bool)
    for units, owners in owned:
        old, term = total[:, owners], values[:, units]
        new = old + term
        back = new - old
        unsure[:, owners] |= ((old - (new - back)) + (term - back)) != 0
        total[:, owners] = new
    return total, unsure
