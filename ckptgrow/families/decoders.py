"""Declarations: text decoders with one MLP a layer."""

from __future__ import annotations

from typing import Any

from ckptgrow.families.form import Family, Site, adapted, linear
from ckptgrow.families.templates import (
    C_FC,
    FC,
    FC_IN,
    FOUR_H,
    FUSED_GLU,
    GELU,
    GELU_NEW,
    GLU,
    TANH_GELU,
    UP_DOWN,
    W123,
    alike,
    keys,
)

_GPT: dict[str, Any] = {"width": "n_inner", "depth": "n_layer", "hidden": "n_embd"}
_GELU_NEW: dict[str, Any] = {"activation": "activation_function", "default_activation": GELU_NEW}
_TANH: dict[str, Any] = {"activation": "hidden_activation", "default_activation": TANH_GELU}
_XIELU = tuple(f"act_fn.{name}" for name in ("alpha_n", "alpha_p", "beta", "eps"))  # one number a layer each
_XGLM = ("num_layers", "d_model", "activation_function", GELU)
_RELU2: dict[str, Any] = {"default_activation": "relu2"}

DECODERS: tuple[Family, ...] = (
    *alike(
        "cohere cohere2 diffllama doge ernie4_5 eurobert esmc granite helium hunyuan_v1_dense internlm3 minicpm3"
        " ministral ministral3 olmo qwen2 qwen3 seed_oss smollm3 stablelm",
        Site(GLU),
    ),
    *alike("llama", Site(GLU), recast="nemotron-nas"),
    *alike("mistral", Site(GLU), recast="nemotron-nas", windowed=True),
    # Llama with a width a layer; some layers may have no MLP
    *alike(
        "nemotron-nas", Site(GLU, width="block_configs", entry="ffn.ffn_mult", rule="deci", listed=True), sparse=True
    ),
    *alike("qwen3_5_text", Site(GLU), extra_layers=True),
    *alike("exaone4 olmo2 olmo3", Site(GLU), norm_after=True),
    *alike("gemma", Site(GLU, default_activation=TANH_GELU)),
    *alike("gemma2 gemma3_text vaultgemma", Site(GLU, **_TANH), norm_after=True),
    # a top-k cutoff from the mean and deviation over the width; a list of widths
    *alike("gemma3n_text", Site(GLU, listed=True, **_TANH), norm_after=True, statistics=True),
    *alike("gemma4_text", Site(GLU, multiple=True, **_TANH), norm_after=True),
    *alike("recurrent_gemma", Site(GLU, "layers.{layer}.mlp_block", rule="twice", **_TANH)),
    *alike("bitnet", Site(linear(gate="gate_proj", up="up_proj", down="down_proj", norm="ffn_sub_norm"), **_RELU2)),
    *alike("bamba falcon_h1", Site(GLU, "layers.{layer}.feed_forward")),
    # its key is rounded by a formula unless it is told not to
    *alike("lfm2", Site(W123, "layers.{layer}.feed_forward", also=(("block_auto_adjust_ff_dim", False),))),
    *alike("phi3 glm", Site(FUSED_GLU)),
    *alike("glm4", Site(FUSED_GLU), norm_after=True),
    *alike(
        "modernbert-decoder",
        Site(linear(gate_up="Wi", down="Wo"), activation="hidden_activation", default_activation=GELU),
    ),
    *alike(
        "zamba2",
        Site(
            adapted(FUSED_GLU, "gate_up_proj_adapter_list.{}.1.weight"),
            "layers.{layer}.shared_transformer.feed_forward",
            default_activation=GELU,
        ),
        sparse=True,
    ),
    *alike("apertus", Site(linear(up="up_proj", down="down_proj", beside=_XIELU), default_activation="xielu")),
    *alike("arcee nemotron", Site(UP_DOWN, **_RELU2)),
    *alike("nanochat", Site(FC, **_RELU2)),
    *alike("phi", Site(FC, default_activation=GELU_NEW)),
    *alike(
        "gpt2",
        Site(linear(turned=True, up="c_fc", down="c_proj"), "h.{layer}.mlp", **_GPT, **_GELU_NEW),
        embedding="wte.weight",
    ),
    *alike(
        "gpt_bigcode",
        Site(C_FC, "h.{layer}.mlp", **_GPT, activation="activation_function", default_activation=TANH_GELU),
        embedding="wte.weight",
    ),
    *alike("gpt_neo", Site(C_FC, "h.{layer}.mlp", depth="num_layers", **_GELU_NEW), embedding="wte.weight"),
    *alike("starcoder2", Site(C_FC, default_activation=TANH_GELU)),
    *alike("codegen gptj", Site(FC_IN, "h.{layer}.mlp", **_GPT, **_GELU_NEW), embedding="wte.weight"),
    *alike(
        "ctrl",
        Site(linear(up="0", down="2"), "h.{layer}.ffn", "dff", **keys("n_layer", "n_embd", "", "relu")),
        embedding="w.weight",
    ),
    *alike(
        "falcon",
        Site(FOUR_H, "h.{layer}.mlp", "ffn_hidden_size", activation="activation", default_activation=GELU),
        embedding="word_embeddings.weight",
    ),
    *alike("gpt_neox", Site(FOUR_H, default_activation=GELU), embedding="embed_in.weight"),
    *alike(
        "gpt_neox_japanese",
        Site(FOUR_H, width="intermediate_multiple_size", rule="per hidden", default_activation=GELU),
        embedding="embed_in.weight",
    ),
    *alike("persimmon", Site(FOUR_H, **_RELU2)),
    *alike("biogpt", Site(FC, "layers.{layer}", default_activation=GELU, open=True)),
    *alike(
        "opt",
        Site(FC, "layers.{layer}", "ffn_dim", activation="activation_function", default_activation="relu", open=True),
    ),
    *alike("xglm", Site(FC, "layers.{layer}", "ffn_dim", open=True, **keys(*_XGLM))),
    *alike(
        "rwkv",
        Site(linear(up="key", down="value"), "blocks.{layer}.feed_forward", default_activation="relu2", open=True),
        embedding="embeddings.weight",
    ),
)
