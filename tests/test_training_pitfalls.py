"""The set-ups in which a gradient mask fails silently: each is shown to, and to be held or refused with ours.

Those that need no more than torch's optimizers stand in test_training.py; trainers and sharding in test_matrix.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from safetensors.torch import save_file
from test_training import DEVICE, Grow, Toy, adamw, backward, grow, moved, one_thread, state, steps, trainable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import ckptgrow
from ckptgrow.manifest import load_manifest
from ckptgrow.training import FreezeError, freeze, whole
from ckptgrow.training.mask import MaskHandle
from ckptgrow.training.resolve import resolve

__all__ = ["grow", "one_thread"]  # fixtures
Make = Callable[[nn.Module], Optimizer]


@pytest.fixture
def grown(grow: Grow) -> Path:
    """Large enough that 8-bit optimizers do not leave its tensors in 32 bit: 4,096 elements."""
    return grow(hidden=64, width=64)


def cuts(model: nn.Module, grown: Path) -> Iterator[tuple[Any, Any]]:
    """Parameters that are frozen in part, each with its cut; only the manifest's tensors require a gradient."""
    model.requires_grad_(False)
    for target in resolve(model, load_manifest(grown)):
        target.parameter.requires_grad_(True)
        yield target.parameter, target.cut


def zeroed(cut: Any, gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    for part in cut.slices(gradient, cut.frozen):
        part.zero_()
    return gradient


def masked_by_hand(grown: Path) -> Toy:
    """What people write themselves."""
    model = Toy(grown)
    for parameter, cut in cuts(model, grown):
        parameter.register_hook(partial(zeroed, cut))
    return model


def moved_by(model: Toy, grown: Path) -> tuple[int, int, int]:
    return moved(checkpoints.load(grown), model.state_dict(), load_manifest(grown))


# ---------------------------------------------------------------- optimizers that move what has no gradient


def eight_bit(name: str) -> Make:
    def make(model: nn.Module) -> Optimizer:
        bitsandbytes = pytest.importorskip("bitsandbytes", reason="8-bit optimizers: bitsandbytes is not installed")
        optimizer: Optimizer = getattr(bitsandbytes.optim, name)(trainable(model), lr=1e-2, weight_decay=0.0)
        return optimizer

    return make


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit"])
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes' own imports
def test_eight_bit_moments(grown: Path, name: str) -> None:
    """On CPU a zero in a block of other values becomes a small one, without any decay; on CUDA it does not."""
    make = eight_bit(name)
    if DEVICE == "cpu":
        model = masked_by_hand(grown)
        steps(model, make(model))
        assert moved_by(model, grown)[0] > 0

        model = Toy(grown)
        freeze(model, grown, "mask")
        optimizer = make(model)
        steps(model, optimizer, 2)
        with pytest.raises(FreezeError, match=r"down_proj\.weight: frozen elements have moved"):
            steps(model, optimizer, 1)  # it looks after 1, 2, 4, 8, ... steps

    for how in ("split", "mask"):
        model = Toy(grown)
        handle = freeze(model, grown, how)  # type: ignore[arg-type]
        optimizer = make(model)
        handle.guard(optimizer)
        steps(model, optimizer)
        frozen, free, total = moved_by(model, grown)
        assert frozen == 0
        assert free > 0.5 * total  # Lion's signs take some elements back where they were


def test_a_mask_without_guard_is_looked_at_again(grown: Path) -> None:
    """Whatever moves it: here a weight that is written to between two steps. Then at twice the number of steps."""
    model = Toy(grown)
    freeze(model, grown, "mask")
    optimizer = adamw(model, weight_decay=0.0)
    steps(model, optimizer, 5)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] += 1
    steps(model, optimizer, 3)
    with pytest.raises(FreezeError, match=r"layers\.1\.mlp\.gate_proj\.weight: frozen elements have moved"):
        steps(model, optimizer, 1)


@pytest.mark.parametrize("how", ["split", "mask"])
def test_schedule_free_averages(grown: Path, how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`eval()` exchanges the weights for an average of the optimizer's own, in which decay was at work."""
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")

    def train(model: Toy, guard: Callable[[Optimizer], Any]) -> Any:
        optimizer = schedulefree.AdamWScheduleFree(trainable(model), lr=1e-2, weight_decay=0.1)
        optimizer.train()
        guard(optimizer)
        steps(model, optimizer)
        optimizer.eval()
        return optimizer

    model = Toy(grown)
    handle = freeze(model, grown, "mask")
    with monkeypatch.context() as patch:
        patch.setattr(MaskHandle, "_guard_swaps", lambda *_: None)
        train(model, handle.guard)
    assert moved_by(model, grown)[0] > 0

    model = Toy(grown)
    handle = freeze(model, grown, how)
    optimizer = train(model, handle.guard)
    frozen, free, total = moved_by(model, grown)
    assert (frozen, free) == (0, total)
    optimizer.train()
    steps(model, optimizer, 1)
    optimizer.eval()
    assert moved_by(model, grown)[0] == 0
    handle.check(optimizer)
    handle.remove()
    assert not {"train", "eval"} & optimizer.__dict__.keys()


def test_a_model_taken_apart_stops_its_own_steps_only(grown: Path) -> None:
    """What FSDP1 does to a masked one. Another model beside it, which has nothing to do with it, goes on."""
    model, other = Toy(grown), Toy(grown)
    freeze(model, grown, "mask")
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module.register_parameter(name, nn.Parameter(parameter.detach().flatten()))
    steps(other, adamw(other), 1)
    with pytest.raises(FreezeError, match=r"taken apart since it was masked, to \[\d+\]"):
        adamw(model).step()


# ---------------------------------------------------------------- when the mask acts


def test_clipping_before_the_mask(grown: Path) -> None:
    """A mask in a callback before the step comes after clipping: the frozen part has had its share of the norm."""
    norms = []
    for how in ("after", "mask", "split"):
        model = Toy(grown)
        found = list(cuts(model, grown)) if how == "after" else []
        if how != "after":
            freeze(model, grown, how)  # type: ignore[arg-type]
        backward(model)
        nn.utils.clip_grad_norm_(trainable(model), 1e-3)
        for parameter, cut in found:
            parameter.grad = zeroed(cut, parameter.grad)
        norms.append(float(nn.utils.get_total_norm([p.grad for p in trainable(model) if p.grad is not None])))
    assert norms[0] < 0.9e-3
    assert norms[1:] == pytest.approx([1e-3, 1e-3], rel=1e-3)


def stepping(model: nn.Module, decay: float) -> list[Optimizer]:
    """One optimizer a parameter, which steps as soon as its gradient is there and then drops it."""
    made = []
    for parameter in trainable(model):
        optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=decay)
        parameter.register_post_accumulate_grad_hook(partial(_step, optimizer))  # type: ignore[attr-defined]
        made.append(optimizer)
    return made


def _step(optimizer: Optimizer, parameter: Tensor) -> None:
    optimizer.step()
    optimizer.zero_grad()


def test_an_optimizer_in_the_backward_pass(grown: Path) -> None:
    """A mask on what has been accumulated comes too late; one on what flows in does not; decay needs the guard."""
    model = Toy(grown)
    found = list(cuts(model, grown))
    stepping(model, 0.0)
    for parameter, cut in found:
        parameter.register_post_accumulate_grad_hook(partial(_late, cut))
    backward(model)
    assert moved_by(model, grown)[0] > 0

    model = Toy(grown)
    freeze(model, grown, "mask")
    stepping(model, 0.1)
    with pytest.raises(FreezeError, match=r"weight_decay=0\.1 would move"):
        backward(model)
    assert moved_by(model, grown)[0] == 0

    for how, decay in (("mask", 0.0), ("mask", 0.1), ("split", 0.1)):
        model = Toy(grown)
        handle = freeze(model, grown, how)  # type: ignore[arg-type]
        optimizers = stepping(model, decay)
        if decay:
            handle.guard(*optimizers)
        for _ in range(4):
            backward(model)
        frozen, free, total = moved_by(model, grown)
        assert (frozen, free) == (0, total)
        handle.check(*optimizers)


def _late(cut: Any, parameter: Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad = zeroed(cut, parameter.grad)


def test_a_parameter_that_no_optimizer_of_several_holds(grown: Path) -> None:
    """Two share out what trains; one alone does not hold it all."""
    model = Toy(grown)
    handle = freeze(model, grown, "mask")
    half = [torch.optim.AdamW(trainable(model)[i::2], lr=1e-2) for i in range(2)]
    with pytest.raises(FreezeError, match="the optimizer does not hold it"):
        handle.guard(half[0])
    handle.guard(*half)
    backward(model)
    for optimizer in half:
        optimizer.step()
    frozen, free, total = moved_by(model, grown)
    assert (frozen, free) == (0, total)


def test_a_gradient_times_a_mask(grown: Path) -> None:
    """Minus one times zero is minus zero, which turns the sign of a frozen one; infinity times zero is no number."""
    for by_hand in (True, False):
        model = Toy(grown)
        weight = model.model.layers[0].mlp.gate_proj.weight
        with torch.no_grad():
            weight[0, :4] = -0.0
        before = weight.detach().clone()
        for parameter, cut in cuts(model, grown) if by_hand else ():
            ones = torch.ones_like(parameter)
            parameter.register_hook(partial(torch.mul, zeroed(cut, ones)))
        if not by_hand:
            freeze(model, grown, "mask")
        bad = torch.full_like(weight, -1.0)
        bad[1, 0] = float("inf")
        (weight * bad).sum().backward()
        torch.optim.SGD(trainable(model), lr=1e-2).step()
        same = before[:64].view(torch.int32) == weight.detach()[:64].view(torch.int32)
        assert bool(same.all()) == (not by_hand)
        assert int((~same).sum()) == (5 if by_hand else 0)  # four signs and a NaN


# ---------------------------------------------------------------- after training


def saved(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def trained(grown: Path, rate: float, steps_: int = 3) -> Toy:
    model = Toy(grown)
    handle = freeze(model, grown)
    steps(model, adamw(model, lr=rate), steps_)
    handle.check()
    return model


def test_the_mean_of_frozen_runs(grown: Path, tmp_path: Path) -> None:
    """Of three equal values the sum's third need not be the value: found, named, and put back to the bit."""
    runs = [state(trained(grown, rate)) for rate in (1e-3, 1e-2, 3e-2)]
    mean = {name: (runs[0][name] + runs[1][name] + runs[2][name]) / 3 for name in runs[0]}
    out = saved(tmp_path / "mean", mean)
    seen = ckptgrow.audit(grown, out)
    assert (seen.exit_code, seen.cause) == (1, "averaging")
    assert seen.total("moved") > 0
    ckptgrow.audit(grown, out, repair=tmp_path / "repaired")
    check_repaired(grown, mean, checkpoints.load(tmp_path / "repaired"))


def test_decay_under_a_mask_by_hand(grown: Path, tmp_path: Path) -> None:
    """Found, named with its factor, and put back to the bit; what was learned stays."""
    model = masked_by_hand(grown)
    steps(model, adamw(model))
    learned = state(model)
    seen = ckptgrow.audit(grown, saved(tmp_path / "trained", learned))
    assert (seen.exit_code, seen.cause) == (1, "decay")
    assert seen.factor == pytest.approx([(1 - 1e-3) ** 4] * 2, rel=1e-6)
    ckptgrow.audit(grown, tmp_path / "trained", repair=tmp_path / "repaired")
    check_repaired(grown, learned, checkpoints.load(tmp_path / "repaired"))


def check_repaired(grown: Path, learned: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Frozen elements have the grown bits, the others the learned ones."""
    frozen, free, total = moved(checkpoints.load(grown), after, load_manifest(grown))
    assert (frozen, free) == (0, total)
    boxes = {tensor.name: tensor.boxes for tensor in load_manifest(grown).trainable}
    for name, found in boxes.items():
        place = tuple(slice(*span) for span in found[0])
        assert torch.equal(after[name][place], learned[name][place])


def test_moving_averages_of_a_split_model(grown: Path, tmp_path: Path) -> None:
    """torch's own EMA moves frozen values one by one, and does not when it takes them together."""
    for name, kind in (
        ("one", {"avg_fn": get_ema_avg_fn(0.99)}),
        ("all", {"multi_avg_fn": get_ema_multi_avg_fn(0.99)}),
    ):
        model = Toy(grown)
        freeze(model, grown)
        average = AveragedModel(model, **kind)  # type: ignore[arg-type]
        optimizer = adamw(model)
        for _ in range(4):
            steps(model, optimizer, 1)
            average.update_parameters(model)
        seen = ckptgrow.audit(grown, saved(tmp_path / name, average.module.state_dict()))
        assert seen.exit_code == (1 if name == "one" else 0)
        if seen.exit_code:
            ckptgrow.audit(grown, tmp_path / name, repair=tmp_path / "repaired", force=True)
            assert ckptgrow.audit(grown, tmp_path / "repaired").exit_code == 0


def test_parts_of_split_tensors_become_whole(grown: Path, tmp_path: Path) -> None:
    """What is made of parameters instead of a state dict, as DeepSpeed does; audit says what is the matter with it."""
    model = trained(grown, 1e-2)
    parts = {f"module.{name}": parameter for name, parameter in model.named_parameters()}
    names = {"module." + name: tensor for name, tensor in model.state_dict().items()}
    found = whole(parts, grown)
    assert found.keys() == names.keys()
    assert all(torch.equal(found[name], names[name]) for name in names)
    assert whole(names, grown) == names
    seen = ckptgrow.audit(grown, saved(tmp_path / "parts", parts))
    assert seen.exit_code == 2
    assert any("ckptgrow.training.whole" in finding.problem for finding in seen.findings)
    assert ckptgrow.audit(grown, saved(tmp_path / "whole", found)).exit_code == 0
    del parts["module.model.layers.0.mlp.up_proj.weight_frozen"]
    with pytest.raises(FreezeError, match=r"up_proj\.weight: \S+up_proj\.weight_trained is there without"):
        whole(parts, grown)
