"""The plugin as Axolotl calls it: by a stand-in with the same order of calls, and by Axolotl itself where it is."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

pytest.importorskip("transformers", reason="Axolotl's trainers are Hugging Face's, which are not installed")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate, which is not installed")
pytest.importorskip("pydantic", reason="Axolotl's configuration is made of it, and it is not installed")

import pydantic
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import ckptgrow
from ckptgrow.manifest import load_manifest
from ckptgrow.training import FreezeError

pytestmark = pytest.mark.transformers

EXAMPLE = Path(tiny.__file__).parent / "axolotl.yaml"
SETTINGS = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))


class BasePlugin:
    """What the plugin relies on in Axolotl's class of this name."""

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return []

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return []


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin's module, on Axolotl or on a stand-in for it."""
    try:
        import axolotl.integrations.base  # noqa: F401
    except ImportError:
        base = ModuleType("axolotl.integrations.base")
        base.BasePlugin = BasePlugin  # type: ignore[attr-defined]
        for name in ("axolotl", "axolotl.integrations"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "ckptgrow.training.axolotl", raising=False)
    yield import_module("ckptgrow.training.axolotl")
    sys.modules.pop("ckptgrow.training.axolotl", None)


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    return tiny.grown(tiny.Asked(tmp_path, None, 0, 0.0, "split"))


def train(plugin: Any, cfg: Any, meddle: Any = None) -> Any:
    """Axolotl's order of calls: see loaders/model.py, core/builders and train.py of 0.19."""
    model = AutoModelForCausalLM.from_pretrained(cfg.base_model)
    arguments = TrainingArguments(
        cfg.output_dir, max_steps=3, save_steps=2, weight_decay=0.1, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    data = [{"input_ids": row, "labels": row} for row in tiny.rows(Path(cfg.base_model))]
    callbacks = plugin.add_callbacks_pre_trainer(cfg=cfg, model=model)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=callbacks)  # type: ignore[arg-type]
    for callback in plugin.add_callbacks_post_trainer(cfg, trainer):
        trainer.add_callback(callback)
    trainer.train()
    plugin.post_train(cfg, trainer.model)
    trainer.save_model(cfg.output_dir)
    if meddle:
        meddle(Path(cfg.output_dir))
    plugin.post_train(cfg, model)
    return trainer


def config(grown: Path, **keys: Any) -> SimpleNamespace:
    """Where a key is not given, Axolotl's configuration says None."""
    given = {"ckptgrow_manifest": None, "ckptgrow_how": None, **keys}
    return SimpleNamespace(base_model=str(grown), output_dir=str(grown.parent / "trained"), **given)


@pytest.mark.parametrize("how", ["split", "mask", None])
def test_the_plugin_holds_and_audits(
    module: Any, grown: Path, how: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """With weight decay; counts at the start, the audit at the end, once."""
    cfg = config(grown, ckptgrow_how=how)
    trainer = train(module.CkptgrowPlugin(), cfg)
    held = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert held == load_manifest(grown).counts.trainable * (2 if how == "mask" else 1)
    said = capsys.readouterr().out
    assert f"ckptgrow: {held:,} parameters optimised" in said
    assert said.count("the frozen part is untouched") == 1
    assert ckptgrow.audit(grown, cfg.output_dir).total("changed") > 0


def test_a_saved_model_that_moved_ends_the_run(module: Any, grown: Path) -> None:
    """Whatever happened between training and saving."""

    def meddle(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(FreezeError, match=r"frozen part is not that of the grown one.*ckptgrow audit"):
        train(module.CkptgrowPlugin(), config(grown), meddle)


def test_what_an_earlier_run_left_is_not_audited(module: Any, grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training is over and nothing is saved yet: Axolotl calls post_train for the first time."""
    cfg = config(grown)
    Path(cfg.output_dir).mkdir()
    old = Path(cfg.output_dir, "model.safetensors")
    save_file({"model.norm.weight": torch.zeros(64)}, old)
    os.utime(old, (1, 1))
    train(module.CkptgrowPlugin(), cfg)
    assert capsys.readouterr().out.count("the frozen part is untouched") == 1


def test_a_manifest_from_elsewhere(module: Any, grown: Path) -> None:
    """base_model is a copy without its manifest; without the key the plugin says what to do."""
    copy = grown.parent / "copy"
    AutoModelForCausalLM.from_pretrained(grown).save_pretrained(copy)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).write_bytes((grown / name).read_bytes())
    with pytest.raises(FreezeError, match="the manifest was not found"):
        train(module.CkptgrowPlugin(), config(copy))
    for manifest in (grown, grown / "ckptgrow.json"):
        train(module.CkptgrowPlugin(), config(copy, ckptgrow_manifest=str(manifest)))


def test_the_example_says_what_the_plugin_reads(module: Any) -> None:
    """Its path, and each of its keys; another `how` is refused when the configuration is read."""
    (path,) = SETTINGS["plugins"]
    room, _, name = path.rpartition(".")
    assert getattr(import_module(room), name) is module.CkptgrowPlugin
    room, _, name = module.CkptgrowPlugin().get_input_args().rpartition(".")
    declared = getattr(import_module(room), name)
    ours = {key: value for key, value in SETTINGS.items() if key.startswith("ckptgrow")}
    assert set(ours) == set(declared.model_fields)
    merged = type("Merged", (pydantic.create_model("Config", base_model=(str, ...)), declared), {})  # as Axolotl does
    assert merged(base_model="x", **ours).model_dump() == {"base_model": "x", **ours}
    assert merged(base_model="x").ckptgrow_manifest is None
    with pytest.raises(pydantic.ValidationError):
        declared(ckptgrow_how="other")


@pytest.fixture
def beside(grown: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which the examples' relative paths hold."""
    pytest.importorskip("axolotl.cli.config", reason="Axolotl is not installed")
    (grown.parent / "examples").symlink_to(EXAMPLE.parent)
    monkeypatch.chdir(grown.parent)
    return grown.parent


def test_axolotl_reads_the_example(beside: Path) -> None:
    """Its own parsing and validation keep our keys."""
    script = "from axolotl.cli.config import load_cfg; c = load_cfg('examples/axolotl.yaml');"
    script += "print('read', c.ckptgrow_manifest, c.ckptgrow_how, c.plugins)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=quiet())
    assert f"read ./grown split {SETTINGS['plugins']}" in done.stdout, done.stderr[-3000:]


def test_axolotl_trains_the_example(beside: Path) -> None:
    """`axolotl train`, on CPU, where half precision does not run; skipped where Axolotl itself cannot run here."""
    command = [sys.executable, "-m", "axolotl.cli.train", "examples/axolotl.yaml", "--bf16=False"]
    done = subprocess.run(command, capture_output=True, text=True, env=quiet())
    if "ModuleNotFoundError" in done.stderr:
        pytest.skip(f"Axolotl misses something: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "parameters optimised" in done.stdout
    assert "trained: the frozen part is untouched" in done.stdout


def quiet() -> dict[str, str]:
    return {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": ""}
