"""The few templates that most families share, and the sites that come in the same company in many of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ckptgrow.families.form import MAIN, Family, Site, linear, stack

GLU = linear(gate="gate_proj", up="up_proj", down="down_proj")
FUSED_GLU = linear(gate_up="gate_up_proj", down="down_proj")
W123 = linear(gate="w1", up="w3", down="w2")
UP_DOWN = linear(up="up_proj", down="down_proj")
FC = linear(up="fc1", down="fc2")
LINEAR_FC = linear(up="linear_fc1", down="linear_fc2")
C_FC = linear(up="c_fc", down="c_proj")
FC_IN = linear(up="fc_in", down="fc_out")
FOUR_H = linear(up="dense_h_to_4h", down="dense_4h_to_h")
DENSE = linear(up="intermediate.dense", down="output.dense")
STACK = stack(gate_up="gate_up_proj", down="down_proj")  # [E, 2F, H] and [E, H, F]
TURNED = stack(turned=True, gate_up="gate_up_proj", down="down_proj")  # [E, H, 2F] and [E, F, H]

GELU, TANH_GELU, GELU_NEW = "gelu", "gelu_pytorch_tanh", "gelu_new"

SIGLIP = (Site(FC, default_activation=TANH_GELU), Site(FC, "head.mlp", default_activation=TANH_GELU))


def keys(depth: str, hidden: str, activation: str, default: str) -> dict[str, Any]:
    """The keys of a site that are not called as most are, and the activation where the config does not say it."""
    return {"depth": depth, "hidden": hidden, "activation": activation, "default_activation": default}


def alike(model_types: str, *sites: Site, **traps: Any) -> Iterator[Family]:
    """A family of these sites for each of the names, which stand between spaces."""
    for model_type in model_types.split():
        yield Family(model_type, sites, **traps)


def experts(
    width: str = "moe_intermediate_size", block: str = "layers.{layer}.mlp", names: Site | None = None, **more: Any
) -> tuple[Site, ...]:
    """Routed experts in all their spellings: each with tensors of its own (as `names` says), or in 3-D stacks.

    transformers holds them in stacks and writes either; the Hub has stacks in both orientations.
    """
    own = replace(names or Site(GLU), stem=f"{block}.experts.{{expert}}", width=width, part="expert", **more)
    stacks = {
        replace(own, stem=f"{block.replace('block_sparse_moe', 'mlp')}.experts", template=t): None
        for t in (STACK, TURNED)
    }
    return (own, *stacks)


def shared(width: str, block: str = "layers.{layer}.mlp.shared_experts", **more: Any) -> Site:
    """An expert that every token passes."""
    return Site(more.pop("template", GLU), block, width, part="shared", **more)


def halves(**more: Any) -> tuple[Site, Site]:
    """The two sites of an encoder-decoder whose MLPs lie in the layer itself, with a width and a depth each."""
    both: dict[str, Any] = {
        "hidden": "d_model",
        "activation": "activation_function",
        "default_activation": GELU,
        "open": True,
    } | more
    stems = {
        side: Site(FC, f"{side}.*.layers.{{layer}}", f"{side}_ffn_dim", depth=f"{side}_layers", **both)
        for side in ("encoder", "decoder")
    }
    return stems["encoder"], stems["decoder"]


def within(scope: str, *sites: Site, tower: str = MAIN) -> tuple[Site, ...]:
    """The sites with their keys in a nested config, in a tower."""
    return tuple(replace(site, scope=scope, tower=tower) for site in sites)
