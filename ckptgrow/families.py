"""Which tensors carry an MLP's width, family by family: data, and the check of that data against real shapes.

A Template says what one MLP is made of (projections, axes, fusion, biases). A Family says where its MLPs sit, which
config keys give their width and depth, and the traps. There is no code per family: `locate` reads any of them, and
refuses a checkpoint in which a declared tensor is missing, an undeclared one sits beside it, or shapes contradict.
Widths are read from tensor shapes, never from the config, which omits keys, holds None, or is wrong.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ckptgrow.errors import FamilyError
from ckptgrow.plan import Member
from ckptgrow.tensors import TensorInfo

HEAD = "lm_head.weight"
# What shares can be made of. Other float formats need their scales grown with them.
GROWABLE_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


# ---------------------------------------------------------------- the form of the table


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of an MLP that has an axis of units: its name below the block, the axis, what its lanes are."""

    name: str
    lanes: tuple[str, ...]
    axis: int
    bias: bool = False

    @property
    def required(self) -> bool:
        return not self.bias


@dataclass(frozen=True, slots=True)
class Template:
    """What one MLP is made of. `still` names the tensors beside it that have no axis of units."""

    slots: tuple[Slot, ...]
    still: tuple[str, ...]
    gated: bool


def linear(**projections: str) -> Template:
    """The template of Linear layers in [out, in] layout, each with or without bias: `linear(up="fc1", down="fc2")`.

    A key with an underscore is a fused projection whose halves come in that order: `gate_up="gate_up_proj"`.
    """
    slots: list[Slot] = []
    for role, module in projections.items():
        lanes = tuple(role.split("_"))
        slots.append(Slot(f"{module}.weight", lanes, axis=1 if role == "down" else 0))
        if role != "down":
            slots.append(Slot(f"{module}.bias", lanes, axis=0, bias=True))
    gated = any("gate" in slot.lanes for slot in slots)
    return Template(tuple(slots), still=(f"{projections['down']}.bias",), gated=gated)


@dataclass(frozen=True, slots=True)
class Family:
    """One model_type: where its MLPs are and which config keys describe them. Keys are relative to `scope`."""

    model_type: str
    template: Template
    stem: str = "layers.{layer}.mlp"
    scope: str = ""  # the nested config that holds the keys below
    width: str = "intermediate_size"
    depth: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    activation: str = "hidden_act"
    default_activation: str = "silu"  # where the config does not say
    listed: bool = False  # the width may be a list, a number for each layer
    statistics: bool = False  # it takes statistics over the width, so every unit must come equally often
    norm_after: bool = False  # a norm follows the MLP: outputs cannot see the scale of down (METHOD.md 8)
    embedding: str = "embed_tokens.weight"
    in_memory: tuple[tuple[str, str], ...] = ()  # prefix on disk -> prefix in a transformers model


# ---------------------------------------------------------------- the table

GLU = linear(gate="gate_proj", up="up_proj", down="down_proj")
TANH_GELU = "gelu_pytorch_tanh"
FUSED_GLU = linear(gate_up="gate_up_proj", down="down_proj")

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("cohere", GLU),
        Family("cohere2", GLU),
        Family("gemma", GLU, default_activation=TANH_GELU),
        Family("gemma2", GLU, activation="hidden_activation", default_activation=TANH_GELU, norm_after=True),
        Family("gemma3_text", GLU, activation="hidden_activation", default_activation=TANH_GELU, norm_after=True),
        Family(
            "gemma3",
            GLU,
            scope="text_config",
            activation="hidden_activation",
            default_activation=TANH_GELU,
            norm_after=True,
            in_memory=(("language_model.model.", "model.language_model."),),
        ),
        Family(
            "gemma3n_text",
            GLU,
            activation="hidden_activation",
            default_activation=TANH_GELU,
            listed=True,
            statistics=True,
            norm_after=True,
        ),
        Family(
            "gpt_neo",
            linear(up="c_fc", down="c_proj"),
            stem="h.{layer}.mlp",
            depth="num_layers",
            activation="activation_function",
            default_activation="gelu_new",
            embedding="wte.weight",
        ),
        Family("granite", GLU),
        Family("llama", GLU),
        Family("mistral", GLU),
        Family("olmo2", GLU, norm_after=True),
        Family("phi", linear(up="fc1", down="fc2"), default_activation="gelu_new"),
        Family("phi3", FUSED_GLU),
        Family("qwen2", GLU),
        Family("qwen3", GLU),
        Family("smollm3", GLU),
    )
}

# Known architectures that cannot grow, and why.
REFUSED: Mapping[str, str] = {
    "bloom": "its MLP width is fixed at 4 x hidden_size in the model code: no config key can say the new width",
    "falcon_mamba": "it has no MLP: intermediate_size is the inner width of its state-space mixer",
    "mamba": "it has no MLP: intermediate_size is the inner width of its state-space mixer",
    "mamba2": "it has no MLP",
    "mpt": "its MLP width is fixed at 4 x d_model in the model code: config.expansion_ratio is ignored",
    "openai-gpt": "its MLP width is fixed at 4 x n_embd in the model code: no config key can say the new width",
}


# ---------------------------------------------------------------- reading it against a checkpoint


@dataclass(frozen=True)
class Mlp:
    """One MLP found in a checkpoint: its tensors by what they are in it, and its width read from their shapes."""

    block: str
    layer: int
    tensors: Mapping[str, Slot]  # tensor name -> slot, in the template's order
    width: int
    hidden: int

    def member(self, name: str) -> Member:
        slot = self.tensors[name]
        return Member(self.block, self.layer, slot.lanes, slot.bias)

    @cached_property
    def down(self) -> str:
        """The name of the tensor of shares."""
        return next(name for name, slot in self.tensors.items() if slot.lanes == ("down",))


@dataclass(frozen=True)
class Architecture:
    """A family found in a checkpoint: all its MLPs. `says` is what the config gives for their width, if anything.

    They have one width, unless `says` is a list.
    """

    family: Family
    mlps: tuple[Mlp, ...]
    says: Any = None

    @property
    def width(self) -> int:
        return self.mlps[0].width

    @property
    def width_path(self) -> str:
        """The dotted config key of the width."""
        return ".".join(filter(None, (self.family.scope, self.family.width)))

    @property
    def widths(self) -> dict[str, int]:
        """The width of each MLP, by block."""
        return {mlp.block: mlp.width for mlp in self.mlps}

    def told(self, value: Any, mlp: Mlp) -> int | None:
        """The width of that MLP in the config's words, None where they do not say it."""
        if isinstance(value, list) and self.family.listed:
            value = value[mlp.layer] if len(value) == len(self.mlps) else None
        return value if type(value) is int else None

    def value_of(self, widths: Mapping[str, int]) -> Any:
        """What the config must say when the MLPs have these widths, by block: a list only where it must be one."""
        values = [widths[mlp.block] for mlp in self.mlps]
        return values if isinstance(self.says, list) or len(set(values)) > 1 else values[0]


def locate(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> Architecture:
    """The family of a checkpoint and all its MLPs, checked against the shapes. Raises FamilyError."""
    family = family_of(config)
    scope = scoped(config, family)
    _check_not_quantised(config, scope)
    found = _group(family, infos)
    mlps = tuple(_mlp(family, block, names, infos) for block, names in sorted(found.items(), key=_by_layer))
    _check_together(family, scope, mlps)
    return Architecture(family, mlps, scope.get(family.width))


def family_of(config: Mapping[str, Any]) -> Family:
    """The declaration for this config's model_type. Raises FamilyError for unknown and for refused ones."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise FamilyError("it has no model_type", file="config.json")
    if model_type in REFUSED:
        raise FamilyError(f"model_type {model_type!r} cannot be grown: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        raise FamilyError(f"unknown model_type {model_type!r}", hint=f"Known: {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[model_type]


def scoped(config: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """The (nested) config that holds the family's keys."""
    scope = config.get(family.scope) if family.scope else config
    if not isinstance(scope, Mapping):
        raise FamilyError(f"model_type {family.model_type!r} keeps its width in {family.scope}, which is missing")
    return scope


def in_memory_name(family: Family, name: str) -> str:
    """The name under which transformers holds a tensor of this name on disk."""
    for disk, memory in family.in_memory:
        if name.startswith(disk):
            return memory + name.removeprefix(disk)
    return name


def ties(config: Mapping[str, Any], family: Family, infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Tensors that are not on disk because they are another one: {"lm_head.weight": the embedding's name}."""
    untied = False in (config.get("tie_word_embeddings"), scoped(config, family).get("tie_word_embeddings"))
    if untied or any(ends_in(name, HEAD) for name in infos):
        return {}
    embeddings = [name for name in infos if ends_in(name, family.embedding)]
    return {HEAD: embeddings[0]} if embeddings else {}


def ends_in(name: str, ending: str) -> bool:
    """Whether a tensor's name is that one, under any prefix."""
    return name == ending or name.endswith("." + ending)


def _check_not_quantised(config: Mapping[str, Any], scope: Mapping[str, Any]) -> None:
    quantised = config.get("quantization_config") or scope.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, Mapping) else quantised
        raise FamilyError(
            f"the weights are quantised ({method})",
            file="config.json",
            hint="Grow the unquantised checkpoint and quantise the result.",
        )


def _by_layer(found: tuple[tuple[str, int], Any]) -> tuple[str, int]:
    (block, layer), _ = found
    return block.partition(f".{layer}.")[0], layer


def _group(family: Family, infos: Mapping[str, TensorInfo]) -> dict[tuple[str, int], list[str]]:
    """All tensors that lie inside one of the family's blocks, by (block, layer)."""
    stem = re.escape(family.stem).replace(re.escape("{layer}"), r"(?P<layer>\d+)")
    pattern = re.compile(rf"(?P<block>(?:.+\.)?{stem})\.(?P<slot>.+)", re.DOTALL)
    wanted = {slot.name for slot in family.template.slots}
    found: dict[tuple[str, int], list[str]] = defaultdict(list)
    blocks = set()
    for name in infos:
        if match := pattern.fullmatch(name):
            found[match["block"], int(match["layer"])].append(name)
            if match["slot"] in wanted:
                blocks.add((match["block"], int(match["layer"])))
    if not blocks:
        stem = family.stem.replace("{layer}", "N")
        raise FamilyError(f"model_type {family.model_type!r}, but no tensor is named [...]{stem}.{min(wanted)}")
    return {key: names for key, names in found.items() if key in blocks}


def _mlp(family: Family, key: tuple[str, int], names: list[str], infos: Mapping[str, TensorInfo]) -> Mlp:
    block, layer = key
    template, prefix = family.template, key[0] + "."
    present = {slot: prefix + slot.name for slot in template.slots if prefix + slot.name in infos}
    for slot in template.slots:
        if slot.required and slot not in present:
            raise FamilyError("it is missing, but other tensors of its MLP are there", tensor=prefix + slot.name)
    declared = {*present.values(), *(prefix + still for still in template.still)}
    for name in sorted(set(names) - declared):
        raise FamilyError(
            f"model_type {family.model_type!r} declares no such tensor, and growing the MLP around it may break it",
            tensor=name,
            hint="A quantised or customised checkpoint? Grow a plain one.",
        )
    return _measured(block, layer, {name: slot for slot, name in present.items()}, infos)


def _measured(block: str, layer: int, tensors: Mapping[str, Slot], infos: Mapping[str, TensorInfo]) -> Mlp:
    """The Mlp, its width and hidden size read from the first tensor and demanded of the others."""
    width = hidden = None
    for name, slot in tensors.items():
        info = infos[name]
        if len(info.shape) != (1 if slot.bias else 2) or info.shape[slot.axis] % len(slot.lanes):
            raise FamilyError(
                f"shape {list(info.shape)} is not that of a {'_'.join(slot.lanes)} projection", tensor=name
            )
        if info.dtype not in GROWABLE_DTYPES:
            raise FamilyError(
                f"{info.dtype} weights cannot be shared out",
                tensor=name,
                hint=f"Grow a checkpoint in one of {', '.join(GROWABLE_DTYPES)}.",
            )
        units = info.shape[slot.axis] // len(slot.lanes)
        other = None if slot.bias else info.shape[1 - slot.axis]
        width = units if width is None else width
        hidden = other if hidden is None else hidden
        if units != width or other not in (None, hidden):
            raise FamilyError(
                f"shape {list(info.shape)} contradicts the width {width} and hidden size {hidden} of its MLP",
                tensor=name,
            )
    if not width or not hidden:
        raise FamilyError("its MLP has no units", tensor=next(iter(tensors)))
    return Mlp(block, layer, tensors, width, hidden)


def _check_together(family: Family, scope: Mapping[str, Any], mlps: tuple[Mlp, ...]) -> None:
    """One width (or a list of them), one hidden size, the same tensors in every layer, and every layer there."""
    first = mlps[0]
    stacks = {mlp.block.removesuffix(family.stem.format(layer=mlp.layer)) for mlp in mlps}
    if len(stacks) > 1:
        raise FamilyError(f"MLPs under several prefixes ({', '.join(sorted(stacks))}), where one stack was expected")
    says: Any = scope.get(family.width)
    listed = family.listed and isinstance(says, list)
    if listed and len(says) != len(mlps):
        raise FamilyError(f"{family.width} lists {len(says)} widths for {len(mlps)} MLPs", file="config.json")
    for mlp in mlps:
        if (mlp.width if not listed else first.width, mlp.hidden) != (first.width, first.hidden):
            raise FamilyError(
                f"width {mlp.width} and hidden size {mlp.hidden}, but {first.width} and {first.hidden} in"
                f" {first.block}: one config number cannot describe both",
                tensor=mlp.block,
            )
        _check_same_slots(first, mlp)
    _check_depth(family, scope, mlps)
    hidden = scope.get(family.hidden)
    if isinstance(hidden, int) and hidden != first.hidden:
        raise FamilyError(f"hidden size {first.hidden}, but config.json says {hidden}", tensor=first.down)


def _check_same_slots(first: Mlp, mlp: Mlp) -> None:
    slots, theirs = set(first.tensors.values()), set(mlp.tensors.values())
    for slot in slots ^ theirs:
        lacking = mlp if slot in slots else first
        raise FamilyError("it is missing, but other layers have it", tensor=f"{lacking.block}.{slot.name}")


def _check_depth(family: Family, scope: Mapping[str, Any], mlps: tuple[Mlp, ...]) -> None:
    """Layers counted from 0 without a hole, as many as the config says, where it says so."""
    depth, present = scope.get(family.depth), [mlp.layer for mlp in mlps]
    says = depth if isinstance(depth, int) else len(mlps)
    for layer in range(max(says, max(present) + 1)):
        if layer < says and layer not in present:
            why = f"{family.depth} is {depth}" if isinstance(depth, int) else "later layers are there"
            raise FamilyError(f"it is missing, but {why}", tensor=_name_in(family, mlps[0], layer))
        if layer >= says and layer in present:
            raise FamilyError(
                f"{family.depth} is {depth}, so no loader reads it", tensor=_name_in(family, mlps[0], layer)
            )


def _name_in(family: Family, mlp: Mlp, layer: int) -> str:
    """The first tensor of another layer's MLP in the same stack."""
    stack = mlp.block.removesuffix(family.stem.format(layer=mlp.layer))
    return f"{stack}{family.stem.format(layer=layer)}.{family.template.slots[0].name}"
