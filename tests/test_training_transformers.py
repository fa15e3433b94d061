"""Frozen models in real transformers: save, reload, the Trainer, its checkpoints, and training resumed from one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="trains real transformers models, which is not installed")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate, which is not installed")

import checkpoints
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import ckptgrow
from ckptgrow.checkpoint import MANIFEST
from ckptgrow.manifest import load_manifest
from ckptgrow.policy import POLICIES
from ckptgrow.training import FreezeError, How, freeze
from ckptgrow.training.transformers import FreezeCallback

pytestmark = [pytest.mark.transformers, pytest.mark.usefixtures("quiet")]

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": True, "tie_word_embeddings": True},
    "phi3": {},
    "phi": {"num_key_value_heads": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
}
TOKENS = torch.randint(3, 64, (12, 10), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in TOKENS]
# Renamed in transformers 5; the old name warns.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
Grow = Callable[..., Path]


@pytest.fixture
def grow(tmp_path: Path) -> Grow:
    """A grown checkpoint of a tiny random model."""

    def make(model_type: str = "llama", policy: str = "g-freeze") -> Path:
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**checkpoints.TINY, **MODELS[model_type]})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")  # type: ignore[no-untyped-call]
        return Path(ckptgrow.expand(tmp_path / "base", tmp_path / "grown", policy=policy).folder)

    return make


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        torch.equal(one[name].view(torch.int32), other[name].view(torch.int32)) for name in one
    )


def moved(grown: Path, after: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """Elements whose bits are not the grown checkpoint's: frozen, trainable; and trainable ones in all."""
    boxes = {tensor.name: tensor.boxes for tensor in load_manifest(grown).trainable}
    frozen = free = total = 0
    for name, tensor in state(load(grown)).items():
        differ = tensor.view(torch.int32) != after[name].view(torch.int32)
        for box in boxes.get(name, ()):
            place = tuple(slice(*span) for span in box)
            free, total = free + int(differ[place].sum()), total + differ[place].numel()
            differ[place] = False
        frozen += int(differ.sum())
    return frozen, free, total


# ---------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model_type", MODELS)
def test_save_pretrained_writes_a_stock_checkpoint(grow: Grow, model_type: str, policy: str, tmp_path: Path) -> None:
    """The manifest is found by itself; logits have the grown model's bits; what is saved opens without us."""
    folder = grow(model_type, policy)
    model, plain = load(folder), load(folder)
    handle = freeze(model)
    assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)
    optimizer = torch.optim.AdamW(handle.trained().values(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert same(state(again), state(model))
    frozen, free, total = moved(folder, state(again))
    assert frozen == 0
    assert free > 0.9 * total  # a token that a row never sees, a bias's zero gradient
    script = f"import transformers as t; t.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'saved')!r})"
    if (model_type, policy) == ("llama", "g-freeze"):
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize("how", ["split", "mask"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(grow: Grow, how: How, reentrant: bool) -> None:
    """transformers' own."""
    folder = grow()
    model = load(folder)
    handle = freeze(model, how=how)
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.1)
    handle.guard(optimizer)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    frozen, free, total = moved(folder, state(model))
    assert (frozen, free) == (0, total)


# ---------------------------------------------------------------- the Trainer


def trainer(model: Any, out: Path, callback: FreezeCallback, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return Trainer(model, TrainingArguments(**{**defaults, **options}), train_dataset=DATA, callbacks=[callback])


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {CHECKPOINTING: True},
    "no-clipping": {"max_grad_norm": 0.0},
    "bf16": {"bf16": True},
    "adafactor": {"optim": "adafactor"},
}


@pytest.mark.parametrize("how", ["split", "mask"])
@pytest.mark.parametrize("way", WAYS)
def test_the_trainer_keeps_every_frozen_bit(
    grow: Grow, way: str, how: How, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With weight decay, in the model and in both checkpoints; the counts are printed at the start."""
    folder = grow()
    model = load(folder)
    run = trainer(model, tmp_path / "out", FreezeCallback(how=how), **WAYS[way])
    run.train()
    manifest = load_manifest(folder)
    held = sum(p.numel() for group in run.optimizer.param_groups for p in group["params"])
    assert held == (manifest.counts.trainable if how == "split" else 2 * manifest.counts.trainable)
    for after in (state(model), *(state(load(tmp_path / "out" / f"checkpoint-{step}")) for step in (3, 6))):
        frozen, free, total = moved(folder, after)
        assert frozen == 0
        assert free > 0.99 * total
    assert f"{held:,} parameters optimised" in capsys.readouterr().out


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("how", ["split", "mask"])
def test_training_resumed_equals_training_uninterrupted(grow: Grow, model_type: str, how: How, tmp_path: Path) -> None:
    """From the checkpoint in the middle, which a stock loader opens and which has its manifest."""
    folder = grow(model_type)
    whole = load(folder)
    trainer(whole, tmp_path / "out", FreezeCallback(how=how)).train()
    middle = tmp_path / "out" / "checkpoint-3"
    assert load_manifest(middle) == load_manifest(folder)
    stock = load(middle)
    assert {n: t.shape for n, t in state(stock).items()} == {n: t.shape for n, t in state(load(folder)).items()}
    for start in (folder, middle):
        model = load(start)
        trainer(model, tmp_path / "again", FreezeCallback(how=how)).train(resume_from_checkpoint=str(middle))
        assert same(state(model), state(whole))


def test_both_ways_report_the_same_norms(grow: Grow, tmp_path: Path) -> None:
    """So both are clipped alike: masks act before clipping."""
    folder, norms = grow(), []
    for how in ("split", "mask"):
        run = trainer(load(folder), tmp_path / how, FreezeCallback(how=how), max_grad_norm=0.01)
        run.train()
        norms.append([entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert len(norms[0]) == 6


@pytest.mark.parametrize("how", ["split", "mask"])
def test_a_frozen_bit_that_moves_stops_the_save(grow: Grow, how: How, tmp_path: Path) -> None:
    """By another callback, say."""

    class Meddler(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **has: Any) -> None:
            has["model"].get_input_embeddings().weight.data[5, 5] += 1

    model = load(grow())
    run = trainer(model, tmp_path / "out", FreezeCallback(how=how))
    run.add_callback(Meddler())
    with pytest.raises(FreezeError, match=r"embed_tokens\.weight: frozen elements have moved"):
        run.train()


def test_an_optimizer_brought_along_is_looked_at(grow: Grow, tmp_path: Path) -> None:
    """It was made before the split and holds what is no more."""
    model = load(grow())
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True
    )
    optimizer = torch.optim.AdamW(model.parameters())
    run = Trainer(model, arguments, train_dataset=DATA, callbacks=[FreezeCallback()], optimizers=(optimizer, None))
    with pytest.raises(FreezeError, match="the optimizer does not hold it"):
        run.train()


def test_a_split_that_zero3_would_save_in_parts_is_refused(grow: Grow) -> None:
    """Its parameters carry DeepSpeed's mark by the time training begins."""
    model, callback = load(grow()), FreezeCallback()
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    callback.on_init_end(arguments := TrainingArguments(use_cpu=True), state, control, model=model)
    arguments.deepspeed = {"zero_optimization": {"stage": 3}}
    assert callback.handle is not None
    for number, parameter in enumerate(callback.handle.trained().values()):
        parameter.ds_id = number  # type: ignore[attr-defined]
    with pytest.raises(FreezeError, match="under ZeRO-3 the Trainer would save"):
        callback.on_train_begin(arguments, state, control, model=model, optimizer=None)


def test_a_manifest_of_another_model_is_refused(grow: Grow, tmp_path: Path) -> None:
    """By the digest in the model's config."""
    folder = grow()
    (tmp_path / "other").mkdir()
    text = (folder / MANIFEST).read_text().replace('"inexact_halves": 0', '"inexact_halves": 1')
    (tmp_path / "other" / MANIFEST).write_text(text)
    with pytest.raises(FreezeError, match="digest"):
        trainer(load(folder), tmp_path / "out", FreezeCallback(tmp_path / "other"))


@pytest.mark.parametrize("example", ["train_plain", "train_transformers", "train_native"])
def test_examples(example: str) -> None:
    """They end well, and they check themselves."""
    path = Path(__file__).parent.parent / "examples" / f"{example}.py"
    done = subprocess.run([sys.executable, path, "--steps", "10"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "optimised" in done.stdout
