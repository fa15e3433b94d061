"""Grow a model and train only what is new in a plain PyTorch loop, with AdamW's default weight decay.

    python examples/train_plain.py [--model FOLDER] [--steps 30]

Without --model it makes a tiny Llama of random weights; with it, say --model gemma-3-270m, it grows that checkpoint.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ckptgrow
from ckptgrow.training import freeze


def tiny(folder: Path) -> Path:
    """A Llama of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def main(base: Path | None, steps: int, folder: Path) -> None:
    """Grow, train on one batch, save, and open what was saved."""
    grown = ckptgrow.expand(base or tiny(folder / "base"), folder / "grown").folder
    model = AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32)
    handle = freeze(model)  # finds ckptgrow.json beside the checkpoint
    print(handle.stats())

    optimizer = torch.optim.AdamW(handle.trained().values(), lr=1e-3)
    tokens = torch.randint(3, 64, (2, 32), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    handle.check(optimizer)  # raises where a frozen bit has moved
    model.save_pretrained(folder / "trained")  # plain names, grown shapes
    again = AutoModelForCausalLM.from_pretrained(folder / "trained")
    saved, trained = again.state_dict(), model.state_dict()
    if not all(torch.equal(saved[name], trained[name]) for name in trained):
        raise SystemExit("what was saved is not what was trained")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; no frozen bit moved; the saved checkpoint opens as usual")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(asked.model, asked.steps, Path(temporary))
