"""merge: base + Σ λ·(skill - base), MLP by MLP, held against a reference of its own in float64; what is refused."""

from __future__ import annotations

import json
import shutil
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import checkpoints
import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAW
from test_revert import DOWN, GATE, NORM, WIDTHS, grow, one_ulp, train
from test_skills import alike, run

import ckptgrow
from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.errors import RequestError
from ckptgrow.families import locate
from ckptgrow.manifest import load_manifest
from ckptgrow.merged import merged
from ckptgrow.policy import POLICIES

SCHEMA = json.loads((Path(ckptgrow.__file__).parent / "manifest.schema.json").read_text())
MLP = "model.layers.{}.mlp.{}_proj.weight"
X = torch.linspace(-2, 2, 40, dtype=torch.float64).reshape(5, 8)


def skill(base: Path, name: str, noise: int, *, as_grown: bool = False, **options: Any) -> Path:
    """A skill of that base: grown, trained by noise of that seed, extracted; or the trained checkpoint itself."""
    folder = base.parent / name
    grown = grow(base, folder / "grown", **options)
    trained = train(grown, seed=noise)
    if as_grown:
        shutil.copy(grown / "ckptgrow.json", trained)
        return trained
    ckptgrow.extract(trained, folder / "skill", manifest=grown, base=base)
    return folder / "skill"


def answer(folder: Path, layer: int) -> torch.Tensor:
    """One MLP of a checkpoint with gate, up and down on fixed inputs, in float64."""
    tensors = {name: tensor.double() for name, tensor in checkpoints.load(folder).items()}
    gate, up, down = (tensors[MLP.format(layer, role)] for role in ("gate", "up", "down"))
    hidden = torch.nn.functional.gelu(X @ gate.T, approximate="tanh") * (X @ up.T)
    return hidden @ down.T


def expected(base: Path, skills: list[Path], weights: list[float], layer: int) -> torch.Tensor:
    mine = answer(base, layer)
    result = mine.clone()
    for path, weight in zip(skills, weights, strict=True):
        trained = path if (path / "config.json").exists() else path.parent / "trained"
        result += weight * (answer(trained, layer) - mine)
    return result


def close(one: torch.Tensor, other: torch.Tensor, within: float) -> bool:
    return bool((one - other).abs().max() <= within * max(1.0, float(other.abs().max())))


# ---------------------------------------------------------------- laws


@settings(LAW, max_examples=12)
@given(
    st.sampled_from(["gemma3_text", "phi3", "gpt_neo", "llama"]),
    st.sampled_from(["F32", "F16", "BF16", "F8_E4M3"]),
    st.sampled_from(WIDTHS),
    st.sampled_from(["auto", "even", "random"]),
    st.sampled_from(list(POLICIES)),
)
def test_one_skill_at_one_is_the_trained_one(
    family: str, dtype: str, width: dict[str, Any], shares: Any, policy: str
) -> None:
    """Unit by unit and bit by bit, whatever was grown and how; at zero it is the base."""
    with tempfile.TemporaryDirectory() as name:
        base = checkpoints.make(Path(name) / "base", family, dtype=dtype, bias=family == "phi3")
        one = skill(base, "one", 1, **width, shares=shares, policy=policy, seed=3)
        done = ckptgrow.merge(base, [one], Path(name) / "out")
        assert alike(one.parent / "trained", Path(name) / "out")
        assert (done.rounding.rounded, [answer.verdict for answer in done.answers]) == (0, ["yes"] * 3)
        ckptgrow.merge(base, [one], Path(name) / "none", weights=[0])
        assert alike(base, Path(name) / "none")
        assert (base / "config.json").read_bytes() == (Path(name) / "none/config.json").read_bytes()


@settings(LAW, max_examples=8)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(WIDTHS),
            st.sampled_from(list(POLICIES)),
            st.sampled_from(["auto", "even", "random"]),
            st.sampled_from([1, 0.5, 0.25, -1, 2, 0]),
        ),
        min_size=2,
        max_size=3,
    ),
    st.booleans(),
)
def test_any_skills_with_any_weights(recipe: list[tuple[dict[str, Any], str, Any, float]], as_grown: bool) -> None:
    """As functions f = base + Σ λ·(skill - base), in every order; and fold does not change that."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = checkpoints.make(folder / "base", dtype="F32")
        skills = [
            skill(base, f"{i}", i, as_grown=as_grown, **width, policy=policy, shares=shares)
            for i, (width, policy, shares, _) in enumerate(recipe)
        ]
        weights = [weight for *_, weight in recipe]
        done = ckptgrow.merge(base, skills, folder / "out", weights=weights)
        assert [answer.verdict for answer in done.answers] == ["yes"] * 3
        ckptgrow.merge(base, skills[::-1], folder / "other", weights=weights[::-1])
        ckptgrow.fold(folder / "out", folder / "folded", partial=True)
        for layer in range(2):
            wanted = expected(base, skills, weights, layer)
            assert close(answer(folder / "out", layer), wanted, 1e-6)
            assert close(answer(folder / "other", layer), wanted, 1e-6)
            if (folder / "folded").exists():
                assert close(answer(folder / "folded", layer), wanted, 1e-6)


# ---------------------------------------------------------------- widths


def test_two_at_one_are_no_wider_than_one(base: Path, tmp_path: Path) -> None:
    """The base's half cancels and is left out; what is left is each skill's own units, in their order, as bytes."""
    skills = [skill(base, "a", 1), skill(base, "b", 2)]
    result = run("merge", base, *skills, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "MLPs        model.layers.0-1.mlp: 12 -> 24 units" in result.stdout
    assert "none is rounded" in result.stdout
    tensors = checkpoints.load(tmp_path / "out")
    own = [checkpoints.load(path.parent / "trained") for path in skills]
    assert torch.equal(tensors[GATE], torch.cat([mine[GATE][12:] for mine in own]))
    assert torch.equal(tensors[DOWN], torch.cat([mine[DOWN][:, 12:] for mine in own], 1))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["intermediate_size"] == 24


@pytest.mark.parametrize(("weights", "width"), [("1,0.5", 36), ("2,0", 24), ("0.5,1.5", 24), ("0,0", 12)])
def test_widths(base: Path, tmp_path: Path, weights: str, width: int) -> None:
    """The base's units stay where their coefficient 1 - Σλ/2 is not zero; a skill without weight takes no room."""
    skills = [skill(base, "a", 1), skill(base, "b", 2)]
    result = run("merge", base, *skills, tmp_path / "out", "--weights", weights)
    assert result.exit_code == 0, result.output
    left = 1 - sum(map(float, weights.split(","))) / 2
    tensors = checkpoints.load(tmp_path / "out")
    assert tensors[GATE].shape[0] == (width if weights != "2,0" else 12)
    if left and weights != "0,0":
        assert torch.equal(tensors[DOWN][:, :12], (checkpoints.load(base)[DOWN].double() * left).bfloat16())
    for layer in range(2):
        wanted = expected(base, skills, [*map(float, weights.split(","))], layer)
        assert close(answer(tmp_path / "out", layer), wanted, 0.02)


def test_other_layers_and_widths(base: Path, tmp_path: Path) -> None:
    """One skill grew layer 0, another layer 1 and further: one width, what is free is filled with zero columns."""
    skills = [skill(base, "a", 1, layers=(0,)), skill(base, "b", 2, layers=(1,), factor=3)]
    done = ckptgrow.merge(base, skills, tmp_path / "out")
    assert [block.new_width for block in done.blocks] == [36, 36]
    for layer in range(2):
        assert close(answer(tmp_path / "out", layer), expected(base, skills, [1, 1], layer), 1e-9)
    down = checkpoints.load(tmp_path / "out")[DOWN]
    assert not down[:, 24:].any()
    boxes = {tensor.name: tensor.boxes for tensor in load_manifest(tmp_path / "out").trainable}
    assert boxes[DOWN] == (((0, 8), (12, 24)),)


# ---------------------------------------------------------------- what comes out is a grown checkpoint


def test_the_manifest(base: Path, tmp_path: Path) -> None:
    """Valid, with both skills; it trains on, is audited and grown again."""
    skills = [skill(base, "a", 1), skill(base, "b", 2, policy="up")]
    out = tmp_path / "out"
    ckptgrow.merge(base, skills, out, weights=[1, 0.5])
    manifest = json.loads((out / "ckptgrow.json").read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)
    assert (manifest["operation"], [part["weight"] for part in manifest["skills"]]) == ("merge", [1.0, 0.5])
    assert "2 skills merged" in (out / "README.md").read_text()
    trained = train(out)
    assert ckptgrow.audit(out, trained).exit_code == 0
    assert ckptgrow.expand(out, tmp_path / "wider").verification.same  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("layers", "weights", "given"),
    [((None, None), "1,0.5", False), (((0,), (1,)), "1,1", False), (((0,), None), "1,1", True)],
)
@pytest.mark.parametrize("trained_on", [False, True])
def test_a_merge_is_a_skill_too(
    base: Path, tmp_path: Path, layers: tuple[Any, Any], weights: str, given: bool, trained_on: bool
) -> None:
    """All that is not the base's, trained on or not, makes the merged checkpoint again; it is no part of a merge."""
    skills = [skill(base, "a", 1, layers=layers[0]), skill(base, "b", 2, layers=layers[1], factor=3)]
    out, one = tmp_path / "out", tmp_path / "skill"
    assert run("merge", base, *skills, out, "--weights", weights).exit_code == 0
    source = train(out) if trained_on else out
    asked = ("extract", source, one, "--manifest", out)
    if given:
        result = run(*asked)
        assert (result.exit_code, one.exists()) == (2, False)
        assert "tensors of the base are not in it: the weights (1, 1) cancel its columns" in result.stderr
        assert "its weights are not base's" in run(*asked, "--base", checkpoints.make(tmp_path / "no", seed=1)).stderr
        assert run(*asked, "--base", out).exit_code == 0
        shutil.rmtree(one)
    assert run(*asked, *(("--base", base) if given else ())).exit_code == 0
    assert "skills of `base`, merged by" in (one / "README.md").read_text()
    assert run("apply", base, one, tmp_path / "again").exit_code == 0
    assert alike(source, tmp_path / "again")
    assert (tmp_path / "again/ckptgrow.json").read_bytes() == (out / "ckptgrow.json").read_bytes()
    moved = train(out, one_ulp(GATE), name="moved") if not given else train(out, one_ulp(NORM), name="moved")
    result = run("extract", moved, tmp_path / "no skill", "--manifest", out, "--base", base)
    assert (result.exit_code, (tmp_path / "no skill").exists()) == (1, False)
    for wrong in (one, out):
        result = run("merge", base, wrong, skills[0], tmp_path / "more")
        assert (result.exit_code, (tmp_path / "more").exists()) == (2, False)
        assert "it is of a merge, which is made of skills" in result.stderr


# ---------------------------------------------------------------- and back


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("trained_on", [False, True])
def test_revert_undoes_a_merge(tmp_path: Path, dtype: str, trained_on: bool) -> None:
    """Where the weights leave a part of the base, it is read back from that: byte for byte, after training too."""
    base = checkpoints.make(tmp_path / "base", dtype=dtype)
    (base / "README.md").write_text("# its own\n")
    skills = [skill(base, "a", 1), skill(base, "b", 2, policy="up"), skill(base, "c", 3, layers=(1,))]
    for i, weights in enumerate(([1, 0.5, 0], [1, 0, 2], [0.5, 0.5, 0.5], [-1, 1, -2], [1, 0, 0])):
        out = tmp_path / f"{i}/out"
        ckptgrow.merge(base, skills, out, weights=weights)
        source = train(out) if trained_on else out
        done = ckptgrow.revert(source, tmp_path / f"{i}/back", manifest=out)
        assert (done.exit_code, done.taken_from, done.notes) == (0, "trained", ())
        assert checkpoints.snapshot(base) == checkpoints.snapshot(tmp_path / f"{i}/back")
    moved = train(tmp_path / "0/out", one_ulp(DOWN) if dtype == "BF16" else None, name="moved")
    if dtype == "BF16":
        done = ckptgrow.revert(moved, tmp_path / "no", manifest=tmp_path / "0/out")
        assert (done.exit_code, [finding.tensor for finding in done.moved]) == (1, [DOWN])


def test_what_a_merge_lost_needs_the_base(base: Path, tmp_path: Path) -> None:
    """The half that cancelled, random shares, rounded multiples: each says so, and BASE is the way out."""
    a, b = skill(base, "a", 1), skill(base, "b", 2)
    r, up = skill(base, "r", 3, shares="random"), skill(base, "up", 4, policy="up", layers=(0,))
    for skills, options, said in (
        (
            (a, b),
            (),
            "6 tensors of the base are not in it: the weights (1, 1) cancel its columns, so the merge left its",
        ),
        ((a, r), ("--weights", "0.5,0.5"), "2 tensors of the base are not in it: the merge added up shares of its"),
        ((up,), ("--weights", "2"), "2 tensors of the base are not in it: the weights (2) cancel its columns"),
        ((a,), ("--weights", "0.3"), "2 tensors are not the base's any more: the merge rounded"),
    ):
        out = tmp_path / f"{len(skills)}{options}"
        assert run("merge", base, *skills, out, *options).exit_code == 0
        result = run("revert", out, tmp_path / "back")
        assert (result.exit_code, (tmp_path / "back").exists()) == (2, False)
        assert said in result.stderr
        assert "Give --base BASE." in result.stderr
        other = checkpoints.make(tmp_path / "other", seed=1)
        assert "its weights are not base's" in run("revert", out, tmp_path / "back", "--base", other).stderr
        assert run("revert", out, tmp_path / "back", "--base", base).exit_code == 0
        assert checkpoints.snapshot(base) == checkpoints.snapshot(tmp_path / "back")
        shutil.rmtree(tmp_path / "back")


def test_rounded_multiples_come_back_from_float32(base: Path, tmp_path: Path) -> None:
    """Kept in float32, 0.85 times a weight of bf16 still tells which weight it was."""
    done = ckptgrow.merge(base, [skill(base, "a", 1)], tmp_path / "out", weights=["0.3"], dtype="float32")
    assert done.rounding.rounded
    assert ckptgrow.revert(tmp_path / "out", tmp_path / "back").exit_code == 0
    assert checkpoints.snapshot(base) == checkpoints.snapshot(tmp_path / "back")


def test_growing_a_merge_again_and_all_the_way_back(base: Path, tmp_path: Path) -> None:
    """Grown, trained, merged, grown again, trained: extract and apply, one step back, and all of them."""
    skills = [skill(base, "a", 1), skill(base, "b", 2)]
    for weights in ([1, 0.5], [1, 1]):
        folder = tmp_path / f"{weights[1]}"
        ckptgrow.merge(base, skills, folder / "merged", weights=weights)
        wider = grow(folder / "merged", folder / "wider", factor=2)
        trained = train(wider, shards=2)
        assert ckptgrow.extract(trained, folder / "skill", manifest=wider).exit_code == 0
        ckptgrow.apply(folder / "merged", folder / "skill", folder / "again")
        assert alike(trained, folder / "again")
        assert ckptgrow.revert(trained, folder / "last", manifest=wider).undone == 1
        assert checkpoints.snapshot(folder / "merged") == checkpoints.snapshot(folder / "last")
        if weights == [1, 1]:
            with pytest.raises(RequestError, match="6 tensors of the base are not in it"):
                ckptgrow.revert(trained, folder / "first", manifest=wider, every=True)
            ckptgrow.revert(trained, folder / "first", manifest=wider, every=True, base=base)
        else:
            assert ckptgrow.revert(trained, folder / "first", manifest=wider, every=True).undone == 2
        assert checkpoints.snapshot(base) == checkpoints.snapshot(folder / "first")


def test_merging_what_was_grown_before(base: Path, tmp_path: Path) -> None:
    """The base of a merge may be a grown and trained checkpoint: its history stays, and --all undoes both."""
    first = grow(base, tmp_path / "first")
    second = train(first)
    for file in ("ckptgrow.json", "tokenizer.json", "generation_config.json"):
        shutil.copy(first / file, second)
    skills = [skill(second, "a", 1), skill(second, "b", 2)]
    ckptgrow.merge(second, skills, tmp_path / "out", weights=[0.5, 1])
    ckptgrow.revert(tmp_path / "out", tmp_path / "last")
    assert checkpoints.snapshot(second) == checkpoints.snapshot(tmp_path / "last")
    assert ckptgrow.revert(tmp_path / "out", tmp_path / "all", every=True).undone == 2
    assert checkpoints.snapshot(base) == checkpoints.snapshot(tmp_path / "all")


def test_float32_keeps_sums_and_wide_skills_exact(base: Path, tmp_path: Path) -> None:
    """A third rounds in bf16 and is said to; in float32 it does less. A skill in fp32 is refused without it."""
    one = skill(base, "a", 1)
    assert "are rounded, by up to a relative" in run("merge", base, one, tmp_path / "a1", "--weights", "0.3").stdout
    result = run("merge", base, one, tmp_path / "a2", "--weights", "0.3", "--dtype", "float32", "--json")
    assert checkpoints.load(tmp_path / "a2")[DOWN].dtype == torch.float32
    assert json.loads(result.stdout)["rounding"]["largest"] < 1e-7
    wide = train(base.parent / "a/grown", wide=True, seed=1, name="wide")
    ckptgrow.extract(wide, tmp_path / "wide", manifest=base.parent / "a/grown")
    result = run("merge", base, tmp_path / "wide", tmp_path / "a3")
    assert (result.exit_code, (tmp_path / "a3").exists()) == (2, False)
    assert "F32 in a skill and BF16 in the base" in result.stderr
    result = run("merge", base, tmp_path / "wide", tmp_path / "a3", "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    assert torch.equal(checkpoints.load(tmp_path / "a3")[GATE], checkpoints.load(wide)[GATE])


# ---------------------------------------------------------------- refusals, and the checker


def test_what_is_refused(base: Path, tmp_path: Path) -> None:
    """One clear message each, exit 2, nothing written."""
    a, b = skill(base, "a", 1), skill(base, "b", 2)
    other = checkpoints.make(tmp_path / "far/base", seed=1)
    far = skill(other, "c", 1)
    moved = train(base.parent / "a/grown", one_ulp(NORM), name="moved")
    shutil.copy(base.parent / "a/grown/ckptgrow.json", moved)
    bare = train(base.parent / "a/grown", name="bare")
    for arguments, said in (
        ((a, b, "--weights", "1"), "1 weights for 2 skills"),
        ((a, b, "--weights", "1,x"), "--weights 1,x: give numbers"),
        ((a, b, "--weights", "1,1/0"), "give numbers"),
        ((a, a), "it is the same skill as"),
        ((a, far), "model.embed_tokens.weight: its weights are not base's"),
        ((a, moved), f"{NORM}: outside the boxes, 1 of 8 frozen elements moved"),
        ((a, bare), "it has no ckptgrow.json"),
        ((a, base), "it has no ckptgrow.json"),
    ):
        result = run("merge", base, *arguments, tmp_path / "out")
        assert (result.exit_code, (tmp_path / "out").exists()) == (2, False), said
        assert said in result.stderr
    (a / "skill.safetensors").write_bytes((a / "skill.safetensors").read_bytes()[:-3])
    result = run("merge", base, a, b, tmp_path / "out")
    assert (result.exit_code, (tmp_path / "out").exists()) == (2, False)
    assert "skill.safetensors: the tensors end at" in result.stderr
    with pytest.raises(RequestError, match="no skill"):
        ckptgrow.merge(base, [], tmp_path / "out")


def test_the_check_sees_a_fault(base: Path, tmp_path: Path) -> None:
    """One bit of one column of what was merged: no."""
    one = skill(base, "a", 1)
    ckptgrow.merge(base, [one], tmp_path / "out")
    architecture = locate(open_checkpoint(base).config, open_checkpoint(base).infos)

    def verdict() -> str:
        opened, grown = open_checkpoint(base), [(Fraction(1), open_checkpoint(one.parent / "trained"))]
        written = open_checkpoint(tmp_path / "out")
        return merged(opened, grown, written, architecture, False, lambda _: None).verdict

    assert verdict() == "yes"
    checkpoints.edit(tmp_path / "out", one_ulp(DOWN))
    assert verdict() == "no"
