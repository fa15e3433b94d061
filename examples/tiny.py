"""What the training examples share: a tiny model to grow, text to train on, and the audit at the end.

    python examples/train_plain.py [--model FOLDER] [--steps 30] [--rate 0.001] [--how split|mask] [--out FOLDER]

Without --model a tiny Llama of random weights is made, which reads bytes; with it, say --model gemma-3-270m, that
checkpoint is grown. Weight decay is on everywhere: it is what moves frozen weights when only gradients are masked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ckptgrow

LENGTH = 64
BATCH = 2
DECAY = 0.01
TEXT = Path(__file__).parent.parent / "README.md"
SPECIAL = ("<pad>", "<s>", "</s>")


@dataclass(frozen=True)
class Asked:
    """The options that every example has; `folder` is where it may write."""

    folder: Path
    model: Path | None
    steps: int
    rate: float
    how: str


def run(main: Callable[[Asked], None], doc: str | None) -> None:
    """Read the options and call `main`, in a temporary folder if none was asked for."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--how", choices=["split", "mask"], default="split")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(Asked(asked.out or Path(temporary), asked.model, asked.steps, asked.rate, asked.how))


def grown(asked: Asked) -> Path:
    """The checkpoint to train: the asked one or the tiny one, twice as wide. Made once, whoever comes first."""
    folder = asked.folder / "grown"
    if not folder.is_dir():
        ckptgrow.expand(asked.model or tiny(asked.folder / "base"), folder)
    return folder


def tiny(folder: Path, width: int = 128) -> Path:
    """A Llama of random weights and a tokenizer that makes a token of each byte."""
    torch.manual_seed(0)
    alphabet = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    reader = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pad, start, end = SPECIAL
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=reader, pad_token=pad, bos_token=start, eos_token=end)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4 * LENGTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def texts() -> list[str]:
    """The paragraphs of this project's README."""
    return [part for part in TEXT.read_text(encoding="utf-8").split("\n\n") if len(part) > LENGTH]


def rows(folder: Path, count: int = 16) -> torch.Tensor:
    """The README in pieces: `count` rows of LENGTH tokens."""
    ids = AutoTokenizer.from_pretrained(folder)(TEXT.read_text(encoding="utf-8"))["input_ids"]
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


def batch(data: torch.Tensor, step: int, process: int = 0, processes: int = 1) -> torch.Tensor:
    """The rows of one step; each process has its own."""
    start = (step * processes + process) * BATCH % len(data)
    return data[start : start + BATCH]


def finish(before: Path, trained: Path, losses: Sequence[float]) -> None:
    """`ckptgrow audit`, as a command. Ends the example where a frozen element moved, none trained, or no loss fell."""
    few = max(1, len(losses) // 4)
    first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
    print(f"loss {first:.3f} -> {last:.3f}, means of {few} steps")
    command = [sys.executable, "-m", "ckptgrow", "audit", str(before), str(trained)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    subprocess.run(command, check=True)
    if done.returncode or not json.loads(done.stdout)["totals"]["changed"] or last >= first:
        raise SystemExit("that is not how it should be")
