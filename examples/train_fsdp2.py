"""Train only what is new with FSDP2 (`fully_shard`) in two processes on CPU. For the options see tiny.py.

    torchrun --standalone --nproc-per-node 2 examples/train_fsdp2.py --out OUT [--model gemma-3-270m]

A split comes before sharding; a mask after it, since sharding replaces the parameters and with them the hooks.
"""

from __future__ import annotations

import os

import tiny
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from ckptgrow.training import freeze


def main(asked: tiny.Asked) -> None:
    """Grow, shard, train, gather, audit."""
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    mesh = dist.device_mesh.init_device_mesh("cpu", (processes,))
    if rank == 0:
        tiny.grown(asked)
    dist.barrier()
    grown = tiny.grown(asked)
    model = AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32)
    if asked.how == "split":
        handle = freeze(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if asked.how == "mask":
        handle = freeze(model, how="mask")
    optimizer = torch.optim.AdamW(handle.trained().values(), lr=asked.rate, weight_decay=tiny.DECAY)
    handle.guard(optimizer)
    if rank == 0:
        print(handle.stats())

    data, losses = tiny.rows(grown), []
    for step in range(asked.steps):
        tokens = tiny.batch(data, step, rank, processes)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    handle.check(optimizer)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        plain = AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32)
        plain.load_state_dict(whole)
        plain.save_pretrained(asked.folder / "trained")
        tiny.finish(grown, asked.folder / "trained", losses)
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that takes itself down in order


if __name__ == "__main__":
    tiny.run(main, __doc__)
