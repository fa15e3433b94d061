"""FP8 in blocks of 128 x 128: the payload is copied as bytes, the shares go into the scales, and the sum is exact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import Tensors
from strategies import config_of

import ckptgrow
from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.errors import FamilyError, PlanError, RequestError
from ckptgrow.families import locate
from ckptgrow.proof import prove
from ckptgrow.surgery import Growth, expand
from ckptgrow.tensors import TensorInfo

HIDDEN, WIDTH, BLOCK = 160, 256, 128
QUANTISED = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}}
LAYER = "model.layers.{}.mlp.{}_proj.weight"


def quantise(tensors: Tensors) -> None:
    """Each projection as an F8 payload and the scales of its blocks, the last block of the hidden axis cut short."""
    for name in [name for name in tensors if "_proj" in name and "mlp" in name]:
        weight = tensors[name].float()
        *experts, rows, columns = weight.shape
        tiles = [*experts, -(-rows // BLOCK), -(-columns // BLOCK)]
        scales = torch.rand(*tiles, generator=torch.Generator().manual_seed(3)) * 0.01 + 0.001
        tensors[name] = (weight / spread(scales, weight.shape)).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scales


def stack(tensors: Tensors) -> None:
    """The experts of each layer in two tensors."""
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts."
        parts = {
            role: [tensors.pop(f"{block}{i}.{role}_proj.weight") for i in range(2)] for role in ("gate", "up", "down")
        }
        both = zip(parts["gate"], parts["up"], strict=True)
        tensors[block + "gate_up_proj"] = torch.stack([torch.cat(pair) for pair in both])
        tensors[block + "down_proj"] = torch.stack(parts["down"])


def spread(scales: torch.Tensor, shape: Any) -> torch.Tensor:
    """Each scale at every place of its block."""
    return scales.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., : shape[-2], : shape[-1]]


def weights(tensors: Tensors, name: str) -> torch.Tensor:
    """The payload times its scales, in float64."""
    return tensors[name].double() * spread(tensors[name + "_scale_inv"].double(), tensors[name].shape)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny llama, its MLPs quantised."""
    folder = checkpoints.make(tmp_path / "base", "llama", hidden=HIDDEN, width=WIDTH, config=QUANTISED)
    checkpoints.edit(folder, quantise)
    return folder


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("policy", ["g-freeze", "g-train", "down"])
def test_it_grows_exactly(base: Path, tmp_path: Path, factor: int, policy: str) -> None:
    """Payload bytes are the base's, scales of down a power of two smaller, columns add up to the last bit."""
    done = ckptgrow.expand(base, tmp_path / "out", factor=factor, policy=policy)
    assert [a.verdict for a in ckptgrow.verify(base, tmp_path / "out").answers] == ["yes", "yes", "yes"]
    before, after = checkpoints.load(base), checkpoints.load(tmp_path / "out")
    for layer in range(2):
        down, gate = LAYER.format(layer, "down"), LAYER.format(layer, "gate")
        payload = after[down].view(torch.uint8).chunk(factor, 1)
        assert all(torch.equal(part, before[down].view(torch.uint8)) for part in payload)
        scales = after[down + "_scale_inv"].chunk(factor, 1)
        assert all(torch.equal(part * factor, before[down + "_scale_inv"]) for part in scales)
        assert torch.equal(sum(weights(after, down).chunk(factor, 1)), weights(before, down))
        assert torch.equal(weights(after, gate), weights(before, gate).repeat(factor, 1))
    assert json.loads((tmp_path / "out/config.json").read_text())["intermediate_size"] == factor * WIDTH
    assert not any("scale" in tensor.name for tensor in done.manifest.trainable)
    assert ckptgrow.audit(base, tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_grow_exactly(tmp_path: Path, stacked: bool) -> None:
    """DeepSeek-V3's own layout, each expert with its scales, and transformers' stacks with a table for each expert."""
    base = checkpoints.make(tmp_path / "base", "deepseek_v3", hidden=HIDDEN, width=WIDTH, config=QUANTISED)
    if stacked:
        checkpoints.edit(base, stack)
    checkpoints.edit(base, quantise)
    before = checkpoints.load(base)
    scaled = [name for name in before if name.endswith("_scale_inv")]
    assert len(scaled) == (16 if stacked else 24)
    done = ckptgrow.expand(base, tmp_path / "out")
    assert [a.verdict for a in ckptgrow.verify(base, tmp_path / "out").answers] == ["yes", "yes", "yes"]
    after = checkpoints.load(tmp_path / "out")
    for name in (name.removesuffix("_scale_inv") for name in scaled if "down" in name):
        payload = after[name].view(torch.uint8).chunk(2, -1)
        assert all(torch.equal(part, before[name].view(torch.uint8)) for part in payload)
        assert all(
            torch.equal(part * 2, before[name + "_scale_inv"]) for part in after[name + "_scale_inv"].chunk(2, -1)
        )
    assert not any("scale" in tensor.name for tensor in done.manifest.trainable)
    assert ckptgrow.revert(tmp_path / "out", tmp_path / "back").exit_code == 0
    some = ckptgrow.expand(base, tmp_path / "some", experts="1", factor=4)
    assert [a.verdict for a in ckptgrow.verify(base, tmp_path / "some").answers] == ["yes", "yes", "yes"]
    assert 0 < some.manifest.counts.trainable < 3 * done.manifest.counts.trainable
    for out, undone in ((tmp_path / "folded", ckptgrow.fold), (tmp_path / "reverted", ckptgrow.revert)):
        assert undone(tmp_path / "some", out).exit_code == 0
        assert all(
            torch.equal(t.view(torch.uint8), before[n].view(torch.uint8)) for n, t in checkpoints.load(out).items()
        )
    assert all(
        torch.equal(t.view(torch.uint8), before[n].view(torch.uint8))
        for n, t in checkpoints.load(tmp_path / "back").items()
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"factor": 3}, "2, 4, 8, ... times, not from 256 to 768"),
        ({"width": 384}, "2, 4, 8, ... times, not from 256 to 384"),
        ({"shares": "random"}, "can only be shared out evenly"),
    ],
)
def test_what_cannot_be_exact_is_refused(base: Path, tmp_path: Path, options: Any, told: str) -> None:
    """Naming the tensor; nothing is written."""
    with pytest.raises(RequestError) as caught:
        ckptgrow.expand(base, tmp_path / "out", **options)
    assert told in caught.value.problem
    assert caught.value.tensor == LAYER.format(0, "down") + "_scale_inv"
    assert not (tmp_path / "out").exists()


def infos_of(base: Path) -> dict[str, TensorInfo]:
    return dict(open_checkpoint(base).infos)


def test_a_width_off_the_blocks_is_refused(base: Path) -> None:
    """Half a block cannot be copied with its scale."""
    infos = infos_of(base)
    for name in [name for name in infos if ".mlp." in name and not name.endswith("_inv")]:
        shape = tuple(192 if size == WIDTH else size for size in infos[name].shape)
        infos[name] = replace(infos[name], shape=shape)
    with pytest.raises(FamilyError, match="192 places do not fall on the blocks of 128"):
        locate(config_of("llama", hidden=HIDDEN) | QUANTISED, infos)


def test_a_payload_without_scales_is_refused(base: Path) -> None:
    """The half of a weight."""
    infos = infos_of(base)
    del infos[LAYER.format(1, "up") + "_scale_inv"]
    with pytest.raises(FamilyError, match="it is missing, but") as caught:
        locate(config_of("llama", hidden=HIDDEN) | QUANTISED, infos)
    assert caught.value.tensor == LAYER.format(1, "up") + "_scale_inv"


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [128, 64]},
        {"quant_method": "mxfp4"},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "bitsandbytes"},
    ],
)
def test_other_formats_are_refused_by_name(base: Path, said: dict[str, Any]) -> None:
    """With the way out."""
    with pytest.raises(FamilyError, match=said["quant_method"]) as caught:
        locate(config_of("llama", hidden=HIDDEN) | {"quantization_config": said}, infos_of(base))
    assert "Grow the unquantised checkpoint" in str(caught.value)


def test_a_forgotten_scale_is_seen(base: Path, tmp_path: Path) -> None:
    """On the Plan, on the bytes, and by running it: payload copied, scales not halved."""
    opened = open_checkpoint(base)
    found = locate(opened.config, opened.infos)
    plan = expand(opened.infos, found, Growth())
    prove(plan, opened.infos, found)
    name = LAYER.format(0, "down") + "_scale_inv"
    whole = [
        replace(
            output,
            parts=tuple(replace(p, terms=tuple(replace(t, share=None) for t in p.terms)) for p in output.parts),
        )
        if output.name == name
        else output
        for output in plan.outputs
    ]
    with pytest.raises(PlanError, match="do not add up"):
        prove(replace(plan, outputs=tuple(whole)), opened.infos, found)
    ckptgrow.expand(base, tmp_path / "out")
    checkpoints.edit(tmp_path / "out", lambda t: t[name].mul_(2))
    answer = ckptgrow.verify(base, tmp_path / "out").answers[1]
    assert (answer.verdict, answer.findings[0].tensor) == ("no", name)


def test_a_payload_of_another_block_is_seen(base: Path, tmp_path: Path) -> None:
    """Scales that are right beside bytes that are not."""
    ckptgrow.expand(base, tmp_path / "out")
    name = LAYER.format(1, "down")

    def roll(tensors: Tensors) -> None:
        bits = tensors[name].view(torch.uint8)
        bits[:, WIDTH:] = bits[:, WIDTH:].roll(1, 1).clone()

    checkpoints.edit(tmp_path / "out", roll)
    answer = ckptgrow.verify(base, tmp_path / "out").answers[1]
    assert answer.verdict == "no"


def test_unquantised_layers_may_lie_beside(base: Path, tmp_path: Path) -> None:
    """A layer that was left in bfloat16 grows as ever, in the same checkpoint."""

    def restore(tensors: Tensors) -> None:
        for role in ("gate", "up", "down"):
            name = LAYER.format(0, role)
            tensors[name] = weights(tensors, name).to(torch.bfloat16)
            del tensors[name + "_scale_inv"]

    checkpoints.edit(base, restore)
    ckptgrow.expand(base, tmp_path / "out")
    assert ckptgrow.verify(base, tmp_path / "out").exit_code == 0
