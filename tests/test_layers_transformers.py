"""Partly grown checkpoints in real transformers: filled layers in any family, layers of several widths in gemma3n."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="holds ckptgrow against real transformers, which is not installed")

import torch
import transformers
from test_transformers import COMMON, WIDTH, load, randomised
from torch import nn

import ckptgrow
from ckptgrow.checkpoint import open_checkpoint

pytestmark = pytest.mark.transformers

GEMMA3N: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],  # a cutoff at mean + std of the gate, over the width
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
}
CASES: dict[str, dict[str, Any]] = {"gemma3n_text": GEMMA3N, "llama": {}, "phi3": {}}
Make = Callable[[str], Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A tiny model of that type with random weights, saved."""

    def made(model_type: str) -> Path:
        transformers.logging.disable_progress_bar()
        config = transformers.AutoConfig.for_model(model_type, **COMMON | {"num_hidden_layers": 4} | CASES[model_type])
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        randomised(model)
        model.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return made


def apart(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of logits, and of the outputs of each MLP: a norm after it hides the scale of down."""
    tokens = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    inputs = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        pairs = [(one(tokens).logits, other(tokens).logits)]
        layers = zip(one.get_submodule("model.layers"), other.get_submodule("model.layers"), strict=True)  # type: ignore[call-overload]
        pairs += [(mine.mlp(inputs), its.mlp(inputs)) for mine, its in layers]
    assert all(mine.abs().max() > 0.05 for mine, _ in pairs)
    return max(float((mine - its).abs().max()) for mine, its in pairs)


def widths(folder: Path) -> list[int]:
    infos = open_checkpoint(folder).infos
    return [infos[f"model.layers.{layer}.mlp.down_proj.weight"].shape[1] for layer in range(4)]


@pytest.mark.parametrize("model_type", CASES)
def test_filled_layers_are_the_same_function(make: Make, tmp_path: Path, model_type: str) -> None:
    """Copies with zero columns change nothing, not even a cutoff taken over the width."""
    base = make(model_type)
    ckptgrow.expand(base, tmp_path / "grown", layers="1,3")
    assert widths(tmp_path / "grown") == [2 * WIDTH] * 4
    assert apart(load(base), load(tmp_path / "grown")) <= 2e-5


def test_layers_of_several_widths(make: Make, tmp_path: Path) -> None:
    """gemma3n's config has a list: only the named layers grow, the others keep their bytes; and again."""
    base, one, two = make("gemma3n_text"), tmp_path / "one", tmp_path / "two"
    done = ckptgrow.expand(base, one, layers="1,2", uneven="native")
    config = json.loads((one / "config.json").read_text())
    assert config["intermediate_size"] == widths(one) == [WIDTH, 2 * WIDTH, 2 * WIDTH, WIDTH]
    assert config["ckptgrow"]["base_width"] == {"intermediate_size": [WIDTH] * 4}
    assert [block.layer for block in done.manifest.blocks] == [1, 2]
    assert done.manifest.counts.filled == 0
    assert apart(load(base), load(one)) <= 2e-5
    assert [block.width for block in ckptgrow.inspect(one).blocks] == widths(one)
    ckptgrow.expand(one, two, layers="0,1", uneven="native", factor=3)
    assert widths(two) == [3 * WIDTH, 6 * WIDTH, 2 * WIDTH, WIDTH]
    assert ckptgrow.verify(base, two).exit_code == 0
    assert apart(load(base), load(two)) <= 2e-5
    ckptgrow.expand(one, tmp_path / "all", factor=2)
    assert widths(tmp_path / "all") == [2 * WIDTH, 4 * WIDTH, 4 * WIDTH, 2 * WIDTH]
    assert apart(load(base), load(tmp_path / "all")) <= 2e-5


def test_other_families_do_not_load_a_list(make: Make, tmp_path: Path) -> None:
    """Why --uneven native is refused there: transformers says so itself."""
    base = make("llama")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": [WIDTH] * 4}))
    with pytest.raises(Exception, match="intermediate_size"):
        transformers.AutoConfig.from_pretrained(base)
