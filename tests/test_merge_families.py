"""merge over families: any layout of an MLP, skills that grew other MLPs, lists and multiples of widths, blocks."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import test_fp8
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import FREE, LAW, LAYOUTS, Tiny, Weights, answer, fitting
from test_merge import skill
from test_revert import grow, same, train
from test_skills import alike, run

import ckptgrow
from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.errors import RequestError
from ckptgrow.families import FAMILIES, locate
from ckptgrow.families.locate import EVERY
from ckptgrow.policy import POLICIES

MLP = "model.layers.{}.mlp.{}_proj.weight"


def outputs(folder: Path) -> dict[tuple[str, int | None], NDArray[np.float64]]:
    """What each MLP of a checkpoint says to a fixed input, in numpy and float64."""
    opened = open_checkpoint(folder)
    weights: Weights = {name: tensor.double().numpy() for name, tensor in checkpoints.load(folder).items()}
    tiny = Tiny(dict(opened.infos), locate(opened.config, opened.infos, EVERY))
    return {
        (mlp.block, mlp.expert): answer(weights, tiny, i) for i, mlp in enumerate(tiny.architecture.mlps) if mlp.down
    }


def trained_of(path: Path) -> Path:
    return path if (path / "config.json").exists() else path.parent / "trained"


def adds_up(base: Path, skills: list[Path], weights: list[float], out: Path, within: float = 1e-5) -> None:
    """Whether each MLP is base + Σ λ·(skill - base), by outputs of this test's own making."""
    mine, got = outputs(base), outputs(out)
    theirs = [outputs(trained_of(path)) for path in skills]
    assert mine.keys() == got.keys()
    for key, own in mine.items():
        wanted = own + sum(weight * (its[key] - own) for weight, its in zip(weights, theirs, strict=True))
        size = max(np.abs(one[key]).max() for one in (mine, got, *theirs))
        assert np.abs(got[key] - wanted).max() <= within * size, key


def verdicts(done: ckptgrow.Merging) -> list[str]:
    return [answer.verdict for answer in done.answers]


def there_and_back(base: Path, out: Path, folder: Path) -> None:
    """A merge gives the base back or says why not, and it is a skill of the base; where it is the base it has none."""
    if not (out / "ckptgrow.json").exists():
        return
    try:
        ckptgrow.revert(out, folder / "back")
    except RequestError as error:
        assert "Give --base BASE." in str(error)  # noqa: PT017 (either is right, and what is kept is checked)
        ckptgrow.revert(out, folder / "back", base=base)
    assert same(base, folder / "back")
    ckptgrow.extract(out, folder / "skill", base=base)
    ckptgrow.apply(base, folder / "skill", folder / "again")
    assert alike(out, folder / "again")


# ---------------------------------------------------------------- laws

recipes = st.tuples(
    st.sampled_from([{"factor": 2}, {"factor": 3}, {"factor": 2, "layers": (1,)}]),
    st.sampled_from(list(POLICIES)),
    st.sampled_from(["auto", "even", "random"]),
    st.sampled_from([1, 0.5, -1, 2, 0.3, 0]),
)


@settings(LAW, max_examples=25)
@given(
    st.sampled_from(sorted(set(LAYOUTS) & set(FREE))),
    st.sampled_from(["F64", "F32", "BF16", "F16"]),
    st.lists(recipes, min_size=1, max_size=3),
    st.booleans(),
)
def test_merge_is_the_sum(family: str, dtype: str, drawn: list[Any], bias: bool) -> None:
    """Of any layout: as functions base + Σ λ·(skill - base), in every order; one at 1 is the skill, none the base."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = checkpoints.make(folder / "base", family, dtype=dtype, bias=bias, hidden=6, width=6, shards=1)
        skills, weights = [], []
        for i, (options, policy, shares, weight) in enumerate(drawn):
            options = {"policy": policy, "shares": shares, **options}
            skills.append(skill(base, f"{i}", i, **fitting(family, options)))
            weights.append(weight)
        done = ckptgrow.merge(base, skills, folder / "out", weights=weights)
        assert verdicts(done) == ["yes"] * 3
        if dtype in ("F64", "F32"):
            adds_up(base, skills, weights, folder / "out")
            ckptgrow.merge(base, skills[::-1], folder / "other", weights=weights[::-1])
            adds_up(base, skills, weights, folder / "other")
        there_and_back(base, folder / "out", folder)
        ckptgrow.merge(base, skills[:1], folder / "one")
        assert alike(skills[0].parent / "trained", folder / "one")
        ckptgrow.merge(base, skills, folder / "none", weights=[0] * len(skills))
        assert alike(base, folder / "none")


# ---------------------------------------------------------------- other MLPs


def test_other_experts(tmp_path: Path) -> None:
    """One skill grew what every token passes, another all: what only one grew is that one's."""
    base = checkpoints.make(tmp_path / "base", "qwen2_moe", dtype="F32")
    skills = [skill(base, "a", 1, experts="shared"), skill(base, "b", 2), skill(base, "c", 3, experts="shared")]
    for name, some in (("ac", [0, 2]), ("ab", [0, 1]), ("abc", [0, 1, 2])):
        picked = [skills[i] for i in some]
        assert verdicts(ckptgrow.merge(base, picked, tmp_path / name)) == ["yes"] * 3
        adds_up(base, picked, [1.0] * len(picked), tmp_path / name)
    config = json.loads((tmp_path / "abc/config.json").read_text())
    assert (config["moe_intermediate_size"], config["shared_expert_intermediate_size"]) == (24, 48)
    config = json.loads((tmp_path / "ac/config.json").read_text())
    assert (config["moe_intermediate_size"], config["shared_expert_intermediate_size"]) == (12, 24)


@pytest.mark.parametrize("weights", [[1, 1], [1, 0.5], [1, 0]])
def test_experts_without_down_keep_step(tmp_path: Path, weights: list[float]) -> None:
    """LongCat's experts that answer nothing: as wide as the others, in rows that a loader can stack with theirs."""
    base = checkpoints.make(tmp_path / "base", "longcat_flash", dtype="F32")
    last = ".mlp.experts.1.down_proj.weight"
    checkpoints.edit(base, lambda t: [t.pop(name) for name in list(t) if name.endswith(last)] and None)
    assert not any(name.endswith(last) for name in checkpoints.load(base))
    skills = [skill(base, "a", 1), skill(base, "b", 2, layers=(0,))]
    done = ckptgrow.merge(base, skills, tmp_path / "out", weights=weights)
    assert verdicts(done) == ["yes"] * 3
    adds_up(base, skills, weights, tmp_path / "out")
    there_and_back(base, tmp_path / "out", tmp_path)


def test_another_declaration_is_refused(base: Path, tmp_path: Path) -> None:
    """A base that two skills read as different families has no MLPs in common that could be told."""
    a = skill(base, "a", 1)
    declared = tmp_path / "family.json"
    b = skill(base, "b", 2)
    manifest = json.loads((b / "ckptgrow.json").read_text())
    from ckptgrow.families.declared import to_json

    told = to_json(FAMILIES["gemma3_text"]) | {"norm_after": False}
    declared.write_text(json.dumps(told))
    c = skill(base, "c", 3, family=declared)
    assert manifest["declaration"] is None
    result = run("merge", base, a, c, tmp_path / "out")
    assert (result.exit_code, (tmp_path / "out").exists()) == (2, False)
    assert "it was grown by another declaration of the family than" in result.stderr


# ---------------------------------------------------------------- lists, multiples, formulas


def test_each_layer_has_its_own_width_in_a_list(tmp_path: Path) -> None:
    """gemma3n takes a list: two skills grown natively on different layers, one of them threefold."""
    base = checkpoints.make(
        tmp_path / "base", "gemma3n_text", dtype="F32", layers=3, config={"intermediate_size": [12] * 3}
    )
    a = skill(base, "a", 1, layers=(0,), uneven="native")
    b = skill(base, "b", 2, layers=(2,), uneven="native", factor=3)
    done = ckptgrow.merge(base, [a, b], tmp_path / "out")
    assert verdicts(done) == ["yes"] * 3
    assert json.loads((tmp_path / "out/config.json").read_text())["intermediate_size"] == [24, 12, 36]
    assert [(block.layer, block.new_width) for block in done.blocks] == [(0, 24), (2, 36)]
    adds_up(base, [a, b], [1, 1], tmp_path / "out")
    tensors = checkpoints.load(tmp_path / "out")
    assert torch.equal(tensors[MLP.format(2, "gate")], checkpoints.load(b.parent / "trained")[MLP.format(2, "gate")])
    result = run("merge", base, a, skill(base, "c", 3, layers=(0,), uneven="native"), tmp_path / "no")
    assert (result.exit_code, (tmp_path / "no").exists()) == (2, False)
    assert "it takes statistics over its units, so it is no sum that could be merged" in result.stderr
    assert "Only one skill can have it, with weight 1." in result.stderr


def test_norms_over_the_width_on_different_layers(tmp_path: Path) -> None:
    """bitnet's norm: no sums, but each layer can be one skill's; filling comes in whole rounds of its units."""
    base = checkpoints.make(tmp_path / "base", "bitnet", dtype="F32", layers=3)
    a, b = skill(base, "a", 1, layers=(0,)), skill(base, "b", 2, layers=(1,), factor=3)
    done = ckptgrow.merge(base, [a, b], tmp_path / "out")
    assert verdicts(done) == ["yes"] * 3
    assert json.loads((tmp_path / "out/config.json").read_text())["intermediate_size"] == 72
    adds_up(base, [a, b], [1, 1], tmp_path / "out")
    ckptgrow.revert(tmp_path / "out", tmp_path / "back")
    assert same(base, tmp_path / "back")
    with pytest.raises(RequestError, match="its filling repeats units of a skill"):
        ckptgrow.extract(tmp_path / "out", tmp_path / "skill", base=base)
    for options in ({"weights": [1, 0.5]}, {"skills": [a, skill(base, "c", 3)]}):
        with pytest.raises(RequestError, match="no sum that could be merged"):
            ckptgrow.merge(base, **({"skills": [a, b], "out": tmp_path / "no"} | options))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gemma4_text", {}),
        ("deepseek_v3", {}),
        ("gpt_neox_japanese", {"intermediate_multiple_size": 2}),
        ("dinov2", {}),
    ],
)
def test_multiples_and_formulas(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Where the key cannot say what is needed, the next width that it can."""
    base = checkpoints.make(tmp_path / "base", family, dtype="F32", hidden=6, width=12, config=config)
    skills = [skill(base, "a", 1), skill(base, "b", 2, layers=(1,))]
    for weights in ([1, 1], [1, 0.5]):
        out = tmp_path / f"{weights[1]}"
        assert verdicts(ckptgrow.merge(base, skills, out, weights=weights)) == ["yes"] * 3
        adds_up(base, skills, weights, out)
        opened = open_checkpoint(out)
        (group, *_) = locate(opened.config, opened.infos).groups
        values = {group.path: group.says}
        assert all(group.told(values, mlp) == mlp.width for mlp in group.mlps)


# ---------------------------------------------------------------- FP8 in blocks


@pytest.fixture
def scaled(tmp_path: Path) -> Path:
    """A tiny llama of FP8 in blocks."""
    size = {"hidden": test_fp8.HIDDEN, "width": test_fp8.WIDTH, "config": test_fp8.QUANTISED}
    folder = checkpoints.make(tmp_path / "base", "llama", **size)  # type: ignore[arg-type]
    checkpoints.edit(folder, test_fp8.quantise)
    return folder


@pytest.mark.parametrize(
    ("weights", "exact"), [([1, 1], True), ([1, 0.5], True), ([0.3, 0.9], False), ([-1, 2], False)]
)
def test_scaled_blocks_take_the_weights_in_their_scales(
    scaled: Path, tmp_path: Path, weights: list[float], exact: bool
) -> None:
    """Payloads stay bytes; the coefficients go into the scales, which only other numbers than powers of two round."""
    skills = [skill(scaled, "a", 1), skill(scaled, "b", 2, factor=4, layers=(1,))]
    done = ckptgrow.merge(scaled, skills, tmp_path / "out", weights=weights)
    assert verdicts(done) == ["yes"] * 3
    assert (done.rounding.rounded == 0) == exact
    down = test_fp8.LAYER.format(1, "down")
    got, mine = (checkpoints.load(folder) for folder in (tmp_path / "out", scaled))
    assert got[down].dtype == torch.float8_e4m3fn
    theirs = [checkpoints.load(path.parent / "trained") for path in skills]
    x = torch.linspace(-1, 1, 3 * test_fp8.HIDDEN, dtype=torch.float64).reshape(3, -1)

    def answered(tensors: checkpoints.Tensors) -> torch.Tensor:
        gate, up, down = (test_fp8.weights(tensors, test_fp8.LAYER.format(1, role)) for role in ("gate", "up", "down"))
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    base = answered(mine)
    parts = [weight * (answered(its) - base) for weight, its in zip(weights, theirs, strict=True)]
    wanted = base + torch.stack(parts).sum(0)
    there_and_back(scaled, tmp_path / "out", tmp_path)
    assert (answered(got) - wanted).abs().max() <= 1e-6 * max(part.abs().max() for part in (base, *parts))


def test_a_payload_in_another_dtype_is_refused(scaled: Path, tmp_path: Path) -> None:
    """What a trainer widened has lost its scales' meaning in the merged tensor."""
    grown = grow(scaled, tmp_path / "a/grown")
    wide = train(grown, wide=True)
    shutil.copy(grown / "ckptgrow.json", wide)
    result = run("merge", scaled, wide, tmp_path / "out", "--dtype", "float32")
    assert (result.exit_code, (tmp_path / "out").exists()) == (2, False)
