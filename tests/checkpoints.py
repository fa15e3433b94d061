"""Tiny checkpoints in the shape of each family, written by the safetensors library, and ways to break them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ckptgrow.families import FAMILIES, Family
from ckptgrow.layout import INDEX, SINGLE

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
Tensors = dict[str, torch.Tensor]
# Of a tiny model that transformers makes, of any family.
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make(
    folder: Path,
    model_type: str = "gemma3_text",
    *,
    layers: int = 2,
    hidden: int = 8,
    width: int = 12,
    dtype: str = "BF16",
    shards: int = 2,
    bias: bool = False,
    prefix: str = "model.",
    tied: bool = True,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder: config, one file or shards with an index, and files that are to be copied."""
    family = FAMILIES[model_type]
    tensors = tensors_of(family, layers, hidden, width, dtype, bias, prefix, tied, seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, tensors, shards)
    (folder / "config.json").write_text(
        json.dumps(config_of(family, layers, hidden, width) | dict(config or {}), indent=2) + "\n"
    )
    (folder / "tokenizer.json").write_text('{"version": "1.0", "text": "naïve"}')
    (folder / "generation_config.json").write_text('{\n  "do_sample": true\n}\n')
    return folder


def config_of(family: Family, layers: int, hidden: int, width: int) -> dict[str, Any]:
    """The family's own keys, nested where it nests them, between keys that must stay where they are."""
    inner = {
        "attention_bias": False,
        family.hidden: hidden,
        family.activation: "gelu_pytorch_tanh",
        family.width: width,
        family.depth: layers,
        "rms_norm_eps": 1e-06,
    }
    outer: dict[str, Any] = {"architectures": ["AnyForCausalLM"], "model_type": family.model_type}
    return outer | ({family.scope: inner} if family.scope else inner) | {"vocab_size": 16}


def tensors_of(
    family: Family, layers: int, hidden: int, width: int, dtype: str, bias: bool, prefix: str, tied: bool, seed: int
) -> Tensors:
    """Random tensors: embedding, per layer attention, norm and MLP, final norm, and a head unless tied."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DTYPES[dtype])

    tensors = {prefix + family.embedding: random(16, hidden), prefix + "norm.weight": random(hidden)}
    for layer in range(layers):
        block = prefix + family.stem.format(layer=layer)
        tensors[block.rpartition(".")[0] + ".self_attn.q_proj.weight"] = random(hidden, hidden)
        tensors[block.rpartition(".")[0] + ".input_layernorm.weight"] = random(hidden)
        for slot in family.template.slots:
            if slot.bias and not (bias or family.model_type in ("phi", "gpt_neo")):
                continue
            units = width * len(slot.lanes)
            shape = (units,) if slot.bias else (units, hidden) if slot.axis == 0 else (hidden, units)
            tensors[f"{block}.{slot.name}"] = random(*shape)
        if bias or family.model_type in ("phi", "gpt_neo"):
            tensors[f"{block}.{family.template.still[0]}"] = random(hidden)
    if not tied:
        tensors["lm_head.weight"] = random(16, hidden)
    return tensors


def write_shards(folder: Path, tensors: Tensors, shards: int) -> None:
    """One model.safetensors, or so many shards with an index in transformers' format."""
    if shards == 1:
        save_file(tensors, folder / SINGLE, {"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    parameters = sum(t.numel() for t in tensors.values())
    index = {
        "metadata": {"total_parameters": parameters, "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def load(folder: Path) -> Tensors:
    """All tensors of a folder, read by the safetensors library."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def edit(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Change tensors of a checkpoint in place, each staying in its file; new ones go to the last file."""
    files = sorted(folder.glob("*.safetensors"))
    parts = {file: load_file(file) for file in files}
    everything = {name: tensor.clone() for part in parts.values() for name, tensor in part.items()}
    change(everything)
    homes = {name: file for file, part in parts.items() for name in part}
    for file in files:
        mine = {n: t for n, t in everything.items() if homes.get(n, files[-1]) == file}
        save_file(mine, file, {"format": "pt"})
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {n: homes.get(n, files[-1]).name for n in everything}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}, indent=2))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
