"""The mask as transformers and PEFT take it: loaded into memory beside the model, and as a LoRA that keeps to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="loads the mask with real transformers, which is not installed")

import torch
import transformers
from test_transformers import COMMON, GEMMA, VISION
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import ckptgrow
from ckptgrow.manifest import load_manifest

# PEFT asks transformers 5 for a property by its old name.
pytestmark = [
    pytest.mark.transformers,
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

MODELS: dict[str, dict[str, Any]] = {
    "llama": COMMON | {"mlp_bias": True, "tie_word_embeddings": True},
    "phi3": COMMON,
    "gemma3": {"text_config": GEMMA, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 60}
    | {"boi_token_index": 61, "eoi_token_index": 62},
}
TOKENS = torch.randint(3, 56, (4, 10), generator=torch.Generator().manual_seed(0))
Grow = Callable[..., Path]


@pytest.fixture
def grow(tmp_path: Path) -> Grow:
    """A grown checkpoint of a tiny random model, some of whose weights are minus zero."""

    def make(model_type: str = "llama", policy: str = "g-freeze", dtype: torch.dtype = torch.bfloat16) -> Path:
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **copy.deepcopy(MODELS[model_type]))
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "mlp" in name and parameter.dim() == 2:
                    parameter.view(-1)[::3] = -0.0
        model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
        return Path(ckptgrow.expand(tmp_path / "base", tmp_path / "grown", width=97, policy=policy).folder)

    return make


def loaded(folder: Path) -> nn.Module:
    """What from_pretrained makes of a folder, after a look at what it complained about."""
    model, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {key: found for key, found in said.items() if found} == {}
    held: nn.Module = model
    return held


@pytest.mark.parametrize("policy", ["g-freeze", "up"])
@pytest.mark.parametrize("model_type", MODELS)
def test_the_mask_travels_as_the_weights_do(model_type: str, policy: str, grow: Grow, tmp_path: Path) -> None:
    """from_pretrained opens it without a word; in memory the ones are the boxes, and as many as are counted."""
    grown = grow(model_type, policy)
    ckptgrow.mask(grown, "safetensors", out=tmp_path / "mask")
    manifest, mask = load_manifest(grown), dict(loaded(tmp_path / "mask").named_parameters())
    model = dict(loaded(grown).named_parameters())
    expected = {name: torch.zeros(parameter.shape) for name, parameter in model.items()}
    for tensor in manifest.trainable:
        for box in tensor.boxes:
            name = manifest.in_memory_names.get(tensor.name, tensor.name)
            expected[name][tuple(slice(a, b) for a, b in box)] = 1
    assert mask.keys() == expected.keys()
    assert {(mask[name].shape, mask[name].dtype) for name in mask} == {(p.shape, p.dtype) for p in model.values()}
    assert all(torch.equal(mask[name].float(), expected[name]) for name in mask)
    assert sum(int(ones.sum()) for ones in mask.values()) == manifest.counts.trainable


def test_the_mask_in_fp8(grow: Grow, tmp_path: Path) -> None:
    """1.0 in e4m3 is 1.0, also through from_pretrained."""
    grown = grow("llama", dtype=torch.float8_e4m3fn)
    ckptgrow.mask(grown, "safetensors", out=tmp_path / "mask")
    mask = AutoModelForCausalLM.from_pretrained(tmp_path / "mask", dtype=torch.float32)
    counted = sum(int((parameter == 1).sum()) for parameter in mask.parameters())
    assert counted == load_manifest(grown).counts.trainable
    assert all(bool(((p == 0) | (p == 1)).all()) for p in mask.parameters())


# ---------------------------------------------------------------- peft


@pytest.fixture
def peft() -> Any:
    """PEFT, where it is installed."""
    return pytest.importorskip("peft", reason="confines a LoRA of PEFT, which is not installed")


def adapted(peft: Any, grown: Path, **more: Any) -> Any:
    """The model with the LoRA that `ckptgrow mask --format peft` asks for."""
    text = ckptgrow.mask(grown, "peft").text or ""
    regex = text.partition('target_modules=r"')[2].partition('"')[0]
    options = {"r": 4, "lora_alpha": 8, "target_modules": regex} | more
    return peft.get_peft_model(loaded(grown), peft.LoraConfig(**options))


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    """A few steps on the same tokens."""
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("policy", ["g-freeze", "g-train", "down", "up"])
@pytest.mark.parametrize("model_type", MODELS)
def test_a_confined_lora_leaves_the_frozen_part_alone(
    model_type: str, policy: str, grow: Grow, peft: Any, tmp_path: Path
) -> None:
    """Trained with decay, merged and saved: audit says that nothing frozen moved, not even minus zeros."""
    from ckptgrow.training.peft import confine

    grown = grow(model_type, policy)
    model = adapted(peft, grown)
    handle = confine(model, grown)
    optimizer = torch.optim.AdamW(handle.trained().values(), lr=0.05, weight_decay=0.01)
    train(model, optimizer)
    handle.check(optimizer)
    model.merge_and_unload().save_pretrained(tmp_path / "trained")
    seen = ckptgrow.audit(grown, tmp_path / "trained")
    assert (seen.exit_code, seen.total("moved"), seen.cause) == (0, 0, "nothing")
    matrices = [tensor for tensor in load_manifest(grown).trainable if len(tensor.shape) == 2]
    changed = {drift.tensor: drift.changed / drift.trainable for drift in seen.tensors if drift.trainable}
    assert all(changed[tensor.name] > 0.5 for tensor in matrices)


def test_what_is_not_confined_moves(grow: Grow, peft: Any, tmp_path: Path) -> None:
    """The audit above has teeth: the same LoRA without `confine` moves frozen elements."""
    grown = grow()
    model = adapted(peft, grown)
    train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05))
    model.merge_and_unload().save_pretrained(tmp_path / "trained")
    assert ckptgrow.audit(grown, tmp_path / "trained").exit_code == 1


def test_zeros_alone_flip_signs(grow: Grow, peft: Any, tmp_path: Path) -> None:
    """Why the update says minus zero: PEFT's own merge adds +0.0, and -0.0 + 0.0 is +0.0."""
    from ckptgrow.training.peft import confine

    grown = grow()
    model = adapted(peft, grown)
    confine(model, grown)
    for module in model.modules():
        if "ckptgrow_cut" in module.__dict__:
            module.__class__ = type(module).__mro__[1]
    model.merge_and_unload().save_pretrained(tmp_path / "trained")
    seen = ckptgrow.audit(grown, tmp_path / "trained")
    assert (seen.exit_code, max(drift.largest for drift in seen.tensors)) == (1, 0.0)


def test_an_adapter_saved_by_itself_is_confined_again(grow: Grow, peft: Any, tmp_path: Path) -> None:
    """Save the adapter, load it over the grown model, confine, merge."""
    from ckptgrow.training.peft import confine

    grown = grow()
    model = adapted(peft, grown)
    handle = confine(model, grown)
    train(model, torch.optim.AdamW(handle.trained().values(), lr=0.05))
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(grown), tmp_path / "adapter")
    confine(again, grown)
    again.merge_and_unload().save_pretrained(tmp_path / "trained")
    seen = ckptgrow.audit(grown, tmp_path / "trained")
    assert seen.exit_code == 0
    assert seen.total("changed") > 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"target_modules": ["q_proj", "up_proj"]}, "an adapter reaches it, but it is frozen"),
        ({"use_dora": True}, "a variant of LoRA"),
        ({"lora_bias": True}, "a variant of LoRA"),
        ({"init_lora_weights": "pissa"}, "began as pissa"),
        ({"modules_to_save": ["norm"]}, "belongs to no adapter"),
    ],
)
def test_what_cannot_be_confined_is_refused(options: dict[str, Any], why: str, grow: Grow, peft: Any) -> None:
    """By name, with every parameter as it was."""
    from ckptgrow.training import FreezeError
    from ckptgrow.training.peft import confine

    model = adapted(peft, grow(dtype=torch.float32), **options)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(FreezeError, match=why):
        confine(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]


def test_the_hook_that_does_not_fire_is_seen(grow: Grow, peft: Any) -> None:
    """A gradient that something writes past the hooks is refused before the first step."""
    from ckptgrow.training import FreezeError
    from ckptgrow.training.peft import confine

    grown = grow()
    model = adapted(peft, grown)
    handle = confine(model, grown)
    optimizer = torch.optim.AdamW(handle.trained().values())
    for parameter in handle.trained().values():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(FreezeError, match="not masked"):
        optimizer.step()


def test_a_confined_lora_under_the_trainer(grow: Grow, peft: Any, tmp_path: Path) -> None:
    """Hugging Face's Trainer with decay and clipping: nothing but the handle is needed."""
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate, which is not installed")
    from ckptgrow.training.peft import confine

    grown = grow("phi3", dtype=torch.float32)
    model = adapted(peft, grown)
    handle = confine(model, grown)
    options: dict[str, Any] = {"weight_decay": 0.1, "max_grad_norm": 0.1, "learning_rate": 0.05, "max_steps": 4}
    quietly: dict[str, Any] = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    args = transformers.TrainingArguments(str(tmp_path / "run"), **options, **quietly)
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    trainer = transformers.Trainer(model, args, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    handle.check(trainer.optimizer)
    model.merge_and_unload().save_pretrained(tmp_path / "trained")
    seen = ckptgrow.audit(grown, tmp_path / "trained")
    assert (seen.exit_code, seen.cause) == (0, "nothing")
    assert seen.total("changed") > 0.5 * seen.total("trainable")


def test_a_zero_that_moved_is_seen(grow: Grow, peft: Any) -> None:
    """check() names the factor in which a row or column that must be zero is not."""
    from ckptgrow.training import FreezeError
    from ckptgrow.training.peft import confine

    grown = grow()
    for role, factor in (("up_proj", "lora_B"), ("down_proj", "lora_A")):
        model = adapted(peft, grown)
        handle = confine(model, grown)
        handle.check()
        name = next(name for name in handle.trained() if role in name and factor in name)
        with torch.no_grad():
            handle.trained()[name][0, 0] = 1e-30
        with pytest.raises(FreezeError, match="frozen elements have moved") as caught:
            handle.check()
        assert caught.value.tensor == name


def test_a_copy_of_the_model_merges_its_own_factors(grow: Grow, peft: Any, tmp_path: Path) -> None:
    """Trainers copy models for averages: what a copy merges is what it has learned, and confined."""
    from ckptgrow.training.peft import confine

    grown = grow("phi3", dtype=torch.float32)
    model = adapted(peft, grown)
    handle = confine(model, grown)
    untrained = copy.deepcopy(model)
    train(model, torch.optim.AdamW(handle.trained().values(), lr=0.05))
    untrained.merge_and_unload().save_pretrained(tmp_path / "untrained")
    seen = ckptgrow.audit(grown, tmp_path / "untrained")
    assert (seen.exit_code, seen.total("moved")) == (0, 0)
    again = copy.deepcopy(model)
    again.merge_and_unload().save_pretrained(tmp_path / "trained")
    seen = ckptgrow.audit(grown, tmp_path / "trained")
    assert (seen.exit_code, seen.total("moved")) == (0, 0)
    assert seen.total("changed") > 0


def test_the_snippet_runs(grow: Grow, peft: Any) -> None:
    """What `--format peft` prints, word for word."""
    grown = grow("phi3")
    names: dict[str, Any] = {}
    exec(compile(ckptgrow.mask(grown, "peft").text or "", "snippet", "exec"), names)
    assert names["handle"].stats().optimised == sum(p.numel() for p in names["model"].parameters() if p.requires_grad)
