"""The check of a merge weight by weight: sums made anew and rounded once, and one unit in the last place is seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import LAW
from test_merge import skill
from test_revert import DOWN, GATE

import ckptgrow
from ckptgrow import weighed as subject
from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.equivalence import Answer
from ckptgrow.families import locate
from ckptgrow.manifest import load_manifest
from ckptgrow.numeric import FLOATS, values_of
from ckptgrow.weighed import Weighed, weighed

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def grew(path: Path) -> frozenset[str]:
    return frozenset(block.block for block in load_manifest(path).blocks if not block.filled)


def asked(base: Path, skills: list[Path], weights: list[str], out: Path) -> Answer:
    """The answer for two skills that left the base's rows alone, from folders."""
    opened = open_checkpoint(base)
    theirs = [
        Weighed(Fraction(weight), open_checkpoint(path.parent / "trained"), grew(path), frozenset())
        for path, weight in zip(skills, weights, strict=True)
    ]
    architecture = locate(opened.config, opened.infos)
    return weighed(opened, theirs, open_checkpoint(out), architecture, lambda _: None)


def moved(name: str, place: tuple[int, int]) -> Callable[[checkpoints.Tensors], None]:
    """One unit in the last place, in one weight."""

    def change(tensors: checkpoints.Tensors) -> None:
        tensors[name].view(WORDS[tensors[name].itemsize])[place] += 1

    return change


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F16", "BF16", "F32"])
@pytest.mark.parametrize("weights", ["1,0.5", "0.3,0.7", "0.37,-2"])
def test_one_unit_in_the_last_place_is_seen(tmp_path: Path, dtype: str, weights: str) -> None:
    """In a column that is the base's, in one that is a skill's, in a row, in filling: each by tensor and unit."""
    base = checkpoints.make(tmp_path / "base", dtype=dtype)
    skills = [skill(base, "a", 1), skill(base, "b", 2, layers=(0,))]
    given_weights = weights.split(",")
    out = tmp_path / "out"
    done = ckptgrow.merge(base, skills, out, weights=given_weights)
    assert done.rounding.rounded or weights == "1,0.5"
    assert asked(base, skills, given_weights, out).verdict == "yes"
    second = DOWN.replace("layers.0", "layers.1")
    before = checkpoints.snapshot(out)
    for name, place, unit in (
        (DOWN, (3, 5), 5),
        (DOWN, (7, 20), 20),
        (DOWN, (0, 35), 35),
        (GATE, (2, 1), 2),
        (GATE, (32, 7), 32),
        (second, (1, 30), None),
        (GATE.replace("layers.0", "layers.1"), (30, 1), 0),
    ):
        checkpoints.edit(out, moved(name, place))
        answer = asked(base, skills, given_weights, out)
        assert answer.verdict == "no", (name, place)
        assert answer.findings[0].tensor == name
        told = f"unit {unit} is off by" if unit else "the filling from unit 24 on is no"
        assert told in answer.findings[0].problem
        for file, data in before.items():
            (out / file).write_bytes(data)


@pytest.mark.parametrize("weights", ["1,0.5", "2,-1", "1,1"])
def test_float64_to_the_last_place(tmp_path: Path, weights: str) -> None:
    """With powers of two float64 loses nothing either, and one unit in its last place is seen."""
    base = checkpoints.make(tmp_path / "base", dtype="F64")
    skills = [skill(base, "a", 1), skill(base, "b", 2)]
    ckptgrow.merge(base, skills, tmp_path / "out", weights=weights.split(","))
    assert asked(base, skills, weights.split(","), tmp_path / "out").verdict == "yes"
    checkpoints.edit(tmp_path / "out", moved(DOWN, (3, 5)))
    assert asked(base, skills, weights.split(","), tmp_path / "out").verdict == "no"


def test_what_is_lost_is_seen(base: Path, tmp_path: Path) -> None:
    """A merge with other weights, without the base's units, without a skill's, with a skill's twice."""
    skills = [skill(base, "a", 1), skill(base, "b", 2)]
    for weights, claimed in (("1,1", "1,0.5"), ("1,0.5", "1,1"), ("0,1", "1,1"), ("1,1", "0,1"), ("1,0.5", "0.5,1")):
        out = tmp_path / weights.replace(",", "-") / claimed
        ckptgrow.merge(base, skills, out, weights=weights.split(","))
        assert asked(base, skills, weights.split(","), out).verdict == "yes"
        assert asked(base, skills, claimed.split(","), out).verdict == "no"


def test_a_merge_that_is_wrong_is_not_kept(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check stands before OUT: a Plan that adds up otherwise leaves nothing."""
    from ckptgrow.operations import merging

    make = merging.merge_plan

    def wrong(*arguments: Any) -> Any:
        plan = make(*arguments)
        (down,) = (output for output in plan.outputs if output.name == DOWN)
        first, *rest = down.parts
        first = replace(first, terms=tuple(replace(term, scale=term.scale * (1 + 2.0**-7)) for term in first.terms))
        return replace(plan, outputs=tuple(replace(o, parts=(first, *rest)) if o is down else o for o in plan.outputs))

    monkeypatch.setattr(merging, "merge_plan", wrong)
    with pytest.raises(ckptgrow.errors.PlanError, match="what was written is not base and skills"):
        ckptgrow.merge(base, [skill(base, "a", 1)], tmp_path / "out", weights=[0.5])
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the arithmetic, against whole numbers


def nearest(value: Fraction, dtype: str) -> float:
    """The value of the format that is nearest, in rational arithmetic; not a number where two are."""
    around = [_next(float(value), dtype, step) for step in (-2, -1, 0, 1, 2)]
    least = min(abs(Fraction(v) - value) for v in around)
    found = {v for v in around if abs(Fraction(v) - value) == least}
    return found.pop() if len(found) == 1 else math.nan


@cache
def ascending(dtype: str) -> NDArray[np.float64]:
    return np.unique(values_of(dtype)[np.isfinite(values_of(dtype))])


def _next(value: float, dtype: str, step: int) -> float:
    """The value of the format so many steps from where that number belongs."""
    if dtype == "F32":
        near = np.float32(value)
        for _ in range(abs(step)):
            near = np.nextafter(near, np.float32(math.copysign(math.inf, step)))
        return float(near)
    place = int(np.searchsorted(ascending(dtype), value)) + step
    return float(ascending(dtype)[min(max(place, 0), len(ascending(dtype)) - 1)])


numbers = st.floats(-4, 4, width=16).filter(lambda x: x == 0 or abs(x) > 2**-10)
factors = st.sampled_from(["1", "1/2", "-1", "3/10", "1/3", "-7/5", "2"]).map(Fraction)


@LAW
@given(
    st.lists(st.tuples(numbers, factors), min_size=1, max_size=4), st.sampled_from(["BF16", "F16", "F8_E4M3", "F32"])
)
def test_sums_are_those_of_whole_numbers(drawn: list[tuple[float, Fraction]], dtype: str) -> None:
    """Of numbers of F16 times fractions, in rational arithmetic: nearest, and no other number passes."""
    terms = tuple(
        subject._Source(np.array([[[value]]], np.float16).view(np.uint16), "F16", factor) for value, factor in drawn
    )
    total, rest, loose = subject._total(terms, (slice(None), slice(None)))
    exact = sum((Fraction(value) * factor for value, factor in drawn), Fraction(0))
    assert abs(Fraction(float(total.item())) + Fraction(float(rest.item())) - exact) <= Fraction(1, 2**95)
    wanted = nearest(exact, dtype)
    if not abs(wanted) < FLOATS[dtype].largest / 2:
        return  # a tie, or out of range
    for got, right in ((wanted, True), (_next(wanted, dtype, 1), False), (_next(wanted, dtype, -1), False)):
        told = subject._is_nearest(np.full((1, 1, 1), got), total, rest, loose, dtype)
        assert bool(told) is right, (exact, got)
