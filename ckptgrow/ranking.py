"""Which layers an ordinary fine-tuning changed most: the relative Frobenius norm of the change of each projection.

For each layer and projection |TUNED - BASE| / |BASE|, and for the block the same over all its projections together;
biases and norms are not counted. Both checkpoints stream in blocks and are compared in float64, in their own dtypes;
no model is built. Sums are made in one order, so equal files give equal figures.

The paper ranks layers by the size of their weight update and states neither the norm nor the tensors (METHOD.md 7):
the choice made here is this module's. Refused: another architecture, an MLP tensor that is missing or has another
shape, weights that are not finite, and two checkpoints whose MLPs are equal.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ckptgrow.checkpoint import CONFIG, Checkpoint
from ckptgrow.errors import FormatError, RequestError
from ckptgrow.families import Architecture, Mlp, ends_in, ties
from ckptgrow.matching import Matching, Renamed, naming
from ckptgrow.numeric import FLOATS, decode
from ckptgrow.respelled import found, notes_on
from ckptgrow.trained import Trained
from ckptgrow.units import lanes, side_by_side

Progress = Callable[[int], None]  # called with the number of bytes just compared, from any thread

MEASURE = "|TUNED - BASE| / |BASE|, Frobenius norms; block: all projections of the MLP together"
_PAPER_TOP, _PAPER_LAYERS = 10, 26  # METHOD.md 7


@dataclass(frozen=True, slots=True)
class Change:
    """How far the MLP of one layer moved, relatively: each projection by its name, and all of them together."""

    layer: int
    projections: Mapping[str, float]
    block: float

    def to_json(self) -> dict[str, Any]:
        return {"layer": self.layer, **self.projections, "block": self.block}


@dataclass(frozen=True, slots=True)
class Ranking:
    """All layers, the most changed first, of which the first `top` are to be grown."""

    base: str
    tuned: str
    top: int
    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(change.layer for change in self.changes)

    def to_json(self) -> dict[str, Any]:
        """What `expand --layers @ranking.json` reads, `layers` and `top`, and what it rests on."""
        return {
            "layers": list(self.layers),
            "top": self.top,
            "measure": MEASURE,
            "base": self.base,
            "tuned": self.tuned,
            "figures": [change.to_json() for change in self.changes],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints of one architecture, the tuned one under the base's names."""

    base: Checkpoint
    architecture: Architecture
    folder: Path  # of the tuned one
    tuned: Renamed
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.nbytes_of(mlp) for mlp in self.architecture.mlps)

    def nbytes_of(self, mlp: Mlp) -> int:
        return sum(infos[name].nbytes for infos in (self.base.infos, self.tuned.infos) for name in _matrices(self, mlp))


def comparison(base: Checkpoint, architecture: Architecture, tuned: Trained) -> Comparison:
    """Who is who. Raises RequestError, naming the tensor, where the MLPs are not those of one architecture."""
    says, its = base.config.get("model_type"), tuned.config.get("model_type")
    if its not in (None, says):
        raise RequestError(f"model_type {its!r}, and {says!r} in {base.folder}", file=str(tuned.folder / CONFIG))
    family, probe = architecture.family, architecture.mlps[0].down
    own = naming(base, base.config, family, ties(base.config, family, base.infos), probe)
    tuned, matching = found(own, tuned, lambda: architecture)
    job = Comparison(base, architecture, tuned.folder, Renamed(tuned, matching.names), matching.notes)
    _check_same(job, matching, tuned)
    return replace(job, notes=(*matching.notes, *notes_on(tuned), *_coarser(job)))


def ranking(job: Comparison, top: int | None, progress: Progress) -> Ranking:
    """The layers by the change of their block, the lower layer first among equals.

    `top` is how many of them to grow; without it as many in a hundred as the paper grows, 10 of 26.
    """
    count = len({mlp.layer for mlp in job.architecture.mlps})
    chosen = max(1, round(_PAPER_TOP / _PAPER_LAYERS * count)) if top is None else top
    if not 1 <= chosen <= count:
        raise RequestError(f"--top {chosen}: it has {count} layers")
    sums: dict[int, list[_Sum]] = defaultdict(list)
    with ThreadPoolExecutor(max_workers=2) as pool:
        mlps = job.architecture.mlps
        for mlp, measured in zip(mlps, pool.map(lambda mlp: _measured(job, mlp, progress), mlps), strict=True):
            sums[mlp.layer] += measured
    changes = [_change(layer, parts) for layer, parts in sums.items()]
    if not any(change.block for change in changes):
        raise RequestError(
            f"its MLPs are those of {job.base.folder}: there is nothing to rank",
            file=str(job.folder),
            hint="Give a checkpoint in which the MLPs were trained.",
        )
    ranked = tuple(sorted(changes, key=lambda change: (-change.block, change.layer)))
    return Ranking(str(job.base.folder), str(job.folder), chosen, ranked, job.notes)


# ---------------------------------------------------------------- what may be compared


def _matrices(job: Comparison, mlp: Mlp) -> Iterator[str]:
    """The projections of an MLP: its tensors without biases and norms."""
    for name, slot in mlp.tensors.items():
        if slot.coded:
            raise RequestError("its bytes are no weights without their scales", tensor=name)
        if not slot.vector:
            yield name


def _check_same(job: Comparison, matching: Matching, tuned: Trained) -> None:
    file = str(tuned.folder)
    for mlp in job.architecture.mlps:
        for name in _matrices(job, mlp):
            if name not in matching.names:
                raise RequestError("it is missing", file=file, tensor=name)
            mine, its = job.base.infos[name], tuned.infos[matching.names[name]]
            if its.shape != mine.shape:
                problem = f"shape {list(its.shape)}, and {list(mine.shape)} in {job.base.folder}"
                raise RequestError(problem, file=file, tensor=its.name)
            if not {mine.dtype, its.dtype} <= FLOATS.keys():
                problem = f"{its.dtype}, and {mine.dtype} in {job.base.folder}: these cannot be compared"
                raise RequestError(problem, file=file, tensor=its.name)
    slots = {slot.name for mlp in job.architecture.mlps for slot in mlp.tensors.values()}
    for name in (*matching.strangers, *matching.doubles):
        if any(ends_in(name, slot) for slot in slots):
            problem = "it is there twice" if name in matching.doubles else f"{job.base.folder} has no such tensor"
            raise RequestError(problem, file=file, tensor=name)


def _coarser(job: Comparison) -> Iterator[str]:
    """Where the tuned dtype has fewer bits, rounding alone changes every weight, and the figures contain it."""
    pairs = {(job.base.infos[n].dtype, job.tuned.infos[n].dtype) for mlp in job.architecture.mlps for n in mlp.tensors}
    for mine, its in sorted(pairs):
        if FLOATS[its].mantissa < FLOATS[mine].mantissa:
            about = 2.0 ** -FLOATS[its].mantissa / 4
            yield f"{its} holds less than {mine}: the figures contain its rounding, about {about:.1g}"


# ---------------------------------------------------------------- the figures


@dataclass(frozen=True, slots=True)
class _Sum:
    """One projection of one MLP: the sums of the squares of its change and of its weights."""

    projection: str
    change: float
    weights: float


def _measured(job: Comparison, mlp: Mlp, progress: Progress) -> list[_Sum]:
    sums = []
    for name in _matrices(job, mlp):
        slot, mine, its = mlp.tensors[name], job.base.infos[name].dtype, job.tuned.infos[name].dtype
        for projection, rows in zip(slot.lanes, lanes(job.base, job.tuned, name, slot), strict=True):
            change, weights = [], []
            for one, other in side_by_side(rows.base, rows.grown):
                was, now = decode(one, mine), decode(other, its)
                change.append(float(np.square(now - was).sum()))
                weights.append(float(np.square(was).sum()))
            sums.append(_Sum(projection, math.fsum(change), math.fsum(weights)))
            if not math.isfinite(sums[-1].change):
                raise FormatError("it has weights that are infinite or NaN in one of the two", tensor=name)
            if not sums[-1].weights:
                raise FormatError("its weights are all zero, so no change is relative to them", tensor=name)
        progress(job.base.infos[name].nbytes + job.tuned.infos[name].nbytes)
    return sums


def _change(layer: int, sums: list[_Sum]) -> Change:
    names = dict.fromkeys(part.projection for part in sums)
    of = {name: _relative([part for part in sums if part.projection == name]) for name in names}
    return Change(layer, of, _relative(sums))


def _relative(sums: list[_Sum]) -> float:
    return math.sqrt(math.fsum(part.change for part in sums) / math.fsum(part.weights for part in sums))
