"""Train only what is new with Lightning. For the options see tiny.py.

    python examples/train_lightning.py [--model gemma-3-270m]

Needs lightning (`pip install 'ckptgrow[lightning]'`).
"""

from __future__ import annotations

from typing import Any

import tiny
import torch
from lightning.pytorch import LightningModule, Trainer
from transformers import AutoModelForCausalLM

from ckptgrow.training.lightning import FreezeCallback


class FineTuning(LightningModule):
    """Nothing in here knows of freezing."""

    def __init__(self, model: Any, rate: float) -> None:
        super().__init__()
        self.model, self.rate, self.losses = model, rate, list[float]()

    def training_step(self, tokens: torch.Tensor, index: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=tokens, labels=tokens).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.rate, weight_decay=tiny.DECAY)


def main(asked: tiny.Asked) -> None:
    """Grow, train, save the model inside the module as safetensors (a .ckpt is a pickle), audit."""
    grown = tiny.grown(asked)
    module = FineTuning(AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32), asked.rate)
    data = torch.utils.data.DataLoader(tiny.rows(grown), batch_size=tiny.BATCH)
    trainer = Trainer(
        callbacks=[FreezeCallback(how=asked.how)],
        max_steps=asked.steps,
        gradient_clip_val=1.0,
        accelerator="cpu",
        devices=1,
        default_root_dir=asked.folder,
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, data)
    module.model.save_pretrained(asked.folder / "trained")
    tiny.finish(grown, asked.folder / "trained", module.losses)


if __name__ == "__main__":
    tiny.run(main, __doc__)
