"""Is a merged checkpoint, weight by weight, the base plus what each skill adds? Asked of the bytes, knowing no Plan.

The sums are made anew from what the trained checkpoints hold, not from the shares that the growths dealt: a unit that
is the base's has the column (1 - Σ λ)·base + Σ λᵢ·trainedᵢ, one that is a skill's own λᵢ·trainedᵢ, and rows are bytes.
Each sum is made in two float64, some hundred bits, and rounded once: every weight must be that number. Where a
weight λ is no power of two, what float64 loses in a product is allowed, 2^-50 of the sum's terms: only of a sum that
lies so near to the middle between two numbers of the format either will do. Filling repeats the base's rows, or where
an MLP is no sum over its units all that lie before it; its columns are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptgrow.checkpoint import Bits, Tensors
from ckptgrow.equivalence import SHOWN, Answer, Finding, Progress
from ckptgrow.families import Architecture, Mlp
from ckptgrow.numeric import Floats, decode, rounded
from ckptgrow.units import cuts, lanes_of

NOISE = 2.0**-50


@dataclass(frozen=True)
class Weighed:
    """A skill as it is held against a merge: its weight and the trained checkpoint.

    `grew` names the MLPs that it grew, or the experts stacked in one (Mlp.named), `whole` those in which all units are
    its own: the base's rows trained.
    """

    weight: Fraction
    tensors: Tensors
    grew: frozenset[str]
    whole: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Source:
    """Some units [outer, units, inner] of a checkpoint, and the factor with which they go into a sum."""

    bits: Bits
    dtype: str
    factor: Fraction = Fraction(1)


_Sum = tuple[_Source, ...]


def weighed(
    base: Tensors, skills: Sequence[Weighed], result: Tensors, architecture: Architecture, progress: Progress
) -> Answer:
    """Whether each weight of each MLP is what base and skills make it; the figure says how many were looked at."""

    def compare(mlp: Mlp) -> Finding | None:
        rigid = architecture.family.statistics or mlp.site.template.normed
        some = any(mlp.named(expert) in skill.grew for skill in skills for expert in range(mlp.experts))
        for expert in mlp.numbers if some else (None,):
            live = [skill for skill in skills if skill.weight and {mlp.block, mlp.named(expert)} & skill.grew]
            problem = _problem(base, live, result, mlp, expert, rigid, kept=True)
            if problem is not None and _problem(base, live, result, mlp, expert, rigid, kept=False) is not None:
                return problem
        for name in mlp.tensors:
            progress(result.infos[name].nbytes)
        return None

    with ThreadPoolExecutor(max_workers=2) as pool:
        findings = tuple(filter(None, pool.map(compare, architecture.mlps)))
    columns = sum(result.infos[mlp.down].elements for mlp in architecture.mlps if mlp.down)
    rows = sum(result.infos[name].elements for name in architecture.names) - columns
    figure = f"{columns:,} weights of down are sums of base and skills rounded once, {rows:,} of the rows are theirs"
    return Answer("proved", "no" if findings else "yes", figure, findings[:SHOWN])


def _problem(
    base: Tensors,
    skills: Sequence[Weighed],
    result: Tensors,
    mlp: Mlp,
    expert: int | None,
    rigid: bool,
    kept: bool,
) -> Finding | None:
    """What is wrong in one MLP, or in one of the experts in its tensors.

    It has, if `kept`, the base's own units, then each skill's, then filling.
    """
    for name, slot in mlp.tensors.items():
        there = [result, base, *(skill.tensors for skill in skills)]
        stacks = zip(*(lanes_of(one, name, slot, mlp.grain, expert) for one in there), strict=True)
        for (_, its), *others in stacks:
            sources = [_Source(bits, one.infos[name].dtype) for (_, bits), one in zip(others, there[1:], strict=True)]
            sums = list(_sums(sources, skills, mlp, slot.shared, kept))
            mine = _Source(its, result.infos[name].dtype)
            problem = _unlike(mine, sums, None if slot.shared else mine if rigid else sources[0])
            if problem is None and slot.shared and not kept:
                problem = _lost(sources, skills, mlp)
            if problem is not None:
                return Finding(name, problem)
    return None


def _sums(sources: Sequence[_Source], skills: Sequence[Weighed], mlp: Mlp, shared: bool, kept: bool) -> Iterator[_Sum]:
    """What the units of one lane are, stretch by stretch; `sources` are the base and each skill."""
    base, *theirs = sources
    old = mlp.width // mlp.grain
    if kept:
        yield tuple(_originals(sources, skills, mlp)) if shared else (base,)
    for source, skill in zip(theirs, skills, strict=True):
        own = source.bits[:, 0 if mlp.block in skill.whole else old :]
        yield (replace(source, bits=own, factor=skill.weight if shared else Fraction(1)),)


def _originals(sources: Sequence[_Source], skills: Sequence[Weighed], mlp: Mlp) -> Iterator[_Source]:
    """The columns that the base's own units have in base and skills, each with its factor."""
    base, *theirs = sources
    yield replace(base, factor=1 - sum((skill.weight for skill in skills), Fraction(0)))
    for source, skill in zip(theirs, skills, strict=True):
        if mlp.block not in skill.whole:
            yield replace(source, bits=source.bits[:, : base.bits.shape[1]], factor=skill.weight)


def _lost(sources: Sequence[_Source], skills: Sequence[Weighed], mlp: Mlp) -> str | None:
    """Whether units of the base that were left out have a column that is not zero."""
    terms = tuple(_originals(sources, skills, mlp))
    for cut in cuts(terms[0].bits.shape):
        total, rest, loose = _total(terms, cut)
        if (np.abs(total + rest) > loose).any():
            return "units of the base are left out, and their columns are not zero"
    return None


def _unlike(its: _Source, sums: Sequence[_Sum], filler: _Source | None) -> str | None:
    """How the units of one lane differ from the sums, and behind them from `filler`'s (itself: all before) or zeros."""
    at, width = 0, its.bits.shape[1]
    for terms in sums:
        size = terms[0].bits.shape[1]
        if at + size > width:
            return f"it has {width:,} units, and those of base and skills are more"
        problem = _differing(replace(its, bits=its.bits[:, at : at + size]), terms, at)
        if problem is not None:
            return problem
        at += size
    if filler is None:
        rest = its.bits[:, at:]
        some = any(np.left_shift(rest[cut], 1).any() for cut in cuts(rest.shape))
        return f"the filling from unit {at:,} on is not zero" if some else None
    step = (at if filler is its else filler.bits.shape[1]) or width
    for first in range(at, width, step):
        rest = its.bits[:, first : first + step]
        if _differing(replace(its, bits=rest), (replace(filler, bits=filler.bits[:, : rest.shape[1]]),), first):
            return f"the filling from unit {first:,} on is no copy of units"
    return None


def _differing(its: _Source, terms: _Sum, at: int) -> str | None:
    """How many weights are not the sum of the terms, rounded once, and how far the first one is off."""
    plain = len(terms) == 1 and terms[0].factor == 1
    wrong, first, off = 0, 0, 0.0
    for cut in cuts(its.bits.shape):
        if plain and terms[0].dtype == its.dtype:
            bad = its.bits[cut] != terms[0].bits[cut]
            if not bad.any():
                continue
        total, rest, loose = _total(terms, cut)
        got = decode(np.ascontiguousarray(its.bits[cut]), its.dtype)
        if not (plain and terms[0].dtype == its.dtype):
            bad = ~_is_nearest(got, total, rest, loose, its.dtype)
        if bad.any() and not wrong:
            place = tuple(np.argwhere(bad)[0])
            first, off = at + cut[1].start + int(place[1]), float((got - total)[place])
        wrong += int(np.count_nonzero(bad))
    how_many = "1 weight is not what it" if wrong == 1 else f"{wrong:,} weights are not what they"
    return f"{how_many} should be: unit {first:,} is off by {off:.3g}" if wrong else None


# ---------------------------------------------------------------- sums in two float64


def _total(terms: _Sum, cut: tuple[slice, slice]) -> tuple[Floats, Floats, Floats]:
    """(a sum in float64, what float64 lost of it, how much of it a float64 computation may lose)."""
    total = rest = loose = np.zeros(())
    for term in terms:
        if not term.factor:
            continue
        values = decode(np.ascontiguousarray(term.bits[cut]), term.dtype)
        factor = float(term.factor)
        product, lost = _product(values, factor)
        lost = lost + values * float(term.factor - Fraction(factor))
        total, missed = _two_sum(total, product)
        rest = rest + missed + lost
        if not _is_power_of_two(term.factor):
            loose = loose + NOISE * np.abs(product)
    shape = terms[0].bits[cut].shape
    total, rest, loose = (np.broadcast_to(one, shape) for one in (total, rest, loose))
    return *_two_sum(total, rest), loose


def _two_sum(one: Floats, other: Floats) -> tuple[Floats, Floats]:
    """The sum in float64, and what that lost (Knuth)."""
    total = one + other
    back = total - one
    return total, (one - (total - back)) + (other - back)


def _product(values: Floats, factor: float) -> tuple[Floats, Floats]:
    """(values x factor in float64, what that lost): Dekker's, the factors split in halves of 26 bits."""
    product = values * factor
    (high, low), (fine, small) = _halves(values), _halves(np.float64(factor))
    return product, ((high * fine - product) + high * small + low * fine) + low * small


def _halves(values: Any) -> tuple[Any, Any]:
    scaled = values * 134217729.0  # 2^27 + 1
    high = scaled - (scaled - values)
    return high, values - high


def _is_power_of_two(factor: Fraction) -> bool:
    return abs(factor.numerator).bit_count() == 1 and factor.denominator.bit_count() == 1


def _is_nearest(got: Floats, total: Floats, rest: Floats, loose: Floats, dtype: str) -> NDArray[np.bool_]:
    """Whether these are the sums total + rest rounded once, or as near to them as what float64 may lose allows."""
    nearest = total if dtype == "F64" else rounded(_odd(total, rest), dtype)
    off, least = np.abs((got - total) - rest), np.abs((nearest - total) - rest)
    close: NDArray[np.bool_] = (got == nearest) | ((loose > 0) & (off <= least + loose))
    return close


def _odd(total: Floats, rest: Floats) -> Floats:
    """The sums rounded to float64 so that rounding once more, to fewer bits, is rounding once (to odd, Boldo 2004)."""
    even = np.ascontiguousarray(total).view(np.int64) % 2 == 0
    toward = np.nextafter(total, np.where(rest > 0, np.inf, -np.inf))
    odd: Floats = np.where((rest != 0) & even, toward, total)
    return odd
