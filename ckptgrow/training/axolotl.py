"""The plugin for Axolotl. Needs axolotl.

    plugins:
      - ckptgrow.training.axolotl.CkptgrowPlugin
    ckptgrow_manifest: ./grown    # needed only where base_model is not the grown folder
    ckptgrow_how: split           # or mask

Axolotl's trainers are Hugging Face's, so the FreezeCallback does the work; this hands it over and, when the model has
been saved, audits what lies in output_dir.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from ckptgrow.training.finished import audit_saved
from ckptgrow.training.transformers import FreezeCallback


class CkptgrowArgs(BaseModel):  # type: ignore[misc, unused-ignore]
    """The keys that this plugin adds to Axolotl's configuration."""

    ckptgrow_manifest: str | None = None
    ckptgrow_how: Literal["split", "mask"] | None = None


class CkptgrowPlugin(BasePlugin):  # type: ignore[misc, unused-ignore]
    """Freezes what `ckptgrow.json` says, whatever Axolotl's own settings would train."""

    def __init__(self) -> None:
        super().__init__()
        self.callback: FreezeCallback | None = None
        self._began = 0.0

    def get_input_args(self) -> str:
        """Where the added keys are declared, in Axolotl's way: by name."""
        return f"{CkptgrowArgs.__module__}.{CkptgrowArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[FreezeCallback]:
        """The trainer calls on_init_end of what it is made with, and its optimizer comes later than that.

        Not post_model_load: Axolotl calls it for a reference model too, and adapters given after the trainer was made
        are too late for on_init_end.
        """
        self._began = time.time()
        self.callback = FreezeCallback(cfg.ckptgrow_manifest or None, cfg.ckptgrow_how or "split")
        return [self.callback]

    def post_train(self, cfg: Any, model: Any) -> None:
        """Called when training is over, and again when the model is saved; only then is there something to audit."""
        if self.callback is None or self.callback.handle is None:
            return
        self.callback.handle.check()
        if self.callback.leads and self._has_saved(Path(cfg.output_dir)):
            audit_saved(cfg.ckptgrow_manifest or cfg.base_model, cfg.output_dir)

    def _has_saved(self, folder: Path) -> bool:
        """Whether this run has written weights there: an earlier one may have."""
        return any(file.stat().st_mtime >= self._began for file in folder.glob("*.safetensors"))
