"""verify accepts any duplication that keeps the function and names the tensor of any that does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import Tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckptgrow
from ckptgrow import equivalence
from ckptgrow.errors import FormatError
from ckptgrow.results import Verification

GATE, UP, DOWN = (f"model.layers.1.mlp.{role}_proj.weight" for role in ("gate", "up", "down"))


def verdicts(result: Verification) -> dict[str, str]:
    return {answer.name: answer.verdict for answer in result.answers}


def named(result: Verification, name: str) -> str:
    """What was found in that tensor by any answer."""
    return " ".join(f.problem for answer in result.answers for f in answer.findings if f.tensor == name)


@pytest.fixture
def grown(base: Path, tmp_path: Path) -> Path:
    """The base at twice its width."""
    return ckptgrow.expand(base, tmp_path / "grown").folder


def test_the_grown_model_is_the_same_function(base: Path, grown: Path) -> None:
    """All three answers are yes, with an error of exactly 0.0."""
    result = ckptgrow.verify(base, grown)
    assert (result.exit_code, result.same) == (0, True)
    assert verdicts(result) == {"untouched": "yes", "proved": "yes", "probed": "yes"}
    assert result.answers[1].figure.endswith("largest error 0.0")


def test_a_checkpoint_is_itself(base: Path) -> None:
    """No growth at all is a function-preserving growth."""
    assert ckptgrow.verify(base, base).exit_code == 0


def forget_the_halving(tensors: Tensors) -> None:
    tensors[DOWN] *= 2


def shift_one_row(tensors: Tensors) -> None:
    tensors[GATE][13] = tensors[GATE][14]


def shift_all_rows(tensors: Tensors) -> None:
    tensors[UP][12:] = tensors[UP][12:].roll(1, 0)


def one_bit_of_a_row(tensors: Tensors) -> None:
    tensors[UP].view(torch.int16)[20, 3] ^= 1


def one_bit_of_a_column(tensors: Tensors) -> None:
    tensors[DOWN].view(torch.int16)[7, 23] ^= 1


def wrong_axis(tensors: Tensors) -> None:
    tensors[DOWN] = torch.cat([tensors[DOWN][:, 12:], tensors[DOWN][:, :12].roll(1, 1)], 1)


def lost_unit(tensors: Tensors) -> None:
    tensors[DOWN][:, 5] = 0


@pytest.mark.parametrize(
    ("change", "tensor", "problem"),
    [
        (
            forget_the_halving,
            DOWN,
            "12 of 12 base units do not get their column back: unit 0 (now units 0, 12) is off by",
        ),
        (shift_one_row, GATE, "unit 13 mixes rows of different base units"),
        (shift_all_rows, GATE, "mixes rows of different base units"),
        (one_bit_of_a_row, UP, "the row of unit 20 is in no unit of the base; it is 0.00"),
        (one_bit_of_a_column, DOWN, "1 of 12 base units do not get their column back: unit 11 (now units 11, 23)"),
        (wrong_axis, DOWN, "do not get their column back"),
        (lost_unit, DOWN, "unit 5 (now units 5, 17) is off by"),
    ],
)
def test_a_wrong_growth_is_named(
    base: Path, grown: Path, change: Callable[[Tensors], None], tensor: str, problem: str
) -> None:
    """Each fault in the MLPs: exit 1, line 2 says no, the tensor and unit are named."""
    checkpoints.edit(grown, change)
    result = ckptgrow.verify(base, grown)
    assert result.exit_code == 1
    assert verdicts(result) == {"untouched": "yes", "proved": "no", "probed": "not run"}
    assert problem in named(result, tensor)


def test_the_probe_sees_a_forgotten_halving(base: Path, grown: Path) -> None:
    """The third answer can say no by itself."""
    from ckptgrow.checkpoint import open_checkpoint
    from ckptgrow.families import locate
    from ckptgrow.probe import probed

    checkpoints.edit(grown, forget_the_halving)
    one, other = open_checkpoint(base), open_checkpoint(grown)
    answer = probed(one, other, locate(one.config, one.infos), lambda nbytes: None)
    assert answer.verdict == "no"
    assert [finding.tensor for finding in answer.findings] == ["model.layers.1.mlp"]


def test_one_bit_of_an_untouched_tensor(base: Path, grown: Path) -> None:
    """A flipped bit outside the MLPs is seen by line 1 alone."""
    name = "model.layers.0.self_attn.q_proj.weight"
    checkpoints.edit(grown, lambda tensors: tensors[name].view(torch.int16)[3, 3].bitwise_xor_(1))
    result = ckptgrow.verify(base, grown)
    assert (result.exit_code, verdicts(result)["untouched"], verdicts(result)["proved"]) == (1, "no", "yes")
    assert named(result, name) == "1 of its 128 bytes differ"


def test_two_shards_swap_tensors(base: Path, grown: Path) -> None:
    """Two tensors of one shape, in different shards, each with the other's bytes: both are named."""
    one, other = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    weight_map = json.loads((grown / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map[one] != weight_map[other]
    checkpoints.edit(grown, lambda t: t.update({one: t[other].clone(), other: t[one].clone()}))
    result = ckptgrow.verify(base, grown)
    assert result.exit_code == 1
    assert "differ" in named(result, one)
    assert "differ" in named(result, other)


def test_a_dropped_bias(tmp_path: Path) -> None:
    """A bias that is gone is missing, in an MLP as outside of one."""
    base = checkpoints.make(tmp_path / "base", "phi")
    grown = ckptgrow.expand(base, tmp_path / "grown").folder
    checkpoints.edit(grown, lambda tensors: tensors.pop("model.layers.0.mlp.fc1.bias"))
    result = ckptgrow.verify(base, grown)
    assert result.exit_code == 1
    assert "it is missing" in named(result, "model.layers.0.mlp.fc1.bias")


def test_a_bias_that_is_not_copied(tmp_path: Path) -> None:
    """The biases are part of a unit's rows."""
    base = checkpoints.make(tmp_path / "base", "phi")
    grown = ckptgrow.expand(base, tmp_path / "grown").folder
    checkpoints.edit(grown, lambda tensors: tensors["model.layers.0.mlp.fc1.bias"][15:16].add_(1))
    result = ckptgrow.verify(base, grown)
    assert result.exit_code == 1
    assert "the row of unit 15 is in no unit" in named(result, "model.layers.0.mlp.fc1.bias")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.2.mlp.gate_proj.weight"])
def test_an_extra_tensor(base: Path, grown: Path, name: str) -> None:
    """A head that appears for a tied model, a layer too many."""
    checkpoints.edit(grown, lambda tensors: tensors.update({name: torch.zeros(3)}))
    result = ckptgrow.verify(base, grown)
    assert (result.exit_code, named(result, name)) == (1, "the base has no such tensor")


def test_another_dtype_is_another_checkpoint(base: Path, grown: Path) -> None:
    """float32 copies of bfloat16 weights are equal numbers, not equal bytes."""
    checkpoints.edit(grown, lambda tensors: tensors.update({n: t.float() for n, t in tensors.items()}))
    result = ckptgrow.verify(base, grown)
    assert (result.exit_code, verdicts(result)["untouched"], verdicts(result)["proved"]) == (1, "no", "no")


@pytest.mark.parametrize(
    ("change", "code", "problem"),
    [
        ({"rms_norm_eps": 1e-5}, 1, "rms_norm_eps is 1e-05"),
        ({"intermediate_size": 12}, 1, "intermediate_size is 12, but the tensors have width 24"),
        ({"rope_theta": 5.0}, 2, "rope_theta stands only in the grown one"),
        ({"transformers_version": "5.0"}, 0, ""),
        ({"rms_norm_eps": float("nan")}, 1, "rms_norm_eps is nan"),
    ],
)
def test_config(base: Path, grown: Path, change: dict[str, object], code: int, problem: str) -> None:
    """The function is the config's too: a changed key is no, a key that only one has cannot be told."""
    checkpoints.edit_config(grown, **change)
    result = ckptgrow.verify(base, grown)
    assert result.exit_code == code
    assert problem in named(result, "config.json")


def test_weights_that_are_not_finite(base: Path, grown: Path) -> None:
    """Infinite columns prove nothing: an error, exit status 2."""
    for folder in (base, grown):
        checkpoints.edit(folder, lambda tensors: tensors[DOWN][:, :1].fill_(float("nan")))
    with pytest.raises(FormatError, match=f"{DOWN}.*nothing can be proved"):
        ckptgrow.verify(base, grown)


def rebuilt(base: Path, folder: Path, units: list[int], shares: torch.Tensor) -> Path:
    """A growth by another tool: unit j copies base unit units[j], its column is shares[j] of it."""
    shutil.copytree(base, folder)

    def grow(tensors: Tensors) -> None:
        for name in list(tensors):
            if "gate_proj" in name or "up_proj" in name:
                tensors[name] = tensors[name][units].clone()
            elif "down_proj" in name:
                tensors[name] = (tensors[name][:, units].double() * shares).to(tensors[name].dtype)

    checkpoints.edit(folder, grow)
    checkpoints.edit_config(folder, intermediate_size=len(units))
    return folder


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(copies=st.lists(st.integers(1, 4), min_size=12, max_size=12), data=st.data())
def test_any_tools_duplication_is_accepted(
    tmp_path_factory: pytest.TempPathFactory, copies: list[int], data: st.DataObject
) -> None:
    """Any number of copies in any order, powers of two as shares, units with a zero column anywhere: proved."""
    folder = tmp_path_factory.mktemp("any")
    base = checkpoints.make(folder / "base", dtype="F32", width=12)
    dealt = {1: [1.0], 2: [0.5, 0.5], 3: [0.25, 0.5, 0.25], 4: [0.25] * 4}
    made = [(unit, share) for unit, count in enumerate(copies) for share in dealt[count]]
    made += [(unit, 0.0) for unit in data.draw(st.lists(st.integers(0, 11), max_size=5))]
    made = data.draw(st.permutations(made))
    grown = rebuilt(base, folder / "grown", [unit for unit, _ in made], torch.tensor([share for _, share in made]))
    result = ckptgrow.verify(base, grown)
    assert result.exit_code == 0, result
    wrong = data.draw(st.integers(0, len(made) - 1))
    checkpoints.edit(grown, lambda t: t[DOWN][:, wrong : wrong + 1].add_(2.0**-20))
    assert ckptgrow.verify(base, grown).exit_code == 1


def test_a_free_unit_may_be_anything(base: Path, grown: Path) -> None:
    """A unit whose column is zero does not count: with it folded into its twin, its rows may change."""

    def free(tensors: Tensors) -> None:
        tensors[DOWN][:, 3] += tensors[DOWN][:, 15]
        tensors[DOWN][:, 15] = 0
        tensors[GATE][15] = 7

    checkpoints.edit(grown, free)
    result = ckptgrow.verify(base, grown)
    assert result.exit_code == 0
    assert "47 units and 1 unit with a zero column are 24 base units" in result.answers[1].figure


def test_a_config_with_nan_is_itself(base: Path) -> None:
    """NaN is not equal to NaN, but the same text is the same value."""
    checkpoints.edit_config(base, strange=float("nan"))
    assert ckptgrow.verify(base, base).exit_code == 0


def test_equal_base_units_count_as_one(base: Path, tmp_path: Path) -> None:
    """Copies cannot be told apart by their rows, so their columns are added up together: a grown base grows again."""

    def twins(tensors: Tensors) -> None:
        for name in (GATE, UP):
            tensors[name][4:7] = tensors[name][3]

    checkpoints.edit(base, twins)
    grown = ckptgrow.expand(base, tmp_path / "out", factor=3, shares="random").folder
    assert ckptgrow.verify(base, grown).exit_code == 0
    checkpoints.edit(grown, lambda tensors: tensors[DOWN][:, 5:6].mul_(2))
    assert ckptgrow.verify(base, grown).exit_code == 1


def test_a_tiny_share_is_not_lost_in_rounding(tmp_path: Path) -> None:
    """A column that is off by less than a float64 sum can hold is still off."""
    base = checkpoints.make(tmp_path / "base", dtype="F32")
    grown = ckptgrow.expand(base, tmp_path / "grown", factor=3).folder

    def add(tensors: Tensors) -> None:
        tensors[DOWN][0, 30] = 1e-38

    checkpoints.edit(base, lambda t: t[DOWN][0].fill_(1.0))
    checkpoints.edit(grown, lambda t: t[DOWN][0].copy_(torch.tensor([0.5, 0.5, 0.0]).repeat_interleave(12)))
    assert ckptgrow.verify(base, grown).exit_code == 0
    checkpoints.edit(grown, add)
    result = ckptgrow.verify(base, grown)
    assert result.exit_code == 1
    assert "unit 6 (now units 6, 18, 30)" in named(result, DOWN)


def test_sums_longer_than_float64(tmp_path: Path) -> None:
    """Equal base units are added up together, and their columns may spread over any magnitudes: still exact."""
    base = checkpoints.make(tmp_path / "base", dtype="F32", width=64, hidden=16)

    def spread(tensors: Tensors) -> None:
        for name in (GATE, UP):
            tensors[name][20:] = 0
        generator = torch.Generator().manual_seed(1)
        tensors[DOWN] *= 10.0 ** torch.empty(16, 64).uniform_(-30, 0, generator=generator)

    checkpoints.edit(base, spread)
    grown = ckptgrow.expand(base, tmp_path / "out", shares="random").folder
    assert ckptgrow.verify(base, grown).exit_code == 0
    checkpoints.edit(grown, lambda t: t[DOWN].view(torch.int32)[3, 40:41].bitwise_xor_(1))
    assert "off by" in named(ckptgrow.verify(base, grown), DOWN)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_free_unit_must_be_finite(base: Path, grown: Path, value: float) -> None:
    """Zero times infinity is not zero: a unit with a zero column and such a row changes the function."""

    def free(tensors: Tensors) -> None:
        tensors[DOWN][:, 3] += tensors[DOWN][:, 15]
        tensors[DOWN][:, 15] = 0
        tensors[UP][15, 2] = value

    checkpoints.edit(grown, free)
    result = ckptgrow.verify(base, grown)
    assert (result.exit_code, named(result, UP)) == (1, "the column of unit 15 is zero, but its row is infinite or NaN")


def test_colliding_digests_are_looked_through(base: Path, grown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast digest may collide: with one that always does, the slow one decides."""
    import numpy as np

    monkeypatch.setattr(equivalence, "fast_digests", lambda bits: np.zeros(bits.shape[1], np.uint64))
    assert ckptgrow.verify(base, grown).exit_code == 0
    checkpoints.edit(grown, one_bit_of_a_row)
    assert ckptgrow.verify(base, grown).exit_code == 1


def test_a_narrower_model(base: Path, tmp_path: Path) -> None:
    """verify goes both ways: the grown model's base is the same function as the grown one."""
    grown = ckptgrow.expand(base, tmp_path / "out").folder
    assert ckptgrow.verify(grown, base).exit_code == 0


def test_expand_verifies_what_it_wrote(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the writer is caught before OUT appears, and nothing is left; --no-verify would not see it."""
    from ckptgrow import execute

    honest = execute.share_of
    monkeypatch.setattr(
        execute, "share_of", lambda bits, dtype, share, draw: bits if share.index else honest(bits, dtype, share, draw)
    )
    with pytest.raises(ckptgrow.PlanError, match=r"down_proj\.weight: what was written is not the same function"):
        ckptgrow.expand(base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    ckptgrow.expand(base, tmp_path / "out", verify=False)
    assert ckptgrow.verify(base, tmp_path / "out").exit_code == 1


@pytest.mark.parametrize("family", ["phi", "phi3", "gpt_neo", "gemma3", "llama"])
def test_each_layout_is_seen(tmp_path: Path, family: str) -> None:
    """For each kind of template, a single flipped bit in each tensor of an MLP is found and named."""
    base = checkpoints.make(tmp_path / "base", family, layers=1)
    grown = ckptgrow.expand(base, tmp_path / "grown").folder
    for name in [name for name in checkpoints.load(grown) if ".mlp." in name]:
        shutil.copytree(grown, tmp_path / "broken")
        checkpoints.edit(
            tmp_path / "broken", lambda t, name=name: t[name].view(torch.int16).view(-1)[-1:].bitwise_xor_(1)
        )  # type: ignore[misc]
        result = ckptgrow.verify(base, tmp_path / "broken")
        assert result.exit_code == 1
        assert named(result, name)
        shutil.rmtree(tmp_path / "broken")
