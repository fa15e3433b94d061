"""Freezing models that hold experts in stacks: the boxes of all experts of a layer, in one parameter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
import trainings
from hypothesis import given
from hypothesis import strategies as st
from stacks import SPELLINGS, rewrite, stacked, where
from test_mask import Named
from torch import nn

from ckptgrow.manifest import load_manifest
from ckptgrow.operations import audit
from ckptgrow.policy import POLICIES, Box
from ckptgrow.regions import divided
from ckptgrow.training import FreezeError, freeze, require_grad
from ckptgrow.training.cut import StackCut, cut_of
from ckptgrow.training.masters import Master
from ckptgrow.training.resolve import resolve


def grow(folder: Path, model_type: str = "mixtral", policy: str = "g-freeze", experts: str = "all") -> Path:
    base = checkpoints.make(folder / "base", model_type, dtype="F32")
    return trainings.grow(base, folder / "grown", policy=policy, experts=experts)


def held(grown: Path, model_type: str = "mixtral") -> Named:
    """The model as transformers would hold it."""
    return Named(stacked(checkpoints.load(grown), model_type))


def pull(model: nn.Module) -> None:
    """A gradient of 1 at every element."""
    torch.autograd.backward([parameter.sum() for parameter in model.parameters() if parameter.requires_grad])


@pytest.mark.parametrize("experts", ["all", "1"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model_type", SPELLINGS)
def test_gradients_arrive_where_the_boxes_are(model_type: str, policy: str, experts: str, tmp_path: Path) -> None:
    """At [expert, lane and rows] of the stack, and nowhere else; counts are those of the manifest."""
    grown = grow(tmp_path, model_type, policy, experts)
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


@pytest.mark.parametrize("experts", ["all", "1"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_the_guard_holds_stacks(model_type: str, experts: str, tmp_path: Path) -> None:
    """Decay moves nothing with it, and is refused without; what is saved has a clean audit."""
    grown = grow(tmp_path, model_type, experts=experts)
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
    """A manifest that was written by hand may say so: each has its boxes. What are no units is refused."""
    grown = grow(tmp_path)
    manifest = load_manifest(grown)
    first, *others = manifest.trainable
    odd = replace(manifest, trainable=(replace(first, boxes=(((0, 8), (12, 20)),)), *others))
    stack = next(t for t in resolve(held(grown), odd) if t.name.endswith("layers.0.mlp.experts.down_proj"))
    assert stack.tensor.boxes == (((0, 1), (0, 8), (12, 20)), ((1, 2), (0, 8), (12, 24)))
    assert isinstance(stack.cut, StackCut)
    odd = replace(manifest, trainable=(replace(first, boxes=(((2, 4), (0, 24)),)), *others))
    with pytest.raises(FreezeError, match="are not ranges along one axis"):
        resolve(held(grown), odd)


SHAPE = (4, 3, 6)


@st.composite
def masks(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    """An axis of units, and a stack of four experts of which each trains ranges of its own along it."""
    axis, mask = draw(st.sampled_from([1, 2])), torch.zeros(SHAPE, dtype=torch.bool)
    for expert in range(SHAPE[0]):
        ends = sorted(draw(st.sets(st.integers(0, SHAPE[axis]), max_size=4)))
        for start, stop in zip(ends[::2], ends[1::2], strict=False):
            mask[expert].narrow(axis - 1, start, stop - start).fill_(True)
    return axis, mask


def boxes_of(axis: int, mask: torch.Tensor) -> tuple[Box, ...]:
    """One box for each unit of each expert that trains."""
    found = []
    for expert, unit in mask.movedim(axis, 1)[:, :, 0].nonzero().tolist():
        box = [(0, size) for size in SHAPE]
        box[0], box[axis] = (expert, expert + 1), (unit, unit + 1)
        found.append(tuple(box))
    return tuple(found)


@given(masks(), st.data())
def test_shards_of_a_stack_are_the_stack(drawn: tuple[int, torch.Tensor], data: st.DataObject) -> None:
    """Wherever processes divide it, by experts or along another axis: frozen is what the boxes leave, once each."""
    axis, mask = drawn
    cut = cut_of(divided(SHAPE, boxes_of(axis, mask)))
    if cut is None:
        assert mask.all()
        return
    way = data.draw(st.integers(0, 2))
    middle = data.draw(st.integers(0, SHAPE[way]))
    seen = torch.zeros(SHAPE, dtype=torch.int)
    for start, stop in ((0, middle), (middle, SHAPE[way])):
        shard, offset = seen.narrow(way, start, stop - start), [0, 0, 0]
        offset[way] = start
        for part in cut.shard(offset, shard.shape).frozen_in(shard):
            part.add_(1)
    assert torch.equal(seen, (~mask).int())


class Zero3:
    """As ZeRO-3 holds a master: flat, a piece for each of two processes."""

    def __init__(self, whole: torch.Tensor) -> None:
        self.whole = whole

    def get_local_fp32_param(self, _: object) -> torch.Tensor:
        return self.whole.flatten()

    def set_local_hp_param(self, piece: torch.Tensor, _: object) -> None:
        self.whole = piece.view(self.whole.shape)


@given(masks())
def test_masters_of_a_stack_are_put_back(drawn: tuple[int, torch.Tensor]) -> None:
    """In ZeRO's flat float32 pieces: whatever moved, frozen elements are what they were and the others are not."""
    axis, mask = drawn
    cut = cut_of(divided(SHAPE, boxes_of(axis, mask)))
    if cut is None:
        return
    before = torch.randn(SHAPE)
    parameter = torch.nn.Parameter(torch.zeros(SHAPE))
    zero: Any = Zero3(before.clone())
    parameter._z3_optimizer, parameter.ds_process_group = zero, None  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "get_rank", lambda group: 0)
        master = Master(parameter, SHAPE, cut)
        zero.whole = before + 1
        master.put_back()
    assert torch.equal(zero.whole, torch.where(mask, before + 1, before))
