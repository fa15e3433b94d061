"""A Llama told as nemotron-nas, in mlx-lm: a stock loader that builds layers of several widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="holds mlx-lm against real transformers, which is not installed")

import numpy as np
import torch
import transformers
from test_transformers import COMMON, randomised

import ckptgrow

mx = pytest.importorskip("mlx.core", reason="needs mlx, which is not installed")
loading = pytest.importorskip("mlx_lm.utils", reason="needs mlx-lm, which is not installed")
pytestmark = pytest.mark.transformers

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama3 rope, tied": {
        "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16},
        "tie_word_embeddings": True,
    },
    "linear rope, biases": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        "mlp_bias": True,
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
}


@pytest.mark.parametrize("case", CASES)
def test_mlx_lm_builds_the_same_function(case: str, tmp_path: Path) -> None:
    """Every tensor is loaded (its loader is strict), and the logits are those of the base in transformers."""
    options = COMMON | {"num_hidden_layers": 4, "intermediate_size": 256} | CASES[case]
    config = transformers.AutoConfig.for_model(options.pop("model_type", "llama"), **options)
    base = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    randomised(base)
    base.save_pretrained(tmp_path / "base")
    ckptgrow.expand(tmp_path / "base", tmp_path / "grown", layers="1,2", uneven="native", width=768)
    mx.set_default_device(mx.cpu)
    grown, _ = loading.load_model(tmp_path / "grown")
    assert type(grown).__module__ == "mlx_lm.models.nemotron-nas"
    assert [layer.mlp.down_proj.weight.shape[1] for layer in grown.layers] == [256, 768, 768, 256]
    tokens = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = base(tokens).logits.numpy()
    logits = np.array(grown(mx.array(tokens.tolist())))
    assert np.abs(wanted).max() > 0.05
    assert np.abs(logits - wanted).max() <= 2e-5
