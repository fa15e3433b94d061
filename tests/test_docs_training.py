"""The README's page "Train it" is true: each of its blocks is run on a tiny model, or parsed, as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Train it\n")[2].partition("\n## ")[0]
PARTS = [part.partition("**") for part in re.split(r"^\*\*", PAGE, flags=re.MULTILINE)[1:]]
FOUND = {name: re.search(r"```\w+\n(.*?)```", text, re.DOTALL) for name, _, text in PARTS}
BLOCKS = {name: match[1] for name, match in FOUND.items() if match}

PRELUDE = """
import os, sys, torch
sys.path.insert(0, {examples!r})
import tiny
from pathlib import Path
from transformers import AutoModelForCausalLM
from ckptgrow.training import freeze
batches = [dict(input_ids=rows, labels=rows) for rows in tiny.rows(Path("grown")).split(tiny.BATCH)]
model = AutoModelForCausalLM.from_pretrained("grown", dtype=torch.float32)
"""
SHARDED = """
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo")
wrapped = model
{block}
for batch in batches:
    wrapped(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
handle.check(optimizer)
whole = {{n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in model.state_dict().items()}}
if dist.get_rank() == 0:
    plain = AutoModelForCausalLM.from_pretrained("grown", dtype=torch.float32)
    plain.load_state_dict(whole)
    plain.save_pretrained("trained")
dist.barrier()
os._exit(0)
"""
DEEPSPEED = """
import deepspeed
from train_deepspeed import CONFIG as config
deepspeed.init_distributed("gloo")
{block}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which "grown" is a grown checkpoint."""
    pytest.importorskip("transformers", reason="the page trains transformers models")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    import tiny

    tiny.grown(tiny.Asked(tmp_path, None, 0, 0.0, "split"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(here: Path) -> dict[str, Any]:
    """What the page leaves to its reader: rows, texts, a module and its loader."""
    import tiny
    import torch

    rows = tiny.rows(here / "grown")
    return {
        "batches": [{"input_ids": part, "labels": part} for part in rows.split(tiny.BATCH)],
        "dataset": [{"input_ids": row, "labels": row} for row in rows],
        "loader": torch.utils.data.DataLoader(rows, batch_size=tiny.BATCH),  # type: ignore[arg-type]
    }


def audited() -> None:
    """What was saved is the grown checkpoint but for what may train, and that did."""
    import ckptgrow

    seen = ckptgrow.audit("grown", "trained")
    assert seen.clean
    assert seen.total("changed") > 0.9 * seen.total("trainable")


def test_the_page_has_a_block_for_each_trainer() -> None:
    """And each of them is tested below."""
    one = ["Plain PyTorch", "Hugging Face's Trainer", "TRL", "Lightning", "DDP", "FSDP2", "DeepSpeed"]
    assert list(BLOCKS) == [*one, "Axolotl", "LLaMA-Factory"]
    assert len(re.findall("^```[a-z]", PAGE, re.MULTILINE)) == len(BLOCKS) + 1  # and the launcher's command


@pytest.mark.transformers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trainer", ["Plain PyTorch", "Hugging Face's Trainer", "TRL", "Lightning"])
def test_blocks_in_one_process(trainer: str, here: Path) -> None:
    """They run as they stand, and `audit` says that they held."""
    given = names(here)
    if trainer == "TRL":
        pytest.importorskip("trl", reason="TRL is not installed")
        from datasets import Dataset
        from tiny import texts

        given["texts"] = Dataset.from_list([{"text": text} for text in texts()])
    if trainer == "Lightning":
        pytest.importorskip("lightning", reason="Lightning is not installed")
        from train_lightning import FineTuning
        from transformers import AutoModelForCausalLM

        given["module"] = FineTuning(AutoModelForCausalLM.from_pretrained("grown"), 1e-3)
    exec(BLOCKS[trainer], given)
    audited()


def run(script: str, here: Path, processes: int) -> None:
    """In processes of their own."""
    (here / "script.py").write_text(PRELUDE.format(examples=str(ROOT / "examples")) + script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*torchrun, "script.py"], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    audited()


@pytest.mark.transformers
@pytest.mark.parametrize("trainer", ["DDP", "FSDP2"])
def test_blocks_in_two_processes(trainer: str, here: Path) -> None:
    """gloo, on CPU."""
    run(SHARDED.format(block=BLOCKS[trainer]), here, 2)


@pytest.mark.transformers
def test_the_block_of_deepspeed(here: Path) -> None:
    """ZeRO-3, on CPU."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    run(DEEPSPEED.format(block=BLOCKS["DeepSpeed"]), here, 1)


@pytest.mark.parametrize("trainer", ["Axolotl", "LLaMA-Factory"])
def test_configurations_are_those_of_the_examples(trainer: str) -> None:
    """Which the tests of the plugin and of the launcher read and run."""
    shown = yaml.safe_load(BLOCKS[trainer])
    example = yaml.safe_load((ROOT / "examples" / f"{trainer.replace('-', '').lower()}.yaml").read_text())
    assert shown
    assert shown.items() <= example.items()


def examples() -> Iterator[str]:
    yield from re.findall(r"`(examples/[\w./]+)`", PAGE)


def test_examples_exist() -> None:
    """Each one that the page names; and it names them all."""
    assert set(examples()) == {
        f"examples/{p.name}" for p in (ROOT / "examples").iterdir() if p.name.startswith("train_")
    } | {
        "examples/axolotl.yaml",
        "examples/bench_training.py",
        "examples/llamafactory.yaml",
    }
    assert all((ROOT / example).is_file() for example in examples())


@pytest.mark.transformers
@pytest.mark.parametrize("example", ["trl", "lightning", "fsdp2", "deepspeed"])
def test_examples_run(example: str, here: Path) -> None:
    """They end well, and they check themselves; the other two are run beside the Trainer's tests."""
    if example != "fsdp2":
        pytest.importorskip(example, reason=f"{example} is not installed")
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if example == "fsdp2" else []
    command = [sys.executable, *start, str(ROOT / f"examples/train_{example}.py"), "--steps", "12", "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "parameters optimised" in done.stdout
    assert "the frozen part is untouched" in done.stdout
