"""One forward of each MLP on random inputs, base against grown: the weakest of the three answers, and the most literal.

It runs the block as a model would, in float32, so its figure is the noise of adding in another order. A norm that
follows the MLP in some families is left out: outputs after it cannot see a wrong scale of down (METHOD.md 8).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ckptgrow.checkpoint import Checkpoint
from ckptgrow.equivalence import Answer, Finding, Progress
from ckptgrow.families import Architecture, Mlp, scoped
from ckptgrow.numeric import decode

INPUTS = 8
TOLERANCE = 1e-4  # float32 sums in another order; a forgotten half is off by 0.5
BLOCK_ELEMENTS = 1 << 20

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
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
    """The largest relative difference of an MLP's output on 8 random inputs of unit size, over all MLPs."""
    name = activation_name(scoped(base.config, architecture.family), architecture)
    if name not in ACTIVATIONS:
        return Answer("probed", "not run", f"the activation {name!r} is not known here")
    worst, findings = 0.0, []
    for mlp in architecture.mlps:
        inputs = _inputs(mlp)
        expected, got = (forward(c, mlp, ACTIVATIONS[name], inputs, progress) for c in (base, grown))
        if not bool(expected.isfinite().all()):
            return Answer("probed", "not run", f"{mlp.block} of the base overflows float32 on random inputs")
        difference = float((expected - got).abs().max() / expected.abs().max().clamp_min(1e-30))
        if not difference <= TOLERANCE:  # not a number is no agreement either
            findings.append(Finding(mlp.block, f"its output differs by {difference:.2g} of its size"))
        worst = max(worst, difference)
    figure = (
        f"{len(architecture.mlps)} MLPs in float32 on {INPUTS} random inputs, largest relative difference {worst:.1e}"
    )
    return Answer("probed", "no" if findings else "yes", figure, tuple(findings))


def activation_name(config: Mapping[str, Any], architecture: Architecture) -> str:
    """What the config calls the activation, or the family's default where it does not say."""
    name = config.get(architecture.family.activation)
    return name if isinstance(name, str) else architecture.family.default_activation


def _inputs(mlp: Mlp) -> Tensor:
    """[8, hidden], each of unit mean square, different for each layer."""
    generator = torch.Generator().manual_seed(mlp.layer)
    return torch.randn(INPUTS, mlp.hidden, generator=generator)


def forward(
    checkpoint: Checkpoint, mlp: Mlp, activation: Callable[[Tensor], Tensor], inputs: Tensor, progress: Progress
) -> Tensor:
    """The MLP's output without the bias of down, which growth leaves alone. inputs and result: [n, hidden]."""
    hidden = activated(activation, answers(checkpoint, mlp, inputs, progress))
    return _applied(checkpoint, mlp.down, mlp.tensors[mlp.down].axis, hidden)


def answers(checkpoint: Checkpoint, mlp: Mlp, inputs: Tensor, progress: Progress) -> dict[str, Tensor]:
    """What gate and up say to the inputs, biases included: [n, units] each."""
    lanes: dict[str, Tensor] = {}
    for name, slot in mlp.tensors.items():
        if name != mlp.down:
            made = _vector(checkpoint, name) if slot.bias else _applied(checkpoint, name, 1 - slot.axis, inputs)
            for lane, piece in zip(slot.lanes, made.chunk(len(slot.lanes), -1), strict=True):
                lanes[lane] = lanes[lane] + piece if lane in lanes else piece
        progress(checkpoint.infos[name].nbytes)
    return lanes


def activated(activation: Callable[[Tensor], Tensor], lanes: Mapping[str, Tensor]) -> Tensor:
    """[n, units]: what goes into down."""
    return activation(lanes["gate"]) * lanes["up"] if "gate" in lanes else activation(lanes["up"])


def _vector(checkpoint: Checkpoint, name: str) -> Tensor:
    return torch.from_numpy(decode(checkpoint.bits(name), checkpoint.infos[name].dtype)).float()


def _applied(checkpoint: Checkpoint, name: str, axis: int, inputs: Tensor) -> Tensor:
    """inputs [n, a] contracted with that axis of a matrix, read some rows at a time."""
    bits, dtype = checkpoint.bits(name), checkpoint.infos[name].dtype
    step = max(1, BLOCK_ELEMENTS // max(1, bits.shape[1]))
    result = torch.zeros(inputs.shape[0], bits.shape[1 - axis])
    for row in range(0, bits.shape[0], step):
        matrix = torch.from_numpy(decode(bits[row : row + step], dtype)).float()
        if axis == 1:
            result[:, row : row + step] = inputs @ matrix.T
        else:
            result += inputs[:, row : row + step] @ matrix
    return result
