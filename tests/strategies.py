"""What the laws are tried on: tensor names, headers, tiny architectures, growths, and a plain reading of a Plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import checkpoints
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptgrow.families import FAMILIES, Architecture, Family, Mlp, locate
from ckptgrow.plan import Output, Plan, Share, Term
from ckptgrow.policy import POLICIES
from ckptgrow.surgery import Growth
from ckptgrow.tensors import DTYPE_BITS, TensorInfo

Infos = dict[str, TensorInfo]
Weights = Mapping[str, NDArray[np.float64]]

# The same examples in every run, and nothing left in the working folder.
LAW = settings(max_examples=60, deadline=None, derandomize=True, database=None)


# ---------------------------------------------------------------- headers

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")
awkward_names = st.sampled_from(
    ['"', "\\", "\x00", "\x1f", "\x7f", "\u2028", "é", "\U0001f600", "\ufeff", "/", "a\nb", "", "model.layers.0"]
)
tensor_names = names | awkward_names
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=3).map(tuple)
metadata = st.dictionaries(tensor_names, tensor_names, max_size=1)


@st.composite
def tensor_infos(draw: st.DrawFn, dtypes: tuple[str, ...] = tuple(DTYPE_BITS)) -> list[TensorInfo]:
    """Some tensors of unlike names, not yet placed; those of half bytes fill whole ones."""
    infos = []
    for name in draw(st.lists(tensor_names, unique=True, max_size=6)):
        dtype, shape = draw(st.sampled_from(dtypes)), draw(shapes)
        infos.append(TensorInfo(name, dtype, (*shape, 4) if DTYPE_BITS[dtype] % 8 else shape))
    return infos


# ---------------------------------------------------------------- architectures


def infos_of(
    family: Family | str,
    *,
    layers: int = 2,
    hidden: int = 3,
    width: int = 4,
    dtype: str = "BF16",
    bias: bool = False,
    prefix: str = "model.",
    tied: bool = True,
) -> Infos:
    """The tensor descriptions of a tiny checkpoint of that family, as its headers would give them."""
    family = FAMILIES[family] if isinstance(family, str) else family
    tensors = checkpoints.tensors_of(
        family,
        layers=layers,
        hidden=hidden,
        width=width,
        dtype=dtype,
        bias=bias,
        prefix=prefix,
        tied=tied,
        seed=0,
    )
    return {name: TensorInfo(name, dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def config_of(family: Family | str, *, layers: int = 2, hidden: int = 3, width: int = 4) -> dict[str, Any]:
    """The config.json that goes with `infos_of`."""
    family = FAMILIES[family] if isinstance(family, str) else family
    return checkpoints.config_of(family, layers=layers, hidden=hidden, width=width)


@dataclass(frozen=True)
class Tiny:
    """A tiny checkpoint without weights: its tensors, and the architecture found in them."""

    infos: Infos
    architecture: Architecture


@cache
def tiny(model_type: str = "llama", width: int = 4, hidden: int = 3, layers: int = 2, bias: bool = False) -> Tiny:
    """The tiny checkpoint of that family; equal calls give the same one."""
    infos = infos_of(model_type, width=width, hidden=hidden, layers=layers, bias=bias)
    return Tiny(infos, locate(config_of(model_type, width=width, hidden=hidden, layers=layers), infos))


# Those that any growth fits: no statistics over the width, no key that says a ratio.
FREE = sorted(
    name
    for name in checkpoints.USUAL
    if not FAMILIES[name].statistics
    and not any(s.template.normed or s.rule == "per hidden" for s in checkpoints.sites_of(FAMILIES[name]))
)


def _is_plain(name: str) -> bool:
    groups = tiny(name).architecture.groups
    slots = [slot for mlp in groups[0].mlps for slot in mlp.tensors.values()]
    odd = any(slot.stacked or slot.flat or slot.extra or slot.span > 1 for slot in slots)
    return len(groups) == 1 and not odd and groups[0].site.rule == "units" and not groups[0].site.also


# Those whose MLPs have tensors of their own and one width.
PLAIN = [name for name in FREE if _is_plain(name)]
# One family for each company of templates.
LAYOUTS = sorted(
    {
        tuple(site.template for site in checkpoints.sites_of(FAMILIES[name])): name
        for name in sorted(checkpoints.USUAL, reverse=True)
    }.values()
)


def fitting(family: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a growth, but for what this family cannot have: layers, part of a round, half of what alternates.

    Where its config may have a list of widths, the layers that do not grow stay as they are.
    """
    sites, found = checkpoints.sites_of(FAMILIES[family]), dict(options)
    if any("{layer}" not in site.stem for site in sites):
        found.pop("layers", None)
    if family not in FREE and "width" in found:
        found |= {"width": None, "factor": 2}
    if any(slot.span > 1 for site in sites for slot in site.template.slots) and found.get("policy") in ("up", "down"):
        found["policy"] = "g-freeze"
    if "layers" in found and any(site.listed for site in sites):
        found["uneven"] = "native"
    return found


tinies = st.builds(
    tiny,
    st.sampled_from(FREE),
    width=st.integers(1, 7),
    hidden=st.integers(1, 3),
    layers=st.integers(1, 2),
    bias=st.booleans(),
)


@st.composite
def growths(draw: st.DrawFn, old: int) -> Growth:
    """Any growth of an MLP of width `old` that is allowed."""
    factor = draw(st.none() | st.integers(2, 5))
    width = None if factor else draw(st.none() | st.integers(old + 1, 4 * old + 3))
    return Growth(
        factor=factor,
        width=width,
        multiple_of=draw(st.sampled_from([1, 1, 2, 8])),
        policy=draw(st.sampled_from(sorted(POLICIES))),
        shares=draw(st.sampled_from(["auto", "even", "random"])),
        seed=draw(st.sampled_from([0, 1, 2**63 - 1])),
    )


# ---------------------------------------------------------------- a plain reading of a Plan, in real arithmetic


def value_of(share: Share | None) -> float:
    """A number for each share such that all shares of one weight, and nothing else, add up to 1."""
    if share is None:
        return 1.0
    lean = 1.1 + 0.37 * (share.seed % 97) if share.rule == "random" else 1.0
    return value_of(share.of) * (share.index + lean) / sum(i + lean for i in range(share.count))


def executed(output: Output, weights: Weights) -> NDArray[np.float64]:
    """What the executor would write for this output, computed from whole arrays; NaN where nothing is."""
    outer, inner = output.steps
    whole, filled = np.full((outer, output.extent, inner), np.nan), dict[range | None, int]()
    for part in output.parts:
        rows, start = part.slices or range(outer), filled.get(part.slices, 0)
        total = np.zeros((len(rows), part.size, inner))
        for term in part.terms:
            total += _picked(term, output.axis, weights)[rows.start - term.shift : rows.stop - term.shift]
        whole[rows.start : rows.stop, start : start + part.size] = total
        filled[part.slices] = start + part.size
    return whole.reshape(output.shape)


def _picked(term: Term, axis: int, weights: Weights) -> NDArray[np.float64]:
    """The units as [slices, units, inner]."""
    source = weights[term.name]
    seen = source.reshape(int(np.prod(source.shape[:axis])), source.shape[axis], -1)
    return seen[:, list(term.units)] * term.scale * value_of(term.share)


def same_function(plan: Plan, tiny: Tiny) -> bool:
    """Whether the MLPs of the Plan's result answer as the base's do, and all else is equal: by running them."""
    draw = np.random.default_rng(0)
    base = {name: draw.normal(size=info.shape) for name, info in tiny.infos.items()}
    if {output.name for output in plan.outputs} != set(base):
        return False
    try:
        grown = {output.name: executed(output, base) for output in plan.outputs}
        inside = {name for mlp in tiny.architecture.mlps for name in mlp.tensors}
        return all(np.array_equal(grown[name], base[name]) for name in base.keys() - inside) and all(
            np.allclose(answer(grown, tiny, i), answer(base, tiny, i)) for i in range(len(tiny.architecture.mlps))
        )
    except ValueError:  # shapes that do not go together
        return False


def answer(weights: Weights, tiny: Tiny, index: int) -> NDArray[np.float64]:
    """One MLP, or each of its experts, on a fixed input: down(act(gate x) * up x), with the biases of gate and up."""
    mlp = tiny.architecture.mlps[index]
    return np.stack([_answer(weights, mlp, expert) for expert in range(mlp.experts)])


def _answer(weights: Weights, mlp: Mlp, expert: int) -> NDArray[np.float64]:
    lanes: dict[str, Any] = {}
    for name, slot in mlp.tensors.items():
        value = weights[name]
        if slot.flat:
            value = value.reshape(mlp.experts, -1, value.shape[-1])
        if slot.flat or slot.stacked:
            value = value[expert]
        units = slot.axis - int(slot.stacked)
        rows = value if slot.vector else np.moveaxis(value, units, 0)
        if slot.lanes[0] == "down":
            down = rows
            continue
        made = rows if slot.vector else rows @ np.linspace(-1.0, 2.0, rows.shape[1])
        names = slot.lanes[0].split("_") if slot.span > 1 else slot.lanes[:1] if slot.flat else slot.lanes
        halves = [made[i :: slot.span] for i in range(slot.span)] if slot.span > 1 else np.split(made, len(names))
        for lane, half in zip(names, halves, strict=True):
            lanes[lane] = lanes.get(lane, 0.0) + half
    inner = np.tanh(lanes["gate"]) * lanes["up"] if "gate" in lanes else np.tanh(lanes["up"])
    if "norm" in lanes:
        inner = inner / np.sqrt(np.mean(inner**2) + 1e-6) * lanes["norm"]
    return np.asarray(inner @ down)
