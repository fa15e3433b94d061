"""Tiny checkpoints in the shape of each family, written by the safetensors library, and ways to break them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ckptgrow.families import FAMILIES, Family, Site, Slot
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
# Families of any width; those whose config says a factor for each layer have test_native.py.
USUAL = tuple(name for name, family in FAMILIES.items() if not any(site.entry for site in family.sites))
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


EXPERTS = 2


def sites_of(family: Family) -> list[Site]:
    """The sites of the first tower, without those that are another spelling of an earlier one."""
    found: dict[tuple[Any, ...], Site] = {}
    for site in family.sites:
        side = site.stem.partition(".")[0] if "*." in site.stem else "{layer}" in site.stem
        if site.tower == family.towers[0]:
            found.setdefault((site.part, site.path, site.depth, side), site)
    return list(found.values())


def config_of(family: Family, layers: int, hidden: int, width: int) -> dict[str, Any]:
    """The family's own keys, nested where it nests them, between keys that must stay where they are."""
    config: dict[str, Any] = {"architectures": ["AnyForCausalLM"], "model_type": family.model_type}
    for site in sites_of(family):
        keys = {
            "attention_bias": False,
            site.hidden: hidden,
            site.activation: "gelu_pytorch_tanh",
            site.width: {"twice": 2 * width, "per hidden": width / hidden}.get(site.rule, width),
            site.depth: layers,
            site.experts: EXPERTS,
            "rms_norm_eps": 1e-06,
        }
        for key, value in keys.items():
            inner = config
            *outer, last = site.under(key).split(".")
            for name in outer:
                inner = inner.setdefault(name, {})
            if key:
                inner[last] = value
    return config | {"vocab_size": 16}


def tensors_of(
    family: Family, layers: int, hidden: int, width: int, dtype: str, bias: bool, prefix: str, tied: bool, seed: int
) -> Tensors:
    """Random tensors: embedding, per layer attention, norm and MLP, final norm, and a head unless tied."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DTYPES[dtype])

    bias = bias or family.model_type in ("phi", "gpt_neo")
    tensors = {prefix + family.embedding: random(16, hidden), prefix + "norm.weight": random(hidden)}
    for layer in range(layers):
        tensors[f"{prefix}layers.{layer}.self_attn.q_proj.weight"] = random(hidden, hidden)
        tensors[f"{prefix}layers.{layer}.input_layernorm.weight"] = random(hidden)
        for site in sites_of(family):
            for block in blocks_of(site, prefix, layer):
                for slot in site.template.slots:
                    if not slot.bias or (bias and slot.lanes != ("norm",)):
                        tensors[f"{block}.{slot.name.format(0)}"] = random(*shape_of(slot, hidden, width))
                for name in site.template.still if bias else ():
                    tensors[f"{block}.{name}"] = random(hidden)
    if not tied:
        tensors["lm_head.weight"] = random(16, hidden)
    return tensors


def blocks_of(site: Site, prefix: str, layer: int) -> list[str]:
    """The blocks of a site in a layer: one, or one for each expert."""
    if "{layer}" not in site.stem and layer:
        return []
    stem = prefix + site.stem.replace("*.", "").replace("{layer}", str(layer)).replace("{}", "0")
    return [stem.replace("{expert}", str(i)) for i in range(EXPERTS if "{expert}" in stem else 1)]


def shape_of(slot: Slot, hidden: int, width: int) -> tuple[int, ...]:
    """What its declaration says of a tensor's shape; an adapter has rank 2."""
    units = width * len(slot.lanes) * slot.span * (EXPERTS if slot.flat else 1)
    shape = [2 if slot.extra else hidden] * (1 if slot.vector else 2)
    shape[slot.axis - int(slot.stacked)] = units
    return (EXPERTS, *shape) if slot.stacked else tuple(shape)


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
