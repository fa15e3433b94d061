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

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from ckptgrow.errors import FreezeError
from ckptgrow.manifest import Manifest, load_manifest
from ckptgrow.training.handle import KEPT_AS, Handle, Stats
from ckptgrow.training.mask import MaskHandle, check_hooks_run, check_maskable
from ckptgrow.training.resolve import find_manifest, resolve
from ckptgrow.training.split import SplitHandle, SplitLinear, check_splittable, check_unwrapped, put_together

How = Literal["split", "mask"]

__all__ = ["FreezeError", "Handle", "How", "SplitLinear", "Stats", "freeze", "require_grad", "whole"]


def freeze(model: nn.Module, manifest: Manifest | Path | str | None = None, how: How = "split") -> Handle:
    """Let only the manifest's elements train. Raises FreezeError, with the model untouched, where that cannot be held.

    `manifest` is a ckptgrow.json, the folder that holds it, or a loaded one; None looks beside the model's checkpoint.
    Call it before the optimizer is made. A split comes before any wrapping or sharding; a mask before DDP and after
    FSDP2, which replaces parameters.
    """
    _check_free(model)
    if how not in ("split", "mask"):
        raise FreezeError(f"how={how!r}: there are 'split' and 'mask'")
    check_unwrapped(model) if how == "split" else check_hooks_run(model)
    manifest = find_manifest(model, manifest)
    targets = resolve(model, manifest)
    if how == "split":
        check_splittable(model, targets)
        return SplitHandle(model, manifest, targets)
    check_maskable(model, targets)
    return MaskHandle(model, manifest, targets)


def require_grad(model: nn.Module, manifest: Manifest | Path | str | None = None) -> None:
    """Only set requires_grad, tensor by tensor: for trainers that make the optimizer before hooks can be set."""
    _check_free(model)
    check_hooks_run(model)
    targets = resolve(model, find_manifest(model, manifest))
    check_maskable(model, targets)
    model.requires_grad_(False)
    for target in targets:
        target.parameter.requires_grad_(True)


def whole(state: Mapping[str, Tensor], manifest: Manifest | Path | str) -> dict[str, Tensor]:
    """The checkpoint's own names and shapes, of a state dict that holds the two parts of split tensors.

    For what DeepSpeed puts together from parameters (zero_to_fp32, ZeRO-3's 16-bit export); `model.state_dict()` and
    `save_pretrained` are whole already. Raises FreezeError where one of two parts is missing.
    """
    return put_together(state, manifest if isinstance(manifest, Manifest) else load_manifest(Path(manifest)))


def _check_free(model: nn.Module) -> None:
    if any(isinstance(m, SplitLinear) or m.__dict__.get(KEPT_AS) is not None for m in model.modules()):
        raise FreezeError("the model is frozen already", hint="Call remove() of its handle first.")
