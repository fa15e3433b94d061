"""extract and apply: what training learned as a small file, and the trained checkpoint again from it and the base."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from strategies import LAW, LAYOUTS, fitting
from test_revert import DOWN, GATE, NORM, WIDTHS, grow, one_ulp, train

import ckptgrow
from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.cli import main
from ckptgrow.manifest import load_manifest
from ckptgrow.policy import POLICIES

FILE = "skill.safetensors"


@pytest.fixture
def grown(base: Path, tmp_path: Path) -> Path:
    return grow(base, tmp_path / "grown")


@pytest.fixture
def skill(grown: Path, tmp_path: Path) -> Path:
    """What the tiny Gemma learned with the default policy."""
    ckptgrow.extract(train(grown), tmp_path / "skill", manifest=grown)
    return tmp_path / "skill"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def alike(one: Path, other: Path) -> bool:
    """Whether two checkpoints have the same tensors, dtypes and bits."""
    mine, its = checkpoints.load(one), checkpoints.load(other)
    return mine.keys() == its.keys() and all(
        mine[name].dtype == its[name].dtype and torch.equal(_bits(mine[name]), _bits(its[name])) for name in mine
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@settings(LAW, max_examples=25)
@given(
    st.sampled_from(["gemma3_text", "gemma3", "phi3", "gemma3n_text", *LAYOUTS]),
    st.sampled_from(["F32", "F16", "BF16", "F8_E4M3"]),
    st.sampled_from(WIDTHS),
    st.sampled_from(["auto", "even", "random"]),
    st.sampled_from(list(POLICIES)),
    st.booleans(),
)
def test_apply_undoes_extract(
    family: str, dtype: str, width: dict[str, Any], shares: Any, policy: str, wide: bool
) -> None:
    """apply(base, extract(t)) is t, tensor by tensor and bit by bit, in the dtypes in which it was trained."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = checkpoints.make(folder / "base", family, dtype=dtype, bias=family == "phi3")
        options = {**width, "shares": shares, "policy": policy, "seed": 3}
        grown = grow(base, folder / "grown", **fitting(family, options))
        trained = train(grown, wide=wide)
        done = ckptgrow.extract(trained, folder / "skill", manifest=grown, base=base)
        assert (done.exit_code, done.elements) == (0, load_manifest(grown).counts.trainable)
        ckptgrow.apply(base, folder / "skill", folder / "out")
        assert alike(trained, folder / "out")
        assert ckptgrow.audit(grown, folder / "out").exit_code == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_extract_needs_no_base(base: Path, tmp_path: Path, policy: str) -> None:
    """With every policy's own shares of two copies the frozen part is checked by the manifest's digests alone."""
    checkpoints.edit(base, lambda tensors: tensors.update(logit_scale=torch.tensor(2.5)))
    grown = grow(base, tmp_path / "grown", policy=policy, shares="even")
    trained = train(grown)
    assert ckptgrow.extract(trained, tmp_path / "skill", manifest=grown).exit_code == 0
    ckptgrow.apply(base, tmp_path / "skill", tmp_path / "out")
    assert alike(trained, tmp_path / "out")


def test_what_a_skill_is(skill: Path, grown: Path) -> None:
    """The boxes' elements and nothing else, in a file that the safetensors library opens; manifest and card."""
    assert sorted(path.name for path in skill.iterdir()) == ["README.md", "ckptgrow.json", FILE]
    assert (skill / "ckptgrow.json").read_bytes() == (grown / "ckptgrow.json").read_bytes()
    assert "ckptgrow apply base THIS_FOLDER OUT" in (skill / "README.md").read_text()
    trained = checkpoints.load(grown.with_name("trained"))
    with safe_open(skill / FILE, "pt") as opened:
        assert sorted(opened.keys()) == sorted(tensor.name for tensor in load_manifest(grown).trainable)
        assert torch.equal(opened.get_tensor(GATE), trained[GATE][12:])
        assert torch.equal(opened.get_tensor(DOWN), trained[DOWN][:, 12:])


def test_applied_is_a_checkpoint_like_any(skill: Path, base: Path, tmp_path: Path) -> None:
    """Its config names the manifest, its files are the base's, it can be reverted, extracted, grown again."""
    out = tmp_path / "out"
    result = run("apply", base, skill, out)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, f"wrote {out}")
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert ckptgrow.revert(out, tmp_path / "back").exit_code == 0
    assert checkpoints.snapshot(base) == checkpoints.snapshot(tmp_path / "back")
    ckptgrow.extract(out, tmp_path / "again")
    assert checkpoints.snapshot(tmp_path / "again") == checkpoints.snapshot(skill)
    ckptgrow.expand(out, tmp_path / "wider", factor=2)
    assert len(load_manifest(tmp_path / "wider").history) == 1


@pytest.mark.parametrize("name", [GATE, DOWN, NORM])
@pytest.mark.parametrize("compared", [False, True])
def test_a_moved_row_is_not_lost(grown: Path, base: Path, tmp_path: Path, name: str, compared: bool) -> None:
    """One ulp outside the boxes: exit 1, that tensor, nothing written; with and without the base."""
    trained, out = train(grown, one_ulp(name)), tmp_path / "skill"
    result = run("extract", trained, out, "--manifest", grown, *(["--base", base] if compared else []))
    assert (result.exit_code, out.exists()) == (1, False)
    assert f"  {name}: " in result.stdout
    assert result.stdout.splitlines()[-1].endswith("a skill would lose that: nothing was written")


def test_a_copy_that_moved_is_not_lost(base: Path, tmp_path: Path) -> None:
    """Frozen copies count too, not only what the base is read back from: gate's, with policy down."""
    grown = grow(base, tmp_path / "grown", policy="down")
    trained = train(grown, lambda t: t[GATE].view(torch.int16)[20].add_(1))
    result = run("extract", trained, tmp_path / "skill", "--manifest", grown)
    assert result.exit_code == 1
    assert f"  {GATE}: 8 of 192 frozen elements moved by up to" in result.stdout


def test_what_cannot_be_told_without_the_base(base: Path, tmp_path: Path) -> None:
    """Half of a random share: exit 2 and the way out, which is the base or the grown folder."""
    grown = grow(base, tmp_path / "grown", shares="random")
    trained, out = train(grown), tmp_path / "skill"
    result = run("extract", trained, out, "--manifest", grown)
    assert (result.exit_code, out.exists()) == (2, False)
    assert "Give --base BASE (or the grown folder) to compare with" in result.stderr
    assert run("extract", trained, out, "--manifest", grown, "--base", grown, "-q").output == ""
    ckptgrow.apply(base, out, tmp_path / "out")
    assert alike(trained, tmp_path / "out")


def test_another_base(skill: Path, tmp_path: Path) -> None:
    """The same shapes and other weights: refused by the tensor that differs, nothing written."""
    other = checkpoints.make(tmp_path / "other", seed=1)
    result = run("apply", other, skill, tmp_path / "out")
    assert (result.exit_code, (tmp_path / "out").exists()) == (2, False)
    assert "model.embed_tokens.weight: its weights are not base's" in result.stderr
    assert "grew from another checkpoint" in result.stderr


def test_a_broken_skill(skill: Path, base: Path, grown: Path, tmp_path: Path) -> None:
    """Truncated, without its metadata, with another manifest, with other tensors: one message each, exit 2."""
    data, manifest = (skill / FILE).read_bytes(), (skill / "ckptgrow.json").read_bytes()
    tensors = {}
    with safe_open(skill / FILE, "pt") as opened:
        told = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    from safetensors.torch import save_file

    def save(change: dict[str, torch.Tensor | None], metadata: dict[str, str] | None) -> None:
        save_file({n: t for n, t in (tensors | change).items() if t is not None}, skill / FILE, metadata)

    other = grow(base, tmp_path / "other", factor=3)
    for act, said in (
        (lambda: (skill / FILE).write_bytes(data[:-7]), "skill.safetensors: the tensors end at"),
        (lambda: (skill / FILE).write_bytes(data[:100]), "not a safetensors file, or cut short"),
        (lambda: (skill / FILE).unlink(), "skill.safetensors"),
        (lambda: save({}, {"format": "pt"}), "it does not say which growth it belongs to"),
        (lambda: save({GATE: None}, told), f"{GATE}: skill and manifest do not both have it"),
        (lambda: save({GATE: tensors[GATE][1:]}, told), f"{GATE}: not BF16 [12, 8]"),
        (lambda: shutil.copy(other / "ckptgrow.json", skill), "it belongs to another ckptgrow.json"),
        (lambda: (skill / "ckptgrow.json").unlink(), "ckptgrow.json: it cannot be read"),
    ):
        act()
        result = run("apply", base, skill, tmp_path / "out")
        assert (result.exit_code, (tmp_path / "out").exists()) == (2, False), said
        assert said in result.stderr
        (skill / FILE).write_bytes(data)
        (skill / "ckptgrow.json").write_bytes(manifest)
    assert run("apply", base, skill, tmp_path / "out").exit_code == 0


def test_json_and_an_existing_out(grown: Path, base: Path, tmp_path: Path) -> None:
    """Results as JSON; what exists is not touched."""
    trained = train(grown)
    shown = json.loads(run("extract", trained, tmp_path / "skill", "--manifest", grown, "--json").stdout)
    assert (shown["extracted"], shown["elements"], shown["tensors"]) == (True, 576, 6)
    shown = json.loads(run("apply", base, tmp_path / "skill", tmp_path / "out", "--json").stdout)
    assert (shown["tensors"], shown["learned"]) == (len(open_checkpoint(base).infos), 6)
    assert "it exists" in run("apply", base, tmp_path / "skill", tmp_path / "out").stderr
    assert "it exists" in run("extract", trained, tmp_path / "skill", "--manifest", grown).stderr
