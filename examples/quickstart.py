"""Grow a checkpoint and prove it, in a minute and without any download.

    python examples/quickstart.py [FOLDER]

Makes a tiny Gemma-shaped checkpoint in two shards (random weights, bfloat16), doubles its MLPs, verifies the result,
breaks a copy of it on purpose to show that verification can say no, and prints what happened. FOLDER (a temporary
one if not given) must be empty or new.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import ckptgrow
from ckptgrow import report

LAYERS, HIDDEN, WIDTH, VOCABULARY = 4, 64, 256, 512


def make_base(folder: Path) -> Path:
    """A checkpoint as transformers writes it: config.json, an index, two safetensors shards."""
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN), "model.norm.weight": torch.zeros(HIDDEN)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{block}.self_attn.{name}.weight"] = torch.randn(HIDDEN, HIDDEN) / 8
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}.{name}.weight"] = torch.zeros(HIDDEN)
        tensors[f"{block}.mlp.gate_proj.weight"] = torch.randn(WIDTH, HIDDEN) / 8
        tensors[f"{block}.mlp.up_proj.weight"] = torch.randn(WIDTH, HIDDEN) / 8
        tensors[f"{block}.mlp.down_proj.weight"] = torch.randn(HIDDEN, WIDTH) / 16
    tensors = {name: tensor.bfloat16() for name, tensor in sorted(tensors.items())}
    folder.mkdir(parents=True)
    weight_map = {}
    for i, names in enumerate((list(tensors)[:20], list(tensors)[20:])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = {
        "architectures": ["GemmaForCausalLM"],
        "head_dim": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "model_type": "gemma",
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def forget_to_halve(grown: Path, folder: Path) -> Path:
    """A copy of the grown checkpoint in which one layer's down projection is twice as large as it should be."""
    shutil.copytree(grown, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("layers.2.mlp.down_proj.weight"):
                tensors[name] *= 2
        save_file(tensors, file, {"format": "pt"})
    return folder


def main(folder: Path) -> None:
    """Run the whole story in `folder`."""
    base = make_base(folder / "base")
    print(f"1. a tiny Gemma in {base}\n")
    print(report.inspection(ckptgrow.inspect(base)))
    print("\n2. grow it\n")
    grown = ckptgrow.expand(base, folder / "grown").folder
    print(report.verification(ckptgrow.verify(base, grown)))
    print("\n3. what trains (from ckptgrow.json)\n")
    for tensor in json.loads((grown / "ckptgrow.json").read_text())["trainable"][:3]:
        print(f"{tensor['name']} {tensor['shape']}: {tensor['boxes']}")
    print("\n4. a growth that went wrong: one layer's down projection was not halved\n")
    broken = ckptgrow.verify(base, forget_to_halve(grown, folder / "broken"))
    print(report.verification(broken))
    if broken.same or not ckptgrow.verify(base, grown).same:
        raise SystemExit("the verifier is wrong")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
