"""Freezing in plain PyTorch: split and mask hold every frozen bit, or say that they cannot; each check can fail."""

from __future__ import annotations

import copy
import gc
import io
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from hub_server import HubServer, Repository
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

import ckptgrow
from ckptgrow.checkpoint import MANIFEST
from ckptgrow.manifest import Manifest, load_manifest
from ckptgrow.policy import POLICIES
from ckptgrow.regions import divided
from ckptgrow.training import FreezeError, How, SplitLinear, freeze
from ckptgrow.training.cut import Cut, cut_of, fingerprint, interleave
from ckptgrow.training.handle import _LIVE
from ckptgrow.training.mask import MaskHandle

INTEGERS = {2: torch.int16, 4: torch.int32}
DEVICE = os.environ.get("CKPTGROW_DEVICE", "cpu")
TOKENS = torch.arange(2, 14).view(2, 6).to(DEVICE)
FAMILIES = ("llama", "phi3", "phi")


# ---------------------------------------------------------------- a model without any library


class Mlp(nn.Module):
    """Gated, fused or plain: whatever its tensors say."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            module, _, attribute = name.partition(".")
            if attribute == "weight":
                self.add_module(module, nn.Linear(shape[1], shape[0], bias=module + ".bias" in shapes))

    def forward(self, x: Tensor) -> Tensor:
        has: Any = self._modules
        if "fc1" in has:
            result: Tensor = has["fc2"](functional.gelu(has["fc1"](x)))
            return result
        gate, up = (
            has["gate_up_proj"](x).chunk(2, -1) if "gate_up_proj" in has else (has["gate_proj"](x), has["up_proj"](x))
        )
        mixed: Tensor = has["down_proj"](functional.silu(gate) * up)
        return mixed


class Layer(nn.Module):
    self_attn: Any

    def __init__(self, hidden: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden)
        self.self_attn = nn.Module()
        self.self_attn.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.mlp = Mlp(shapes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn.q_proj(self.input_layernorm(x)) / 8
        result: Tensor = x + self.mlp(x) / 8
        return result


class Toy(nn.Module):
    """Layers with the names of a checkpoint of tests/checkpoints.py, and its values."""

    model: Any

    def __init__(self, folder: Path) -> None:
        super().__init__()
        tensors = checkpoints.load(folder)
        self.checkpointing = False
        self.model = nn.Module()
        hidden = len(tensors["model.norm.weight"])
        self.model.embed_tokens = nn.Embedding(16, hidden)
        self.model.layers = nn.ModuleList(Layer(hidden, _below(tensors, f"model.layers.{i}.mlp.")) for i in range(2))
        self.model.norm = nn.RMSNorm(hidden)
        self.to(next(iter(tensors.values())).dtype)
        self.load_state_dict(tensors)
        self.to(DEVICE)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        logits: Tensor = self.model.norm(x) @ self.model.embed_tokens.weight.t()
        return logits


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, tuple[int, ...]]:
    return {n.removeprefix(prefix): tuple(t.shape) for n, t in tensors.items() if n.startswith(prefix)}


Grow = Callable[..., Path]


@pytest.fixture
def grow(tmp_path: Path) -> Grow:
    """A grown checkpoint of a family, policy and dtype."""

    def make(
        model_type: str = "llama", policy: str = "g-freeze", dtype: str = "F32", only: str | None = None, **options: Any
    ) -> Path:
        base = checkpoints.make(tmp_path / "base", model_type, dtype=dtype, **options)
        return Path(ckptgrow.expand(base, tmp_path / "grown", policy=policy, layers=only).folder)

    return make


@pytest.fixture
def grown(grow: Grow) -> Path:
    return grow(bias=True)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone().view(INTEGERS[tensor.element_size()])


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor], manifest: Manifest) -> tuple[int, int, int]:
    """Elements whose bits changed: frozen, trainable; and trainable ones in all."""
    boxes = {tensor.name: tensor.boxes for tensor in manifest.trainable}
    frozen = free = total = 0
    for name, tensor in before.items():
        differ = bits(tensor) != bits(after[name])
        for box in boxes.get(name, ()):
            place = tuple(slice(*span) for span in box)
            free, total = free + int(differ[place].sum()), total + differ[place].numel()
            differ[place] = False
        frozen += int(differ.sum())
    return frozen, free, total


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}


def trainable(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def backward(model: nn.Module, tokens: Tensor = TOKENS) -> None:
    functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 4, micro: int = 1, clip: float = 0.0
) -> None:
    for _ in range(count):
        for _ in range(micro):
            backward(model)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), **{"lr": 1e-2, "weight_decay": 0.1, **options})


# ---------------------------------------------------------------- what a split model is


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_split_model_is_the_same_to_the_bit(grow: Grow, family: str, policy: str, dtype: str) -> None:
    """Logits, names, order, shapes, values; and what trains is what the manifest counts."""
    folder = grow(family, policy, dtype, bias=True)
    model, plain = Toy(folder), Toy(folder)
    handle = freeze(model, folder)
    assert torch.equal(model(TOKENS), plain(TOKENS))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert moved(plain.state_dict(), model.state_dict(), handle.manifest)[:2] == (0, 0)
    counts, stats = handle.manifest.counts, handle.stats()
    assert sum(p.numel() for p in trainable(model)) == stats.optimised == stats.trained == counts.trainable
    assert stats.frozen == counts.frozen
    assert stats.share_of_base == pytest.approx(counts.trainable_share_of_base, abs=1e-6)
    handle.check()


def test_split_layers_are_linears_and_read_whole(grown: Path) -> None:
    """For whoever looks for nn.Linear, its weight, its sizes."""
    model, plain = Toy(grown), Toy(grown)
    handle = freeze(model, grown)
    split, linear = model.model.layers[0].mlp.down_proj, plain.model.layers[0].mlp.down_proj
    assert type(split) is SplitLinear
    assert isinstance(split, nn.Linear)
    assert (split.in_features, split.out_features) == (linear.in_features, linear.out_features)
    assert torch.equal(split.weight, linear.weight)
    assert split.bias is not None
    assert torch.equal(split.bias, linear.bias)
    assert split.weight.data_ptr() != split.weight.data_ptr()  # fresh: safetensors refuses shared memory
    assert "model.layers.0.mlp.down_proj.weight_trained" in handle.trained()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_unsplit_model(grow: Grow, family: str) -> None:
    """Sliced; and none is made for what is frozen."""
    folder = grow(family, bias=True)
    model, plain = Toy(folder), Toy(folder)
    handle = freeze(model, folder)
    backward(model)
    backward(plain)
    whole = dict(plain.named_parameters())
    for target in handle.targets:
        assert target.cut is not None
        expected = target.cut.take(whole[target.name].grad, target.cut.trained)  # type: ignore[arg-type]
        torch.testing.assert_close(handle.trained()[target.name + "_trained"].grad, expected)
    assert not [name for name, p in model.named_parameters() if name not in handle.trained() and p.grad is not None]


def test_the_gradient_of_the_input_is_the_same_to_the_bit(grown: Path) -> None:
    """So layers below train as below an unsplit one."""
    model, plain = Toy(grown), Toy(grown)
    freeze(model, grown)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    gradients = []
    for mlp in (model.model.layers[0].mlp, plain.model.layers[0].mlp):
        leaf = x.clone().requires_grad_()
        mlp(leaf).sum().backward()
        gradients.append(leaf.grad.clone() if leaf.grad is not None else torch.empty(0))
    assert torch.equal(*gradients)


def test_autocast_treats_it_like_a_linear(grown: Path) -> None:
    """bfloat16 products of float32 weights."""
    model, plain = Toy(grown), Toy(grown)
    freeze(model, grown)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(model(TOKENS), plain(TOKENS))
        backward(model)


def test_copies_and_pickles_are_models_too(grown: Path) -> None:
    """deepcopy (EMA) and torch.save of a whole model."""
    model = Toy(grown)
    freeze(model, grown)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(TOKENS), model(TOKENS))


# ---------------------------------------------------------------- state dicts


def test_it_loads_what_an_unsplit_model_saved(grown: Path) -> None:
    """And the other way round, also by assignment, with dtype and device as they were."""
    model, plain = Toy(grown), Toy(grown)
    freeze(model, grown)
    other = {name: torch.randn_like(tensor) for name, tensor in plain.state_dict().items()}
    for assign in (False, True):
        model.load_state_dict(other, assign=assign)
        assert all(torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(TOKENS), model(TOKENS))


def test_what_is_wrong_with_a_state_dict_is_said_in_its_own_names(grown: Path) -> None:
    """Missing, misshapen, unexpected."""
    model = Toy(grown)
    freeze(model, grown)
    name = "model.layers.1.mlp.gate_proj.weight"
    good = state(model)
    found = model.load_state_dict({n: t for n, t in good.items() if n != name} | {"x": TOKENS}, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([name], ["x"])
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}") as caught:
        model.load_state_dict(good | {name: good[name][:-1]})
    assert "_frozen" not in str(caught.value)


# ---------------------------------------------------------------- training


def train(model: Toy, optimizer: torch.optim.Optimizer, way: str) -> None:
    """Four steps in one of the ways in which people train."""
    model.checkpointing = way == "checkpointing"
    runner = torch.compile(model, backend="aot_eager") if way == "compile" else model
    steps(runner, optimizer, micro=3 if way == "accumulation" else 1, clip=0.1 if way == "clipping" else 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["split", "mask"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_frozen_bit_moves_under_decay(grow: Grow, family: str, policy: str, how: How) -> None:
    """Every trainable element does."""
    folder = grow(family, policy, bias=True)
    model = Toy(folder)
    before, handle = state(model), freeze(model, folder, how)
    optimizer = adamw(model)
    handle.guard(optimizer)
    steps(model, optimizer)
    frozen, free, total = moved(before, model.state_dict(), handle.manifest)
    assert (frozen, free) == (0, total)
    handle.check(optimizer)


@pytest.mark.parametrize("how", ["split", "mask"])
@pytest.mark.parametrize("policy", POLICIES)
def test_only_the_layers_that_grew_train(grow: Grow, tmp_path: Path, policy: str, how: How) -> None:
    """The other layers are filled up: under decay not one of their bits moves, and an audit agrees."""
    folder = grow("llama", policy, only="1")
    model = Toy(folder)
    before, handle = state(model), freeze(model, folder, how)
    optimizer = adamw(model)
    handle.guard(optimizer)
    steps(model, optimizer)
    after = {name: tensor.contiguous() for name, tensor in state(model).items()}
    frozen, free, total = moved(before, after, handle.manifest)
    assert (frozen, free) == (0, total)
    assert {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])} == {"1"}
    for status in (0, 1):
        (trained := tmp_path / f"trained{status}").mkdir()
        save_file(after, trained / "model.safetensors")
        assert ckptgrow.audit(folder, trained).exit_code == status
        after["model.layers.0.mlp.down_proj.weight"][:, 12:] += 1


@pytest.mark.parametrize("how", ["split", "mask"])
@pytest.mark.parametrize("way", ["accumulation", "clipping", "checkpointing", "compile"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
def test_ways_to_train(grown: Path, way: str, how: How) -> None:
    """The same promise in each."""
    model = Toy(grown)
    before, handle = state(model), freeze(model, grown, how)
    optimizer = adamw(model)
    handle.guard(optimizer)
    train(model, optimizer, way)
    frozen, free, total = moved(before, model.state_dict(), handle.manifest)
    assert (frozen, free) == (0, total)


def test_split_and_mask_train_alike(grown: Path) -> None:
    """The same weights but for the rounding of sums, and the same norm at clipping; without either it is another."""
    results, norms = [], []
    for how in ("split", "mask"):
        model = Toy(grown)
        handle = freeze(model, grown, how)
        optimizer = adamw(model)
        handle.guard(optimizer)
        backward(model)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1e-3)))
        optimizer.step()
        results.append(state(model))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name])
    whole = Toy(grown)
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(name in {tensor.name for tensor in load_manifest(grown).trainable})
    backward(whole)
    assert float(nn.utils.clip_grad_norm_(whole.parameters(), 1e-3)) > 1.1 * norms[0]


# ---------------------------------------------------------------- what a mask alone does not hold


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable(model), lr=1e-2, momentum=0.9)


@pytest.mark.parametrize(
    ("make", "earlier", "says"),
    [
        (adamw, 0, "weight_decay=0.1 would move"),
        (lambda model: torch.optim.ASGD(trainable(model), lr=1e-2), 0, "lambd=0.0001 would move"),
        (sgd, 3, "state would move"),
        (lambda model: adamw(model, weight_decay=0.0), 3, "state would move"),
    ],
    ids=["decay", "asgd", "momentum", "adam-moments"],
)
def test_silent_movers(
    grown: Path,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    earlier: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is refused before it moves anything; unrefused it would; guarded it does not."""
    model = Toy(grown)
    optimizer = make(model)
    steps(model, optimizer, earlier)
    before, handle = state(model), freeze(model, grown, "mask")
    with pytest.raises(FreezeError, match=says) as caught:
        steps(model, optimizer, 1)
    assert "handle.guard(optimizer)" in str(caught.value)
    assert ".mlp." in (caught.value.tensor or "")
    with pytest.raises(FreezeError, match=says):
        handle.check(optimizer)
    optimizer.zero_grad()
    assert moved(before, state(model), handle.manifest)[:2] == (0, 0)

    unguarded = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(MaskHandle, "_check_optimizer", lambda *_: None)
        patch.setattr(MaskHandle, "_look_again", lambda *_: None)  # it would stop at the second step
        steps(model, optimizer)
    assert moved(before, state(model), handle.manifest)[0] > 0
    with pytest.raises(FreezeError, match="frozen elements have moved"):
        handle.check()

    model.load_state_dict(unguarded[0])
    optimizer.load_state_dict(unguarded[1])
    handle.guard(optimizer)
    steps(model, optimizer)
    whole = [t for t in before if t in {target.name for target in handle.targets}]
    frozen, free, _ = moved({n: before[n] for n in whole}, state(model), handle.manifest)
    assert frozen == 0
    assert free > 0


def test_zeros_are_filled_in_not_multiplied(grown: Path) -> None:
    """An infinite or NaN gradient at a frozen element, and the sign of a frozen -0.0."""
    model = Toy(grown)
    weight = model.model.layers[0].mlp.gate_proj.weight
    with torch.no_grad():
        weight[0, :4] = -0.0
    handle = freeze(model, grown, "mask")
    before, optimizer = state(model), torch.optim.SGD(trainable(model), lr=1e-2)
    bad = torch.full_like(weight, -1.0)
    bad[0, 0], bad[0, 1] = float("inf"), float("nan")
    (weight * bad).sum().backward()
    assert weight.grad is not None
    assert not weight.grad[:12].any()
    assert weight.grad[12:].all()
    assert not weight.grad[:12].signbit().any()
    optimizer.step()
    assert moved(before, state(model), handle.manifest)[0] == 0


def test_a_hook_that_did_not_fire_stops_the_first_step(grown: Path) -> None:
    """Whoever wrote that gradient did it behind autograd's back."""
    model = Toy(grown)
    handle = freeze(model, grown, "mask")
    optimizer = adamw(model, weight_decay=0.0)
    for parameter in trainable(model):
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(FreezeError, match="gradient was not masked"):
        optimizer.step()
    assert moved(state(Toy(grown)), state(model), handle.manifest)[:2] == (0, 0)


def test_a_parameter_replaced_after_the_hook_stops_the_first_step(grown: Path) -> None:
    """What sharding does to a model that was masked before it."""
    model = Toy(grown)
    freeze(model, grown, "mask")
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module.register_parameter(name, nn.Parameter(parameter.detach(), parameter.requires_grad))
    optimizer = adamw(model, weight_decay=0.0)
    backward(model)
    with pytest.raises(FreezeError, match="gradient was not masked"):
        optimizer.step()


@pytest.mark.parametrize("how", ["split", "mask"])
def test_requires_grad_set_again_stops_the_first_step(grown: Path, how: How) -> None:
    """Some trainers set it on everything they find."""
    model = Toy(grown)
    freeze(model, grown, how)
    model.requires_grad_(True)
    optimizer = adamw(model, weight_decay=0.0)
    backward(model)
    with pytest.raises(FreezeError, match="frozen, but has a gradient"):
        optimizer.step()


@pytest.mark.parametrize("how", ["split", "mask"])
def test_other_optimizers_are_left_alone(grown: Path, how: How) -> None:
    """One watch for all handles, however many; it ends for a model with its handle, and for none is a model kept."""
    handle = freeze(Toy(grown), grown, how)
    watching = len(_global_optimizer_pre_hooks)
    other = Toy(grown)
    steps(other, adamw(other), 1)
    freeze(other, grown, how)
    assert len(_global_optimizer_pre_hooks) == watching
    assert handle in _LIVE
    handle.remove()
    assert handle not in _LIVE
    gone = weakref.ref(freeze(Toy(grown), grown, how))
    gc.collect()
    assert gone() is None


def test_a_handle_that_is_collected_during_a_step_does_no_harm(grown: Path) -> None:
    """Torch goes through its hooks while they run, and a collection may come at any moment."""
    freeze(Toy(grown), grown)
    model = Toy(grown)
    freeze(model, grown)
    register = register_optimizer_step_pre_hook(lambda *_: [gc.collect()].clear())
    try:
        steps(model, adamw(model), 1)
    finally:
        register.remove()


def test_an_optimizer_made_before_the_split_is_told(grown: Path) -> None:
    """It holds parameters that are no more."""
    model = Toy(grown)
    optimizer = adamw(model)
    handle = freeze(model, grown)
    with pytest.raises(FreezeError, match="the optimizer does not hold it"):
        handle.check(optimizer)
    handle.check(adamw(model))


# ---------------------------------------------------------------- check and remove


@pytest.mark.parametrize("how", ["split", "mask"])
def test_check_sees_one_bit_and_an_exchange(grown: Path, how: How) -> None:
    """In a half-frozen tensor and in one that is wholly frozen; a trained element may move."""
    model = Toy(grown)
    handle = freeze(model, grown, how)
    gate = model.model.layers[1].mlp.gate_proj
    part = gate.weight_frozen if how == "split" else gate.weight
    norm = model.model.embed_tokens.weight
    for tensor in (part, norm):
        for change in (_flip, _exchange):
            good = tensor.detach().clone()
            change(tensor.data)
            with pytest.raises(FreezeError, match="moved"):
                handle.check()
            tensor.data.copy_(good)
    (gate.weight_trained if how == "split" else gate.weight[12:]).data.add_(1)
    handle.check()
    model.double()  # a wider type keeps every value
    handle.check()


def _flip(tensor: Tensor) -> None:
    tensor.view(torch.int32)[3, 1] ^= 1


def _exchange(tensor: Tensor) -> None:
    tensor[[0, 1]] = tensor[[1, 0]]


@pytest.mark.parametrize("how", ["split", "mask"])
@pytest.mark.parametrize("family", FAMILIES)
def test_remove_gives_the_plain_model_back(grow: Grow, family: str, how: How) -> None:
    """With what it learned; every parameter can train again, and nothing is masked."""
    folder = grow(family, bias=True)
    model = Toy(folder)
    handle = freeze(model, folder, how)
    optimizer = adamw(model, weight_decay=0.0)
    steps(model, optimizer)
    learned, logits = state(model), model(TOKENS)
    handle.remove()
    assert [(n, p.shape, type(p)) for n, p in model.named_parameters()] == [
        (n, p.shape, type(p)) for n, p in Toy(folder).named_parameters()
    ]
    assert {type(module) for module in model.modules()} == {type(module) for module in Toy(folder).modules()}
    assert all(torch.equal(tensor, learned[name]) for name, tensor in state(model).items())
    assert torch.equal(model(TOKENS), logits)
    backward(model)
    assert all(p.requires_grad and p.grad is not None and p.grad.any() for p in model.parameters())
    freeze(model, folder, how)


# ---------------------------------------------------------------- refusals


def test_the_manifest_is_found_beside_the_checkpoint(grown: Path) -> None:
    """By the config that transformers leaves in a model; its digest must be the config's."""
    model: Any = Toy(grown)
    with pytest.raises(FreezeError, match="does not say where it came from"):
        freeze(model)
    entry = json.loads((grown / "config.json").read_text())["ckptgrow"]
    model.config = type("Config", (), {"_name_or_path": str(grown), "ckptgrow": entry})()
    freeze(model).remove()
    model.config.ckptgrow = {"manifest": "sha256:" + "0" * 64}
    with pytest.raises(FreezeError, match="digest"):
        freeze(model)
    with pytest.raises(FreezeError, match="digest"):
        freeze(model, grown / MANIFEST)
    model.config._name_or_path = "org/elsewhere"
    with pytest.raises(FreezeError, match=r"org/elsewhere is no folder with a ckptgrow\.json"):
        freeze(model)


def test_the_manifest_of_a_model_from_the_hub_is_found(grown: Path, tmp_path: Path) -> None:
    """By the id and the commit that transformers leaves in the config; no weights are fetched for it."""
    script = f"""
from types import SimpleNamespace
from pathlib import Path
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_training import Toy, freeze
from ckptgrow.hub import preview
commit = preview("org/grown").origin.revision
model = Toy(Path({str(grown)!r}))
model.config = SimpleNamespace(_name_or_path="org/grown", _commit_hash=commit)
print(freeze(model).stats())
"""
    with HubServer({"org/grown": Repository({"main": checkpoints.snapshot(grown)})}) as server:
        env = os.environ | server.environment(tmp_path / "hf")
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert "parameters optimised" in done.stdout, done.stderr
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def altered(folder: Path, change: Callable[[Any], Any]) -> Manifest:
    """The manifest with its last trainable tensor changed."""
    manifest = load_manifest(folder)
    return replace(manifest, trainable=(*manifest.trainable[:-1], change(manifest.trainable[-1])))


Spoil = Callable[[Toy], Any]


def _of_another_kind(model: Toy) -> None:
    model.model.layers[0].mlp.up_proj.__class__ = type("Conv1D", (nn.Linear,), {})


def _shared(model: Toy) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def _wrapped(name: str) -> Spoil:
    def spoil(model: Toy) -> None:
        model.__class__ = type(name, (Toy,), {})

    return spoil


def _fused(model: Toy) -> None:
    weight: Any = model.model.layers[0].mlp.up_proj.weight
    weight.main_grad = torch.zeros(1)


@pytest.mark.parametrize(
    ("spoil", "how", "says"),
    [
        (_of_another_kind, "split", r"layers\.0\.mlp\.up_proj\.\S+: it is a parameter of Conv1D.*how=\"mask\""),
        (_shared, "split", r"up_proj\.weight: it is shared by several modules.*how=\"mask\""),
        (_wrapped("DistributedDataParallel"), "split", r"already wrapped \(DistributedDataParallel\).*how=\"mask\""),
        (_wrapped("FSDPModule"), "split", r"already wrapped \(FSDPModule\)"),
        (_wrapped("FullyShardedDataParallel"), "mask", "FSDP1"),
        (_fused, "mask", r"up_proj\.weight: its gradient goes to main_grad"),
        (lambda model: None, "other", "there are 'split' and 'mask'"),
    ],
)
def test_what_cannot_be_held_is_refused(grown: Path, spoil: Spoil, how: Any, says: str) -> None:
    """Naming the tensor, and before anything is touched."""
    model = Toy(grown)
    spoil(model)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(FreezeError, match=says):
        freeze(model, grown, how)
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("how", ["split", "mask"])
def test_a_foreign_manifest_is_refused(grown: Path, how: How) -> None:
    """A name the model lacks, another shape, boxes that are no ranges of one axis."""
    model = Toy(grown)
    for change, says in (
        (lambda t: replace(t, name=t.name + "s"), "no such parameter"),
        (lambda t: replace(t, shape=(7, *t.shape[1:])), r"shape \[.*, the manifest's \[7"),
        (lambda t: replace(t, boxes=(((0, 2), (0, 2)),), shape=t.shape), "not ranges along one axis"),
    ):
        with pytest.raises(FreezeError, match=says) as caught:
            freeze(model, altered(grown, change), how)
        assert ".mlp." in (caught.value.tensor or "")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_twice_is_refused(grown: Path) -> None:
    """Until it is removed; a copy has no handle."""
    for first in ("split", "mask"):
        model = Toy(grown)
        handle = freeze(model, grown, first)
        for how in ("split", "mask"):
            with pytest.raises(FreezeError, match="frozen already"):
                freeze(model, grown, how)
        assert copy.deepcopy(model).__dict__["_ckptgrow_handle"] is None
        handle.remove()


@pytest.mark.parametrize("prefix", ["_orig_mod", "module", "module._orig_mod", "base_model.model", "model"])
def test_prefixes_of_wrappers_are_known(grown: Path, prefix: str) -> None:
    """The parameter of the wrapper is the manifest's."""
    inner: nn.Module = Toy(grown)
    model = inner
    for name in reversed(prefix.split(".")):
        outer = nn.Module()
        outer.add_module(name, model)
        model = outer
    handle = freeze(model, grown)
    assert handle.targets[0].name.startswith(prefix + ".")
    assert sum(p.numel() for p in trainable(inner)) == handle.manifest.counts.trainable


def test_names_in_memory_and_models_without_a_head(grown: Path) -> None:
    """Through the manifest's own table, and below the base model's prefix."""
    model = Toy(grown)
    manifest = load_manifest(grown)
    disk = {tensor.name: tensor.name.replace("model.", "text.decoder.") for tensor in manifest.trainable}
    renamed = replace(
        manifest,
        trainable=tuple(replace(tensor, name=disk[tensor.name]) for tensor in manifest.trainable),
        in_memory_names={new: old for old, new in disk.items()},
    )
    freeze(model, renamed).remove()
    assert freeze(model.model, grown).targets[0].name.startswith("layers.0")


# ---------------------------------------------------------------- cuts


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Cut, Tensor]:
    """A tensor of one to three dimensions and ranges along one of its axes."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    axis = draw(st.integers(0, len(shape) - 1))
    ends = sorted(draw(st.sets(st.integers(0, shape[axis]), max_size=6)))
    spans = tuple(zip(ends[0::2], ends[1::2], strict=False))
    return Cut(axis, shape[axis], spans), torch.arange(float(torch.Size(shape).numel())).view(shape)


@given(cuts())
def test_what_is_cut_can_be_put_together(cutting: tuple[Cut, Tensor]) -> None:
    """Both parts, interleaved, are the tensor; every place is in exactly one."""
    cut, tensor = cutting
    places = [place for spans in (cut.frozen, cut.trained) for span in spans for place in range(*span)]
    assert sorted(places) == list(range(cut.size))
    if cut.frozen and cut.trained:
        parts = cut.take(tensor, cut.frozen), cut.take(tensor, cut.trained)
        assert torch.equal(interleave(*parts, cut.axis, cut.order), tensor)
        boxes = tuple(
            tuple(span if axis == cut.axis else (0, size) for axis, size in enumerate(tensor.shape))
            for span in cut.trained
        )
        assert cut_of(divided(tuple(tensor.shape), boxes)) == cut


@given(cuts(), st.data())
def test_shards_of_a_cut_are_the_cut(cutting: tuple[Cut, Tensor], data: st.DataObject) -> None:
    """Wherever an axis is divided among processes."""
    cut, _ = cutting
    middle = data.draw(st.integers(0, cut.size))
    left, right = cut.within(0, middle), cut.within(middle, cut.size)
    places = [p for span in left.trained for p in range(*span)]
    places += [p + middle for span in right.trained for p in range(*span)]
    assert places == [p for span in cut.trained for p in range(*span)]


def test_fingerprints_tell_places_and_pieces_apart() -> None:
    """Also across the pieces in which large tensors are read."""
    one, two = torch.randn(5), torch.randn(5)
    assert fingerprint([one, two]) == fingerprint([one.clone(), two.clone()])
    assert fingerprint([one, two]) != fingerprint([two, one])
    assert fingerprint([one.flip(0)]) != fingerprint([one])


# ---------------------------------------------------------------- sharded parameters

SHARDED = """
import os, sys
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from test_training import Toy, adamw, backward, moved, state, steps
from ckptgrow.training import FreezeError, freeze
from pathlib import Path

torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
folder = Path({grown!r})
FULL = StateDictOptions(full_state_dict=True)


def full(model):
    return {{name: tensor.full_tensor().detach() for name, tensor in model.state_dict().items()}}


def sharded():
    model = Toy(folder)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# masked before sharding: the hooks are gone with the parameters
model = Toy(folder)
early = freeze(model, folder, "mask")
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = adamw(model, weight_decay=0.0)
backward(model)
try:
    optimizer.step()
    raise SystemExit("not noticed")
except FreezeError as error:
    assert "not masked" in str(error), error
early.remove()

# masked after sharding, and what a split says then
model = sharded()
try:
    freeze(model, folder)
    raise SystemExit("not refused")
except FreezeError as error:
    assert "mask" in str(error), error
handle = freeze(model, folder, "mask")
before = full(model)
optimizer = adamw(model)
handle.guard(optimizer)
steps(model, optimizer, micro=2)
handle.check(optimizer)
frozen, free, total = moved(before, full(model), handle.manifest)
assert (frozen, free) == (0, total), (frozen, free, total)

# split before sharding
model = Toy(folder)
handle = freeze(model, folder)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
names = {{name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}}
optimizer = adamw(model)
steps(model, optimizer)
handle.check(optimizer)
for name, p in model.named_parameters():
    assert torch.equal(p.full_tensor(), names[name]) != name.endswith("_trained"), name

# what it holds comes back in each way to load: by shards, the same whole in each process, whole in the first one only
learned, first = full(model), dist.get_rank() == 0
fresh = state(Toy(folder))
for kind, given in (
    ("sharded", {{name: tensor.clone() for name, tensor in model.state_dict().items()}}),
    ("full", dict(learned)),
    ("broadcast", dict(learned) if first else {{}}),
    ("assign", None),  # from meta, as accelerate loads with cpu_ram_efficient_loading
):
    placements = {{name: p.placements for name, p in model.named_parameters()}}
    if given is None:
        model.to("meta")
        own = {{name: (t.device_mesh, t.placements) for name, t in model.state_dict().items()}}
        given = {{name: distribute_tensor(learned[name], *where) for name, where in own.items()}}
        model.load_state_dict(given, assign=True)
    else:
        set_model_state_dict(model, {{n: t.full_tensor() * 0 for n, t in model.state_dict().items()}}, options=FULL)
        assert not any(tensor.any() for tensor in full(model).values())
        options = StateDictOptions(full_state_dict=kind != "sharded", broadcast_from_rank0=kind == "broadcast")
        set_model_state_dict(model, given, options=options)
    assert {{name: p.placements for name, p in model.named_parameters()}} == placements, kind
    after = full(model)
    assert all(torch.equal(after[name], learned[name]) for name in learned), kind
    assert after.keys() == fresh.keys()
for wrong in ("missing", "misshapen"):
    given = dict(learned) if first else {{}}
    name = next(name for name in learned if name.endswith("down_proj.weight"))
    if first:
        given[name] = learned[name][:, 1:]
    if wrong == "missing":
        given.pop(name, None)
    try:
        set_model_state_dict(
            model, given, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        )
        raise SystemExit("not refused")
    except RuntimeError as error:
        assert name in str(error), error
assert all(torch.equal(tensor, learned[name]) for name, tensor in full(model).items())

# both in DDP, which must know beforehand what will have no gradient
wrapped = torch.nn.parallel.DistributedDataParallel(Toy(folder))
try:
    freeze(wrapped, folder, "mask")
    raise SystemExit("not refused")
except FreezeError as error:
    assert "DDP waits" in str(error), error
for how in ("split", "mask"):
    model = Toy(folder)
    before = state(model)
    handle = freeze(model, folder, how)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = adamw(model)
    handle.guard(optimizer)
    steps(wrapped, optimizer)
    handle.check(optimizer)
    frozen, free, total = moved(before, state(model), handle.manifest)
    assert (frozen, free) == (0, total), (how, frozen, free, total)
print("held", flush=True)
dist.barrier()
os._exit(0)  # all has been asserted; gloo's threads now and then abort a process that takes itself down in order
"""


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_ddp_and_fsdp2_in_two_processes(grow: Grow, family: str, tmp_path: Path) -> None:
    """Masks work on each process's shard, at its place in the whole; splits shard like anything else."""
    folder = grow(family, bias=family == "llama")
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED.format(tests=str(Path(__file__).parent), grown=str(folder)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"CKPTGROW_DEVICE": "cpu"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("held") == 2


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_importing_it_imports_no_trainer() -> None:
    """torch only."""
    report = "import sys, ckptgrow.training; print(*({'transformers', 'accelerate', 'lightning'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
