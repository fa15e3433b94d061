"""On the real Gemma 3 270M: training made each way, what audit says of it, and what --repair brings back to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="trains a real transformers model, which is not installed")

import checkpoints
import torch
from test_training_pitfalls import cuts, zeroed
from transformers import AutoModelForCausalLM, AutoTokenizer

import ckptgrow
from ckptgrow.drift import Audit
from ckptgrow.manifest import load_manifest
from ckptgrow.training import freeze

pytestmark = [pytest.mark.real, pytest.mark.transformers]
TEXT = Path(__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def grown(real_gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(ckptgrow.expand(real_gemma, tmp_path_factory.mktemp("real") / "grown").folder)


def train(grown: Path, out: Path, hold: Callable[[Any], Any], rate: float = 1e-3, decay: float = 0.1) -> list[float]:
    """Four steps of AdamW in float32 on one row of 64 tokens; saves as transformers does. The losses."""
    model = AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32)
    hold(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=decay)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(grown)(TEXT)["input_ids"][:64]])
    losses = []
    for _ in range(4):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(out)
    return losses


def by_hand(model: Any, grown: Path, hooks: bool) -> None:
    """Only gradients are masked, or not even they."""
    for parameter, cut in cuts(model, grown):
        if hooks and cut is not None:
            parameter.register_hook(partial(zeroed, cut))


def repaired(grown: Path, trained: Path, out: Path) -> Audit:
    """The audit after --repair, and every element: frozen ones are the grown ones, the others the trained ones."""
    ckptgrow.audit(grown, trained, repair=out)
    before, after, found = (checkpoints.load(folder) for folder in (grown, trained, out))
    boxes = {tensor.name: tensor.boxes for tensor in load_manifest(grown).trainable}
    for name, tensor in found.items():
        wanted = before[name].to(tensor.dtype)
        for box in boxes.get(name, ()):
            place = tuple(slice(*span) for span in box)
            wanted[place] = after[name][place]
        assert torch.equal(tensor.view(torch.uint8), wanted.view(torch.uint8)), name
    return ckptgrow.audit(grown, out)


def mixed(runs: list[Mapping[str, torch.Tensor]], shares: list[float]) -> dict[str, torch.Tensor]:
    """As merges are made: in bfloat16."""
    low = [{name: tensor.to(torch.bfloat16) for name, tensor in run.items()} for run in runs]
    return {name: shares[0] * low[0][name] + shares[1] * low[1][name] for name in low[0]}


def test_a_mask_without_a_guard_decays(grown: Path, tmp_path: Path) -> None:
    """Named, and put back. At a tenth of this rate it would hide in float32, below what bfloat16 can tell."""
    train(grown, tmp_path / "trained", partial(by_hand, grown=grown, hooks=True), rate=1e-2)
    seen = ckptgrow.audit(grown, tmp_path / "trained")
    assert (seen.exit_code, seen.cause) == (1, "decay")
    assert seen.total("moved") > 0.9 * seen.total("trainable")
    assert seen.factor == pytest.approx([(1 - 1e-3) ** 4] * 2, rel=1e-6)
    after = repaired(grown, tmp_path / "trained", tmp_path / "repaired")
    assert (after.cause, after.total("moved_before_cast")) == ("nothing", 0)


def test_two_frozen_runs_averaged(grown: Path, tmp_path: Path) -> None:
    """Each is clean and learned; three tenths of one and seven of the other is not clean, and is put back."""
    for name, rate in (("one", 1e-3), ("two", 3e-4)):
        losses = train(grown, tmp_path / name, freeze, rate)
        assert losses[-1] < losses[0]
        seen = ckptgrow.audit(grown, tmp_path / name)
        assert (seen.exit_code, seen.cause) == (0, "nothing")
        assert seen.total("changed") > 0.9 * seen.total("trainable")
    (tmp_path / "mixed").mkdir()
    tensors = mixed([checkpoints.load(tmp_path / name) for name in ("one", "two")], [0.3, 0.7])
    checkpoints.write_shards(tmp_path / "mixed", tensors, 1)
    seen = ckptgrow.audit(grown, tmp_path / "mixed")
    assert (seen.exit_code, seen.cause) == (1, "averaging")
    after = repaired(grown, tmp_path / "mixed", tmp_path / "repaired")
    assert (after.exit_code, after.cause) == (0, "nothing")


def test_no_mask_is_training(grown: Path, tmp_path: Path) -> None:
    """Which repair refuses, since it would take away what was learned."""
    train(grown, tmp_path / "trained", partial(by_hand, grown=grown, hooks=False))
    seen = ckptgrow.audit(grown, tmp_path / "trained")
    assert (seen.exit_code, seen.cause) == (1, "trained")
    with pytest.raises(ckptgrow.CkptgrowError, match="--force"):
        ckptgrow.audit(grown, tmp_path / "trained", repair=tmp_path / "repaired")
    assert not (tmp_path / "repaired").exists()
