"""Train a Llama of which only some layers grew (--uneven native), with transformers' own Llama. Options: see tiny.py.

The checkpoint's config is that of DeciLMForCausalLM, which transformers does not have. It is Llama with MLPs of several
widths, so Llama's class holds it once each MLP has its width.

python examples/train_native.py [--model FOLDER]
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

import ckptgrow
from ckptgrow.training import freeze


def load(folder: Path) -> PreTrainedModel:
    """The grown model in float32. Its config is the base's, which ckptgrow.json keeps."""
    manifest = json.loads((folder / "ckptgrow.json").read_text(encoding="utf-8"))
    base = json.loads(manifest["base"]["config"])
    config = LlamaConfig(**{key: value for key, value in base.items() if key not in ("model_type", "architectures")})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for i, layer in enumerate(model.get_decoder().layers):
        own = copy.deepcopy(config)
        own.intermediate_size = len(tensors[f"model.layers.{i}.mlp.up_proj.weight"])
        layer.mlp = LlamaMLP(own)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model


def main(asked: tiny.Asked) -> None:
    """Grow the last layer, train, save, audit."""
    base = asked.model or tiny.tiny(asked.folder / "base", width=256)
    grown, trained = asked.folder / "grown", asked.folder / "trained"
    last = json.loads((base / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"] - 1
    ckptgrow.expand(base, grown, layers=[last], uneven="native")
    model = load(grown)
    handle = freeze(model, grown, how=asked.how)
    optimizer = torch.optim.AdamW(handle.trained().values(), lr=asked.rate, weight_decay=tiny.DECAY)
    print(handle.stats())
    handle.guard(optimizer)  # a split needs none

    data, losses = tiny.rows(base), []
    for step in range(asked.steps):
        tokens = tiny.batch(data, step)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    handle.check(optimizer)  # raises where a frozen bit has moved
    trained.mkdir()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    save_file(
        {name: t.contiguous() for name, t in model.state_dict().items() if name not in tied},
        trained / "model.safetensors",
    )
    shutil.copy(grown / "config.json", trained)
    tiny.finish(grown, trained, losses)


if __name__ == "__main__":
    tiny.run(main, __doc__)
