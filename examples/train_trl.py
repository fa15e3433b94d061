"""Train only what is new with TRL's SFTTrainer, which loads the model itself. For the options see tiny.py.

    python examples/train_trl.py [--model gemma-3-270m]

Needs trl (`pip install 'ckptgrow[trl]'`).
"""

from __future__ import annotations

import tiny
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from ckptgrow.training.transformers import FreezeCallback


def main(asked: tiny.Asked) -> None:
    """Grow, train, save, audit. The trainer is given a path, and loads it in float32."""
    grown = tiny.grown(asked)
    arguments = SFTConfig(
        output_dir=str(asked.folder / "out"),
        max_steps=asked.steps,
        max_length=tiny.LENGTH,
        per_device_train_batch_size=tiny.BATCH,
        learning_rate=asked.rate,
        weight_decay=tiny.DECAY,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        report_to=[],
        use_cpu=True,
    )
    data = Dataset.from_list([{"text": text} for text in tiny.texts()])
    trainer = SFTTrainer(str(grown), arguments, train_dataset=data, callbacks=[FreezeCallback(how=asked.how)])
    trainer.train()
    trainer.save_model(str(asked.folder / "trained"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tiny.finish(grown, asked.folder / "trained", losses)


if __name__ == "__main__":
    tiny.run(main, __doc__)
