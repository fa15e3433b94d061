"""Freezing models that hold experts in stacks: the boxes of all experts of a layer, in one parameter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
import torch
import trainings
from stacks import SPELLINGS, rewrite, stacked, where
from test_mask import Named
from torch import nn

from ckptgrow.manifest import load_manifest
from ckptgrow.operations import audit
from ckptgrow.policy import POLICIES
from ckptgrow.training import FreezeError, freeze, require_grad
from ckptgrow.training.resolve import resolve


def grow(folder: Path, model_type: str = "mixtral", policy: str = "g-freeze") -> Path:
    return trainings.grow(checkpoints.make(folder / "base", model_type, dtype="F32"), folder / "grown", policy=policy)


def held(grown: Path, model_type: str = "mixtral") -> Named:
    """The model as transformers would hold it."""
    return Named(stacked(checkpoints.load(grown), model_type))


def pull(model: nn.Module) -> None:
    """A gradient of 1 at every element."""
    torch.autograd.backward([parameter.sum() for parameter in model.parameters() if parameter.requires_grad])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model_type", SPELLINGS)
def test_gradients_arrive_where_the_boxes_are(model_type: str, policy: str, tmp_path: Path) -> None:
    """At [expert, lane and rows] of the stack, and nowhere else; counts are those of the manifest."""
    grown = grow(tmp_path, model_type, policy)
    model, expected, manifest = held(grown, model_type), where(grown, model_type), load_manifest(grown)
    handle = freeze(model, manifest, how="mask")
    pull(model)
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.equal(grad, expected[name]), name
    stats = handle.stats()
    assert (stats.trained, stats.frozen) == (manifest.counts.trainable, manifest.counts.frozen)
    assert stats.optimised == sum(mask.numel() for mask in expected.values() if mask.any())
    assert {target.name for target in handle.targets} == {name for name, mask in expected.items() if mask.any()}
    handle.remove()
    pull(model)
    assert all(parameter.grad is not None and parameter.grad.all() for parameter in model.parameters())


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_the_guard_holds_stacks(model_type: str, tmp_path: Path) -> None:
    """Decay moves nothing with it, and is refused without; what is saved has a clean audit."""
    grown = grow(tmp_path, model_type)
    model = held(grown, model_type)
    require_grad(model, grown)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handle = freeze(model, grown, how="mask")
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    pull(model)
    with pytest.raises(FreezeError, match=r"weight_decay=0\.1 would move"):
        optimizer.step()
    handle.guard(optimizer)
    for _ in range(3):
        optimizer.step()
    handle.check(optimizer)
    rewrite(trainings.trained(grown), lambda _: dict(model.state_dict()))
    seen = audit(grown, tmp_path / "trained")
    assert (seen.exit_code, seen.findings) == (0, ())
    assert seen.total("changed") == seen.total("trainable")
    next(p for n, p in model.named_parameters() if n.endswith("down_proj")).data[1, 0, 0] += 1
    with pytest.raises(FreezeError, match="frozen elements have moved"):
        handle.check()


def test_a_stack_is_not_split(tmp_path: Path) -> None:
    """It says so and what to do, and the model is as it was."""
    grown = grow(tmp_path)
    model = held(grown)
    with pytest.raises(FreezeError, match=r'gate_up_proj: it is a stack of 2 experts .* how="mask"'):
        freeze(model, grown)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_stacks_of_another_model(tmp_path: Path) -> None:
    """Another number of experts, another width, a layer whose experts are not there."""
    grown = grow(tmp_path)
    tensors = stacked(checkpoints.load(grown), "mixtral")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    for change, told in (
        (lambda t: t[:1], r"has the shape \[1, 48, 8\], the manifest's experts make \[2, 48, 8\]"),
        (lambda t: torch.cat([t, t[:1]]), r"has the shape \[3, 48, 8\]"),
        (lambda t: t[:, 1:], r"has the shape \[2, 47, 8\]"),
    ):
        with pytest.raises(FreezeError, match=told):
            freeze(Named(tensors | {name: change(tensors[name])}), grown, how="mask")
    with pytest.raises(FreezeError, match=r"layers.1.block_sparse_moe.experts..\.w[13].weight: the model has no such"):
        freeze(Named({n: t for n, t in tensors.items() if n != name}), grown, how="mask")


def test_experts_that_do_not_train_alike(tmp_path: Path) -> None:
    """A manifest that was written by hand may say so; a cut along one axis cannot."""
    grown = grow(tmp_path)
    manifest = load_manifest(grown)
    first, *others = manifest.trainable
    odd = replace(manifest, trainable=(replace(first, boxes=(((0, 8), (12, 20)),)), *others))
    with pytest.raises(FreezeError, match="its experts do not all train alike"):
        resolve(held(grown), odd)
    odd = replace(manifest, trainable=(replace(first, boxes=(((2, 4), (0, 24)),)), *others))
    with pytest.raises(FreezeError, match="its boxes are not ranges of units"):
        resolve(held(grown), odd)
