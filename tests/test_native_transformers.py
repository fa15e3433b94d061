"""A Llama with layers of several widths in transformers' own Llama: the same function, trained, and back."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="holds ckptgrow against real transformers, which is not installed")

import checkpoints
import torch
import train_native
import transformers
from safetensors.torch import save_file
from test_transformers import COMMON, randomised

import ckptgrow
from ckptgrow.training import freeze

pytestmark = pytest.mark.transformers


@pytest.mark.parametrize("tied", [False, True])
def test_llama_with_several_widths(tmp_path: Path, tied: bool) -> None:
    """The base's logits before training; trained with decay nothing frozen moves, and the base comes back."""
    options = COMMON | {"num_hidden_layers": 4, "intermediate_size": 256, "tie_word_embeddings": tied}
    base = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **options))
    randomised(base.float().eval()).save_pretrained(tmp_path / "base")
    grown, after = tmp_path / "grown", tmp_path / "trained"
    ckptgrow.expand(tmp_path / "base", grown, layers="0,2", uneven="native")
    model = train_native.load(grown)
    tokens = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (model(tokens).logits - base(tokens).logits).abs().max() <= 2e-5
    handle = freeze(model, grown)
    optimizer = torch.optim.AdamW(handle.trained().values(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.check(optimizer)
    after.mkdir()
    kept = {name: t.clone() for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    save_file(kept, after / "model.safetensors")
    (after / "config.json").write_bytes((grown / "config.json").read_bytes())
    result = ckptgrow.audit(grown, after)
    assert result.exit_code == 0
    assert result.total("changed") > 0.9 * result.total("trainable")
    assert ckptgrow.revert(after, tmp_path / "back", manifest=grown).exit_code == 0
    assert checkpoints.snapshot(tmp_path / "back") == checkpoints.snapshot(tmp_path / "base")
