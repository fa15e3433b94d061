"""Did training leave the frozen part alone? Reads the grown checkpoint and the trained one, knows no trainer.

Every trained tensor is compared with the grown one, outside the manifest's boxes, twice: after rounding to the grown
dtype, which decides the answer, and in the trained dtype as it is, where drift hides in an fp32 master before it is
large enough for bf16. The trace of what moved names the cause:

- decay: one factor below 1 explains every frozen element of the touched tensors, the unmoved ones too, within rounding
- averaging: no element moved farther than to the neighbouring value of its dtype
- narrowed: nothing but what the trained dtype cannot hold
- trained: anything else

Everything streams over mapped files. Putting the frozen part back is repair.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ckptgrow.checkpoint import MANIFEST, Bits, Checkpoint, digest_of, open_checkpoint
from ckptgrow.equivalence import Finding
from ckptgrow.errors import FormatError, RequestError
from ckptgrow.manifest import CONFIG_KEY, Manifest, Trainable, along, history, load_manifest
from ckptgrow.numeric import FLOATS, Float, Floats, decode, rounded
from ckptgrow.tensors import TensorInfo
from ckptgrow.trained import Tensors, match, open_trained

Cause = Literal["nothing", "decay", "averaging", "narrowed", "trained"]
Progress = Callable[[int], None]  # called with the number of elements just compared
Spans = tuple[tuple[int, int], ...]

BLOCK_ELEMENTS = 1 << 18
CAUSES: Mapping[Cause, str] = {
    "nothing": "nothing moved",
    "decay": "weight decay: one factor explains every frozen element of the touched tensors",
    "averaging": "averaging: nothing moved by more than one unit in the last place",
    "narrowed": "the trained dtype cannot hold the frozen values; nothing else moved",
    "trained": "training: no factor and no rounding explains it, so the mask was not in force",
}


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
    """A grown tensor and the trained one that it became, cut along one axis."""

    grown: TensorInfo
    trained: TensorInfo
    axis: int
    trainable: Spans

    @property
    def extent(self) -> int:
        return self.grown.around(self.axis)[1]

    @property
    def frozen(self) -> Spans:
        edges = [0, *(edge for span in self.trainable for edge in span), self.extent]
        return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)

    def elements(self, spans: Spans) -> int:
        return self.grown.elements // max(1, self.extent) * sum(stop - start for start, stop in spans)

    def view(self, bits: Bits) -> Bits:
        """A tensor as [outer, along the axis, inner]."""
        return bits.reshape(self.grown.around(self.axis))


@dataclass(frozen=True)
class Job:
    """Two checkpoints, tensor by tensor."""

    grown: Checkpoint
    trained: Tensors
    pairs: tuple[Pair, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def elements(self) -> int:
        return sum(pair.grown.elements for pair in self.pairs)

    @property
    def trained_bytes(self) -> int:
        return sum(info.nbytes for info in self.trained.infos.values())


def compare_names(grown: Path, trained: Path) -> Job:
    """Both checkpoints, and who is who. Raises CkptgrowError where they do not belong together."""
    reference, manifest = _reference(grown)
    found = open_trained(trained)
    notes = [*_belonging(reference, found)]
    matching = match(reference, manifest, found)
    boxes = {tensor.name: tensor for tensor in manifest.trainable}
    named = [*matching.names.items(), *((owner, head) for head, owner in matching.heads.items())]
    pairs, findings = [], list(matching.findings)
    for name, theirs in named:
        mine, its = reference.infos[name], found.infos[theirs]
        axis, trainable = _cut(mine, boxes.get(name))
        problem = _misfit(mine, its)
        if problem:
            findings.append(Finding(theirs, problem))
        else:
            pairs.append(Pair(mine, its, axis, trainable))
    return Job(reference, found, tuple(pairs), tuple(findings), (*notes, *matching.notes))


def _reference(folder: Path) -> tuple[Checkpoint, Manifest]:
    """The grown checkpoint and its manifest, which must belong to each other."""
    grown = open_checkpoint(folder)
    if not (folder / MANIFEST).is_file():
        raise RequestError(
            f"it has no {MANIFEST}: audit compares with the grown checkpoint, not with its base",
            file=str(folder),
            hint="Give the folder that ckptgrow expand wrote; the same expand of the base writes the same bytes again.",
        )
    history(grown)  # raises where the manifest is another checkpoint's
    manifest = load_manifest(folder)
    for tensor in manifest.trainable:
        info = grown.infos.get(tensor.name)
        if info is None or (info.shape, info.dtype) != (tensor.shape, tensor.dtype):
            raise FormatError(
                f"the manifest describes it as {tensor.dtype} {list(tensor.shape)}",
                file=str(folder),
                tensor=tensor.name,
            )
    return grown, manifest


def _belonging(grown: Checkpoint, trained: Tensors) -> Iterator[str]:
    """Whether the trained checkpoint names the grown one's manifest. Raises RequestError where it names another."""
    entry = trained.config.get(CONFIG_KEY)
    named = entry.get("manifest") if isinstance(entry, Mapping) else None
    if named is None:
        yield f"{trained.folder} does not say in its config.json which growth it comes from"
    elif named != digest_of((grown.folder / MANIFEST).read_bytes()):
        raise RequestError(
            f"its config.json names another {MANIFEST} than the one in {grown.folder}",
            file=str(trained.folder),
            hint="Give the grown checkpoint that this training started from.",
        )


def _cut(info: TensorInfo, tensor: Trainable | None) -> tuple[int, Spans]:
    """The axis along which a tensor's boxes lie, and what of it trains."""
    if tensor is None:
        return 0, ()
    try:
        return along(info.shape, tensor.boxes)
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

    def measured(pair: Pair) -> tuple[Drift, _Trace]:
        return _measure(pair, job.grown.bits(pair.grown.name), job.trained.bits(pair.trained.name))

    drifts, traces = [], []
    with ThreadPoolExecutor(max_workers=2) as pool:
        for drift, trace in pool.map(measured, job.pairs):
            drifts.append(drift)
            traces.append(trace)
            progress(drift.frozen + drift.trainable)
    drifted = [i for i, drift in enumerate(drifts) if drift.moved_before_cast]
    cause, factor = _cause(drifts, [traces[i] for i in drifted])
    named = str(job.grown.folder), str(job.trained.folder)
    seen = Audit(*named, cause, factor, tuple(drifts), job.findings, job.notes)
    return seen, tuple(job.pairs[i] for i in drifted)


def _measure(pair: Pair, mine: Bits, its: Bits) -> tuple[Drift, _Trace]:
    """Count what moved, and where something did, look again for how far and by what rule."""
    frozen = [_differing(pair, *block) for block in _blocks(pair, mine, its, pair.frozen)]
    changed = sum(_differing(pair, *block)[1] for block in _blocks(pair, mine, its, pair.trainable))
    moved, before = sum(block[0] for block in frozen), sum(block[1] for block in frozen)
    trace = _Trace(FLOATS.get(pair.trained.dtype))
    if before and trace.form:
        for one, other in _blocks(pair, mine, its, pair.frozen):
            trace.add(rounded(decode(one, pair.grown.dtype), pair.trained.dtype), decode(other, pair.trained.dtype))
    named = pair.grown.name, pair.trained.name, pair.grown.dtype, pair.trained.dtype
    counts = pair.elements(pair.frozen), moved, before
    far = trace.largest, trace.relative, trace.not_finite
    return Drift(*named, *counts, *far, pair.elements(pair.trainable), changed), trace


def _blocks(pair: Pair, mine: Bits, its: Bits, spans: Spans) -> Iterator[tuple[Bits, Bits]]:
    """The same elements of both, some at a time."""
    one, other = pair.view(mine), pair.view(its)
    outer, _, inner = one.shape
    for start, stop in spans:
        places = max(1, min(stop - start, BLOCK_ELEMENTS // max(1, inner)))
        rows = max(1, BLOCK_ELEMENTS // max(1, inner * places))
        for row in range(0, outer, rows):
            for a in range(start, stop, places):
                cut = slice(row, row + rows), slice(a, min(a + places, stop))
                yield one[cut], other[cut]


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


class _Trace:
    """How the frozen elements of one tensor moved, added up block by block, all in the trained dtype."""

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


def _cause(drifts: list[Drift], traces: list[_Trace]) -> tuple[Cause, tuple[float, float] | None]:
    """The cause that explains all that moved, and the factor where it is one. `traces` are of the tensors touched."""
    if not traces:
        return ("narrowed" if any(drift.moved for drift in drifts) else "nothing"), None
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
