"""The callback in Lightning's Trainer: it finds the model, freezes in time, and every frozen bit stays."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from test_training import Toy, moved, state
from torch import Tensor, nn
from torch.nn import functional

import ckptgrow
from ckptgrow.manifest import load_manifest
from ckptgrow.training import FreezeError, How, SplitLinear, freeze

pytest.importorskip("lightning", reason="Lightning is not installed")
from lightning.pytorch import LightningModule, Trainer

from ckptgrow.training.lightning import FreezeCallback

pytestmark = [
    # Lightning's advice about workers, loggers and checkpoint folders.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
DATA = torch.arange(2, 14).repeat(12).view(12, 2, 6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A grown checkpoint of test_training's Toy."""
    base = checkpoints.make(tmp_path / "base", "llama", dtype="F32", bias=True)
    return Path(ckptgrow.expand(base, tmp_path / "grown").folder)


class Recipe:
    """A model, and AdamW over what requires a gradient, with decay."""

    net: Any
    parameters: Any

    def __init__(self, model: nn.Module | None, later: Any = None) -> None:
        super().__init__()
        self.net = nn.Module()
        if model is not None:
            self.net.student = model
        self.later, self.held = later, list[int]()

    def configure_model(self) -> None:
        if self.later is not None and not hasattr(self.net, "student"):
            self.net.student = self.later()

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        tokens = batch[0]
        return functional.cross_entropy(self.net.student(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        self.held.append(sum(p.numel() for p in trained))
        return torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)


class Module(Recipe, LightningModule):  # type: ignore[misc, unused-ignore]
    """The recipe in Lightning."""


def fit(module: Any, out: Path, callback: Any, resume: Path | None = None, kind: Any = Trainer, **options: Any) -> Any:
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_steps": 4, "enable_progress_bar": False}
    defaults |= {"enable_model_summary": False, "logger": False, "default_root_dir": out, "callbacks": [callback]}
    trainer = kind(**{**defaults, **options})
    trainer.fit(module, torch.utils.data.DataLoader(DATA), ckpt_path=resume)  # type: ignore[arg-type]
    return trainer


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipping": {"gradient_clip_val": 0.1},
    "accumulation": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("how", ["split", "mask"])
@pytest.mark.parametrize("way", WAYS)
def test_every_frozen_bit_stays(
    folder: Path,
    how: How,
    way: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Under decay; the optimizer holds what trains and no more; the counts are printed at the start."""
    module = Module(Toy(folder))
    before = state(module.net.student)
    fit(module, tmp_path, FreezeCallback(folder, how), **WAYS[way])
    manifest = load_manifest(folder)
    frozen, free, total = moved(before, state(module.net.student), manifest)
    assert (frozen, free) == (0, total)
    assert module.held == [manifest.counts.trainable * (1 if how == "split" else 2)]
    assert f"ckptgrow: {module.held[0]:,} parameters optimised" in capsys.readouterr().out


def test_without_the_callback_everything_moves(folder: Path, tmp_path: Path) -> None:
    """What the test above would see."""
    from lightning.pytorch import Callback

    module = Module(Toy(folder))
    before = state(module.net.student)
    fit(module, tmp_path, Callback())
    assert moved(before, state(module.net.student), load_manifest(folder))[0] > 0


@pytest.mark.parametrize("how", ["split", "mask"])
def test_resumed_equals_uninterrupted(folder: Path, how: How, tmp_path: Path) -> None:
    """The .ckpt has the unsplit names, and the optimizer's state fits again."""
    whole = Module(Toy(folder))
    fit(whole, tmp_path, FreezeCallback(folder, how))
    half = Module(Toy(folder))
    path = tmp_path / "half.ckpt"
    fit(half, tmp_path, FreezeCallback(folder, how), max_steps=2).save_checkpoint(path)
    names = torch.load(path, weights_only=True)["state_dict"]
    assert list(names) == [f"net.student.{name}" for name in Toy(folder).state_dict()]
    again = Module(Toy(folder))
    fit(again, tmp_path, FreezeCallback(folder, how), resume=path)
    assert all(torch.equal(tensor, state(whole)[name]) for name, tensor in state(again).items())


def test_a_moved_bit_stops_the_save(folder: Path, tmp_path: Path) -> None:
    """Somebody else's callback, say."""
    module = Module(Toy(folder))
    trainer = fit(module, tmp_path, FreezeCallback(folder), enable_checkpointing=False)
    with torch.no_grad():
        module.net.student.model.norm.weight[0] += 1
    with pytest.raises(FreezeError, match=r"model\.norm\.weight: frozen elements have moved"):
        trainer.save_checkpoint(tmp_path / "x.ckpt")


def test_a_hook_that_did_not_fire_is_seen_within_the_first_step(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The backward pass is inside the step: before it there is no gradient to look at."""
    module = Module(Toy(folder))
    before = state(module.net.student)
    monkeypatch.setattr(Tensor, "register_hook", lambda *_: torch.utils.hooks.RemovableHandle(OrderedDict()))
    with pytest.raises(FreezeError, match="gradient was not masked"):
        fit(module, tmp_path, FreezeCallback(folder, "mask"))
    assert moved(before, state(module.net.student), load_manifest(folder))[:2] == (0, 0)


def test_the_model_is_found(folder: Path, tmp_path: Path) -> None:
    """By its config, by the manifest's names, or by the attribute; two are one too many."""
    entry = json.loads((folder / "config.json").read_text())["ckptgrow"]
    module = Module(Toy(folder))
    module.net.student.config = type("Config", (), {"_name_or_path": str(folder), "ckptgrow": entry})()
    fit(module, tmp_path, FreezeCallback())
    assert isinstance(module.net.student.model.layers[0].mlp.up_proj, SplitLinear)

    module = Module(Toy(folder))
    module.net.teacher = Toy(folder)
    with pytest.raises(
        FreezeError, match=r"several grown models: net\.student, net\.teacher.*attribute='net\.student'"
    ):
        fit(module, tmp_path, FreezeCallback(folder))
    fit(module, tmp_path, FreezeCallback(folder, attribute="net.student"))
    assert not [name for name, m in module.net.teacher.named_modules() if isinstance(m, SplitLinear)]
    with pytest.raises(FreezeError, match="no grown model"):
        fit(Module(Toy(folder)), tmp_path, FreezeCallback(folder, attribute="net.model"))


def test_a_model_made_late_is_frozen_by_its_maker(folder: Path, tmp_path: Path) -> None:
    """In configure_model, which no callback can follow before the optimizers are made."""

    def frozen() -> nn.Module:
        model = Toy(folder)
        freeze(model, folder)
        return model

    fit(Module(None, frozen), tmp_path, FreezeCallback(folder))
    with pytest.raises(FreezeError, match="made too late"):
        fit(Module(None, lambda: Toy(folder)), tmp_path, FreezeCallback(folder))


def test_fitting_twice(folder: Path, tmp_path: Path) -> None:
    """The second time it is frozen already, by this callback or another."""
    module = Module(Toy(folder))
    before, callback = state(module.net.student), FreezeCallback(folder)
    fit(module, tmp_path, callback)
    fit(module, tmp_path, callback)
    fit(module, tmp_path, FreezeCallback(folder))
    assert moved(before, state(module.net.student), load_manifest(folder))[0] == 0


def test_the_older_package_takes_it_too(folder: Path, tmp_path: Path) -> None:
    """`import pytorch_lightning`, where both are installed."""
    older = pytest.importorskip("pytorch_lightning", reason="the package of that name is not installed")
    old = type("Old", (Recipe, older.LightningModule), {})(Toy(folder))
    before = state(old.net.student)
    fit(old, tmp_path, FreezeCallback(folder), kind=older.Trainer)
    frozen, free, total = moved(before, state(old.net.student), load_manifest(folder))
    assert (frozen, free) == (0, total)
