"""The launcher: it takes out its own keys, hands run_exp the callback, and audits what was saved."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

pytest.importorskip("transformers", reason="LLaMA-Factory's trainers are Hugging Face's, which are not installed")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate, which is not installed")

import tiny
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import ckptgrow
from ckptgrow.training import FreezeError, llamafactory

pytestmark = pytest.mark.transformers

EXAMPLE = Path(tiny.__file__).parent / "llamafactory.yaml"
SETTINGS = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
HERE = find_spec("llamafactory") is not None


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which the example's relative paths hold."""
    tiny.grown(tiny.Asked(tmp_path, None, 0, 0.0, "split"))
    (tmp_path / "examples").symlink_to(EXAMPLE.parent)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Modules of LLaMA-Factory's names, in which run_exp trains as its full fine-tuning does; returns what it got."""
    got: dict[str, Any] = {}

    def run_exp(args: dict[str, Any] | None = None, callbacks: list[Any] | None = None) -> None:
        assert args is not None
        got.update(args)
        model = AutoModelForCausalLM.from_pretrained(args["model_name_or_path"])
        keys = ("output_dir", "max_steps", "learning_rate", "weight_decay", "per_device_train_batch_size")
        arguments = TrainingArguments(
            **{key: args[key] for key in keys}, report_to=[], use_cpu=True, save_strategy="no"
        )
        data = [{"input_ids": row, "labels": row} for row in tiny.rows(Path(args["model_name_or_path"]))]
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=callbacks)  # type: ignore[arg-type]
        trainer.train()
        trainer.save_model()

    def read_args() -> Any:
        path, *others = sys.argv[1:]
        return yaml.safe_load(Path(path).read_text()) | dict(other.split("=") for other in others)

    for name, function in {"hparams": read_args, "train.tuner": run_exp}.items():
        module = ModuleType(f"llamafactory.{name}")
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("llamafactory", "llamafactory.train"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return got


def launch(monkeypatch: pytest.MonkeyPatch, *others: str) -> None:
    monkeypatch.setattr(sys, "argv", ["llamafactory", "examples/llamafactory.yaml", *others])
    llamafactory.main()


@pytest.mark.parametrize("how", ["split", "mask"])
def test_it_trains_and_audits(
    beside: Path,
    stand_in: dict[str, Any],
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """run_exp gets the file's settings without ours; the saved model is audited."""
    launch(monkeypatch, f"ckptgrow_how={how}")
    assert stand_in == {key: value for key, value in SETTINGS.items() if not key.startswith("ckptgrow")}
    said = capsys.readouterr().out
    assert "ckptgrow: 49,152 parameters" in said if how == "split" else "(49,152 of them free to move)" in said
    assert "trained: the frozen part is untouched" in said
    assert ckptgrow.audit("grown", "trained").total("changed") > 0


@pytest.mark.parametrize("kind", ["lora", "oft", None])
def test_other_ways_of_fine_tuning_are_refused(kind: str | None) -> None:
    """They would train weights that the manifest does not know; LoRA is LLaMA-Factory's default."""
    settings = {"model_name_or_path": "grown"} | ({"finetuning_type": kind} if kind else {})
    with pytest.raises(FreezeError, match=f"finetuning_type is {kind or 'lora'}"):
        llamafactory.taken(settings)


def test_an_audit_that_says_no_ends_the_run(
    beside: Path, stand_in: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was saved is not what was trained."""
    monkeypatch.setattr(Trainer, "save_model", lambda self: moved(beside / "trained"))
    with pytest.raises(FreezeError, match="not that of the grown one"):
        launch(monkeypatch)


def moved(folder: Path) -> None:
    """The grown model but for a norm."""
    model = AutoModelForCausalLM.from_pretrained("grown")
    model.model.norm.weight.data.add_(1)
    model.save_pretrained(folder)


def test_the_command_says_in_one_line_what_is_wrong(beside: Path) -> None:
    """No traceback for what a user can mend; without LLaMA-Factory, that it is not there."""
    command = [sys.executable, "-m", "ckptgrow.training.llamafactory", "examples/llamafactory.yaml"]
    done = subprocess.run([*command, "finetuning_type=lora"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ckptgrow: finetuning_type is lora" if HERE else "ModuleNotFound")


@pytest.mark.skipif(not HERE, reason="LLaMA-Factory is not installed")
def test_llamafactory_reads_the_example(beside: Path) -> None:
    """Its own parsing takes what the launcher leaves, and refuses the file as it is."""
    script = "import sys; from llamafactory.hparams import get_train_args, read_args;"
    script += "from ckptgrow.training.llamafactory import taken; a = read_args(); g = get_train_args(taken(a)[0]);"
    script += "print('read', g[0].model_name_or_path, g[3].finetuning_type)"
    script += "\ntry: get_train_args(a)\nexcept ValueError as e: print(e)"
    done = subprocess.run(
        [sys.executable, "-c", script, "examples/llamafactory.yaml"], capture_output=True, text=True, env=cpu()
    )
    assert "read ./grown full" in done.stdout, done.stderr[-3000:]
    assert "not used by the HfArgumentParser: ['ckptgrow_how', 'ckptgrow_manifest']" in done.stdout


@pytest.mark.skipif(not HERE, reason="LLaMA-Factory is not installed")
def test_llamafactory_trains_the_example(beside: Path) -> None:
    """The command of the README, on CPU."""
    command = [sys.executable, "-m", "ckptgrow.training.llamafactory", "examples/llamafactory.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, env=cpu())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "parameters optimised" in done.stdout
    assert "trained: the frozen part is untouched" in done.stdout


def cpu() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
