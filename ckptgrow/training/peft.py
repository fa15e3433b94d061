"""A LoRA that reaches trainable elements only. Needs peft.

    model = get_peft_model(model, LoraConfig(target_modules=..., ...))    # ckptgrow mask GROWN --format peft
    handle = confine(model, "grown")                                     # before the optimizer is made
    ...
    handle.check()
    model.merge_and_unload().save_pretrained("trained")

The update of a weight is B·A. A row of it is zero where the row of B is, a column where the column of A is: those of
the frozen elements are set to zero and their gradients are kept zero. Decay does no harm, since zero decays to zero.
Adding a zero to a weight of minus zero would flip its sign, so the update says minus zero where the weight is frozen:
x + (-0.0) is x, to the bit, for every x.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ckptgrow.errors import FreezeError
from ckptgrow.manifest import Manifest
from ckptgrow.policy import Box, across
from ckptgrow.training.cut import Cut
from ckptgrow.training.mask import MaskHandle
from ckptgrow.training.resolve import Target, find_manifest, resolve

_INITS = (True, False, "gaussian", "eva")  # others, as pissa, move a part of the base's weights into the adapter
_BASE = ".base_layer.weight"


def confine(model: nn.Module, manifest: Manifest | Path | str | None = None) -> ConfinedHandle:
    """Keep every LoRA of a PEFT model within the manifest's boxes, and let nothing else train.

    Raises FreezeError, with the model untouched, where an adapter reaches a layer that is frozen or something beside
    plain LoRA trains. `manifest` as in `ckptgrow.training.freeze`. Call it before the optimizer is made, and again
    on an adapter loaded by itself, before it is merged.
    """
    manifest = find_manifest(model, manifest)
    layers = _layers(model)
    reached = {target.name: target for target in resolve(model, manifest)}
    for name, layer in layers.items():
        _check_plain(name, layer)
        if name + _BASE not in reached:
            raise FreezeError(
                "an adapter reaches it, but it is frozen",
                tensor=name,
                hint="Take target_modules from `ckptgrow mask GROWN --format peft`.",
            )
    if not layers:
        raise FreezeError("the model has no LoRA", hint="Call get_peft_model first.")
    pairs = [(name, layer, reached[name + _BASE]) for name, layer in layers.items()]
    targets = tuple(target for pair in pairs for target in _factors(*pair))
    _check_alone(model, targets)
    for _, layer, target in pairs:
        if target.cut is not None:
            kind: Any = type(layer)
            layer.__class__ = _confined(kind)
            layer.__dict__["ckptgrow_cut"] = target.cut
    for target in targets:
        for part in target.cut.frozen_in(target.parameter.detach()) if target.cut else ():
            part.zero_()
    return ConfinedHandle(model, manifest, targets)


class ConfinedHandle(MaskHandle):
    """A PEFT model whose adapters are held within the boxes: what is masked is zero, and decays to zero."""

    decays = ()


def _layers(model: nn.Module) -> dict[str, Any]:
    """The modules that an adapter adapts, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _check_plain(name: str, layer: Any) -> None:
    """Raise FreezeError where the update of a weight is not simply B·A, added to it."""
    from peft.tuners.lora import Linear

    trouble = None
    if not isinstance(layer, Linear):
        trouble = f"{type(layer).__name__} is no plain LoRA of a Linear layer"
    elif layer.lora_variant or any(layer.lora_bias.values()):
        trouble = "a variant of LoRA (DoRA, a bias, ...) changes more than B·A does"
    elif layer.merged:
        trouble = "it is merged already"
    if trouble:
        raise FreezeError(f"{trouble}, so it cannot be confined", tensor=name, hint="Use a plain LoraConfig.")


def _factors(name: str, layer: Any, target: Target) -> Iterator[Target]:
    """A and B of each adapter, as tensors of which some elements train."""
    for adapter in layer.lora_A:
        for factor, axis in (("lora_A", 1), ("lora_B", 0)):
            module = getattr(layer, factor)[adapter]
            cut = target.cut if isinstance(target.cut, Cut) else None  # a Linear's weight is no stack
            if cut is not None:
                reaches = (cut.axis == 0) != bool(layer.fan_in_fan_out)  # rows of a Linear's weight: its outputs
                cut = replace(cut, axis=axis) if reaches == (axis == 0) else None
            path = f"{name}.{factor}.{adapter}"
            shape = tuple(module.weight.shape)
            tensor = replace(target.tensor, name=f"{path}.weight", shape=shape, boxes=_boxes(shape, cut))
            yield Target(tensor, tensor.name, module, "weight", cut)


def _boxes(shape: tuple[int, ...], cut: Cut | None) -> tuple[Box, ...]:
    return across(shape, cut.axis, cut.trained) if cut else across(shape, 0, [(0, shape[0])])


def _check_alone(model: nn.Module, targets: tuple[Target, ...]) -> None:
    """Raise FreezeError where something beside these adapters trains, or they did not begin as no change."""
    mine = {id(target.parameter) for target in targets}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in mine:
            raise FreezeError(
                "it trains, but belongs to no adapter that is confined", tensor=name, hint="Leave modules_to_save out."
            )
    configs: Any = getattr(model, "peft_config", {})
    for adapter, config in configs.items():
        if config.init_lora_weights not in _INITS:
            raise FreezeError(
                f"adapter {adapter!r} began as {config.init_lora_weights}, which changes the base's weights",
                hint="Use init_lora_weights=True.",
            )


@cache
def _confined(kind: Any) -> Any:
    """The layer's class, with an update that is minus zero where the weight is frozen."""

    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        delta: Tensor = kind.get_delta_weight(self, adapter)
        for part in self.ckptgrow_cut.frozen_in(delta):
            part.fill_(-0.0)
        return delta

    return type(kind.__name__, (kind,), {"get_delta_weight": get_delta_weight, "__module__": kind.__module__})
