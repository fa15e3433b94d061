"""A Llama in the words of nemotron-nas: the same tensors, under a config that says a width for each layer.

`DeciLMForCausalLM` builds Llama's layers from `block_configs` (vLLM's nemotron_nas.py, NVIDIA's own model code on the
Hub, mlx-lm's nemotron-nas.py). Only what all of these compute as Llama does is taken over; the rest is refused with the
reason. Keys that they have other defaults for are written out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ckptgrow.errors import FamilyError
from ckptgrow.families.found import DECI_STEP, Architecture, Mlp, deci_factor, value_at
from ckptgrow.families.locate import Infos, locate
from ckptgrow.families.table import FAMILIES
from ckptgrow.plan import Edit

ARCHITECTURE = "DeciLMForCausalLM"
_SAID = (
    *("hidden_size", "num_attention_heads", "num_hidden_layers"),
    *("vocab_size", "max_position_embeddings", "rms_norm_eps"),
)
# The keys of each kind of rotary embedding that every loader computes alike.
_ROPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ATTENTION = {
    "no_op": False,
    "num_sink_tokens": None,
    "replace_with_linear": False,
    "sparsify": None,
    "unshifted_sink": False,
    "use_prefill_window_in_sink_attention": False,
    "window_length": None,
}
_FFN = {"no_op": False, "replace_with_linear": False, "sparsify": None}
_LAYER = ("input_layernorm", "post_attention_layernorm", *(f"self_attn.{role}_proj" for role in "qkvo"))


def recast(architecture: Architecture, config: Mapping[str, Any], infos: Infos) -> Architecture:
    """The architecture as one whose config says a width for each layer: itself where it does, or has no such relative.

    Raises FamilyError where the relative does not compute what this checkpoint does.
    """
    family = architecture.family
    if not family.recast or any(group.site.listed for group in architecture.groups):
        return architecture
    try:
        edits = tuple(_edits(architecture, config, infos))
    except FamilyError as error:
        problem = f"it cannot be told as {ARCHITECTURE}, whose layers have widths of their own: {error.problem}"
        raise FamilyError(problem, file=error.file, tensor=error.tensor, hint=error.hint) from None
    told = {**config, **{edit.path: edit.value for edit in edits}}
    found = locate(told, infos, family=FAMILIES[family.recast])
    return replace(found, native=family, recast=edits)


def recast_like(architecture: Architecture, base: Mapping[str, Any], infos: Infos, other: Any) -> Architecture:
    """The architecture of `base` in the words of another config, where that is its relative's."""
    if not isinstance(other, str) or other != architecture.family.recast:
        return architecture
    try:
        return recast(architecture, base, infos)
    except FamilyError:  # then the two configs say different things
        return architecture


def _edits(architecture: Architecture, config: Mapping[str, Any], infos: Infos) -> Iterator[Edit]:
    """What changes in config.json, as far as it does."""
    _check_config(config, windowed=architecture.family.windowed)
    mlps = architecture.mlps
    _check_tensors(mlps, infos)
    heads = config["num_attention_heads"]
    theta, scaling = _rope(config)
    wanted = {
        "architectures": [ARCHITECTURE],
        "model_type": architecture.family.recast,
        "intermediate_size": None,  # as in NVIDIA's: block_configs says it
        "num_key_value_heads": None,
        "head_dim": config["hidden_size"] // heads,
        "hidden_act": "silu",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "attention_bias": False,
        "mlp_bias": _biased(mlps, infos),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "block_configs": [_block(mlp, heads, infos) for mlp in mlps],
    }
    yield from (Edit(key, value) for key, value in wanted.items() if key not in config or config[key] != value)


def _block(mlp: Mlp, heads: int, infos: Infos) -> dict[str, Any]:
    if mlp.width % DECI_STEP:
        raise FamilyError(
            f"its config can only say widths that are multiples of {DECI_STEP}, and this one is {mlp.width:,}",
            tensor=mlp.block,
            hint="Leave out --uneven native: the other layers are filled up to the same width.",
        )
    rows, _ = infos[f"{_layer(mlp)}.self_attn.k_proj.weight"].shape
    group = mlp.hidden // rows
    ffn = {"ffn_mult": deci_factor(mlp.width, mlp.hidden), **_FFN}
    return {"attention": {"n_heads_in_group": group, **_ATTENTION}, "ffn": ffn}


def _layer(mlp: Mlp) -> str:
    return mlp.block.rpartition(".")[0]


# ---------------------------------------------------------------- what it cannot say, or computes otherwise


def _check_config(config: Mapping[str, Any], *, windowed: bool) -> None:
    for key in _SAID:
        if type(config.get(key)) not in (int, float):
            raise FamilyError(f"config.json does not say {key}, and loaders have different defaults")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim")
    if hidden % heads or (head is not None and head * heads != hidden):
        raise FamilyError(f"its heads must have hidden_size / num_attention_heads = {hidden / heads:g} places each")
    if config.get("hidden_act", "silu") != "silu":
        raise FamilyError(f"hidden_act is {config['hidden_act']!r}, where it takes silu")
    if config.get("attention_bias") or config.get("qkv_bias"):
        raise FamilyError("its attention has biases")
    if config.get("sliding_window", windowed or None) is not None:
        raise FamilyError("its attention has a sliding window (sliding_window must be null)")
    if "auto_map" in config:
        raise FamilyError("its config names code of its own (auto_map)")


def _check_tensors(mlps: tuple[Mlp, ...], infos: Infos) -> None:
    """Every tensor one that Llama has, under `model.`, and the heads of keys in equal groups."""
    layers = [_layer(mlp) for mlp in mlps]
    if not layers[0].startswith("model.layers."):
        raise FamilyError("its names must begin with model.layers.", tensor=mlps[0].block)
    known = {f"{layer}.{name}.weight" for layer in layers for name in _LAYER}
    known |= {"model.embed_tokens.weight", "model.norm.weight"}
    known |= {name for mlp in mlps for name in (*mlp.tensors, *_biases(mlp))}
    for name in infos:
        if name not in known | {"lm_head.weight"}:
            raise FamilyError("it has no such tensor", tensor=name)
    for name in sorted(known):
        if name.endswith("weight") and name not in infos:
            raise FamilyError("it is missing", tensor=name)
    biases = [name for mlp in mlps for name in _biases(mlp)]
    for name in biases if _biased(mlps, infos) else ():
        if name not in infos:
            raise FamilyError("it is missing, but its MLPs have biases", tensor=name)
    for mlp in mlps:
        _check_shapes(mlp, infos)


def _biases(mlp: Mlp) -> list[str]:
    """What the biases of an MLP are called, whether they are there or not."""
    template = mlp.site.template
    names = (*(slot.name for slot in template.slots if slot.bias), *template.still)
    return [f"{mlp.block}.{name}" for name in names]


def _biased(mlps: tuple[Mlp, ...], infos: Infos) -> bool:
    return any(name in infos for mlp in mlps for name in _biases(mlp))


def _check_shapes(mlp: Mlp, infos: Infos) -> None:
    for role in "qkvo":
        info = infos[f"{_layer(mlp)}.self_attn.{role}_proj.weight"]
        rows = info.shape[0] if info.shape else 0
        if len(info.shape) != 2 or info.shape[1] != mlp.hidden or not rows or mlp.hidden % rows:
            raise FamilyError(f"shape {list(info.shape)} is no projection of Llama's attention", tensor=info.name)
        if role in "qo" and rows != mlp.hidden:
            raise FamilyError(f"shape {list(info.shape)}, where [{mlp.hidden}, {mlp.hidden}] belongs", tensor=info.name)


def _rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) of the rotary embedding, in the older keys that its loaders read."""
    new = config.get("rope_parameters") or {}
    told = config.get("rope_scaling") or new
    theta = new.get("rope_theta", told.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = told.get("rope_type", told.get("type", "default"))
    partial = [place.get("partial_rotary_factor", 1.0) for place in (config, told, new)]
    if kind not in _ROPES or any(part != 1.0 for part in partial) or type(theta) not in (int, float):
        raise FamilyError(f"its rotary embedding is of the kind {kind!r}, or turns a part of each head only")
    lacking = [key for key in _ROPES[kind] if type(value_at(told, key)) not in (int, float)]
    if lacking:
        raise FamilyError(f"config.json does not say {', '.join(lacking)} of its rotary embedding")
    return theta, {"rope_type": kind, **{key: told[key] for key in _ROPES[kind]}} if kind != "default" else None
