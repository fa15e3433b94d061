"""Checkpoints as training leaves them: what was trained, what moved beside it, and what a repair must give back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import checkpoints
import torch
from checkpoints import Tensors

import ckptgrow
from ckptgrow.drift import Audit
from ckptgrow.manifest import load_manifest
from ckptgrow.operations import audit


def grow(base: Path, out: Path, **options: object) -> Path:
    ckptgrow.expand(base, out, verify=False, **options)  # type: ignore[arg-type]
    return out


def trained(grown: Path, change: Callable[[Tensors], None] | None = None, *, new: float = 0.5) -> Path:
    """A copy in which the trainable elements moved by noise of that size, and then whatever `change` does."""
    out = grown.with_name("trained")
    shutil.copytree(grown, out)
    (out / "ckptgrow.json").unlink()  # no trainer copies it

    def work(tensors: Tensors) -> None:
        learn(tensors, grown, new)
        if change:
            change(tensors)

    checkpoints.edit(out, work)
    return out


def learn(tensors: Tensors, grown: Path, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, mask in masks(grown).items():
        noise = torch.randn(mask.shape, generator=generator) * size
        tensors[name] = torch.where(mask, tensors[name].float() + noise, tensors[name].float()).to(tensors[name].dtype)


def taught(model: Any, parameters: Iterable[torch.Tensor], batches: Iterable[torch.Tensor], rate: float) -> Any:
    """A step of Adam on each batch of tokens, after which the model has learned something. The optimizer."""
    optimizer = torch.optim.Adam(parameters, lr=rate)
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return optimizer


def masks(grown: Path) -> dict[str, torch.Tensor]:
    """True where an element trains, for each tensor that has such."""
    found = {}
    for tensor in load_manifest(grown).trainable:
        found[tensor.name] = torch.zeros(tensor.shape, dtype=torch.bool)
        for box in tensor.boxes:
            found[tensor.name][tuple(slice(*span) for span in box)] = True
    return found


def frozen(grown: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    """Change the frozen elements of every tensor that also has trainable ones, as optimizers do."""

    def work(tensors: Tensors) -> None:
        for name, mask in masks(grown).items():
            tensors[name] = torch.where(mask, tensors[name], change(tensors[name]))

    return work


def neighbour(tensor: torch.Tensor) -> torch.Tensor:
    """About one element in five moved to the next bf16 value, up or down."""
    generator = torch.Generator().manual_seed(2)
    step = torch.randint(0, 10, tensor.shape, generator=generator)
    step = (step == 1).to(torch.int16) - (step == 2).to(torch.int16)
    return (tensor.contiguous().view(torch.int16) + step).view(tensor.dtype)


def shrink(tensor: torch.Tensor) -> None:
    tensor.mul_(0.9)


def to_float(tensors: Tensors) -> None:
    for name in tensors:
        tensors[name] = tensors[name].float()


def moved(seen: Audit) -> set[str]:
    return {drift.tensor for drift in seen.tensors if drift.moved}


def check_repaired(grown: Path, trained: Path, out: Path) -> None:
    """Frozen elements are the grown one's bits; the rest, dtypes and names are the trained one's."""
    was, its, now = checkpoints.load(grown), checkpoints.load(trained), checkpoints.load(out)
    assert now.keys() == its.keys()
    for name, tensor in now.items():
        mask = masks(grown).get(name, torch.zeros(tensor.shape, dtype=torch.bool))
        assert tensor.dtype == its[name].dtype
        assert torch.equal(tensor, torch.where(mask, its[name], was[name].to(tensor.dtype)))
    assert audit(grown, out).exit_code == 0


def steps(
    tensors: Tensors,
    grown: Path,
    *,
    masked: bool = True,
    decay: float = 0.0,
    seed: int = 0,
    count: int = 60,
    rate: float = 3e-3,
    after: Callable[[Tensors], None] | None = None,
) -> None:
    """Real AdamW steps on the gated MLPs of a tiny checkpoint, in place; `after` sees the weights of each step."""
    found, generator = masks(grown), torch.Generator().manual_seed(seed)
    weights = {name: tensors[name].clone().requires_grad_() for name in found}
    optimizer = torch.optim.AdamW(list(weights.values()), lr=rate, weight_decay=decay)
    x, y = torch.randn(64, 8, generator=generator), torch.randn(64, 8, generator=generator)
    for _ in range(count):
        optimizer.zero_grad()
        out = x
        for layer in range(2):
            gate, up, down = (
                weights[f"model.layers.{layer}.mlp.{p}_proj.weight"].float() for p in ("gate", "up", "down")
            )
            out = out + (torch.nn.functional.silu(out @ gate.T) * (out @ up.T)) @ down.T * 0.1
        torch.autograd.backward((out - y).square().mean())
        for name, weight in weights.items():
            if masked and weight.grad is not None:
                weight.grad.masked_fill_(~found[name], 0.0)
        optimizer.step()
        if after:
            after({name: weight.detach() for name, weight in weights.items()})
    tensors.update({name: weight.detach() for name, weight in weights.items()})
