"""The callback for Hugging Face's Trainer and what is built on it (TRL, LLaMA-Factory's run_exp). Needs transformers.

    Trainer(model, args, train_dataset=data, callbacks=[FreezeCallback()]).train()

It freezes when the trainer has been made and has no optimizer yet, looks at the optimizer when training begins, and
checks the frozen bits at every save. Beside each checkpoint it puts the manifest, which trainers do not copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ckptgrow.checkpoint import MANIFEST
from ckptgrow.errors import FreezeError
from ckptgrow.manifest import Manifest
from ckptgrow.training import Handle, How, freeze, require_grad
from ckptgrow.training.resolve import find_manifest


class FreezeCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Holds the frozen part of a grown model while a Trainer trains it; a mask is always guarded."""

    def __init__(self, manifest: Manifest | Path | str | None = None, how: How = "split") -> None:
        self.manifest, self.how = manifest, how
        self.handle: Handle | None = None
        self.leads = True  # of several processes, the one that prints and writes

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **has: Any) -> None:
        """The optimizer that comes will hold what has requires_grad now."""
        model = has["model"]
        self.manifest = find_manifest(model, self.manifest)
        if self.how == "mask":
            require_grad(model, self.manifest)
        else:
            self.handle = freeze(model, self.manifest, self.how)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **has: Any) -> None:
        """The model is wrapped and sharded by now, which hooks must not precede."""
        if self.how == "mask":
            if self.handle is not None:
                self.handle.remove()
            self.handle = freeze(has["model"], self.manifest, self.how)
        if self.handle is None:
            return
        if args.deepspeed:
            self._check_saving(self.handle)
        self.handle.guard(has["optimizer"])
        self.leads = state.is_world_process_zero
        if self.leads:
            print(f"ckptgrow: {self.handle.stats()}")

    def _check_saving(self, handle: Handle) -> None:
        """ZeRO-3 is gathered parameter by parameter when the Trainer saves, so the two parts would stay apart."""
        if self.how == "split" and any(hasattr(p, "ds_id") for p in handle.trained().values()):
            raise FreezeError(
                "under ZeRO-3 the Trainer would save a split model's parts under names of their own",
                hint='Use ZeRO-2, or how="mask".',
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **has: Any) -> None:
        """A checkpoint with moved frozen elements is no checkpoint: stop here."""
        if self.handle is None:
            return
        self.handle.check()
        folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        if self.leads and folder.is_dir():
            (folder / MANIFEST).write_text(self.handle.manifest.text(), encoding="utf-8")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **has: Any) -> None:
        if self.handle is not None:
            self.handle.check()
