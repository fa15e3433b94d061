"""Some experts of real mixtures in transformers: the base's logits, masked training with decay, and the base back."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="trains real mixtures of experts with transformers, which is not installed")

import checkpoints
import torch
from test_experts import parts_of
from test_families_transformers import CASES, build, inputs, load
from test_stacks_transformers import check_sharded, save, train

import ckptgrow
from ckptgrow.manifest import load_manifest
from ckptgrow.operations import audit

pytestmark = [pytest.mark.transformers, pytest.mark.usefixtures("quiet"), pytest.mark.filterwarnings("ignore")]

# Experts with tensors of their own on disk, with shared experts beside; in stacks, turned, woven with biases; flat.
MIXTURES = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text", "qwen3_vl_moe", "dbrx")
LISTED = "0,2"


@pytest.fixture
def grown(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model of the family of which two experts grew."""
    build(CASES[request.param], tmp_path / "base")
    return Path(ckptgrow.expand(tmp_path / "base", tmp_path / "grown", experts=LISTED).folder)


@pytest.mark.parametrize("grown", MIXTURES, indirect=True)
def test_listed_experts_are_trained_and_undone(grown: Path, tmp_path: Path) -> None:
    """Stock transformers has the base's logits; AdamW with decay under a guarded mask moves only what is listed."""
    case = CASES[load_manifest(grown).family]
    one, other = (load(case, tmp_path / name).eval() for name in ("base", "grown"))
    given = inputs(one)
    with torch.no_grad():
        off = (one(**given).logits - other(**given).logits).abs().max()
    assert off < 2e-5
    model = train(grown)
    model.save_pretrained(tmp_path / "trained")
    for folder in (tmp_path / "trained", save(model, tmp_path / "memory")):
        seen = audit(grown, folder)
        assert (seen.exit_code, seen.cause, seen.findings) == (0, "nothing", ())
        assert seen.total("trainable") == load_manifest(grown).counts.trainable
        assert seen.total("changed") > 0.5 * seen.total("trainable")
        ckptgrow.revert(folder, tmp_path / f"{folder.name}-back", manifest=grown)
        assert checkpoints.snapshot(tmp_path / f"{folder.name}-back") == checkpoints.snapshot(tmp_path / "base")
    ckptgrow.extract(tmp_path / "trained", tmp_path / "skill", manifest=grown)
    ckptgrow.apply(tmp_path / "base", tmp_path / "skill", tmp_path / "applied")
    applied, trained = (checkpoints.load(tmp_path / name) for name in ("applied", "trained"))
    assert all(torch.equal(applied[name], tensor) for name, tensor in trained.items())
    before, moved = checkpoints.load(grown), set()
    for (_, expert, _, was), (_, _, _, now) in zip(parts_of(grown, before), parts_of(grown, applied), strict=True):
        moved |= set() if torch.equal(was, now) else {expert}
    assert moved <= {0, 2}
    assert moved


@pytest.mark.parametrize("experts", ["0-1", "1,3"])
def test_sharded_by_experts(experts: str, tmp_path: Path) -> None:
    """FSDP2 gives each of two processes two of the four: all of one's are frozen, or one of each."""
    build(CASES["mixtral"], tmp_path / "base")
    grown = Path(ckptgrow.expand(tmp_path / "base", tmp_path / "grown", experts=experts).folder)
    check_sharded(grown, tmp_path)
