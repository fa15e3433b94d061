"""Declarations: models of several towers. The text model is the first and grows by default; the others by name."""

from __future__ import annotations

from ckptgrow.families.form import Family, Site, linear
from ckptgrow.families.mixtures import LLAMA4, QWEN_MOE
from ckptgrow.families.templates import (
    FC,
    FOUR_H,
    FUSED_GLU,
    GELU,
    GLU,
    LINEAR_FC,
    SIGLIP,
    STACK,
    TANH_GELU,
    alike,
    experts,
    within,
)

_TEXT, _VISION = "text_config", "vision_config"
_GLU = within(_TEXT, Site(GLU))
_TANH_GLU = Site(GLU, activation="hidden_activation", default_activation=TANH_GELU)
_GEMMA4 = within(
    _TEXT,
    Site(GLU, multiple=True, activation="hidden_activation", default_activation=TANH_GELU),
    Site(STACK, "layers.{layer}.experts", "moe_intermediate_size", "expert", activation="hidden_activation"),
)
_SIGLIP = within(_VISION, *SIGLIP, tower="vision")
_CLIP = within(_VISION, Site(FC, default_activation="quick_gelu"), tower="vision")
_QWEN = within(
    _VISION, Site(LINEAR_FC, "blocks.{layer}.mlp", depth="depth", default_activation=TANH_GELU), tower="vision"
)
_LANGUAGE = (("language_model.model.", "model.language_model."),)
_VISUAL = (("model.", "model.language_model."), ("visual.", "model.visual."))
_CONNECTOR = Site(GLU, "connector.modality_projection", hidden="")


def _two(template_site: Site) -> tuple[Site, ...]:
    """CLIP's and SigLIP's pair of towers, whose layers have one name."""
    pair = (("text_model", _TEXT, "main"), ("vision_model", _VISION, "vision"))
    return tuple(
        Site(
            template_site.template,
            f"{side}.*.layers.{{layer}}.mlp",
            scope=scope,
            tower=tower,
            default_activation=template_site.default_activation,
        )
        for side, scope, tower in pair
    )


MULTIMODAL: tuple[Family, ...] = (
    *alike("gemma3", *within(_TEXT, _TANH_GLU), *_SIGLIP, norm_after=True, in_memory=_LANGUAGE),
    *alike(
        "gemma4",
        *_GEMMA4,
        *within(
            _VISION,
            Site(
                linear(gate="gate_proj.linear", up="up_proj.linear", down="down_proj.linear"),
                activation="hidden_activation",
                default_activation=TANH_GELU,
                open=True,
            ),
            tower="vision",
        ),
        norm_after=True,
    ),
    *alike("gemma4_unified embedding_gemma2", *_GEMMA4, norm_after=True),
    *alike("paligemma", *within(_TEXT, Site(GLU, default_activation=TANH_GELU)), *_SIGLIP, in_memory=_LANGUAGE),
    *alike("llava llava_next", *_GLU, *_CLIP, in_memory=_LANGUAGE),
    *alike(
        "glmasr",
        *_GLU,
        in_memory=_LANGUAGE,
        refuses=(("audio", "the projector behind it takes its frames in vectors of that width"),),
    ),
    *alike(
        "internvl",
        *_GLU,
        *within(_VISION, Site(FC, "layer.{layer}.mlp", default_activation=GELU), tower="vision"),
        in_memory=_LANGUAGE,
    ),
    *alike(
        "mistral3",
        *_GLU,
        *within(_VISION, Site(GLU, "layers.{layer}.feed_forward", default_activation=GELU), tower="vision"),
        in_memory=_LANGUAGE,
    ),
    *alike(
        "mllama",
        *_GLU,
        *within(
            _VISION,
            Site(FC, "transformer.layers.{layer}.mlp", default_activation=GELU),
            Site(FC, "global_transformer.layers.{layer}.mlp", depth="num_global_layers", default_activation=GELU),
            tower="vision",
        ),
        in_memory=_LANGUAGE,
    ),
    *alike("idefics3 smolvlm", *_GLU, *_SIGLIP[:1]),
    *alike("idefics2", *within(_TEXT, Site(GLU, "text_model.*.layers.{layer}.mlp"), _CONNECTOR), *_SIGLIP[:1]),
    *alike("fuyu", *within(_TEXT, Site(FOUR_H, default_activation="relu2")), in_memory=_LANGUAGE),
    *alike(
        "qwen2_vl",
        *_GLU,
        *within(
            _VISION,
            Site(
                FC,
                "blocks.{layer}.mlp",
                "mlp_ratio",
                depth="depth",
                hidden="embed_dim",
                rule="per hidden",
                default_activation="quick_gelu",
            ),
            tower="vision",
        ),
        in_memory=_VISUAL,
    ),
    *alike(
        "qwen2_5_vl",
        *_GLU,
        *within(_VISION, Site(GLU, "blocks.{layer}.mlp", depth="depth"), tower="vision"),
        in_memory=_VISUAL,
    ),
    *alike("qwen3_vl", *_GLU, *_QWEN),
    *alike("qwen3_vl_moe", *_GLU, *within(_TEXT, *experts()), *_QWEN),
    *alike("qwen3_5", *_GLU, *_QWEN, extra_layers=True),
    *alike("qwen3_5_moe", *within(_TEXT, *QWEN_MOE), *_QWEN, extra_layers=True),
    *alike(
        "llama4",
        *within(_TEXT, *LLAMA4),
        refuses=(("vision", "the adapter behind it takes vectors of that width, which is the pixel shuffle's too"),),
    ),
    *alike(
        "phi4_multimodal",
        Site(FUSED_GLU),
        *_SIGLIP,
        *within(
            "audio_config",
            *(
                Site(
                    linear(up_gate="gate_up_proj", down="down_proj"),
                    f"encoders.{{layer}}.feed_forward_{side}",
                    depth="num_blocks",
                    activation="activation",
                    open=True,
                )
                for side in ("in", "out")
            ),
            tower="audio",
        ),
    ),
    *alike("clip", *_two(_CLIP[0])),
    *alike("siglip", *_two(_SIGLIP[0]), _SIGLIP[1]),
    *alike(
        "t5gemma2",
        *within(
            "encoder.text_config",
            Site(GLU, "encoder.*.layers.{layer}.mlp", activation="hidden_activation", default_activation=TANH_GELU),
        ),
        *within(
            "decoder",
            Site(GLU, "decoder.*.layers.{layer}.mlp", activation="hidden_activation", default_activation=TANH_GELU),
        ),
        *within("encoder.vision_config", *SIGLIP, tower="vision"),
        norm_after=True,
        in_memory=(("model.encoder.layers.", "model.encoder.text_model.layers."),),
    ),
)
