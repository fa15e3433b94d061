"""The other way to freeze: whole parameters, whose gradients are zero where they are frozen.

For what cannot be split: models that are wrapped already, layers that are not plain Linears. A zero gradient alone
does not hold a weight still: decay, momentum of before and 8-bit states move it. `guard` puts it back after each step;
without a guard, an optimizer that would move it is refused. Zeros are filled in, never multiplied: 0 * inf is NaN.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ckptgrow.errors import FreezeError
from ckptgrow.training.cut import Cut, StackCut
from ckptgrow.training.handle import Handle, local, unwrapped
from ckptgrow.training.masters import Master, has_masters, steps_on
from ckptgrow.training.resolve import Target

# Keys of an optimizer's groups that shrink a weight whose gradient is zero; `lambd` is ASGD's.
_DECAYS = ("weight_decay", "lambd")
_GUARD = "Call handle.guard(optimizer), or switch that off for the masked tensors."


class MaskHandle(Handle):
    """A model whose gradients are masked while they are made, so before any clipping."""

    decays: tuple[str, ...] = _DECAYS

    def _install(self) -> None:
        self._hooks: list[RemovableHandle] = []
        self._fired: set[str] = set()
        self._kept: dict[str, list[Tensor]] = {}
        self._masters: dict[str, Master] = {}
        self._guarded: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._swaps: list[tuple[Optimizer, str]] = []
        self._steps: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        for target in self.targets:
            target.parameter.requires_grad_(True)
        for target, parameter, cut in self._masked():
            if hasattr(parameter, "to_local"):  # a sharded parameter is no part of the graph: only its .grad is seen
                hook: RemovableHandle = parameter.register_post_accumulate_grad_hook(
                    partial(self._clear, target.name, cut)
                )  # type: ignore[no-untyped-call]
            else:
                hook = parameter.register_hook(partial(self._cleared, target.name, cut))  # type: ignore[no-untyped-call]
            self._hooks.append(hook)

    def _uninstall(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for optimizer, swap in self._swaps:
            optimizer.__dict__.pop(swap, None)

    def trained(self) -> dict[str, Tensor]:
        return {target.name: target.parameter for target in self.targets}

    def guard(self, *optimizers: Optimizer) -> None:
        """Put the frozen elements back after each step of these optimizers, from a copy that is made now.

        With DeepSpeed it comes after `deepspeed.initialize`, which makes the masters that are stepped on.
        """
        for target, parameter, cut in self._masked():
            if has_masters(parameter):
                self._masters[target.name] = Master(parameter, target.tensor.shape, cut)
            elif target.name not in self._kept:
                self._kept[target.name] = [part.clone() for part in cut.frozen_in(local(parameter))]
        for optimizer in map(unwrapped, optimizers):
            self._hooks.append(optimizer.register_step_post_hook(self._restore))
            self._guarded.add(optimizer)
            self._guard_swaps(optimizer)
        self.check(*optimizers)

    def _guard_swaps(self, optimizer: Any) -> None:
        """Schedule-free optimizers have their own `train` and `eval`, which exchange the weights for an average."""
        for swap in ("train", "eval"):
            plain = getattr(optimizer, swap, None)
            if callable(plain) and swap not in optimizer.__dict__:
                setattr(optimizer, swap, partial(self._swapped, optimizer, plain))
                self._swaps.append((optimizer, swap))

    def _swapped(self, optimizer: Optimizer, swap: Any, *args: Any, **kwargs: Any) -> Any:
        result = swap(*args, **kwargs)
        self._restore(optimizer, args, kwargs)
        return result

    def before_first_step(self, optimizer: Optimizer) -> None:
        super().before_first_step(optimizer)
        self._look_again(optimizer)

    def _look_again(self, optimizer: Optimizer) -> None:
        """What shows in no setting and no state: 8-bit moments round a zero up. Looks after 1, 2, 4, 8, ... steps."""
        taken = self._steps.get(optimizer, 0)
        self._steps[optimizer] = taken + 1
        if taken & (taken - 1) or not taken or optimizer in self._guarded:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._check_bits((name, p, cut) for name, p, cut in self._frozen() if id(p) in held)

    def _masked(self) -> Iterator[tuple[Target, Tensor, Cut | StackCut]]:
        """The parameters as they are now, each with its cut as this process's shard sees it."""
        for target in self.targets:
            if target.cut is not None:
                parameter = target.parameter
                if not hasattr(parameter, "ds_tensor") and tuple(parameter.shape) != target.tensor.shape:
                    raise FreezeError(
                        f"it has been taken apart since it was masked, to {list(parameter.shape)}: hooks do not run",
                        tensor=target.name,
                        hint='FSDP1 needs how="split" before wrapping (use_orig_params=True).',
                    )
                yield target, parameter, local_cut(parameter, target.cut)

    def _frozen(self) -> Iterator[tuple[str, Tensor, Cut | StackCut | None]]:
        trained = {id(parameter) for parameter in self.trained().values()}
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in trained:
                yield name, parameter, None
        for target, masked, cut in self._masked():
            if not hasattr(masked, "ds_tensor"):  # ZeRO-3's pieces do not follow the cut
                yield target.name, masked, cut

    def _cleared(self, name: str, cut: Cut | StackCut, gradient: Tensor) -> Tensor:
        """The gradient, zero where frozen. A copy: autograd may still need its own."""
        self._fired.add(name)
        gradient = gradient.clone()
        for part in cut.frozen_in(gradient):
            part.zero_()
        return gradient

    def _clear(self, name: str, cut: Cut | StackCut, parameter: Tensor) -> None:
        """The same on what has been accumulated in this process's shard."""
        self._fired.add(name)
        if parameter.grad is not None:
            for part in cut.frozen_in(local(parameter.grad)):
                part.zero_()

    @torch.no_grad()
    def _restore(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for master in self._masters.values():
            master.put_back()
        held = {
            id(p) for group in optimizer.param_groups for p in group["params"]
        }  # autograd may still need the others
        for target, parameter, cut in self._masked():
            if target.name in self._kept and id(parameter) in held:
                for part, kept in zip(cut.frozen_in(local(parameter)), self._kept[target.name], strict=True):
                    part.copy_(kept)

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        self._check_masters(optimizer)
        if optimizer in self._guarded:
            return
        masked = {id(held): (target.name, cut) for target, held, cut in self._masked()}
        for group in optimizer.param_groups:
            decays = [f"{key}={group[key]}" for key in self.decays if group.get(key)]
            for parameter in (p for p in group["params"] if id(p) in masked):
                name, cut = masked[id(parameter)]
                if decays:
                    raise FreezeError(f"{decays[0]} would move its frozen part", tensor=name, hint=_GUARD)
                if _remembers(optimizer.state.get(parameter, {}), parameter, cut):
                    raise FreezeError("the optimizer's state would move its frozen part", tensor=name, hint=_GUARD)

    def _check_masters(self, optimizer: Optimizer) -> None:
        """Of an optimizer inside DeepSpeed's: it holds pieces of masters, in which no parameter can be found."""
        stepped = [target for target, parameter, _ in self._masked() if steps_on(optimizer, parameter)]
        decays = [f"{key}={group[key]}" for group in optimizer.param_groups for key in _DECAYS if group.get(key)]
        for target in stepped if decays else ():
            if optimizer not in self._guarded or target.name not in self._masters:
                raise FreezeError(
                    f"{decays[0]} would move its frozen part in DeepSpeed's float32 copy",
                    tensor=target.name,
                    hint="Call handle.guard(engine.optimizer) after deepspeed.initialize, or switch that off.",
                )

    def _check_gradients(self, optimizer: Optimizer) -> None:
        """Did every hook fire? Some wrappers replace parameters, some hand over gradients behind autograd's back."""
        super()._check_gradients(optimizer)
        mastered = [target.name for target, parameter, _ in self._masked() if steps_on(optimizer, parameter)]
        if mastered and not self._fired:  # DeepSpeed has taken the gradients away by now
            raise _unmasked(mastered[0])
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for target, parameter, cut in self._masked():
            if id(parameter) not in held or parameter.grad is None:
                continue
            if target.name not in self._fired or _any(local(parameter.grad), cut):
                raise _unmasked(target.name)


def _unmasked(name: str) -> FreezeError:
    return FreezeError(
        "its gradient was not masked: the hook did not fire, or something wrote after it",
        tensor=name,
        hint="Freeze after the model has been wrapped or sharded, and before the first step.",
    )


def check_hooks_run(model: nn.Module) -> None:
    """Raise FreezeError where a wrapper never runs the hooks of parameters."""
    if "FullyShardedDataParallel" in _kinds(model):
        raise FreezeError(
            "the model is wrapped in FSDP1, which never runs hooks of parameters",
            hint='Use how="split" before wrapping (use_orig_params=True), or FSDP2.',
        )


def check_maskable(model: nn.Module, targets: tuple[Target, ...]) -> None:
    """Raise FreezeError where no hook would ever see a gradient; nothing has been touched yet."""
    wanted = {id(target.parameter) for target in targets}
    still = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in wanted]
    if "DistributedDataParallel" in _kinds(model) and still:
        raise FreezeError(
            "DDP waits for the gradient of whatever required one when it wrapped the model",
            tensor=still[0],
            hint="Freeze before wrapping, or at least call require_grad(model, manifest).",
        )
    for target in targets:
        if hasattr(target.parameter, "main_grad"):
            raise FreezeError(
                "its gradient goes to main_grad, which no hook sees",
                tensor=target.tensor.name,
                hint="Switch gradient accumulation fusion off.",
            )


def _kinds(model: nn.Module) -> set[str]:
    return {kind.__name__ for module in model.modules() for kind in type(module).__mro__}


def local_cut(parameter: Tensor, cut: Cut | StackCut) -> Cut | StackCut:
    """The cut of this process's shard of a DTensor, at its own offset; of any other tensor, the cut."""
    if not hasattr(parameter, "to_local"):
        return cut
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape,
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
    )
    return cut.shard(offset, shape)


def _remembers(state: Any, parameter: Tensor, cut: Cut | StackCut) -> bool:
    """Whether an optimizer's state (momentum of steps without the mask) has anything where the tensor is frozen."""
    tensors = (value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape)
    return any(_any(local(tensor), cut) for tensor in tensors)


def _any(shard: Tensor, cut: Cut | StackCut) -> bool:
    return any(bool(part.count_nonzero()) for part in cut.frozen_in(shard))
