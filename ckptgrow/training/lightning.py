"""The callback for Lightning 2. Needs `lightning`, or `pytorch_lightning` where only that is installed.

    Trainer(callbacks=[FreezeCallback()], ...).fit(module)
    module.model.save_pretrained("trained")   # what `ckptgrow audit` reads: a .ckpt is a pickle

It freezes the grown model inside the LightningModule before configure_optimizers is called, looks at the optimizers
when training begins and checks the frozen bits at every save. Other parts of the module, a head say, go on training.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment, unused-ignore]

from ckptgrow.errors import FreezeError
from ckptgrow.manifest import CONFIG_KEY, Manifest, load_manifest
from ckptgrow.training import Handle, How, freeze, require_grad
from ckptgrow.training.handle import KEPT_AS
from ckptgrow.training.resolve import find_manifest


class FreezeCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Holds the frozen part of a grown model while Lightning trains the module that has it; a mask is always guarded.

    `attribute` is the model's place in the module ("model", "net.student"); it is needed only where there are two.
    """

    def __init__(
        self, manifest: Manifest | Path | str | None = None, how: How = "split", attribute: str | None = None
    ) -> None:
        if isinstance(manifest, (str, Path)):
            manifest = load_manifest(Path(manifest))
        self.manifest, self.how, self.attribute = manifest, how, attribute
        self.handle: Handle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before configure_model, sharding and configure_optimizers. A model that is made later is looked for later."""
        model = self._inside(pl_module) if stage == "fit" else None
        if model is None or _held(model):
            return
        self.manifest = find_manifest(model, self.manifest)
        if self.how == "mask":
            require_grad(model, self.manifest)
        else:
            freeze(model, self.manifest, self.how)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model is wrapped, the optimizers are made, and what was to be resumed is loaded."""
        model = self._inside(pl_module)
        if model is None:
            raise FreezeError("there is no grown model in the LightningModule", hint="Pass the manifest or attribute.")
        self.handle = _held(model)
        if self.handle is None and self.how == "mask":
            self.handle = freeze(model, self.manifest, self.how)
        if self.handle is None:
            raise FreezeError(
                "the model was made too late to be frozen before its optimizer",
                hint="Make it in the module's __init__, or call ckptgrow.training.freeze where you make it.",
            )
        for optimizer in trainer.optimizers:
            self.handle.guard(optimizer)
        if trainer.is_global_zero:
            print(f"ckptgrow: {self.handle.stats()}")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Lightning runs the backward pass inside the step, so gradients are there only now."""
        if self.handle is not None:
            self.handle.before_first_step(optimizer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint with moved frozen elements is no checkpoint: stop here."""
        if self.handle is not None:
            self.handle.check()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.handle is not None:
            self.handle.check()

    def _inside(self, module: nn.Module) -> nn.Module | None:
        """The grown model of a LightningModule; None where there is none yet."""
        if self.attribute is not None:
            return dict(module.named_modules()).get(self.attribute)
        found = list(dict.fromkeys([*_marked(module), *self._named(module)]))
        outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
        if len(outermost) > 1:
            raise FreezeError(
                f"the LightningModule has several grown models: {', '.join(outermost)}",
                hint=f"Name one: FreezeCallback(attribute={outermost[0]!r}).",
            )
        return module.get_submodule(outermost[0]) if outermost else None

    def _named(self, module: nn.Module) -> Iterator[str]:
        """Where the manifest's own names begin, for models that have no config."""
        if isinstance(self.manifest, Manifest):
            tail = "." + self.manifest.trainable[0].name
            yield from (name.removesuffix(tail) for name, _ in module.named_parameters() if name.endswith(tail))


def _marked(module: nn.Module) -> Iterator[str]:
    """Modules that a handle holds, or whose config says that they were grown."""
    for name, inner in module.named_modules():
        if name and (_held(inner) or hasattr(getattr(inner, "config", None), CONFIG_KEY)):
            yield name


def _held(model: nn.Module) -> Handle | None:
    held: Handle | None = model.__dict__.get(KEPT_AS)
    return held
