"""Grow a model, train only what is new with Hugging Face's Trainer, and show that nothing else moved.

    python examples/train_transformers.py [--model FOLDER] [--steps 30] [--how split|mask] [--out FOLDER]

Without --model it makes a tiny Llama and a tiny vocabulary of bytes; with it, say --model gemma-3-270m, it grows that
checkpoint and uses its tokenizer. Weight decay is on: it is what moves frozen weights when only gradients are masked.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ckptgrow
from ckptgrow.manifest import load_manifest
from ckptgrow.training.transformers import FreezeCallback

LENGTH = 64
Rows = list[dict[str, torch.Tensor]]


def tiny(folder: Path) -> Path:
    """A Llama of random weights that reads bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rows(folder: Path) -> Rows:
    """This file's own text in pieces of LENGTH tokens."""
    text = Path(__file__).read_text(encoding="utf-8")
    tokenized = (folder / "tokenizer.json").is_file()
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"] if tokenized else list(text.encode())
    pieces = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def moved(grown: Path, trained: Path) -> tuple[int, int]:
    """How many frozen and how many trainable elements differ from the grown ones, bit by bit, in the trained dtype."""
    before, after = load(grown), load(trained)
    boxes = {tensor.name: tensor.boxes for tensor in load_manifest(grown).trainable}
    frozen = free = 0
    for name in before:
        differ = after[name].view(torch.uint8) != before[name].to(after[name].dtype).view(torch.uint8)
        differ = differ.view(*before[name].shape, -1).any(-1)
        for box in boxes.get(name, ()):
            place = tuple(slice(start, stop) for start, stop in box)
            free += int(differ[place].sum())
            differ[place] = False
        frozen += int(differ.sum())
    return frozen, free


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def main(options: argparse.Namespace, folder: Path) -> None:
    """Grow, train, compare."""
    base = options.model or tiny(folder / "base")
    grown = ckptgrow.expand(base, folder / "grown").folder
    model = AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=str(folder / "trained"),
        max_steps=options.steps,
        per_device_train_batch_size=2,
        learning_rate=options.rate,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        logging_steps=5,
        save_steps=options.steps,
        save_only_model=True,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows(base), callbacks=[FreezeCallback(how=options.how)])
    seconds = trainer.train().metrics["train_runtime"] / options.steps
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    frozen, free = moved(grown, folder / "trained" / f"checkpoint-{options.steps}")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {seconds:.2f} s a step")
    print(f"saved checkpoint: {frozen:,} frozen elements moved, {free:,} trainable ones did")
    if frozen or not free or losses[-1] >= losses[0]:
        raise SystemExit("that is not how it should be")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--how", choices=["split", "mask"], default="split")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    asked = parsed()
    if asked.out:
        main(asked, asked.out)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(asked, Path(temporary))
