"""What freezing leaves in the caller's hand: counts, checks, and the way back. Shared by split and mask.

Every optimizer is looked at once, before its first step, without being asked: whatever would move frozen elements
must be said before it does. The bits of all that is frozen are remembered as one number a parameter.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from ckptgrow.errors import FreezeError
from ckptgrow.manifest import Manifest
from ckptgrow.training.cut import Cut, StackCut, fingerprint
from ckptgrow.training.masters import has_masters
from ckptgrow.training.resolve import Target


@dataclass(frozen=True, slots=True)
class Stats:
    """Elements: held by the optimizer, able to move, and frozen; the share is of the base's parameters."""

    optimised: int
    trained: int
    frozen: int
    share_of_base: float

    def __str__(self) -> str:
        held = "" if self.optimised == self.trained else f" ({self.trained:,} of them free to move)"
        share = f"{self.share_of_base:.1%} of the base"
        return f"{self.optimised:,} parameters optimised{held}, {share}; {self.frozen:,} frozen"


@dataclass(frozen=True, slots=True)
class Print:
    """What is remembered of the frozen elements of one parameter."""

    dtype: torch.dtype
    shape: torch.Size
    number: int


KEPT_AS = "_ckptgrow_handle"


class Handle(ABC):
    """A model whose frozen part is held. Made by `freeze`; lives as long as the model does."""

    def __init__(self, model: nn.Module, manifest: Manifest, targets: tuple[Target, ...]) -> None:
        self.model, self.manifest, self.targets = model, manifest, targets
        self._before = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
        self.seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        model.requires_grad_(False)
        self._install()
        self._prints = {name: _print(tensor, cut) for name, tensor, cut in self._frozen()}
        _LIVE.add(self)
        _watch_optimizers()
        model.__dict__[KEPT_AS] = self

    def __reduce__(self) -> Any:
        """A copy of the model, or one from a pickle, comes without it."""
        return type(None), ()

    @abstractmethod
    def _install(self) -> None:
        """Make the targets trainable in this way."""

    @abstractmethod
    def _uninstall(self) -> None:
        """Take that back."""

    @abstractmethod
    def trained(self) -> dict[str, Tensor]:
        """The parameters that belong into an optimizer, by name."""

    @abstractmethod
    def _frozen(self) -> Iterator[tuple[str, Tensor, Cut | StackCut | None]]:
        """Every parameter with frozen elements; where a cut is given, only its frozen ranges are meant."""

    def guard(self, *optimizers: Optimizer) -> None:
        """Make it impossible that these optimizers move frozen elements. A split needs nothing but the check."""
        self.check(*optimizers)

    def stats(self) -> Stats:
        """How much trains. Tied parameters count once."""
        total = sum(_elements(p) for p in self.model.parameters())
        held = sum(_elements(p) for p in self.trained().values())
        moving = sum(target.tensor.elements for target in self.targets)
        return Stats(held, moving, total - moving, moving / self.manifest.counts.base)

    def check(self, *optimizers: Optimizer) -> None:
        """Are the frozen bits those of the beginning, and do these optimizers hold what trains, and safely?

        Raises FreezeError naming the first parameter for which the answer is no. A parameter that a wrapper has cut
        up since cannot be compared here; the saved checkpoint can.
        """
        self._check_bits(self._frozen())
        optimizers = tuple(map(unwrapped, optimizers))
        held = {id(p) for optimizer in optimizers for p in _parameters(optimizer)}
        for name, parameter in self.trained().items():
            if held and id(parameter) not in held and not has_masters(parameter):
                raise FreezeError(
                    "it trains, but the optimizer does not hold it",
                    tensor=name,
                    hint="Freeze, then make the optimizer.",
                )
        for optimizer in optimizers:
            self._check_optimizer(optimizer)

    def _check_bits(self, frozen: Iterable[tuple[str, Tensor, Cut | StackCut | None]]) -> None:
        for name, tensor, cut in frozen:
            if not _same(self._prints.get(name), tensor, cut):
                raise FreezeError("frozen elements have moved", tensor=name, hint="Restore them from the grown model.")

    def remove(self) -> None:
        """The model as it was before, with what it has learned: plain modules, no hooks, requires_grad as before."""
        _LIVE.discard(self)
        self._uninstall()
        self.model.__dict__.pop(KEPT_AS, None)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(self._before.get(name, parameter.requires_grad))

    def concerns(self, optimizer: Optimizer) -> bool:
        """Whether it may hold anything of this model. DeepSpeed's holds masters, which are no parameters."""
        own = {id(parameter) for parameter in self.model.parameters()}
        held = any(id(parameter) in own for parameter in _parameters(optimizer))
        return held or any(has_masters(parameter) for parameter in self.trained().values())

    def before_first_step(self, optimizer: Optimizer) -> None:
        """Look at an optimizer once; gradients are there and nothing has moved yet.

        Where the step itself runs the backward pass (a closure, as Lightning's), there are none yet: look again.
        """
        if optimizer not in self.seen:
            self._check_optimizer(optimizer)
            self._check_gradients(optimizer)
            if any(parameter.grad is not None for parameter in _parameters(optimizer)):
                self.seen.add(optimizer)

    @abstractmethod
    def _check_optimizer(self, optimizer: Optimizer) -> None:
        """Raise where the optimizer's settings or state would move frozen elements."""

    def _check_gradients(self, optimizer: Optimizer) -> None:
        """A parameter that does not train must not have got a gradient: some trainers unfreeze what they find."""
        held = {id(p) for p in _parameters(optimizer)}
        trained = {id(p) for p in self.trained().values()}
        for name, parameter in self.model.named_parameters():
            if id(parameter) in held - trained and parameter.grad is not None:
                raise FreezeError(
                    "it is frozen, but has a gradient and an optimizer",
                    tensor=name,
                    hint="Something set requires_grad again: freeze after it.",
                )


_LIVE: weakref.WeakSet[Handle] = weakref.WeakSet()  # keeps no handle, and with it no model, alive


@cache
def _watch_optimizers() -> RemovableHandle:
    """One hook for all optimizers and handles, set once: torch's hooks must not go while it runs them, and a handle may
    be collected at any moment."""
    return register_optimizer_step_pre_hook(_first_step)


def _first_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for handle in list(_LIVE):
        if optimizer in handle.seen or handle.concerns(optimizer):  # the second asks every parameter
            handle.before_first_step(optimizer)


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer that steps: the wrappers of accelerate and DeepSpeed take no hooks."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found: Optimizer = optimizer
    return found


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _elements(parameter: Tensor) -> int:
    """Of the whole parameter: ZeRO-3 keeps the number beside it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor, or piece under ZeRO-3; any other tensor as it is."""
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else getattr(tensor, "ds_tensor", tensor)
    return shard.detach()


def _print(tensor: Tensor, cut: Cut | StackCut | None) -> Print:
    shard = local(tensor)
    return Print(shard.dtype, shard.shape, fingerprint(_parts(shard, cut)))


def _same(printed: Print | None, tensor: Tensor, cut: Cut | StackCut | None) -> bool:
    """Whether the bits are those remembered, in the dtype of then: a wider one keeps every value."""
    shard = local(tensor)
    if printed is None or shard.shape != printed.shape:
        return True
    return fingerprint(part.to(printed.dtype) for part in _parts(shard, cut)) == printed.number


def _parts(shard: Tensor, cut: Cut | StackCut | None) -> Iterable[Tensor]:
    return [shard] if cut is None else cut.frozen_in(shard)
