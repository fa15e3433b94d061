"""Train only what is new with DeepSpeed ZeRO-3 on CPU. For the options see tiny.py.

    python examples/train_deepspeed.py [--model gemma-3-270m]
    DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 2 examples/train_deepspeed.py --out OUT

Needs deepspeed (`pip install 'ckptgrow[deepspeed]'`). The split comes before deepspeed.initialize.
"""

from __future__ import annotations

import os

import tiny
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from ckptgrow.training import freeze

# On a machine without a GPU; torchrun sets the others.
ALONE = {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
ALONE |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
CONFIG = {
    "train_micro_batch_size_per_gpu": tiny.BATCH,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def main(asked: tiny.Asked) -> None:
    """Grow, shard, train, gather, audit."""
    import deepspeed  # looks at the environment at once

    deepspeed.init_distributed("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        tiny.grown(asked)
    dist.barrier()
    grown = tiny.grown(asked)
    model = AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32)
    handle = freeze(model, how=asked.how)
    if rank == 0:
        print(handle.stats())
    optimizer = torch.optim.AdamW(handle.trained().values(), lr=asked.rate, weight_decay=tiny.DECAY)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    handle.guard(engine.optimizer)  # only now are there the float32 copies that DeepSpeed steps on

    data, losses = tiny.rows(grown), []
    for step in range(asked.steps):
        tokens = tiny.batch(data, step, rank, processes)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())

    with deepspeed.zero.GatheredParameters(list(model.parameters())):  # whole again, with the names of before
        if rank == 0:
            model.save_pretrained(asked.folder / "trained")
    if rank == 0:
        tiny.finish(grown, asked.folder / "trained", losses)
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that takes itself down in order


if __name__ == "__main__":
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    tiny.run(main, __doc__)
