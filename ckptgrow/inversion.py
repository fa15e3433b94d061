"""Reading a growth's Plan backwards: each base unit from where its frozen part lies (METHOD.md 6). Pure.

A row of gate or up is copied back as bytes. A column of down is, in this order:

- the column itself, where its unit was not copied;
- twice the half that the frozen original keeps, where every half is exact;
- the sum of all its shares, which is exact in every format.

What the first two cannot give and of which a share trains may be lost. It is read back all the same, from the whole
growth, since it may never have been trained: only the digests of the base can tell, so it is named as doubtful.

A merge is read in the same way, where it kept the base's units: their columns are multiples, which division undoes, and
doubtful where some of them were rounded. What it left out, or added up from random shares, is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from ckptgrow.errors import PlanError
from ckptgrow.plan import Output, Part, Plan, Share, Term, in_slices, unchanged
from ckptgrow.proof import adds_to_one
from ckptgrow.regions import Division, Spans, undivided
from ckptgrow.surgery import BASE
from ckptgrow.tensors import TensorInfo

HALF = Share(0, 2)


@dataclass(frozen=True, slots=True)
class Inverse:
    """The Plan of the base, the tensors of it that what is frozen does not determine, and those that are not there.

    Of the last kind only merges have some; the Plan has zeros in their places.
    """

    plan: Plan
    doubtful: tuple[str, ...]
    lost: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Base units [low, high) of one tensor, lying in the grown one from `at` on."""

    low: int
    high: int
    at: int
    term: Term
    frozen: bool

    def cut(self, low: int, high: int, source: str, name: str, scale: float = 1.0) -> Term:
        return Term(source, name, range(self.at + low - self.low, self.at + high - self.low), scale)


def invert(
    grown: Plan,
    base: Mapping[str, TensorInfo],
    trained: Mapping[str, Division],
    *,
    exact_halves: bool,
    source: str,
) -> Inverse:
    """The base from the result of the Plan that grew it. `trained`: of each tensor that trains what of it does."""
    outputs, doubtful, lost = list[Output](), list[str](), list[str]()
    for output in grown.outputs:
        info = base[output.name]
        if output.is_copy_of(info):
            outputs.append(unchanged(info, source))
            continue
        division, runs = trained.get(output.name, undivided(output.shape, output.axis)), []
        for rows, section, spans in division.sections(output):
            parts, sure = _parts(section, info, spans, exact_halves, source)
            runs.append((rows, parts))
            doubtful += [] if sure or info.name in doubtful[-1:] else [info.name]
        parts = in_slices(runs, output.steps[0])
        outputs.append(Output(info.name, info.dtype, info.shape, output.axis, parts))
        lost += [] if all(part.terms for part in parts) else [info.name]
    return Inverse(Plan(tuple(outputs)), tuple(doubtful), tuple(lost))


def _parts(
    output: Output, info: TensorInfo, spans: Spans, exact_halves: bool, source: str
) -> tuple[tuple[Part, ...], bool]:
    """The base tensor, stretch by stretch, and whether all of it comes from what is frozen."""
    places = list(_places(output, spans))
    edges = sorted({edge for place in places for edge in (place.low, place.high)} | {0, info.shape[output.axis]})
    parts, sure = [], True
    for low, high in pairwise(edges):
        here = [place for place in places if place.low <= low and high <= place.high]
        picked, scale, frozen = _choice(here, exact_halves)
        terms = tuple(place.cut(low, high, source, output.name, scale) for place in picked)
        parts.append(Part(high - low, terms))
        sure &= frozen
    return tuple(parts), sure


def _places(output: Output, spans: Spans) -> Iterator[_Place]:
    """Where each stretch of base units lies; of filling, of skills and of sums there is nothing to read."""
    for at, part in output.placed():
        frozen = not any(start < at + part.size and at < stop for start, stop in spans)
        if any(term.source != BASE for term in part.terms) or len(part.terms) > 1:
            continue
        for term in part.terms:
            if not isinstance(term.units, range) or isinstance(term.scale, tuple) or term.name != output.name:
                raise PlanError("its growth is no copying of stretches", tensor=output.name)
            if term.scale == 1.0 or term.share is None:
                yield _Place(term.units.start, term.units.stop, at, term, frozen)


def _choice(here: list[_Place], exact: bool) -> tuple[list[_Place], float, bool]:
    """(the places whose sum, times the scale, is the base's; the scale; whether they are all frozen)."""
    whole = sorted((place for place in here if place.term.share is None), key=lambda place: not place.frozen)
    shared = [place for place in here if place.term.share is not None]
    if whole:
        scale = whole[0].term.scale
        assert isinstance(scale, float)
        return whole[:1], 1.0 / scale, whole[0].frozen and (exact or scale == 1.0)
    half = [place for place in shared if place.term.share == HALF and place.frozen]
    if half and exact:
        return half, 2.0, True
    complete = adds_to_one(place.term for place in shared)
    return (shared if complete else []), 1.0, all(place.frozen for place in shared)


def compose(outer: Plan, inner: Plan, source: str) -> Plan:
    """The Plan that does `inner` and, with its result as `source`, `outer`. Exact where both are."""
    made = inner.named
    return Plan(tuple(_composed(output, made, source) for output in outer.outputs), outer.config)


def _composed(output: Output, made: Mapping[str, Output], source: str) -> Output:
    """One output of the outer Plan in terms of the inner one's sources. A whole copy has no axis of its own."""
    first = made.get(output.name)
    if first is not None and output.is_copy_of(first.info, source):
        return first
    names = {term.name for part in output.parts for term in part.terms}
    along = {name: _turned(made[name], output.axis) for name in names}
    cut = {name: [*inner.sections()] for name, inner in along.items()}
    edges = {at.start for those in cut.values() for at, _ in those if at is not None}
    runs = []
    for rows, section in output.sections(edges):
        row = rows.start if rows is not None else 0
        here = {name: next(own for at, own in those if at is None or row in at) for name, those in cut.items()}
        runs.append((rows, tuple(p for part in section.parts for p in _through(part, here, source))))
    return replace(output, parts=in_slices(runs, output.steps[0]))


def _turned(output: Output, axis: int) -> Output:
    """The output along that axis, where it is a whole copy of a tensor."""
    copied = output.parts[0].bytes_of if len(output.parts) == 1 else None
    if output.axis == axis or copied is None or copied.units != range(output.extent):
        return output
    extent = output.shape[axis]
    return replace(output, axis=axis, parts=(Part(extent, (replace(copied, units=range(extent)),)),))


def renamed(plan: Plan, source: str, names: Mapping[str, str]) -> Plan:
    """The Plan with the tensors of a source under the names that they have there."""

    def term(was: Term) -> Term:
        return replace(was, name=names[was.name]) if was.source == source else was

    def part(was: Part) -> Part:
        return replace(was, terms=tuple(term(t) for t in was.terms))

    return replace(plan, outputs=tuple(replace(o, parts=tuple(map(part, o.parts))) for o in plan.outputs))


def _through(part: Part, made: Mapping[str, Output], source: str) -> Iterator[Part]:
    """One part of the outer Plan in terms of the inner one's sources, cut where those change."""
    edges = {0, part.size}
    for term in part.terms:
        if not isinstance(term.units, range) or term.source != source or term.share or term.shift:
            raise PlanError("only stretches of one source can be traced back")
        starts = [start - term.units.start for start, _ in made[term.name].placed()]
        edges |= {edge for edge in starts if 0 < edge < part.size}
    for low, high in pairwise(sorted(edges)):
        traced = (found for term in part.terms for found in _traced(term, low, high, made[term.name]))
        yield Part(high - low, tuple(traced), part.grown)


def _traced(term: Term, low: int, high: int, output: Output) -> Iterator[Term]:
    """What the places [low, high) of a term are made of; they lie within one part of the output."""
    first = term.units[low]
    for start, part in output.placed():
        if start <= first < start + part.size:
            for inner in part.terms:
                if isinstance(inner.scale, tuple) or isinstance(term.scale, tuple):
                    raise PlanError("only one scale for all units can be traced back")
                units = inner.units[first - start : first - start + high - low]
                yield replace(inner, units=units, scale=inner.scale * term.scale)
