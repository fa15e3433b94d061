"""Folding what does not fold exactly: one unit for each group, as near as one can be, and how far that is off.

Units are grouped around the first ones, to which the width is cut: a copy with its base unit where a hint says so, any
other with the unit whose gate row is nearest. Of a group of k units dᵢ·act(gᵢx)·(uᵢx) one is made:

- gate: the mean of the gates, weighted by |dᵢ|·|uᵢ|.
- up and down: the best rank-1 approximation of Σ dᵢ·uᵢᵀ, which is its first singular pair. Where the gates differ the
  column is fitted once more, by least squares on normalised random inputs.

Each row and column is a sum of the group's own, times factors, so the result is a Plan like any other. How far the
written MLPs are off is measured on other random inputs than those that were fitted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ckptgrow.checkpoint import Checkpoint
from ckptgrow.equivalence import Progress
from ckptgrow.errors import RequestError
from ckptgrow.families import Architecture, Mlp
from ckptgrow.folding import Recipe, Recipes
from ckptgrow.joining import Lane
from ckptgrow.numeric import Floats
from ckptgrow.probe import ACTIVATIONS, activated, activation_name, answers, forward
from ckptgrow.redundancy import lanes_in
from ckptgrow.results import Off
from ckptgrow.units import Units, alike, stretches

INPUTS = 256
DIRECTIONS = 64  # random ones, on which gate rows are compared to find the nearest
TURNS = 60  # of the power iteration; two units come apart by their second singular value
FITTED, HELD_OUT = 0, 1


def measured(
    written: Checkpoint, trained: Checkpoint, one: Architecture, other: Architecture, progress: Progress
) -> tuple[Off, ...]:
    """The relative error of each MLP's output on held-out normalised random inputs, in float32."""
    found = []
    for narrow, wide in zip(one.mlps, other.mlps, strict=True):
        inputs, activation = _inputs(wide, HELD_OUT), _activation(trained, wide)
        for expert in wide.numbers if wide.down else ():
            got = forward(written, narrow, activation, inputs, progress, expert)
            wanted = forward(trained, wide, activation, inputs, progress, expert)
            error = float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
            found.append(Off(wide.named(expert), wide.layer, error))
    return tuple(found)


def blended(
    checkpoint: Checkpoint, mlp: Mlp, expert: int | None, width: int, partners: Units, progress: Progress
) -> Recipes:
    """The recipes of the `width` units that come nearest to all units of one MLP or expert."""
    lanes = lanes_in(checkpoint, mlp, expert)
    for lane in lanes:
        if not lane.largest()[1].all():
            raise RequestError(
                "it has weights that are infinite or NaN: nothing can be fitted", tensor=mlp.named(expert)
            )
    gates = [lane for lane in lanes if lane.role == "gate"]
    heads = _heads(gates or [lane for lane in lanes if lane.role == "up"], mlp.width, width, partners)
    groups = _groups(heads, width)
    up, down = (_gram([lane for lane in lanes if lane.role == role], groups) for role in ("up", "down"))
    weight = np.sqrt(np.einsum("gkk->gk", up) * np.einsum("gkk->gk", down))
    mean = _normalised(weight, groups)
    row, column = _first_pair(up, down, groups) if gates else (mean, mean)
    said = answers(checkpoint, mlp, _inputs(mlp, FITTED), progress, expert)
    same = _one_gate(gates, groups) if gates else np.zeros(width, bool)
    fitted = _least_squares(_activation(checkpoint, mlp), said, groups, mean, row)
    column = np.where(same[:, None], column, fitted)
    alone = (groups >= 0).sum(axis=1) == 1
    factors = {"gate": mean, "up": row, "down": column}
    return {role: _recipes(groups, np.where(alone[:, None], 1.0, f)) for role, f in factors.items()}


def _recipes(groups: Units, factors: Floats) -> list[Recipe]:
    return [
        tuple((int(unit), float(factor)) for unit, factor in zip(units, those, strict=True) if unit >= 0)
        for units, those in zip(groups, factors, strict=True)
    ]


# ---------------------------------------------------------------- groups


def _heads(gates: list[Lane], units: int, width: int, partners: Units) -> Units:
    """For each unit the one of the first `width` that it is blended into."""
    heads = np.where((partners >= 0) & (partners < width), partners, -1)
    heads[:width] = np.arange(width)
    lost = np.flatnonzero(heads < 0)
    if len(lost):
        draw = np.random.default_rng(0)
        seen = np.zeros((units, DIRECTIONS))
        for lane in gates:
            directions = draw.normal(size=(lane.bits.shape[0] * lane.bits.shape[2], DIRECTIONS))
            for some in stretches(lane.bits, np.arange(units)):
                seen[some] += lane.values(some) @ directions
        firsts = seen[:width]
        for i in range(0, len(lost), 256):
            mine = seen[lost[i : i + 256]]
            heads[lost[i : i + 256]] = ((firsts**2).sum(axis=1) - 2 * mine @ firsts.T).argmin(axis=1)
    return heads


def _groups(heads: Units, width: int) -> Units:
    """[width, most]: the units of each group, the head first; -1 where there is none."""
    order = np.argsort(heads, kind="stable")
    counts = np.bincount(heads, minlength=width)
    place = np.arange(len(heads)) - np.repeat(np.cumsum(counts) - counts, counts)
    groups = np.full((width, int(counts.max())), -1)
    groups[heads[order], place] = order
    return groups


def _one_gate(gates: list[Lane], groups: Units) -> NDArray[np.bool_]:
    """Which groups have one gate, to the bit."""
    same = alike([lane.bits for lane in gates])
    equal: NDArray[np.bool_] = ((same[groups] == same[groups[:, :1]]) | (groups < 0)).all(axis=1)
    return equal


# ---------------------------------------------------------------- one unit for a group


def _gram(lanes: list[Lane], groups: Units) -> Floats:
    """[groups, k, k]: the inner products of the units of each group, zero where there is no unit."""
    count = groups.shape[1]
    made = np.zeros((len(groups), count, count))
    for lane in lanes:
        for some in stretches(lane.bits, np.arange(len(groups))):
            values = lane.values(groups[some].reshape(-1)).reshape(len(some), count, -1)
            values = values * (groups[some] >= 0)[:, :, None]
            made[some] += np.einsum("gke,gle->gkl", values, values)
    return made


def _normalised(weight: Floats, groups: Units) -> Floats:
    """Weights of each group that add up to 1; equal ones where all are zero."""
    there = groups >= 0
    weight = np.where(there, weight, 0.0)
    weight = np.where(weight.sum(axis=1, keepdims=True) > 0, weight, there)
    mean: Floats = weight / weight.sum(axis=1, keepdims=True)
    return mean


def _first_pair(up: Floats, down: Floats, groups: Units) -> tuple[Floats, Floats]:
    """Factors of rows and of columns whose sums are the first singular pair of Σ dᵢ·uᵢᵀ, by power iteration."""
    row = _normalised(np.ones(groups.shape), groups)
    for _ in range(TURNS):
        turned = np.einsum("gkl,glm,gm->gk", down, up, row)
        size = np.abs(turned).max(axis=1, keepdims=True)
        row = np.where(size > 0, turned / np.where(size > 0, size, 1.0), row)
    total = row.sum(axis=1, keepdims=True)
    level = np.abs(total) > 0.1 * np.abs(row).sum(axis=1, keepdims=True)
    row = row / np.where(level, total, 1.0)  # so that equal rows give that row
    column = np.einsum("gkl,gl->gk", up, row)
    size = np.einsum("gk,gk->g", column, row)[:, None]
    return row, np.where(size > 0, column / np.where(size > 0, size, 1.0), 0.0)


def _least_squares(activation: Any, said: dict[str, Tensor], groups: Units, mean: Floats, row: Floats) -> Floats:
    """The factors of the columns with which the new units answer most like their groups."""
    factors = {"gate": mean, "up": row}
    kept = {role: _blend(values, groups, factors[role]) for role, values in said.items()}
    new, old = activated(activation, kept).double(), activated(activation, said).double()
    size = (new * new).sum(dim=0).clamp_min(1e-300)
    fitted = np.zeros(groups.shape)
    for i in range(groups.shape[1]):
        there = groups[:, i] >= 0
        its = old[:, torch.from_numpy(np.maximum(groups[:, i], 0))]
        fitted[:, i] = np.where(there, ((its * new).sum(dim=0) / size).numpy(), 0.0)
    return fitted


def _blend(values: Tensor, groups: Units, factors: Floats) -> Tensor:
    picked = values[:, torch.from_numpy(np.maximum(groups, 0))]
    blend: Tensor = (picked * torch.from_numpy(np.where(groups >= 0, factors, 0.0)).to(values)).sum(dim=-1)
    return blend


def _activation(checkpoint: Checkpoint, mlp: Mlp) -> Any:
    name = activation_name(checkpoint.config, mlp)
    if name not in ACTIVATIONS:
        raise RequestError(f"the activation {name!r} is not known here, so no error can be measured", tensor=mlp.block)
    return ACTIVATIONS[name]


def _inputs(mlp: Mlp, use: int) -> Tensor:
    """[256, hidden], each of unit mean square; other ones for each layer and use."""
    return torch.randn(INPUTS, mlp.hidden, generator=torch.Generator().manual_seed(2 * mlp.layer + use))
