"""How weights are stored where they are no plain floats: FP8 in blocks can grow, other formats are refused by name.

In FP8 with `weight_scale_inv` (DeepSeek-V3's), a weight is its F8 payload times the scale of its block of 128 x 128.
The payload is copied as bytes and the shares go into the scales, which halve exactly; so a tensor of scales stands in
for the down projection it scales, and units move in blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptgrow.errors import FamilyError
from ckptgrow.families.form import Site, Slot
from ckptgrow.families.found import value_at
from ckptgrow.tensors import TensorInfo

_WAY_OUT = "Grow the unquantised checkpoint and quantise the result."
PAYLOAD = "F8_E4M3"
SCALES = "_scale_inv"
# What a tensor of a quantised layer is called -> the format.
_SIGNS: Mapping[str, str] = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes int8",
    "gate_up_proj_blocks": "mxfp4",
    "down_proj_blocks": "mxfp4",
    "weight_packed": "compressed-tensors",
    "weight_shape": "compressed-tensors",
    "weight_scale_2": "NVFP4",
    "weight_global_scale": "NVFP4",
    "weight_scale": "FP8 with one scale a tensor or row, or packed ternary",
    "W_q": "HQQ",
}


@dataclass(frozen=True, slots=True)
class Storage:
    """FP8 in square blocks of `block` x `block`."""

    block: int

    def with_scales(self, tensors: Mapping[str, Slot], infos: Mapping[str, TensorInfo]) -> dict[str, Slot]:
        """The slots of an MLP with those of the scales of its FP8 tensors; others may be left as plain floats."""
        found: dict[str, Slot] = {}
        for name, slot in tensors.items():
            if infos[name].dtype != PAYLOAD or slot.vector:
                found[name] = slot
                continue
            scales = name + SCALES
            if scales not in infos:
                raise FamilyError(f"it is missing, but {name} is {PAYLOAD}", tensor=scales)
            lane = infos[name].shape[slot.axis] // len(slot.lanes)
            if lane % (self.block * slot.span):
                raise FamilyError(
                    f"{lane} places do not fall on the blocks of {self.block} of its scales", tensor=name, hint=_WAY_OUT
                )
            found[name] = replace(slot, coded=True)
            found[scales] = replace(slot, name=slot.name + SCALES, block=self.block)
        return found


def storage_of(config: Mapping[str, Any], sites: Sequence[Site]) -> Storage | None:
    """What config.json says of quantisation. Raises FamilyError for a format whose weights cannot be shared out."""
    said = [config.get("quantization_config"), config.get("compression_config")]
    said += [value_at(config, site.under("quantization_config")) for site in sites]
    for quantised in filter(None, said):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, Mapping) else quantised
        blocks = quantised.get("weight_block_size") if isinstance(quantised, Mapping) else None
        if method == "fp8" and isinstance(blocks, list) and len(set(blocks)) == 1 and type(blocks[0]) is int:
            return Storage(blocks[0])
        raise FamilyError(f"the weights are quantised ({method})", file="config.json", hint=_WAY_OUT)
    return None


def refuse_signs(infos: Mapping[str, TensorInfo]) -> None:
    """Raise FamilyError by the name of a tensor that only a quantised checkpoint has."""
    for name in infos:
        _, dot, ending = name.rpartition(".")
        if dot and ending in _SIGNS:
            raise FamilyError(f"a tensor of a quantised layer ({_SIGNS[ending]})", tensor=name, hint=_WAY_OUT)
