"""The language of checkpoint operations: a Plan says what every output tensor is made of, and nothing about how.

    Plan    = Outputs + changes to config.json
    Output  = Parts laid end to end along one axis
    Part    = a sum of Terms, or one value throughout where there are none; `grown` where it holds new units; of all
              slices before the axis, or where experts of one stack differ of its own `slices`
    Term    = scale x share of some units, picked along the same axis, of a tensor of a source
    Share   = the index-th of `count` shares that add up to the weight exactly (METHOD.md 2)

A Plan is a frozen value: it holds names, never a path, a handle or a tensor. `source` strings are bound to
checkpoints when it is executed. It can be printed, compared, stored, proved (proof.py) and executed (execute.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

from ckptgrow.errors import PlanError
from ckptgrow.tensors import TensorInfo

Units = range | tuple[int, ...]
Rule = Literal["even", "random"]
Sources = Mapping[str, Mapping[str, TensorInfo]]


@dataclass(frozen=True, slots=True)
class Share:
    """The `index`-th of `count` shares of each weight; of the share `of` of it, where that is given."""

    index: int
    count: int
    rule: Rule = "even"
    seed: int = 0
    of: Share | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count or self.count < 2:
            raise PlanError(f"share {self.index} of {self.count} does not exist")

    @property
    def siblings(self) -> tuple[Share, ...]:
        """All shares that together make up what this one is a share of, itself included."""
        return tuple(replace(self, index=i) for i in range(self.count))

    def __str__(self) -> str:
        of = f" of {self.of}" if self.of else ""
        return f"{self.rule} {self.index + 1}/{self.count}{of}"


@dataclass(frozen=True, slots=True)
class Term:
    """scale x share of the picked `units` of tensor `name` in checkpoint `source`; one scale for all, or one a unit.

    The output's slice s before the axis is made of the source's slice s - `shift`.
    """

    source: str
    name: str
    units: Units
    scale: float | tuple[float, ...] = 1.0
    share: Share | None = None
    shift: int = 0

    @property
    def is_bytes(self) -> bool:
        """Whether the term is the source's own bytes, whatever they mean."""
        return self.scale == 1.0 and self.share is None


@dataclass(frozen=True, slots=True)
class Part:
    """`size` consecutive places along the axis: the sum of `terms`, or where there are none the value `fill`.

    With `slices` only in these slices before the axis; the parts of each run of slices fill the axis by themselves.
    """

    size: int
    terms: tuple[Term, ...] = ()
    grown: bool = False
    fill: float = 0.0
    slices: range | None = None

    def rows(self, of: range) -> range:
        """Those of the slices `of` that the part is in."""
        if self.slices is None:
            return of
        return range(max(of.start, self.slices.start), min(of.stop, self.slices.stop))

    @property
    def bytes_of(self) -> Term | None:
        """The one term whose bytes this part is, if it is a plain copy (where the dtypes agree)."""
        return self.terms[0] if len(self.terms) == 1 and self.terms[0].is_bytes else None

    @property
    def is_zero(self) -> bool:
        """Whether nothing but zeros is in it, whatever the sources hold."""
        return not self.terms and not self.fill


@dataclass(frozen=True, slots=True)
class Member:
    """What an output is to its MLP: the block's name, its layer, and the projection each of its lanes belongs to.

    A lane is a stretch of the axis that holds each unit once: ("gate",), ("down",), the halves of a fused gate_up,
    ("gate", "up"), or those of several experts, ("up", "up"). All lanes of a tensor are equally long. A unit takes
    `places` of its lane: 2 in an interleaved tensor, whose one lane is "gate_up", a fraction in a table of scales.
    """

    block: str
    layer: int
    lanes: tuple[str, ...]
    bias: bool = False
    places: Fraction = Fraction(1)

    @property
    def role(self) -> str:
        return "_".join(dict.fromkeys(self.lanes)) + ("_bias" if self.bias else "")


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the result. An output without `member` does not belong to a block that is operated on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    axis: int
    parts: tuple[Part, ...]
    member: Member | None = None

    @property
    def extent(self) -> int:
        """The length along the axis."""
        return self.info.around(self.axis)[1]

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.name, self.dtype, self.shape)

    @property
    def steps(self) -> tuple[int, int]:
        """(outer, inner): how many slices lie before the axis, and how many elements one place along it has."""
        outer, _, inner = self.info.around(self.axis)
        return outer, inner

    def placed(self) -> Iterator[tuple[int, Part]]:
        """Each part with the place where it begins."""
        start, slices = 0, None
        for part in self.parts:
            start = start if part.slices == slices else 0
            yield start, part
            start, slices = start + part.size, part.slices

    def grown(self) -> tuple[tuple[int, int], ...]:
        """The [start, stop) ranges of places that are new in any slice, neighbours joined."""
        return joined(sorted((start, start + part.size) for start, part in self.placed() if part.grown))

    def sections(self, edges: Iterable[int] = ()) -> Iterator[tuple[range | None, Output]]:
        """Each run of slices before the axis, cut further at `edges`, and the output as it is there: its parts have no
        slices of their own. None where all slices are alike; of the shape nothing changes."""
        whole = range(self.steps[0])
        runs = dict.fromkeys(part.slices for part in self.parts)
        for run in runs:
            own = replace(self, parts=tuple(replace(part, slices=None) for part in self.parts if part.slices == run))
            around = whole if run is None else run
            cuts = sorted({around.start, around.stop} | {edge for edge in edges if edge in around})
            if run is None and len(cuts) < 3:
                yield None, own
            else:
                yield from ((range(*span), own) for span in pairwise(cuts))

    @property
    def lane_count(self) -> int:
        return len(self.member.lanes) if self.member else 1

    def lanes(self) -> Iterator[tuple[str, int, int]]:
        """Each lane's projection and the [start, stop) of the axis that it takes."""
        names = self.member.lanes if self.member else ()
        for i, name in enumerate(names):
            yield name, i * self.extent // len(names), (i + 1) * self.extent // len(names)

    def is_copy_of(self, info: TensorInfo, source: str = "base") -> bool:
        """Whether this output is that tensor of `source` unchanged: same name, dtype, shape and bytes."""
        if (self.name, self.dtype, self.shape) != (info.name, info.dtype, info.shape) or len(self.parts) != 1:
            return False
        return self.parts[0] == Part(self.extent, (Term(source, info.name, range(self.extent)),), self.parts[0].grown)


@dataclass(frozen=True, slots=True)
class Edit:
    """A change to config.json: the value that the key at `path` (dotted where nested) takes."""

    path: str
    value: Any


@dataclass(frozen=True, slots=True)
class Plan:
    """What every tensor of the result is made of, and what changes in config.json."""

    outputs: tuple[Output, ...]
    config: tuple[Edit, ...] = ()

    @property
    def named(self) -> dict[str, Output]:
        """The outputs by name."""
        return {output.name: output for output in self.outputs}

    def check(self, sources: Sources) -> None:
        """Raise PlanError where an output does not fit its own shape or the tensors it is made of."""
        names = [output.name for output in self.outputs]
        if len(set(names)) != len(names):
            raise PlanError("two outputs have the same name")
        for output in self.outputs:
            try:
                _check_output(output, sources)
            except PlanError as error:
                raise error.at(tensor=output.name) from None

    def to_json(self) -> dict[str, Any]:
        """The whole Plan as JSON values; units are [start, stop] ranges or {"picked": [...]}."""
        return {
            "outputs": [_output_json(output) for output in self.outputs],
            "config": {edit.path: edit.value for edit in self.config},
        }


def joined(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ascending [start, stop) ranges without the empty ones, neighbours joined."""
    result: list[tuple[int, int]] = []
    for start, stop in spans:
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        elif start < stop:
            result.append((start, stop))
    return tuple(result)


def in_slices(runs: Iterable[tuple[range | None, tuple[Part, ...]]], outer: int) -> tuple[Part, ...]:
    """The parts of an output of which each run of its `outer` slices is made by itself; runs that are alike joined.

    The inverse of `Output.sections`: the runs follow one another.
    """
    kept: list[tuple[range, tuple[Part, ...]]] = []
    for rows, parts in runs:
        rows = range(outer) if rows is None else rows
        if kept and kept[-1][1] == parts:
            kept[-1] = range(kept[-1][0].start, rows.stop), parts
        elif rows:
            kept.append((rows, parts))
    if len(kept) == 1:
        return kept[0][1]
    return tuple(replace(part, slices=rows) for rows, parts in kept for part in parts)


def unchanged(info: TensorInfo, source: str = "base") -> Output:
    """The output that is this tensor of `source`, byte for byte."""
    _, extent, _ = info.around(0)
    return Output(info.name, info.dtype, info.shape, 0, (Part(extent, (Term(source, info.name, range(extent)),)),))


def _check_output(output: Output, sources: Sources) -> None:
    if output.shape and not 0 <= output.axis < len(output.shape):
        raise PlanError(f"axis {output.axis} of shape {list(output.shape)}")
    _check_filled(output)
    for part in output.parts:
        if part.size < 0:
            raise PlanError(f"a part of size {part.size}")
        if part.terms and part.fill:
            raise PlanError("a part is a sum of terms or a value throughout, not both")
        for term in part.terms:
            _check_term(output, part, term, sources)


def _check_filled(output: Output) -> None:
    """The parts of each run of slices fill the axis, and the runs follow one another through all slices."""
    filled: dict[range | None, int] = {} if output.parts else {None: 0}
    for part in output.parts:
        filled[part.slices] = filled.get(part.slices, 0) + part.size
    if any(size != output.extent for size in filled.values()):
        raise PlanError(f"the parts do not fill the axis of {output.extent}")
    if filled.keys() != {None}:
        runs = [(run.start, run.stop) if run is not None else (0, 0) for run in filled]
        if joined(runs) != ((0, output.steps[0]),) or len(runs) != len(set(runs) - {(0, 0)}):
            raise PlanError(f"the parts do not fill the {output.steps[0]} slices before the axis")


def _check_term(output: Output, part: Part, term: Term, sources: Sources) -> None:
    info = sources.get(term.source, {}).get(term.name)
    if info is None:
        raise PlanError(f"{term.source!r} has no tensor {term.name}")
    mine, its = (list(shape[: output.axis] + shape[output.axis + 1 :]) for shape in (output.shape, info.shape))
    rows, there = part.rows(range(output.steps[0])), range(info.around(output.axis)[0]) if info.shape else range(1)
    inside = not rows or (rows.start - term.shift in there and rows.stop - 1 - term.shift in there)
    if output.axis and inside and (term.shift or part.slices is not None):
        mine[0] = its[0]  # only some slices of it are taken
    if len(info.shape) != len(output.shape) or mine != its or not inside:
        raise PlanError(f"{term.name} {list(info.shape)} does not fit {list(output.shape)} along axis {output.axis}")
    extent = info.shape[output.axis] if info.shape else 1
    if len(term.units) != part.size:
        raise PlanError(f"{len(term.units)} units picked for a part of {part.size}")
    if isinstance(term.scale, tuple) and len(term.scale) != part.size:
        raise PlanError(f"{len(term.scale)} scales for a part of {part.size}")
    if isinstance(term.units, range) and term.units.step != 1:
        raise PlanError("a range of units must be contiguous")
    ends = (term.units[0], term.units[-1]) if isinstance(term.units, range) and part.size else term.units
    if any(not 0 <= unit < extent for unit in ends):
        raise PlanError(f"units picked outside the {extent} of {term.name}")


def _output_json(output: Output) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": output.name,
        "dtype": output.dtype,
        "shape": list(output.shape),
        "axis": output.axis,
        "parts": [_part_json(part) for part in output.parts],
    }
    if output.member:
        described |= {"block": output.member.block, "layer": output.member.layer, "role": output.member.role}
    return described


def _part_json(part: Part) -> dict[str, Any]:
    described = {"size": part.size, "grown": part.grown, "terms": [_term_json(term) for term in part.terms]}
    described |= {"slices": [part.slices.start, part.slices.stop]} if part.slices is not None else {}
    return described | ({"fill": part.fill} if part.fill else {})


def _term_json(term: Term) -> dict[str, Any]:
    units: Any = [term.units.start, term.units.stop] if isinstance(term.units, range) else {"picked": [*term.units]}
    described: dict[str, Any] = {"source": term.source, "name": term.name, "units": units}
    if term.scale != 1.0:
        described["scale"] = term.scale if isinstance(term.scale, float) else [*term.scale]
    if term.share:
        described["share"] = _share_json(term.share)
    return described | ({"shift": term.shift} if term.shift else {})


def _share_json(share: Share) -> dict[str, Any]:
    described: dict[str, Any] = {"index": share.index, "count": share.count, "rule": share.rule}
    if share.rule == "random":
        described["seed"] = share.seed
    if share.of:
        described["of"] = _share_json(share.of)
    return described
