"""The default way to freeze: a linear layer that holds its frozen and its trained part as two parameters.

No optimizer, decay, clipping or 8-bit state ever sees the frozen part, and gradients and optimizer state are as small
as what trains. The forward pass multiplies by the whole weight, put together for that moment, so its result has the
bits of the unsplit layer; the backward pass makes the gradient of the trained part alone. On disk nothing changes:
a state dict has the unsplit names and shapes. What is put together from parameters instead, as DeepSpeed does, has
the two parts, and `put_together` makes it a state dict.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from ckptgrow.errors import FreezeError
from ckptgrow.manifest import Manifest
from ckptgrow.training.cut import Cut, Span, StackCut, interleave
from ckptgrow.training.handle import Handle
from ckptgrow.training.resolve import Target, cuts_by_name, plain_name
from ckptgrow.training.sharded import dealt, is_sharded, placed_like

FROZEN, TRAINED = "_frozen", "_trained"
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")
_OFFER = 'Freeze before wrapping, or with how="mask".'


class _Product(torch.autograd.Function):
    """Linear with the whole weight; only the two parts are kept for the backward pass, and only one gets a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen: Tensor, trained: Tensor, bias: Tensor | None, axis: int, order: Any, spans: Any
    ) -> Tensor:
        ctx.save_for_backward(x, frozen, trained)
        ctx.axis, ctx.order, ctx.spans = axis, order, spans
        return functional.linear(x, interleave(frozen, trained, axis, order), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        x, frozen, trained = ctx.saved_tensors
        to_x = to_trained = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = gradient @ interleave(frozen, trained, ctx.axis, ctx.order)
        if ctx.needs_input_grad[2]:
            rows = _columns(gradient, ctx.spans) if ctx.axis == 0 else gradient
            columns = x if ctx.axis == 0 else _columns(x, ctx.spans)
            to_trained = _flat(rows).t() @ _flat(columns)
        if ctx.needs_input_grad[3]:
            to_bias = _flat(gradient).sum(0)
        return to_x, None, to_trained, to_bias, None, None, None


def _flat(tensor: Tensor) -> Tensor:
    """All positions of all sequences in one row of vectors."""
    return tensor.reshape(-1, tensor.shape[-1])


def _columns(tensor: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """The ranges of the last dimension that train."""
    parts = [tensor[..., start:stop] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class _Whole:
    """`weight` or `bias` of a SplitLinear, to read. FSDP1 sets its views on the layer itself, and they come first."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, layer: SplitLinear, owner: type) -> Any:
        if self._name in layer.cuts:
            return layer.whole(self._name)
        if self._name in layer._parameters:
            return layer._parameters[self._name]
        raise AttributeError(self._name)


class SplitLinear(nn.Linear):
    """A Linear whose weight, bias or both are kept in two parts. `weight` and `bias` give them whole, to read."""

    cuts: Mapping[str, Cut]

    weight = _Whole()
    bias = _Whole()

    def whole(self, attribute: str) -> Tensor:
        """The parameter in one piece: made anew where it is cut."""
        if attribute not in self.cuts:
            found = self._parameters[attribute]
            assert found is not None
            return found
        cut, parameters = self.cuts[attribute], self._parts(attribute)
        return interleave(*parameters, cut.axis, cut.order)

    def _parts(self, attribute: str) -> tuple[Tensor, Tensor]:
        return getattr(self, attribute + FROZEN), getattr(self, attribute + TRAINED)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, the name of the class above
        if "weight" not in self.cuts:
            return functional.linear(input, self.weight, self.bias)
        cut, (frozen, trained) = self.cuts["weight"], self._parts("weight")
        factors = [input, frozen, trained, self.bias]
        if torch.is_autocast_enabled(input.device.type):  # it knows linear, but not a Function
            dtype = torch.get_autocast_dtype(input.device.type)
            factors = [None if factor is None else factor.to(dtype) for factor in factors]
        product: Tensor = _Product.apply(*factors, cut.axis, cut.order, cut.trained)  # type: ignore[no-untyped-call]
        return product

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The unsplit names, whole, in a Linear's order."""
        own: dict[str, Any] = {}
        super()._save_to_state_dict(own, prefix, keep_vars)
        for attribute in self.cuts:
            whole = self.whole(attribute)
            own[prefix + attribute] = whole if keep_vars else whole.detach()
            del own[prefix + attribute + FROZEN], own[prefix + attribute + TRAINED]
        for name in (prefix + "weight", prefix + "bias"):
            if name in own:
                destination[name] = own.pop(name)
        destination.update(own)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """The unsplit names, taken apart; what is missing or misshapen is said in those names too."""
        given, missing = dict(state_dict), list[str]()
        for attribute, cut in self.cuts.items():
            whole, parts, shape = given.pop(prefix + attribute, None), self._parts(attribute), self._shape(attribute)
            misshapen = whole is not None and tuple(whole.shape) != shape
            if misshapen:
                error_msgs.append(
                    f"size mismatch for {prefix + attribute}: {tuple(whole.shape)} in the checkpoint,"
                    f" {shape} in the model."
                )
            if is_sharded(parts[0]) and not is_sharded(whole):
                whole = dealt(parts[0], None if misshapen else whole, shape)
            if whole is None and not misshapen:
                continue
            pieces = parts if misshapen else (cut.take(whole, cut.frozen), cut.take(whole, cut.trained))
            for suffix, part, piece in zip((FROZEN, TRAINED), parts, pieces, strict=True):
                given[prefix + attribute + suffix] = placed_like(part, piece) if is_sharded(part) else piece
        super()._load_from_state_dict(given, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += dict.fromkeys(name.removesuffix(FROZEN).removesuffix(TRAINED) for name in missing)

    def _shape(self, attribute: str) -> tuple[int, ...]:
        return (self.out_features, self.in_features) if attribute == "weight" else (self.out_features,)


def split(linear: nn.Linear, cuts: Mapping[str, Cut]) -> None:
    """Turn a Linear into a SplitLinear, in place: its identity, name, mode and forward hooks stay."""
    for attribute, cut in cuts.items():
        whole = linear._parameters.pop(attribute)
        assert whole is not None
        for suffix, spans, trains in ((FROZEN, cut.frozen, False), (TRAINED, cut.trained, True)):
            part = nn.Parameter(cut.take(whole.detach(), spans), requires_grad=trains)
            linear.register_parameter(attribute + suffix, part)
    linear.__dict__["cuts"] = dict(cuts)
    linear.__class__ = SplitLinear


def join(linear: SplitLinear) -> None:
    """The Linear again, with what its trained part has learned."""
    parameters: dict[str, nn.Parameter | None] = {}
    for attribute in ("weight", "bias"):
        cut = attribute in linear.cuts
        parameters[attribute] = nn.Parameter(linear.whole(attribute).detach()) if cut else linear._parameters[attribute]
    linear._parameters.clear()
    del linear.__dict__["cuts"]
    linear.__class__ = nn.Linear  # type: ignore[assignment]
    for attribute, parameter in parameters.items():
        linear.register_parameter(attribute, parameter)


def put_together(state: Mapping[str, Tensor], manifest: Manifest) -> dict[str, Tensor]:
    """A state dict with split tensors in one piece, under the checkpoint's names; a plain one comes back as it is."""
    cuts, found = cuts_by_name(manifest), dict[str, Tensor]()
    for name, tensor in state.items():
        stem = name.removesuffix(FROZEN).removesuffix(TRAINED)
        cut = cuts.get(plain_name(stem))
        if stem == name or cut is None:
            found[name] = tensor
        elif stem not in found:
            parts = [state.get(stem + suffix) for suffix in (FROZEN, TRAINED)]
            if parts[0] is None or parts[1] is None:
                raise FreezeError(f"{name} is there without its other part", tensor=stem)
            found[stem] = interleave(parts[0], parts[1], cut.axis, cut.order)
    return found


class SplitHandle(Handle):
    """A model whose half-frozen Linear layers are split."""

    def _install(self) -> None:
        for target in self.targets:
            if target.cut is None:
                target.parameter.requires_grad_(True)
        for module, targets in _by_module(self.targets).items():
            split(module, {t.attribute: t.cut for t in targets if isinstance(t.cut, Cut)})

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        """Nothing it could do reaches the frozen part."""

    def _uninstall(self) -> None:
        for module in _by_module(self.targets):
            if isinstance(module, SplitLinear):
                join(module)

    def trained(self) -> dict[str, Tensor]:
        suffixed = ((t, "" if t.cut is None else TRAINED) for t in self.targets)
        return {t.name + suffix: getattr(t.module, t.attribute + suffix) for t, suffix in suffixed}

    def _frozen(self) -> Iterator[tuple[str, Tensor, Cut | StackCut | None]]:
        trained = {id(parameter) for parameter in self.trained().values()}
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in trained:
                yield name, parameter, None


def check_unwrapped(model: nn.Module) -> None:
    """Raise FreezeError where a wrapper has taken note of the parameters that a split would replace."""
    for module in model.modules():
        wrapper = next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in _WRAPPERS), None)
        if wrapper:
            raise FreezeError(f"the model is already wrapped ({wrapper}) and cannot be split", hint=_OFFER)


def check_splittable(model: nn.Module, targets: tuple[Target, ...]) -> None:
    """Raise FreezeError where a layer cannot be split; nothing has been touched yet."""
    uses: dict[int, int] = defaultdict(int)
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] += 1
    for target in targets:
        if target.cut is None:
            continue
        trouble = _trouble(target, uses[id(target.parameter)])
        if trouble:
            offer = 'Freeze with how="mask".' if len(target.tensor.shape) > 2 else _OFFER
            raise FreezeError(f"{trouble} and cannot be split", tensor=target.tensor.name, hint=offer)


def _trouble(target: Target, uses: int) -> str | None:
    kind = type(target.module)
    if kind is SplitLinear:
        return "it is split already"
    if len(target.tensor.shape) > 2:
        return f"it is a stack of {target.tensor.shape[0]} experts in three dimensions"
    if kind is not nn.Linear:
        return f"it is a parameter of {kind.__name__}, not of a plain torch.nn.Linear,"
    if hasattr(target.parameter, "to_local") or hasattr(target.parameter, "ds_id"):
        return "it is sharded already"
    return "it is shared by several modules" if uses > 1 else None


def _by_module(targets: tuple[Target, ...]) -> dict[nn.Linear, list[Target]]:
    """The targets to split, by their layer."""
    found: dict[nn.Linear, list[Target]] = defaultdict(list)
    for target in targets:
        if target.cut is not None and isinstance(target.module, nn.Linear):
            found[target.module].append(target)
    return found
