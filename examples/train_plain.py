"""Train only what is new in a plain PyTorch loop, with AdamW's weight decay. For the options see tiny.py.

python examples/train_plain.py [--model gemma-3-270m]
"""

from __future__ import annotations

import tiny
import torch
from transformers import AutoModelForCausalLM

from ckptgrow.training import freeze


def main(asked: tiny.Asked) -> None:
    """Grow, train, save, audit."""
    grown = tiny.grown(asked)
    model = AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32)
    handle = freeze(model, how=asked.how)  # finds ckptgrow.json beside the checkpoint
    print(handle.stats())
    optimizer = torch.optim.AdamW(handle.trained().values(), lr=asked.rate, weight_decay=tiny.DECAY)
    handle.guard(optimizer)  # a split needs none

    data, losses = tiny.rows(grown), []
    for step in range(asked.steps):
        tokens = tiny.batch(data, step)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    handle.check(optimizer)  # raises where a frozen bit has moved
    model.save_pretrained(asked.folder / "trained")  # plain names, grown shapes
    tiny.finish(grown, asked.folder / "trained", losses)


if __name__ == "__main__":
    tiny.run(main, __doc__)
