"""METHOD.md 5, case 5: units with one gate whose rows of up, or columns of down, are exact combinations of others'."""

from __future__ import annotations

import json
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from checkpoints import Tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAW
from test_fold import DOWN, GATE, UP, nudge, run, same_outputs

import ckptgrow
from ckptgrow.combining import combinations, doubtful

HIDDEN = 12
Rows = list[list[float]]


def made(folder: Path, factors: Rows, *, through_up: bool = False, dtype: str = "F32", bias: bool = False) -> Path:
    """One MLP of units with one gate: the first rows of up (columns of down) at random, the others `factors` of them.

    All weights are small whole numbers, so no sum is rounded.
    """
    first = len(factors[0])
    units = first + len(factors)
    checkpoints.make(folder, "llama", width=units, hidden=HIDDEN, layers=1, shards=1, dtype=dtype, bias=bias)
    draw = np.random.default_rng(3)

    def change(tensors: Tensors) -> None:
        def put(name: str, values: Any) -> None:
            tensors[name] = torch.tensor(values).reshape(tensors[name].shape).to(tensors[name].dtype).contiguous()

        rows = draw.integers(-2, 3, (first, HIDDEN + 1)).astype(float)
        rows[np.arange(first), np.arange(first)] = 4.0
        spanned = np.concatenate([rows, np.array(factors) @ rows])
        free = draw.integers(-3, 4, (units, HIDDEN + 1)).astype(float)
        free[np.arange(units), np.arange(units)] = 7.0
        up, down = (free, spanned) if through_up else (spanned, free)
        put(GATE, np.tile(tensors[GATE][0].double().numpy(), (units, 1)))
        put(UP, up[:, :HIDDEN])
        put(DOWN, down[:, :HIDDEN].T)
        if bias:
            put(GATE.replace("weight", "bias"), np.full(units, 0.5))
            put(UP.replace("weight", "bias"), up[:, HIDDEN])

    checkpoints.edit(folder, change)
    return folder


factor = st.sampled_from([0.0, 1.0, -1.0, 2.0, 0.5, 3.0, -1.25])


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    first = draw(st.integers(2, 4))
    rows = st.lists(factor, min_size=first, max_size=first).filter(lambda row: sum(map(bool, row)) > 1)
    return {
        "factors": draw(st.lists(rows, min_size=1, max_size=3)),
        "through_up": draw(st.booleans()),
        "dtype": draw(st.sampled_from(["F32", "F16"])),
        "bias": draw(st.booleans()),
    }


@settings(LAW, max_examples=25)
@given(cases())
def test_combinations_fold(case: dict[str, Any]) -> None:
    """As many units stay as are independent, no more and no fewer, and they answer the same."""
    with tempfile.TemporaryDirectory() as temporary:
        trained, out = made(Path(temporary, "trained"), **case), Path(temporary, "out")
        done = ckptgrow.fold(trained, out)
        assert (done.exit_code, done.width) == (0, len(case["factors"][0]))
        assert [answer.name for answer in done.answers] == ["untouched", "regrouped"]
        assert same_outputs(trained, out, 1e-12 if not done.rounding.rounded else 1e-3)


def test_a_sum_of_two(tmp_path: Path) -> None:
    """u₂ = u₀ + u₁: its column is added to both of theirs, and the report says that one was combined."""
    trained = made(tmp_path / "trained", [[1.0, 1.0]])
    said = run(trained, tmp_path / "out")
    assert "MLPs        model.layers.0.mlp: 3 -> 2 units (1 combined)" in said
    before, after = checkpoints.load(trained), checkpoints.load(tmp_path / "out")
    assert torch.equal(after[UP], before[UP][:2])
    assert torch.equal(after[DOWN], before[DOWN][:, :2] + before[DOWN][:, 2:])
    described = json.loads(run(trained, tmp_path / "plan", "--plan", "--json"))
    (part,) = next(o["parts"] for o in described["plan"]["outputs"] if o["name"] == DOWN)
    assert [term["units"] for term in part["terms"]] == [[0, 2], {"picked": [2, 2]}]


def test_factors_go_with_the_other_side(tmp_path: Path) -> None:
    """d₂ = 2·d₀ - d₁/2: its row of up is added twice to u₀ and taken half from u₁."""
    trained = made(tmp_path / "trained", [[2.0, -0.5]], through_up=True)
    assert ckptgrow.fold(trained, tmp_path / "out").width == 2
    before, after = checkpoints.load(trained), checkpoints.load(tmp_path / "out")
    assert torch.equal(after[UP], before[UP][:2] + torch.tensor([[2.0], [-0.5]]) * before[UP][2])
    assert torch.equal(after[DOWN], before[DOWN][:, :2])


@pytest.mark.parametrize(("name", "through_up"), [(UP, False), (DOWN, True)])
def test_one_ulp_off_does_not_fold(name: str, through_up: bool, tmp_path: Path) -> None:
    """A combination that fails at one element is none."""
    trained = made(tmp_path / "trained", [[1.0, 1.0]], through_up=through_up, dtype="BF16")
    assert ckptgrow.plan_fold(trained, tmp_path / "out").width == 2
    checkpoints.edit(trained, lambda tensors: nudge(tensors[name].T if name == DOWN else tensors[name], 1))
    done = ckptgrow.fold(trained, tmp_path / "out")
    assert (done.exit_code, done.groups[0].smallest) == (1, 3)
    assert not (tmp_path / "out").exists()


def test_long_factors_stay_and_it_says_so(tmp_path: Path) -> None:
    """7·u₂ = 3·u₀ + 5·u₁: neither sevenths, thirds nor fifths are short in any order."""
    trained = made(tmp_path / "trained", [[3.0, 5.0]])
    checkpoints.edit(trained, lambda tensors: tensors[UP][:2].mul_(7))
    checkpoints.edit_config(trained, ckptgrow={"base_width": {"intermediate_size": 2}})
    done = ckptgrow.fold(trained, tmp_path / "out")
    assert done.exit_code == 1
    assert [(left.units, left.why) for block in done.blocks for left in block.left] == [
        (1, "they are combinations of others, but by factors too long for an exact sum")
    ]


def test_twins_of_a_combination_go_the_same_way(tmp_path: Path) -> None:
    """Equal rows of up: the columns of all twins are spread."""
    trained = made(tmp_path / "trained", [[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    done = ckptgrow.fold(trained, tmp_path / "out")
    assert (done.width, done.blocks[0].combined + done.blocks[0].equal) == (2, 3)
    assert same_outputs(trained, tmp_path / "out")


def test_more_units_than_are_looked_at(tmp_path: Path) -> None:
    """Nine units with one gate: only pairs are compared."""
    trained = made(tmp_path / "trained", [[1.0, 1.0] + [0.0] * 6])
    assert ckptgrow.fold(trained, tmp_path / "out").exit_code == 1


# ---------------------------------------------------------------- the arithmetic


@settings(LAW, max_examples=60)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=5, max_size=5), min_size=3, max_size=6))
def test_no_more_and_no_fewer_than_the_rank(rows: list[list[int]]) -> None:
    """What is said to be a combination is one in fractions; with what is too long they are all that are dependent."""
    table = np.array(rows, float)
    found = combinations(table, 20)
    for index, factors in found.made.items():
        total = [sum(Fraction(factor) * rows[other][i] for other, factor in factors) for i in range(5)]
        assert total == rows[index]
        assert not {other for other, _ in factors} & found.made.keys()
    zeros = sum(not any(row) for row in rows)  # dead: not this case's
    assert len(found.made) + len(found.long) + zeros == len(rows) - np.linalg.matrix_rank(table)
    assert bool(doubtful(table[None])[0]) >= bool(found.made)


def test_the_long_ones_are_looked_at_in_full() -> None:
    """Dependent where a look suffices, but not everywhere: neither a combination nor one by long factors."""
    rows = np.array([[1.0, 0.0, 3.0], [0.0, 1.0, 3.0], [1.0, 1.0, 6.0 + 2**-30]])
    found = combinations(rows, 20)
    assert (found.made, found.long) == ({}, frozenset())
    rows[2, 2] = 6.0
    assert set(combinations(rows, 20).made) == {2}


def test_most_groups_are_passed_over() -> None:
    """Independent rows are not solved for: a few elements show that they are."""
    draw = np.random.default_rng(0)
    assert not doubtful(draw.normal(size=(50, 4, 16))).any()
