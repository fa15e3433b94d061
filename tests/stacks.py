"""Checkpoints whose experts lie in stacks, as a transformers model holds them: made by hand, family by family."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import checkpoints
import torch
import trainings
from checkpoints import Tensors

# Where a family has its experts on disk, in memory, and what gate, up and down are called there.
SPELLINGS = {
    "mixtral": ("block_sparse_moe", "mlp", "w1 w3 w2"),
    "qwen2_moe": ("mlp", "mlp", "gate_proj up_proj down_proj"),
    "deepseek_v3": ("mlp", "mlp", "gate_proj up_proj down_proj"),
    "lfm2_moe": ("feed_forward", "feed_forward", "w1 w3 w2"),
    "nemotron_h": ("mixer", "mixer", " up_proj down_proj"),
}


def stacked(tensors: Tensors, model_type: str, *, turned: bool = False) -> Tensors:
    """The same as a model holds it: [E, 2F, H] and [E, H, F], gate before up; `turned`: [E, H, 2F] and [E, F, H]."""
    before, after, names = SPELLINGS[model_type]
    gate, up, down = names.split(" ")
    found, blocks = {}, {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"(.*\.){before}\.experts\.(\d+)\.(\w+)\.weight", name)
        if match:
            blocks.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        else:
            found[name.replace(f".{before}.", f".{after}.")] = tensor
    for block, parts in blocks.items():
        experts = range(len({expert for expert, _ in parts}))
        first = [torch.cat([parts[e, role] for role in (gate, up) if role]) for e in experts]
        stacks = {"gate_up_proj" if gate else "up_proj": first, "down_proj": [parts[e, down] for e in experts]}
        for name, those in stacks.items():
            whole = torch.stack(those)
            found[f"{block}{after}.experts.{name}"] = (whole.transpose(1, 2) if turned else whole).contiguous()
    return found


def rewrite(folder: Path, change: Callable[[Tensors], Tensors], shards: int = 2) -> Path:
    """The same folder with other tensors."""
    tensors = change(checkpoints.load(folder))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    checkpoints.write_shards(folder, {name: tensor.contiguous() for name, tensor in tensors.items()}, shards)
    return folder


def come_back(folder: Path, model_type: str, change: Callable[[Tensors], None] | None = None) -> Path:
    """A grown checkpoint, trained on disk and then written as its model holds it."""
    grown = trainings.grow(checkpoints.make(folder / "base", model_type), folder / "grown")
    return rewrite(trainings.trained(grown, change), lambda tensors: stacked(tensors, model_type))


def where(grown: Path, model_type: str) -> dict[str, torch.Tensor]:
    """1 where an element trains, by the name in the model."""
    masks = {name: torch.zeros(tensor.shape) for name, tensor in checkpoints.load(grown).items()}
    return stacked(masks | {name: mask.float() for name, mask in trainings.masks(grown).items()}, model_type)
