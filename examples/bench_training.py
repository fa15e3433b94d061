"""What freezing costs: full fine-tuning, a mask, a guarded mask and a split on one model, side by side in one run.

    python examples/bench_training.py [--model FOLDER] [--steps 5] [--rows 2] [--length 128] [--device cpu] [--json]

Without --model it grows a Llama of random weights to about 100 M parameters (10 layers, hidden 640, MLP 2 x 2048,
tied). The variants take turns, step by step, so that whatever else the machine does meets them alike; the time is the
median. Bytes are sums over tensors, counted after the last step. AdamW has torch's default decay, except for the mask
without a guard, which would be refused. --model needs the memory of four float32 copies with their states.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ckptgrow
from ckptgrow.training import freeze

VARIANTS = ("full fine-tuning", "mask", "mask + guard", "split")


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one variant: elements held by the optimizer, bytes beside the model, and the median step."""

    variant: str
    optimised: int
    gradient_bytes: int
    state_bytes: int
    copy_bytes: int
    seconds: float


class Run:
    """One variant with its own model and optimizer."""

    def __init__(self, variant: str, grown: Path, device: str) -> None:
        self.variant, self.seconds = variant, list[float]()
        self.model = AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32).to(device)
        how: Any = "split" if variant == "split" else "mask"
        self.handle = None if variant == "full fine-tuning" else freeze(self.model, grown, how)
        decay = 0.0 if variant == "mask" else 0.01
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=decay)
        if self.handle is not None and variant != "mask":
            self.handle.guard(self.optimizer)

    def step(self, tokens: torch.Tensor) -> None:
        settle(tokens)
        began = time.perf_counter()
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        self.optimizer.step()
        settle(tokens)
        self.seconds.append(time.perf_counter() - began)
        self.gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad()

    def figures(self) -> Figures:
        """The first step makes the optimizer's state and is left out."""
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        states = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        kept = [part for parts in getattr(self.handle, "_kept", {}).values() for part in parts]
        sizes = map(nbytes, (self.gradients, states, kept))
        return Figures(self.variant, sum(p.numel() for p in held), *sizes, statistics.median(self.seconds[1:]))


def settle(tensor: torch.Tensor) -> None:
    """A GPU works on after a call has returned."""
    if tensor.is_cuda:
        torch.cuda.synchronize()


def nbytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def random_llama(folder: Path) -> Path:
    """Before growth: MLPs of 2048."""
    torch.manual_seed(0)
    shape = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 10}
    LlamaForCausalLM(LlamaConfig(vocab_size=8192, tie_word_embeddings=True, **shape)).save_pretrained(folder)
    return folder


def bench(asked: argparse.Namespace, folder: Path) -> list[Figures]:
    grown = Path(ckptgrow.expand(asked.model or random_llama(folder / "base"), folder / "grown").folder)
    runs = [Run(variant, grown, asked.device) for variant in VARIANTS]
    parameters = sum(p.numel() for p in runs[0].model.parameters())
    print(f"{parameters:,} parameters in float32, {asked.rows} x {asked.length} tokens, torch {torch.__version__},")
    where = torch.cuda.get_device_name() if asked.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{where}; each variant {asked.steps} steps after a first one, taking turns")
    for step in range(asked.steps + 1):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(3, 8192, (asked.rows, asked.length), generator=generator).to(asked.device)
        for run in runs[step % len(runs) :] + runs[: step % len(runs)]:
            run.step(tokens)
    for run in runs:
        if run.handle is not None:
            run.handle.check(run.optimizer)  # raises where a frozen bit has moved
    return [run.figures() for run in runs]


def table(figures: list[Figures]) -> str:
    """Each figure, and what it is of full fine-tuning's."""
    full = figures[0]
    heads = ("", "optimised", "gradients MB", "optimizer MB", "copy MB", "s/step")
    lines = ["{:<18}{:>20}{:>18}{:>18}{:>10}{:>15}".format(*heads)]
    for row in figures:
        cells = [row.variant, f"{row.optimised:,} ({row.optimised / full.optimised:.2f})"]
        for value, whole in ((row.gradient_bytes, full.gradient_bytes), (row.state_bytes, full.state_bytes)):
            cells.append(f"{value / 1e6:.0f} ({value / whole:.2f})")
        cells += [f"{row.copy_bytes / 1e6:.0f}", f"{row.seconds:.2f} ({row.seconds / full.seconds:.2f})"]
        lines.append("{:<18}{:>20}{:>18}{:>18}{:>10}{:>15}".format(*cells))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = bench(options, Path(temporary))
    print(json.dumps([asdict(row) for row in found], indent=2) if options.json else table(found))
