"""What DeepSpeed steps on instead of a model's parameters: flat pieces in float32, one a process.

Each step writes the model's weights anew from these masters. Weight decay therefore moves them unseen, bfloat16 weights
last of all, and a value put back into the weights is gone with the next step: it has to be put back here. Imports
nothing of DeepSpeed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ckptgrow.training.cut import Cut, StackCut


def has_masters(parameter: Tensor) -> bool:
    """Whether DeepSpeed has taken this parameter over: ZeRO-3 partitions it, the other stages map it to a fragment."""
    return hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")


def steps_on(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Whether this torch optimizer, inside DeepSpeed's, steps on a piece of the parameter's master."""
    zero = getattr(parameter, "_z3_optimizer", None)
    if zero is not None:
        return getattr(zero, "optimizer", None) is optimizer
    mapping = getattr(parameter, "_hp_mapping", None)
    held = (p for group in optimizer.param_groups for p in group["params"])
    return mapping is not None and _storage(mapping.get_hp_fragment()) in map(_storage, held)


class Master:
    """The frozen elements of this process's piece of one parameter's master, as they were when this was made."""

    def __init__(self, parameter: Any, shape: tuple[int, ...], cut: Cut | StackCut) -> None:
        self._parameter = parameter
        frozen = torch.zeros(shape, dtype=torch.bool)
        for part in cut.frozen_in(frozen):
            part.fill_(True)
        start, piece = self._piece()
        place = torch.zeros(piece.numel(), dtype=torch.bool)  # the last piece of ZeRO-3 is padded
        mine = frozen.flatten()[start : start + piece.numel()]
        place[: mine.numel()] = mine
        self._place = place.to(piece.device)
        self._kept = piece[self._place].clone()

    def put_back(self) -> None:
        """Undo what the step just taken did to them."""
        _, piece = self._piece()
        piece[self._place] = self._kept
        zero = getattr(self._parameter, "_z3_optimizer", None)
        if zero is not None:  # what was read may be a copy, of a master that is kept elsewhere
            zero.set_local_hp_param(piece, self._parameter)

    def _piece(self) -> tuple[int, Tensor]:
        """Where in the flattened parameter this process's piece begins, and the piece."""
        parameter = self._parameter
        if hasattr(parameter, "_z3_optimizer"):
            piece = parameter._z3_optimizer.get_local_fp32_param(parameter)
            return torch.distributed.get_rank(parameter.ds_process_group) * piece.numel(), piece.detach()
        mapping = parameter._hp_mapping
        if mapping is None:  # another process has all of it
            return 0, torch.empty(0)
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment().detach()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
