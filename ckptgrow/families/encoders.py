"""Declarations: encoders of text, images and sound, and encoder-decoders."""

from __future__ import annotations

from typing import Any

from ckptgrow.families.form import Family, Part, Site, linear
from ckptgrow.families.templates import DENSE, FC, GELU, GELU_NEW, GLU, SIGLIP, TANH_GELU, UP_DOWN, alike, halves, keys

_LAYER = Site(DENSE, "layer.{layer}", default_activation=GELU, open=True)
_VIT = (_LAYER, Site(FC, "layers.{layer}.mlp", default_activation=GELU))
_WITHOUT_ENCODER = tuple((f"{root}encoder.layers.", f"{root}layers.") for root in ("", "beit.", "deit.", "vit."))
_RATIO: dict[str, Any] = {"width": "mlp_ratio", "rule": "per hidden", "default_activation": GELU}
_DINO = "layer.{layer}.mlp"
_SWIGLU = tuple(
    Site(template, _DINO, "mlp_ratio", rule="swiglu", activation="")
    for template in (linear(gate_up="weights_in", down="weights_out"), GLU)
)
_SPEECH = Site(
    linear(up="intermediate_dense", down="output_dense"), "layers.{layer}.feed_forward", default_activation=GELU
)
_DISTILBERT = ("n_layers", "dim", "activation", GELU)
_XLNET = ("n_layer", "d_model", "ff_activation", GELU)
_WI = linear(up="wi", down="wo")
_GATED_WI = linear(gate="wi_0", up="wi_1", down="wo")
_T5: dict[str, Any] = {
    "width": "d_ff",
    "hidden": "d_model",
    "activation": "feed_forward_proj",
    "default_activation": "relu",
}
_DEPTHS = (("encoder", "num_layers"), ("decoder", "num_decoder_layers"))
_PARTS: tuple[tuple[str, Part], ...] = (("", "mlp"), (".experts.expert_{expert}", "expert"))
_SHARED = "shared.weight"


def _t5(activation: str) -> tuple[Site, ...]:
    """T5's two stacks of one width: wi alone, or gated, as its feed_forward_proj says."""
    return tuple(
        Site(
            template,
            f"{side}.*.block.{{layer}}.layer.{{}}.DenseReluDense",
            depth=depth,
            **_T5 | {"default_activation": activation},
        )
        for side, depth in _DEPTHS
        for template in (_WI, _GATED_WI)
    )


ENCODERS: tuple[Family, ...] = (
    *alike(
        "bert camembert deberta deberta-v2 electra esm layoutlmv3 mpnet roberta xlm-roberta",
        _LAYER,
        embedding="word_embeddings.weight",
    ),
    *alike("beit deit vit", *_VIT, in_memory=_WITHOUT_ENCODER),
    *alike(
        "albert",
        Site(
            linear(up="ffn", down="ffn_output"),
            "albert_layer_groups.{layer}.albert_layers.{}",
            depth="num_hidden_groups",
            default_activation=GELU_NEW,
            open=True,
        ),
        embedding="word_embeddings.weight",
    ),
    *alike(
        "distilbert",
        Site(linear(up="lin1", down="lin2"), "layer.{layer}.ffn", "hidden_dim", **keys(*_DISTILBERT)),
        embedding="word_embeddings.weight",
    ),
    *alike(
        "xlnet",
        Site(linear(up="layer_1", down="layer_2"), "layer.{layer}.ff", "d_inner", open=True, **keys(*_XLNET)),
        embedding="word_embedding.weight",
    ),
    *alike(
        "modernbert",
        Site(linear(gate_up="Wi", down="Wo"), activation="hidden_activation", default_activation=GELU),
        embedding="tok_embeddings.weight",
    ),
    *alike(
        "gte",
        Site(linear(up_gate="up_gate_proj", down="down_proj"), "layer.{layer}.mlp", default_activation=GELU),
        Site(GLU, default_activation=GELU),
        embedding="word_embeddings.weight",
        in_memory=(("gte.encoder.layers.", "gte.layers."),),
    ),
    *alike(
        "nomic_bert",
        Site(linear(gate="fc12", up="fc11", down="fc2")),
        Site(GLU),
        embedding="word_embeddings.weight",
        in_memory=(("nomic_bert.encoder.layers.", "nomic_bert.layers."),),
    ),
    *alike("dinov2 dinov2_with_registers", Site(FC, _DINO, **_RATIO), *_SWIGLU),
    *alike(
        "dinov3_vit",
        Site(GLU, "layer.{layer}.mlp", default_activation=GELU),
        Site(UP_DOWN, "layer.{layer}.mlp", default_activation=GELU),
    ),
    *alike(
        "swin",
        Site(DENSE, "layers.{layer}.blocks.{}", depth="num_layers", hidden="", open=True, **_RATIO),
        Site(FC, "layers.{layer}.blocks.{}.mlp", depth="num_layers", hidden="", **_RATIO),
    ),
    *alike("clip_vision_model", Site(FC, default_activation="quick_gelu")),
    *alike("siglip_vision_model siglip2_vision_model", *SIGLIP),
    *alike("pixtral", Site(GLU, "layers.{layer}.feed_forward", default_activation=GELU)),
    *alike("hubert wav2vec2", _SPEECH),
    *alike("bart blenderbot marian mbart pegasus", *halves(), embedding=_SHARED),
    *alike("m2m_100", *halves(default_activation="relu"), embedding=_SHARED),
    *alike("whisper", *halves(), embedding="decoder.embed_tokens.weight"),
    *alike(
        "nllb-moe",
        *(
            Site(
                FC,
                f"{side}.*.layers.{{layer}}.ffn{experts}",
                f"{side}_ffn_dim",
                part,
                depth=f"{side}_layers",
                hidden="d_model",
                activation="activation_function",
                default_activation="relu",
            )
            for side in ("encoder", "decoder")
            for experts, part in _PARTS
        ),
        embedding=_SHARED,
    ),
    *alike("t5 longt5", *_t5("relu"), embedding=_SHARED),
    *alike("mt5 umt5", *_t5("gated-gelu"), embedding=_SHARED),
    *alike(
        "switch_transformers",
        *(
            Site(template, f"{side}.*.block.{{layer}}.layer.{{}}.mlp{experts}", part=part, depth=depth, **_T5)
            for side, depth in _DEPTHS
            for template in (_WI, _GATED_WI)
            for experts, part in _PARTS
        ),
        embedding=_SHARED,
    ),
    *alike(
        "moonshine",
        Site(
            FC,
            "encoder.*.layers.{layer}.mlp",
            depth="encoder_num_hidden_layers",
            activation="encoder_hidden_act",
            default_activation=GELU,
        ),
        Site(
            linear(up_gate="fc1", down="fc2"),
            "decoder.*.layers.{layer}.mlp",
            depth="decoder_num_hidden_layers",
            activation="decoder_hidden_act",
        ),
        embedding="decoder.embed_tokens.weight",
    ),
    *alike(
        "t5gemma",
        *(
            Site(
                GLU,
                f"{side}.*.layers.{{layer}}.mlp",
                scope=side,
                activation="hidden_activation",
                default_activation=TANH_GELU,
            )
            for side in ("encoder", "decoder")
        ),
        norm_after=True,
    ),
)
