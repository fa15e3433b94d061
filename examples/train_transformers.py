"""Train only what is new with Hugging Face's Trainer. For the options see tiny.py.

python examples/train_transformers.py [--model gemma-3-270m]
"""

from __future__ import annotations

import tiny
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ckptgrow.training.transformers import FreezeCallback


def main(asked: tiny.Asked) -> None:
    """Grow, train, audit the checkpoint that the trainer saved."""
    grown = tiny.grown(asked)
    model = AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=str(asked.folder / "out"),
        max_steps=asked.steps,
        per_device_train_batch_size=tiny.BATCH,
        learning_rate=asked.rate,
        weight_decay=tiny.DECAY,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=asked.steps,
        save_only_model=True,
        report_to=[],
        use_cpu=True,
    )
    data = [{"input_ids": row, "labels": row} for row in tiny.rows(grown)]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[FreezeCallback(how=asked.how)])
    seconds = trainer.train().metrics["train_runtime"] / asked.steps
    print(f"{seconds:.2f} s a step")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tiny.finish(grown, asked.folder / "out" / f"checkpoint-{asked.steps}", losses)


if __name__ == "__main__":
    tiny.run(main, __doc__)
