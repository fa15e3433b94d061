"""Train a grown model so that only what its manifest names can move, with any loop or trainer. Needs torch only.

    model = AutoModelForCausalLM.from_pretrained("grown")
    handle = freeze(model)                       # before the optimizer is made; the manifest lies in "grown"
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ...
    handle.check()                               # raises where a frozen bit has moved
    model.save_pretrained("trained")             # names and shapes as they were

`how="split"` keeps frozen elements away from the optimizer, and is the way to go; `how="mask"` is for models that are
wrapped already, with `handle.guard(optimizer)`. Hugging Face's trainers: `ckptgrow.training.transformers`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import nn

from ckptgrow.manifest import Manifest
from ckptgrow.training.handle import KEPT_AS, Handle, Stats
from ckptgrow.training.mask import MaskHandle, check_maskable
from ckptgrow.training.resolve import FreezeError, find_manifest, resolve
from ckptgrow.training.split import SplitHandle, SplitLinear, check_splittable

How = Literal["split", "mask"]

__all__ = ["FreezeError", "Handle", "How", "SplitLinear", "Stats", "freeze", "require_grad"]


def freeze(model: nn.Module, manifest: Manifest | Path | str | None = None, how: How = "split") -> Handle:
    """Let only the manifest's elements train. Raises FreezeError, with the model untouched, where that cannot be held.

    `manifest` is a ckptgrow.json, the folder that holds it, or a loaded one; None looks beside the model's checkpoint.
    Call it before the optimizer is made. A split comes before any wrapping or sharding; a mask before DDP and after
    FSDP2, which replaces parameters.
    """
    _check_free(model)
    manifest = find_manifest(model, manifest)
    targets = resolve(model, manifest)
    if how == "split":
        check_splittable(model, targets)
        return SplitHandle(model, manifest, targets)
    if how == "mask":
        check_maskable(model, targets)
        return MaskHandle(model, manifest, targets)
    raise FreezeError(f"how={how!r}: there are 'split' and 'mask'")


def require_grad(model: nn.Module, manifest: Manifest | Path | str | None = None) -> None:
    """Only set requires_grad, tensor by tensor: for trainers that make the optimizer before hooks can be set."""
    _check_free(model)
    targets = resolve(model, find_manifest(model, manifest))
    check_maskable(model, targets)
    model.requires_grad_(False)
    for target in targets:
        target.parameter.requires_grad_(True)


def _check_free(model: nn.Module) -> None:
    if any(isinstance(m, SplitLinear) or m.__dict__.get(KEPT_AS) is not None for m in model.modules()):
        raise FreezeError("the model is frozen already", hint="Call remove() of its handle first.")
