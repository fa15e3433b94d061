"""Did training leave the frozen part alone? Reads the grown checkpoint and the trained one, knows no trainer.

Every trained tensor is compared with the grown one, outside the manifest's boxes, twice: after rounding to the grown
dtype, which decides the answer, and in the trained dtype as it is, where drift hides in an fp32 master before it is
large enough for bf16. The trace of what moved names the cause (traces.py).

Everything streams, some elements at a time. Putting the frozen part back is repair.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ckptgrow.checkpoint import MANIFEST, Bits
from ckptgrow.equivalence import Finding
from ckptgrow.errors import FormatError, RequestError
from ckptgrow.families.declared import recalled
from ckptgrow.lineage import architecture_of
from ckptgrow.manifest import Trainable
from ckptgrow.matching import Matching, naming
from ckptgrow.numeric import FLOATS, Floats, decode, rounded
from ckptgrow.reference import Reference
from ckptgrow.regions import Division, Region, undivided
from ckptgrow.respelled import found, found_as, halves, notes_on
from ckptgrow.tensors import TensorInfo
from ckptgrow.traces import Cause, Fates, Trace, cause_of, may_be_rounding
from ckptgrow.trained import Trained
from ckptgrow.units import side_by_side

Progress = Callable[[int], None]  # called with the number of elements just compared
Regions = tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Drift:
    """One tensor: how many frozen elements moved and how far (in the trained dtype), how many trainable ones did."""

    tensor: str
    found_as: str
    dtype: str
    found_dtype: str
    frozen: int
    moved: int
    moved_before_cast: int
    largest: float
    largest_relative: float  # over the elements that were not zero
    not_finite: int  # frozen elements that became infinite or NaN; not in the largest
    trainable: int
    changed: int


@dataclass(frozen=True, slots=True)
class Audit:
    """What came out. `exit_code`: 0 the frozen part is as it was, 1 it moved, 2 cannot tell."""

    grown: str
    trained: str
    cause: Cause
    factor: tuple[float, float] | None  # between which the one factor lies: bf16 does not say more
    tensors: tuple[Drift, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    repaired: str | None = None

    def total(self, field: str) -> int:
        return sum(getattr(drift, field) for drift in self.tensors)

    @property
    def exit_code(self) -> int:
        if self.repaired:
            return 0
        return 1 if self.total("moved") else 2 if self.findings else 0

    @property
    def clean(self) -> bool | None:
        return None if self.findings and not self.total("moved") else not self.total("moved")

    def to_json(self) -> dict[str, Any]:
        counts = ("frozen", "moved", "moved_before_cast", "trainable", "changed")
        said = {"clean": self.clean, "exit_code": self.exit_code, "totals": {name: self.total(name) for name in counts}}
        return asdict(self) | said


# ---------------------------------------------------------------- what is compared with what


@dataclass(frozen=True)
class Pair:
    """A grown tensor and the trained one that it became, and what of it trains."""

    grown: TensorInfo
    trained: TensorInfo
    division: Division
    found_as: str  # where the trained one lies in what the trainer wrote

    @property
    def trainable(self) -> Regions:
        return self.division.trained

    @property
    def frozen(self) -> Regions:
        return self.division.frozen

    def elements(self, regions: Regions) -> int:
        return self.division.elements(regions)

    def view(self, bits: Bits) -> Bits:
        """A tensor as [outer, along the axis, inner]."""
        return bits.reshape(self.grown.around(self.division.axis))


@dataclass(frozen=True)
class Job:
    """Two checkpoints, tensor by tensor."""

    reference: Reference
    trained: Trained
    pairs: tuple[Pair, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def elements(self) -> int:
        return sum(pair.grown.elements for pair in self.pairs)

    @property
    def trained_bytes(self) -> int:
        return sum(info.nbytes for info in self.trained.infos.values())

    def bits(self, pair: Pair) -> tuple[Bits, Bits]:
        return self.reference.tensors.bits(pair.grown.name), self.trained.bits(pair.trained.name)


def compare_names(reference: Reference, trained: Trained) -> Job:
    """Who is who. Raises CkptgrowError where the two do not belong together."""
    grown, manifest = reference.tensors, reference.manifest
    family = recalled(manifest.family, manifest.declaration)
    named = family, manifest.ties, manifest.trainable[0].name, manifest.in_memory_names
    own = naming(grown, reference.config, *named)
    trained, matching = found(own, trained, lambda: architecture_of(manifest))
    boxes = {tensor.name: tensor for tensor in manifest.trainable}
    pairs, findings = [], list(_misplaced(matching))
    for name, theirs in [*matching.names.items(), *((owner, head) for head, owner in matching.heads.items())]:
        mine, its = grown.infos[name], trained.infos[theirs]
        division = _divided(mine, boxes.get(name))
        problem = _misfit(mine, its)
        if problem:
            findings.append(Finding(found_as(trained, theirs), problem))
        else:
            pairs.append(Pair(mine, its, division, found_as(trained, theirs)))
    return Job(
        reference, trained, tuple(pairs), tuple(findings), (*reference.notes, *matching.notes, *notes_on(trained))
    )


def check_order(job: Job) -> None:
    """Raise RequestError where gate and up stand the other way round in a stack: shapes are the same, but what is
    frozen of each is the other's."""
    pairs = {pair.trained.name: pair for pair in job.pairs if pair.frozen}
    for holder, names in halves(job.trained):
        some = [pairs[name] for name in names if name in pairs]
        if len(some) == 2 and not _is(job, some[0], some[0]) and _is(job, some[0], some[1]) and _is(job, *some[::-1]):
            raise RequestError(
                "gate and up stand in it the other way round",
                file=str(job.trained.folder),
                tensor=holder,
                hint="Exchange the halves of each expert.",
            )


def _is(job: Job, mine: Pair, its: Pair) -> bool:
    """Whether the frozen elements of one grown tensor are in the place of another one."""
    if (mine.frozen, mine.grown.shape) != (its.frozen, its.grown.shape):
        return False
    both = job.reference.tensors.bits(mine.grown.name), job.trained.bits(its.trained.name)
    return not any(_differing(mine, *block)[0] for block in _blocks(mine, *both, mine.frozen))


# What stands in a name where a tensor was saved before it was put together again, and what to do.
_PARTS = "a part of a split tensor: ckptgrow.training.whole puts both together"
_UNFINISHED = {
    ".parametrizations.": "a parametrization stands in its place: remove_parametrizations before saving",
    "_frozen.": _PARTS,
    "_trained.": _PARTS,
}


def _misplaced(matching: Matching) -> Iterator[Finding]:
    """Trained tensors that are none of the grown ones, or twice the same, and grown ones that are not there."""
    for name, owner in matching.doubles.items():
        yield Finding(name, f"it and {matching.names[owner]} are both {owner}")
    for name in matching.strangers:
        ways_out = (way_out for mark, way_out in _UNFINISHED.items() if mark in name + ".")
        yield Finding(name, next(ways_out, "the grown checkpoint has no such tensor"))
    yield from (Finding(name, "it is missing") for name in matching.missing)


def _divided(info: TensorInfo, tensor: Trainable | None) -> Division:
    """What of a tensor trains."""
    if tensor is None:
        return undivided(info.shape)
    try:
        return tensor.division()
    except FormatError as error:
        raise error.at(file=MANIFEST, tensor=info.name) from None


def _misfit(mine: TensorInfo, its: TensorInfo) -> str | None:
    if its.shape != mine.shape:
        return f"shape {list(its.shape)}, in the grown checkpoint {list(mine.shape)}"
    if its.dtype != mine.dtype and not {its.dtype, mine.dtype} <= FLOATS.keys():
        return f"{its.dtype}, in the grown checkpoint {mine.dtype}: these cannot be compared"
    return None


# ---------------------------------------------------------------- how far, and why


def examine(job: Job, progress: Progress) -> tuple[Audit, tuple[Pair, ...]]:
    """The audit, and the pairs whose frozen part is not what it was."""

    def measured(pair: Pair) -> tuple[Drift, Trace]:
        return _measure(pair, *job.bits(pair))

    check_order(job)
    drifts, traces = [], []
    with ThreadPoolExecutor(max_workers=2) as pool:
        for drift, trace in pool.map(measured, job.pairs):
            drifts.append(drift)
            traces.append(trace)
            progress(drift.frozen + drift.trainable)
    drifted = [i for i, drift in enumerate(drifts) if drift.moved_before_cast]
    pairs, touched = tuple(job.pairs[i] for i in drifted), [traces[i] for i in drifted]
    cause, factor = cause_of(touched, narrowed=any(drift.moved for drift in drifts))
    if cause == "trained" and may_be_rounding(touched) and _rounded_alike(job, pairs):
        cause = "rounding"
    named = str(job.reference.files.folder), str(job.trained.folder)
    return Audit(*named, cause, factor, tuple(drifts), job.findings, job.notes), pairs


def _rounded_alike(job: Job, pairs: Sequence[Pair]) -> bool:
    """Whether equal frozen values moved equally in all these tensors; reads them once more, until one did not."""
    dtype = pairs[0].trained.dtype
    fates = Fates(FLOATS[dtype], dtype)
    for pair in pairs:
        for one, other in _blocks(pair, *job.bits(pair), pair.frozen):
            fates.add(rounded(decode(one, pair.grown.dtype), dtype), other, decode(other, dtype))
            if fates.broken:
                return False
    return fates.explained


def _measure(pair: Pair, mine: Bits, its: Bits) -> tuple[Drift, Trace]:
    """Count what moved, and where something did, look again for how far and by what rule."""
    frozen = [_differing(pair, *block) for block in _blocks(pair, mine, its, pair.frozen)]
    changed = sum(_differing(pair, *block)[1] for block in _blocks(pair, mine, its, pair.trainable))
    moved, before = sum(block[0] for block in frozen), sum(block[1] for block in frozen)
    trace = Trace(FLOATS.get(pair.trained.dtype))
    if before and trace.form:
        for one, other in _blocks(pair, mine, its, pair.frozen):
            trace.add(rounded(decode(one, pair.grown.dtype), pair.trained.dtype), decode(other, pair.trained.dtype))
    named = pair.grown.name, pair.found_as, pair.grown.dtype, pair.trained.dtype
    counts = pair.elements(pair.frozen), moved, before
    far = trace.largest, trace.relative, trace.not_finite
    return Drift(*named, *counts, *far, pair.elements(pair.trainable), changed), trace


def _blocks(pair: Pair, mine: Bits, its: Bits, regions: Regions) -> Iterator[tuple[Bits, Bits]]:
    """The same elements of both, some at a time."""
    one, other = pair.view(mine), pair.view(its)
    for region in regions:
        rows, places = slice(region.rows.start, region.rows.stop), slice(region.start, region.stop)
        yield from side_by_side(one[rows, places], other[rows, places])


def _differing(pair: Pair, mine: Bits, its: Bits) -> tuple[int, int]:
    """How many elements differ (in the grown dtype, in the trained dtype)."""
    if pair.grown.dtype == pair.trained.dtype:
        count = int(np.count_nonzero(mine != its))
        return count, count
    was, now = decode(mine, pair.grown.dtype), decode(its, pair.trained.dtype)
    after = _unlike(rounded(now, pair.grown.dtype), was)
    return after, _unlike(now, rounded(was, pair.trained.dtype))


def _unlike(one: Floats, other: Floats) -> int:
    """How many are not the same value, signs of zero included; what is finite in neither counts as the same."""
    same = ((one == other) & (np.signbit(one) == np.signbit(other))) | ~(np.isfinite(one) | np.isfinite(other))
    return int(same.size - np.count_nonzero(same))
