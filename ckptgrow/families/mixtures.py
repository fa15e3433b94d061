"""Declarations: mixtures of experts. Dense layers, routed and shared experts have a key each, or grow together."""

from __future__ import annotations

from typing import Any

from ckptgrow.families.form import Family, Site, flat, linear, stack
from ckptgrow.families.templates import FUSED_GLU, GLU, STACK, TURNED, UP_DOWN, W123, alike, experts, shared

_FEED_FORWARD = "layers.{layer}.feed_forward"
_SPARSE = "layers.{layer}.block_sparse_moe"
_DENSE = Site(GLU)
_MOE = "moe_intermediate_size"
_COUPLED = (_DENSE, *experts(), shared(_MOE, multiple=True))
QWEN_MOE = (_DENSE, *experts(), shared("shared_expert_intermediate_size", "layers.{layer}.mlp.shared_expert"))
_INPUT_OUTPUT = linear(gate_up="input_linear", down="output_linear")
_INPUT_OUTPUT_STACK = stack(gate_up="input_linear", down="output_linear", ending=".weight")
_GRANITE = (
    Site(_INPUT_OUTPUT_STACK, _SPARSE, part="expert", open=True),
    Site(STACK, f"{_SPARSE}.experts", part="expert"),
    shared("shared_intermediate_size", "layers.{layer}.shared_mlp", template=_INPUT_OUTPUT),
    shared("shared_intermediate_size", "layers.{layer}.shared_mlp", template=FUSED_GLU),
    shared("shared_intermediate_size", "layers.{layer}.shared_mlp"),
)
LLAMA4 = (
    Site(GLU, _FEED_FORWARD, "intermediate_size_mlp"),
    Site(TURNED, f"{_FEED_FORWARD}.experts", part="expert"),
    shared("intermediate_size", f"{_FEED_FORWARD}.shared_expert"),
)
_MIXER = "layers.{layer}.mixer"
_RELU2: dict[str, Any] = {"activation": "mlp_hidden_act", "default_activation": "relu2"}

MIXTURES: tuple[Family, ...] = (
    *alike("deepseek_v2 deepseek_v32 dots1 ernie4_5_moe glm4_moe_lite mistral4 solar_open", *_COUPLED),
    *alike("deepseek_v3 glm4_moe", *_COUPLED, extra_layers=True),
    *alike("afmoe", *_COUPLED, norm_after=True),
    *alike("qwen3_moe", _DENSE, *experts()),
    *alike("mimo_v2_flash", _DENSE, *experts(), extra_layers=True),
    *alike("qwen2_moe", *QWEN_MOE),
    *alike("qwen3_next qwen3_5_moe_text", *QWEN_MOE, extra_layers=True),
    *alike("olmoe", *experts("intermediate_size")),
    *alike("flex_olmo", *experts("intermediate_size"), norm_after=True),
    *alike(
        "hunyuan_v1_moe", *experts("intermediate_size"), shared("intermediate_size", "layers.{layer}.mlp.shared_mlp")
    ),
    *alike("minimax minimax_m2 mixtral phimoe", *experts("intermediate_size", _SPARSE, Site(W123))),
    *alike(
        "kimi_linear",
        Site(GLU, _SPARSE),
        _DENSE,
        *experts(_MOE, _SPARSE, Site(W123)),
        shared(_MOE, f"{_SPARSE}.shared_experts", multiple=True),
        shared(_MOE, multiple=True),
    ),
    *alike(
        "deepseek_v4",
        *experts(_MOE, "layers.{layer}.ffn", Site(W123), bent=True),
        *experts(_MOE, bent=True),
        shared(_MOE, "layers.{layer}.ffn.shared_experts", template=W123, multiple=True, bent=True),
        shared(_MOE, multiple=True, bent=True),
        extra_layers=True,
    ),
    *alike("jamba", Site(GLU, _FEED_FORWARD), *experts("intermediate_size", _FEED_FORWARD)),
    *alike("lfm2_moe", Site(W123, _FEED_FORWARD), *experts(_MOE, _FEED_FORWARD, Site(W123))),
    *alike("llama4_text", *LLAMA4),
    *alike(
        "aria_text",
        Site(
            stack(turned=True, gate_up="fc1", down="fc2", ending=".weight"), "layers.{layer}.mlp.experts", part="expert"
        ),
        Site(TURNED, "layers.{layer}.mlp.experts", part="expert"),
        shared("intermediate_size", multiple=True),
    ),
    *alike("granitemoe granitemoehybrid granitemoeshared", *_GRANITE),
    *alike("jetmoe", Site(_INPUT_OUTPUT_STACK, part="expert", activation="activation_function", open=True)),
    *alike(
        "gpt_oss",
        Site(
            stack(turned=True, interleaved=True, biases=True, gate_up="gate_up_proj", down="down_proj"),
            "layers.{layer}.mlp.experts",
            part="expert",
            bent=True,
        ),
    ),
    *alike(
        "longcat_flash",
        Site(GLU, "layers.{layer}.mlps.{}", "ffn_hidden_size", depth="num_layers"),
        *experts("expert_ffn_hidden_size", depth="num_layers", spare=True),
    ),
    *alike(
        "nemotron_h",
        Site(UP_DOWN, _MIXER, **_RELU2),
        *experts(_MOE, _MIXER, Site(UP_DOWN), **_RELU2),
        Site(stack(up="up_proj", down="down_proj"), f"{_MIXER}.experts", _MOE, "expert", **_RELU2),
        shared("moe_shared_expert_intermediate_size", f"{_MIXER}.shared_experts", template=UP_DOWN, **_RELU2),
        sparse=True,
        embedding="embeddings.weight",
        in_memory=(("backbone.", "model."),),
    ),
    *alike(
        "dbrx",
        Site(
            flat(gate="w1", up="v1", down="w2"),
            "blocks.{layer}.ffn.experts.mlp",
            "ffn_config.ffn_hidden_size",
            part="expert",
            depth="n_layers",
            hidden="d_model",
            activation="ffn_config.ffn_act_fn.name",
            experts="ffn_config.moe_num_experts",
        ),
        embedding="wte.weight",
    ),
)
