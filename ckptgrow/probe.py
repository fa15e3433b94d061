"""One forward of each MLP on random inputs, base against grown: the weakest of the three answers, and the most literal.

It runs the block as a model would, in float32, so its figure is the noise of adding in another order. A norm that
follows the MLP in some families is left out: outputs after it cannot see a wrong scale of down (METHOD.md 8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ckptgrow.checkpoint import Checkpoint, Tensors
from ckptgrow.equivalence import Answer, Finding, Progress
from ckptgrow.families import SCALES, Architecture, Mlp, Slot, value_at
from ckptgrow.numeric import decode

INPUTS = 8
TOLERANCE = 1e-4  # float32 sums in another order; a forgotten half is off by 0.5
BLOCK_ELEMENTS = 1 << 20

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gated-gelu": lambda x: functional.gelu(x, approximate="tanh"),  # T5's word for gelu_new and a gate
    "gated-silu": functional.silu,
    "gelu_fast": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}


def probed(base: Checkpoint, grown: Checkpoint, architecture: Architecture, progress: Progress) -> Answer:
    """The largest relative difference of an MLP's output on 8 random inputs of unit size, over all MLPs and experts."""
    worst, count, findings = 0.0, 0, []
    for mlp in (mlp for mlp in architecture.mlps if mlp.down):
        name = activation_name(base.config, mlp)
        if name not in ACTIVATIONS:
            return Answer("probed", "not run", f"the activation {name!r} is not known here")
        for expert in mlp.numbers:
            inputs, count = random_inputs(mlp, mlp.hidden), count + 1
            expected, got = (forward(c, mlp, ACTIVATIONS[name], inputs, progress, expert) for c in (base, grown))
            if not bool(expected.isfinite().all()):
                return Answer("probed", "not run", f"{mlp.block} of the base overflows float32 on random inputs")
            difference = float((expected - got).abs().max() / expected.abs().max().clamp_min(1e-30))
            if not difference <= TOLERANCE:  # not a number is no agreement either
                findings.append(Finding(mlp.block, f"its output differs by {difference:.2g} of its size"))
            worst = max(worst, difference)
    figure = f"{count} MLPs in float32 on {INPUTS} random inputs, largest relative difference {worst:.1e}"
    return Answer("probed", "no" if findings else "yes", figure, tuple(findings))


def activation_name(config: Mapping[str, Any], mlp: Mlp) -> str:
    """What the config calls the activation, or the family's default where it does not say."""
    name = value_at(config, mlp.site.under(mlp.site.activation))
    return name if isinstance(name, str) else mlp.site.default_activation


def random_inputs(mlp: Mlp, size: int) -> Tensor:
    """[8, size], each of unit mean square, different for each layer."""
    generator = torch.Generator().manual_seed(mlp.layer)
    return torch.randn(INPUTS, size, generator=generator)


def forward(
    checkpoint: Tensors,
    mlp: Mlp,
    activation: Callable[[Tensor], Tensor],
    inputs: Tensor,
    progress: Progress,
    expert: int | None = None,
) -> Tensor:
    """The output of the MLP, or of one expert, without the bias of down, which growth leaves alone: [n, hidden].

    Computed in the dtype of the inputs.
    """
    hidden = activated(activation, answers(checkpoint, mlp, inputs, progress, expert))
    down = next(name for name, slot in mlp.tensors.items() if slot.lanes[0] == "down" and slot.block == 1)
    return _Weights(checkpoint, mlp, down, expert, inputs.dtype).applied(hidden)


def answers(
    checkpoint: Tensors, mlp: Mlp, inputs: Tensor, progress: Progress, expert: int | None = None
) -> dict[str, Tensor]:
    """What gate and up say to the inputs [n, hidden], biases included: [n, units] each; the weight of a norm, [units].

    The second factor of an adapter gets inputs of its own.
    """
    lanes: dict[str, Tensor] = {}
    for name, slot in mlp.tensors.items():
        if slot.lanes[0] != "down" and slot.block == 1:
            weights = _Weights(checkpoint, mlp, name, expert, inputs.dtype)
            given = random_inputs(mlp, weights.other).to(inputs.dtype) if slot.extra else inputs
            for lane, piece in _lanes(slot, weights.vector() if slot.vector else weights.applied(given)):
                lanes[lane] = lanes[lane] + piece if lane in lanes else piece
        progress(checkpoint.infos[name].nbytes // mlp.experts)
    return lanes


def activated(activation: Callable[[Tensor], Tensor], lanes: Mapping[str, Tensor]) -> Tensor:
    """[n, units]: what goes into down."""
    hidden = activation(lanes["gate"]) * lanes["up"] if "gate" in lanes else activation(lanes["up"])
    if "norm" in lanes:
        hidden = functional.rms_norm(hidden, hidden.shape[-1:], eps=1e-6) * lanes["norm"]
    return hidden


def _lanes(slot: Slot, made: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Each projection's part of what a tensor made."""
    if slot.span > 1:
        yield from ((lane, made[..., i :: slot.span]) for i, lane in enumerate(slot.lanes[0].split("_")))
    elif slot.flat:
        yield slot.lanes[0], made
    else:
        yield from zip(slot.lanes, made.chunk(len(slot.lanes), -1), strict=True)


class _Weights:
    """One matrix or vector of an MLP or of one of its experts, decoded some rows at a time."""

    def __init__(self, checkpoint: Tensors, mlp: Mlp, name: str, expert: int | None, computed: torch.dtype) -> None:
        self.computed = computed
        slot, info = mlp.tensors[name], checkpoint.infos[name]
        self.dtype, self.bits, self.axis = info.dtype, checkpoint.bits(name), slot.axis - int(slot.stacked)
        if slot.flat:
            self.bits = self.bits.reshape(mlp.experts, -1, self.bits.shape[1])
        if slot.stacked or slot.flat:
            self.bits = self.bits[expert or 0]
        self.scales: Tensor | None = None
        if slot.coded:
            scales = checkpoint.bits(name + SCALES)
            picked = scales[expert or 0] if slot.stacked else scales
            self.scales = torch.from_numpy(decode(picked, checkpoint.infos[name + SCALES].dtype)).to(self.computed)
            self.block = mlp.tensors[name + SCALES].block
        self.down = slot.lanes[0] == "down"

    @property
    def other(self) -> int:
        """The size of the axis that is not that of units."""
        return int(self.bits.shape[1 - self.axis])

    def vector(self) -> Tensor:
        return torch.from_numpy(decode(np.ascontiguousarray(self.bits), self.dtype)).to(self.computed)

    def applied(self, inputs: Tensor) -> Tensor:
        """inputs [n, a] contracted with the axis of inputs: that of units for down, the other one else."""
        axis = self.axis if self.down else 1 - self.axis
        rows, columns = self.bits.shape
        step = max(1, BLOCK_ELEMENTS // max(1, columns))
        result = torch.zeros(inputs.shape[0], self.bits.shape[1 - axis], dtype=self.computed)
        for row in range(0, rows, step):
            matrix = self._matrix(row, min(row + step, rows))
            if axis == 1:
                result[:, row : row + step] = inputs @ matrix.T
            else:
                result += inputs[:, row : row + step] @ matrix
        return result

    def _matrix(self, first: int, last: int) -> Tensor:
        matrix = torch.from_numpy(decode(np.ascontiguousarray(self.bits[first:last]), self.dtype)).to(self.computed)
        if self.scales is None:
            return matrix
        down, across = torch.arange(first, last) // self.block, torch.arange(self.bits.shape[1]) // self.block
        return matrix * self.scales[down][:, across]
