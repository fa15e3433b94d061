"""The promise, checked on the Plan alone: M·S = I for every MLP (METHOD.md 1).

S says which base unit each new unit copies; all of gate, up and their biases must agree on it. M says which shares of
which columns of down each new unit gets. The grown function is the base function for every input if and only if the
shares that meet at a unit are exactly all the shares of that unit, and no column meets another unit's activation.
Everything is done on ranges of units and symbolic shares: no weight is read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from ckptgrow.errors import PlanError
from ckptgrow.plan import Output, Part, Plan, Share, Term
from ckptgrow.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class Run:
    """New units [start, stop) that are the base's units from `unit` on, in order."""

    start: int
    stop: int
    unit: int


def prove(plan: Plan, base: Mapping[str, TensorInfo]) -> int:
    """Raise PlanError unless the Plan keeps the base's function; return how many base units were proved."""
    plan.check({"base": base})
    blocks: dict[str, list[Output]] = defaultdict(list)
    for output in plan.outputs:
        if output.member:
            blocks[output.member.block].append(output)
        elif output.name not in base or not output.is_copy_of(base[output.name]):
            raise PlanError("it is in no MLP, and yet it would change", tensor=output.name)
    for name in base.keys() - {output.name for output in plan.outputs}:
        raise PlanError("the Plan loses it", tensor=name)
    return sum(_prove_block(outputs, base) for outputs in blocks.values())


def picks(output: Output, base: Mapping[str, TensorInfo]) -> tuple[Run, ...]:
    """Which base unit each new unit of a gate, up or bias is; all its lanes must say the same."""
    lanes = {tuple(_lane(output, i, base[output.name])) for i in range(len(list(output.lanes())))}
    if len(lanes) != 1:
        raise PlanError("its lanes copy different units", tensor=output.name)
    return lanes.pop()


def _lane(output: Output, lane: int, base: TensorInfo) -> Iterator[Run]:
    """The runs of one lane, neighbours joined, counted from the lane's own start."""
    count = len(list(output.lanes()))
    old, new = base.shape[output.axis] // count, output.extent // count
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


def _prove_block(outputs: Iterable[Output], base: Mapping[str, TensorInfo]) -> int:
    """M·S = I for one MLP."""
    (down,) = [output for output in outputs if output.member and output.member.lanes == ("down",)]
    agreed = {picks(output, base): output for output in outputs if output is not down}
    if len(agreed) != 1:
        names = ", ".join(output.name for output in agreed.values())
        raise PlanError(f"these copy different units: {names}")
    ((runs, _),) = agreed.items()
    try:
        return _prove_shares(down, runs, base[down.name].shape[down.axis])
    except PlanError as error:
        raise error.at(tensor=down.name) from None


def _prove_shares(down: Output, runs: tuple[Run, ...], units: int) -> int:
    met: dict[tuple[int, int], list[Term]] = defaultdict(list)
    for start, part in down.placed():
        for term in part.terms:
            for stretch in _stretches(term):
                for span in _aligned(stretch, start, runs):
                    met[span].append(term)
    cuts = sorted({0, units, *(edge for span in met for edge in span)})
    terms: list[list[Term]] = [[] for _ in cuts]
    for (first, last), those in met.items():
        for i in range(bisect_left(cuts, first), bisect_left(cuts, last)):
            terms[i] += those
    for i, (low, high) in enumerate(pairwise(cuts)):
        if not adds_to_one(terms[i]):
            raise PlanError(f"the shares of units {low} to {high - 1} do not add up to the whole")
    return units


def _aligned(stretch: tuple[int, int, int], start: int, runs: tuple[Run, ...]) -> Iterator[tuple[int, int]]:
    """The base units [first, last) of one stretch of columns; each must meet its own unit's activation."""
    begin, end, unit = start + stretch[0], start + stretch[1], stretch[2]
    for run in runs:
        low, high = max(begin, run.start), min(end, run.stop)
        if low < high:
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
