"""The promise, checked on the Plan before a byte is written: M·S = I for every MLP (METHOD.md 1).

S says which base unit each new unit copies; all of gate, up and their biases must agree on it. M says which shares of
which columns of down each new unit gets. The grown function is the base function for every input if and only if the
shares that meet at a unit are exactly all the shares of that unit, and no column meets another unit's activation.
Everything is done on ranges of units and symbolic shares: no weight is read. What belongs to which MLP is taken from
the architecture found in the base, not from the Plan's own labels, which are checked.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from ckptgrow.errors import PlanError
from ckptgrow.families import Architecture, Mlp
from ckptgrow.plan import Output, Part, Plan, Share, Term
from ckptgrow.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class Run:
    """New units [start, stop) that are the base's units from `unit` on, in order."""

    start: int
    stop: int
    unit: int


def prove(plan: Plan, base: Mapping[str, TensorInfo], architecture: Architecture) -> int:
    """Raise PlanError unless the Plan keeps the base's function; return how many base units were proved."""
    plan.check({"base": base})
    outputs = plan.named
    for name in base.keys() - outputs.keys():
        raise PlanError("the Plan loses it", tensor=name)
    for name, output in outputs.items():
        if name not in architecture.names and (name not in base or output.member or not output.is_copy_of(base[name])):
            raise PlanError("it is in no MLP, and yet it would change", tensor=name)
    widths = {mlp.block: _prove_mlp(outputs, mlp, base, architecture) for mlp in architecture.mlps}
    _prove_config(plan, architecture, widths)
    return sum(mlp.width * mlp.experts for mlp in architecture.mlps)


def _prove_config(plan: Plan, architecture: Architecture, widths: Mapping[str, int]) -> None:
    """config.json must say the widths that the MLPs have: read by the rule of their key, as a loader does."""
    edits = {edit.path: edit.value for edit in plan.config}
    known = set()
    for group in architecture.groups:
        known |= {group.path, *(group.site.under(key) for key, _ in group.site.also)}
        for mlp in group.mlps:
            says = group.told(edits, mlp) if group.path in edits else mlp.width
            beside = {group.site.under(key): value for key, value in group.site.also if group.path in edits}
            if widths[mlp.block] != says or any(edits.get(key) != value for key, value in beside.items()):
                raise PlanError(
                    f"config.json would say {says}, the MLP has width {widths[mlp.block]}", tensor=mlp.block
                )
    told = {edit.path: edit.value for edit in architecture.retold}
    for path, value in told.items():
        if path not in edits or edits[path] != value:
            raise PlanError(f"config.json would not say {path} as {architecture.family.model_type!r} does")
    if edits.keys() - known - told.keys():
        raise PlanError(f"config.json would change {sorted(edits.keys() - known - told.keys())}")


def _prove_mlp(
    outputs: Mapping[str, Output], mlp: Mlp, base: Mapping[str, TensorInfo], architecture: Architecture
) -> int:
    """M·S = I for one MLP; returns its new width."""
    if all(outputs[name].is_copy_of(base[name]) for name in mlp.tensors):
        return mlp.width
    for name in mlp.tensors:
        if outputs[name].member != mlp.member(name) or outputs[name].dtype != base[name].dtype:
            raise PlanError("it does not stay what it is in its MLP", tensor=name)
    often = architecture.family.statistics or mlp.site.template.normed
    widths = {_prove_alike(own, mlp, base, often) for _, own in experts_of(outputs, mlp)}
    if len(widths) > 1:
        raise PlanError("experts of one stack would have several widths", tensor=mlp.block)
    return widths.pop()


def experts_of(outputs: Mapping[str, Output], mlp: Mlp) -> Iterator[tuple[tuple[int | None, ...], dict[str, Output]]]:
    """The tensors of an MLP; of a stack in which experts are not all alike, those alike together, and their outputs.

    Raises PlanError where a run of slices ends within an expert.
    """
    alike: dict[tuple[Output, ...], list[int | None]] = defaultdict(list)
    cut = {name: [*outputs[name].sections()] for name in mlp.tensors}
    for expert in mlp.numbers if any(len(sections) > 1 for sections in cut.values()) else (None,):
        own = []
        for name, sections in cut.items():
            each = outputs[name].steps[0] // mlp.experts
            rows = range((expert or 0) * each, ((expert or 0) + 1) * each)
            found = [s for run, s in sections if run is None or (rows.start in run and rows[-1] in run)]
            if len(found) != 1:
                raise PlanError("a run of slices ends within an expert", tensor=name)
            own += found
        alike[tuple(own)].append(expert)
    yield from ((tuple(experts), dict(zip(cut, own, strict=True))) for own, experts in alike.items())


def _prove_alike(outputs: Mapping[str, Output], mlp: Mlp, base: Mapping[str, TensorInfo], often: bool) -> int:
    """M·S = I for experts that are alike; returns their new width."""
    agreed = {picks(outputs[name], base): name for name in mlp.tensors if name != mlp.down}
    if len(agreed) != 1:
        raise PlanError(f"these copy different units: {', '.join(agreed.values())}")
    (runs,) = agreed
    if often:
        _prove_equally_often(runs, mlp)
    if not mlp.down:
        return runs[-1].stop
    down = outputs[mlp.down]
    try:
        for lane in range(down.lane_count):
            _prove_shares(down, lane, runs, mlp)
    except PlanError as error:
        raise error.at(tensor=down.name) from None
    return runs[-1].stop


def _prove_equally_often(runs: tuple[Run, ...], mlp: Mlp) -> None:
    """Statistics over the width stay what they are only if every unit comes equally often."""
    cuts = sorted({0, mlp.width, *(e for run in runs for e in (run.unit, run.unit + run.stop - run.start))})
    times = {sum(run.unit <= low < run.unit + run.stop - run.start for run in runs) for low in cuts[:-1]}
    if len(times) != 1:
        raise PlanError("it takes statistics over its units, and some come more often than others", tensor=mlp.block)


def prove_marks(plan: Plan, architecture: Architecture, layers: Collection[int] | None = None) -> None:
    """Raise PlanError unless marked as grown, in each lane of each MLP, is exactly what lies behind the old width.

    The freeze mask is read from these marks. Only MLPs of `layers` (None: all), and of experts those listed, may
    have any; what the others have behind their old width must be filling, whose columns of down are zero (METHOD.md 7).
    """

    def grows(mlp: Mlp, expert: int | None) -> bool:
        return (layers is None or mlp.layer in layers) and architecture.grows(mlp, expert)

    outputs = plan.named
    for output in plan.outputs:
        if output.name not in architecture.names and output.grown():
            raise PlanError(f"marked as grown is {output.grown()}, new is ()", tensor=output.name)
    for mlp in architecture.mlps:
        for experts, own in experts_of(outputs, mlp):
            for output in own.values():
                _prove_marks(output, mlp, experts, grows)


def _prove_marks(
    output: Output, mlp: Mlp, experts: tuple[int | None, ...], grows: Callable[[Mlp, int | None], bool]
) -> None:
    """The marks of one tensor in experts that are alike; where each expert is a lane, of all of them."""
    slot, lanes = mlp.tensors[output.name], [*output.lanes()]
    old = int(mlp.width * slot.places)
    several = slot.flat and len(lanes) == len(mlp.numbers)
    growing = [grows(mlp, expert) for expert in (mlp.numbers if several or experts == (None,) else experts)]
    if not several and len({*growing}) > 1:
        raise PlanError("an expert that was to grow does not, or the other way round", tensor=output.name)
    behind = [(start + old, stop) for _, start, stop in lanes]
    wanted = [span for i, span in enumerate(behind) if growing[i if several else 0] and span[0] < span[1]]
    if output.grown() != tuple(wanted):
        raise PlanError(f"marked as grown is {output.grown()}, new is {tuple(wanted)}", tensor=output.name)
    if any(growing) and not wanted:
        raise PlanError("its layer was to grow and does not", tensor=output.name)
    if output.name == mlp.down:
        _prove_filling(output, tuple(span for span in behind if span not in wanted))


def _prove_filling(down: Output, behind: tuple[tuple[int, int], ...]) -> None:
    filled = ((start, start + part.size) for start, part in down.placed() if part.terms and part.size)
    if any(first < stop and last > start for first, last in filled for start, stop in behind):
        raise PlanError("the filling of what does not grow has columns that are not zero", tensor=down.name)


def picks(output: Output, base: Mapping[str, TensorInfo]) -> tuple[Run, ...]:
    """Which base unit each new unit of a gate, up or bias is; all its lanes must say the same."""
    places = output.member.places if output.member else Fraction(1)
    lanes = {tuple(_counted(_lane(output, i, base[output.name]), places)) for i in range(output.lane_count)}
    if len(lanes) != 1:
        raise PlanError("its lanes copy different units", tensor=output.name)
    return lanes.pop()


def _counted(runs: Iterable[Run], places: Fraction) -> Iterator[Run]:
    """Runs of places as runs of units; a unit must not be torn apart."""
    for run in runs:
        edges = [Fraction(edge) / places for edge in (run.start, run.stop, run.unit)]
        if any(edge.denominator != 1 for edge in edges):
            raise PlanError("a unit's places are torn apart")
        yield Run(*(edge.numerator for edge in edges))


def _lane(output: Output, lane: int, base: TensorInfo) -> Iterator[Run]:
    """The runs of one lane, neighbours joined, counted from the lane's own start."""
    old, new = base.shape[output.axis] // output.lane_count, output.extent // output.lane_count
    last: Run | None = None
    for start, part in output.placed():
        if not lane * new <= start < (lane + 1) * new or not part.size:
            continue
        for run in _copies(part, start - lane * new, lane * old, output.name):
            if last and last.stop == run.start and last.unit + (last.stop - last.start) == run.unit:
                last = Run(last.start, run.stop, last.unit)
            else:
                yield from (last,) if last else ()
                last = run
    yield from (last,) if last else ()


def _copies(part: Part, start: int, first: int, name: str) -> Iterator[Run]:
    term = part.bytes_of
    if term is None or term.name != name:
        raise PlanError("a unit's rows must be a copy of that tensor's rows", tensor=name)
    yield from (Run(start + a, start + b, unit - first) for a, b, unit in _stretches(term))


def _stretches(term: Term) -> Iterator[tuple[int, int, int]]:
    """The picked units as (start, stop, first unit), counted from the start of the part."""
    if isinstance(term.units, range):
        yield 0, len(term.units), term.units.start
    else:
        yield from ((i, i + 1, unit) for i, unit in enumerate(term.units))


def _prove_shares(down: Output, lane: int, runs: tuple[Run, ...], mlp: Mlp) -> None:
    """One lane of down: all shares of each unit's column, each beside its own unit's rows, and nothing else."""
    places = mlp.tensors[down.name].places
    old, new = int(mlp.width * places), down.extent // down.lane_count
    if new != runs[-1].stop * places:
        raise PlanError(f"{new} columns for {runs[-1].stop} units")
    rows = tuple(Run(*(int(edge * places) for edge in (run.start, run.stop, run.unit))) for run in runs)
    met: dict[tuple[int, int], list[Term]] = defaultdict(list)
    for start, part in down.placed():
        if len(part.terms) > 1:
            raise PlanError("a sum of shares may be rounded when it is written")
        if part.fill:
            raise PlanError(f"columns that hold {part.fill} throughout are no shares")
        if start < lane * new < start + part.size:
            raise PlanError("a part reaches over two lanes")
        for term in part.terms if lane * new <= start < (lane + 1) * new else ():
            if term.name != down.name:
                raise PlanError(f"a share of another tensor, {term.name}")
            for begin, end, unit in _stretches(term):
                for span in _aligned((begin, end, unit - lane * old), start - lane * new, rows):
                    met[span].append(term)
    _prove_sums(met, old)


def _prove_sums(met: Mapping[tuple[int, int], list[Term]], units: int) -> None:
    cuts = sorted({0, units, *(edge for span in met for edge in span)})
    terms: list[list[Term]] = [[] for _ in cuts]
    for (first, last), those in met.items():
        for i in range(bisect_left(cuts, first), bisect_left(cuts, last)):
            terms[i] += those
    for i, (low, high) in enumerate(pairwise(cuts)):
        if not adds_to_one(terms[i]):
            raise PlanError(f"the shares of units {low} to {high - 1} do not add up to the whole")


def _aligned(stretch: tuple[int, int, int], start: int, runs: tuple[Run, ...]) -> Iterator[tuple[int, int]]:
    """The base units [first, last) of one stretch of columns; each must meet its own unit's activation."""
    begin, end, unit = start + stretch[0], start + stretch[1], stretch[2]
    for i in range(bisect_right(runs, begin, key=lambda run: run.start) - 1, len(runs)):
        run = runs[i]
        low, high = max(begin, run.start), min(end, run.stop)
        if low >= high:
            return
        column, row = unit + low - begin, run.unit + low - run.start
        if column != row:
            raise PlanError(f"new unit {low} has the rows of unit {row} and a share of column {column}")
        yield column, column + high - low


def adds_to_one(terms: Iterable[Term]) -> bool:
    """Whether the shares of one unit are, symbolically, the unit once: complete sets of siblings, nothing else."""
    left: Counter[Share | None] = Counter()
    for term in terms:
        if term.scale != 1.0:
            return False
        left[term.share] += 1
    while any(left):
        share = max((s for s in left if s), key=_depth)
        if any(left[sibling] < 1 for sibling in share.siblings):
            return False
        left -= Counter(share.siblings)
        left[share.of] += 1
    return left == Counter({None: 1})


def _depth(share: Share) -> int:
    return 1 + (_depth(share.of) if share.of else 0)
