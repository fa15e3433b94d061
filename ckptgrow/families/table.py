"""The table: every model_type that can grow, by name, and those known not to."""

from __future__ import annotations

from collections.abc import Mapping

from ckptgrow.families.decoders import DECODERS
from ckptgrow.families.encoders import ENCODERS
from ckptgrow.families.form import Family
from ckptgrow.families.mixtures import MIXTURES
from ckptgrow.families.multimodal import MULTIMODAL

FAMILIES: Mapping[str, Family] = {
    family.model_type: family for family in (*DECODERS, *MIXTURES, *ENCODERS, *MULTIMODAL)
}

_STATE_SPACE = "it has no MLP: intermediate_size is the inner width of its state-space mixer"
# Known architectures that cannot grow, and why.
REFUSED: Mapping[str, str] = {
    "bloom": "its MLP width is fixed at 4 x hidden_size in the model code: no config key can say the new width",
    "falcon_mamba": _STATE_SPACE,
    "grounding-dino": "the widths of its MLPs are those of its fusion attention too: one key drives both",
    "mamba": _STATE_SPACE,
    "mamba2": "it has no MLP",
    "mpt": "its MLP width is fixed at 4 x d_model in the model code: config.expansion_ratio is ignored",
    "openai-gpt": "its MLP width is fixed at 4 x n_embd in the model code: no config key can say the new width",
}
