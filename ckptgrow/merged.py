"""Is a merged checkpoint, as a function, the base plus what each skill adds? The weaker answer beside weighed.py's.

It knows nothing of how a merge is laid out. The reference is built in float64: the outputs of the base's MLP and of
each skill's on the same random inputs, put together as f = base + Σ λᵢ·(grownᵢ - base). Without rounded weights the two
agree to float64's own noise, which one misplaced unit is far above; with them, to what half a unit in the last place of
each weight of the MLP can cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from torch import Tensor

from ckptgrow.checkpoint import Checkpoint, Tensors
from ckptgrow.equivalence import SHOWN, Answer, Finding, Progress
from ckptgrow.families import Architecture, Mlp
from ckptgrow.numeric import FLOATS
from ckptgrow.probe import ACTIVATIONS, INPUTS, activation_name, forward, random_inputs
from ckptgrow.progress import uncounted

NOISE = 1e-11  # float64 sums in another order, relative to the largest output

Grown = Sequence[tuple[Fraction, Tensors]]


def merged(
    base: Checkpoint, skills: Grown, result: Checkpoint, architecture: Architecture, rounded: bool, progress: Progress
) -> Answer:
    """The largest difference of an MLP's output from the reference, relative to the largest output in it.

    `skills`: each weight, and the trained checkpoint it belongs to. `rounded`: weights of the result were rounded.
    """
    worst, count, findings = 0.0, 0, []
    for mlp in (mlp for mlp in architecture.mlps if mlp.down):
        name = activation_name(base.config, mlp)
        if name not in ACTIVATIONS:
            return Answer("probed", "not run", f"the activation {name!r} is not known here")
        for expert in mlp.numbers:
            off, allowed = _off(base, skills, result, mlp, ACTIVATIONS[name], expert, rounded, progress)
            worst, count = max(worst, off), count + 1
            if not off <= allowed:  # not a number is no agreement either
                findings.append(Finding(mlp.block, f"its output differs by {off:.2g} of its size"))
    figure = f"{count} MLPs are the base's and Σ λ·(skill - base) in float64 on {INPUTS} random inputs"
    figure += f", largest relative difference {worst:.1e}"
    return Answer("probed", "no" if findings else "yes", figure, tuple(findings[:SHOWN]))


def _off(
    base: Checkpoint,
    skills: Grown,
    result: Checkpoint,
    mlp: Mlp,
    activation: Callable[[Tensor], Tensor],
    expert: int | None,
    rounded: bool,
    progress: Progress,
) -> tuple[float, float]:
    """(the relative difference of one MLP's output, how large it may be)."""
    inputs = random_inputs(mlp, mlp.hidden).double()
    mine = forward(base, mlp, activation, inputs, uncounted, expert)
    expected, size = mine.clone(), float(mine.abs().max())
    for weight, grown in skills:
        its = forward(grown, mlp, activation, inputs, uncounted, expert)
        expected += float(weight) * (its - mine)
        size = max(size, float(its.abs().max()), float(expected.abs().max()))
    got = forward(result, mlp, activation, inputs, progress, expert)
    unit = 2.0 ** -(FLOATS[result.infos[mlp.down].dtype].mantissa + 1)
    width = result.infos[mlp.down].shape[mlp.tensors[mlp.down].axis]
    allowed = NOISE + (unit * max(1.0, width**0.5) if rounded else 0.0)
    return float((got - expected).abs().max()) / (size or 1.0), allowed
