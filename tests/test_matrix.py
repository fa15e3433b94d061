"""Every trainer in every usual way: what it saves passes the audit and has learned, or the set-up is refused.

    pytest -m matrix                       all of it
    pytest -m "matrix and not full"        what CI runs

One process (two, where trainers shard) trains all cells of several trainers, see matrix.py; here each is judged by what
it left. Controls hold the judge itself to account: in each way to train, the same without us fails the audit.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="trains real transformers models, which is not installed")

import checkpoints
import matrix
import torch
from matrix import TRAINERS, Cell
from transformers import LlamaConfig, LlamaForCausalLM

import ckptgrow

pytestmark = pytest.mark.matrix

UNGUARDED = r"weight_decay=0.1 would move its frozen part"
UNMASKED = "its gradient was not masked: the hook did not fire"
# What must be refused, and in which words.
REFUSED: dict[tuple[str, str, float], str] = {
    ("plain", "unguarded", 0.1): UNGUARDED + r"\. Call handle\.guard",
    ("ddp", "unguarded", 0.1): UNGUARDED + r"\. Call handle\.guard",
    ("fsdp2", "unguarded", 0.1): UNGUARDED + r"\. Call handle\.guard",
    ("zero1", "unguarded", 0.1): UNGUARDED + " in DeepSpeed's float32 copy",
    ("zero2", "unguarded", 0.1): UNGUARDED + " in DeepSpeed's float32 copy",
    ("zero3", "unguarded", 0.1): UNGUARDED + " in DeepSpeed's float32 copy",
    ("ddp", "late", 0.0): r"already wrapped \(DistributedDataParallel\) and cannot be split",
    ("fsdp1", "late", 0.0): r"already wrapped \(FullyShardedDataParallel\) and cannot be split",
    ("fsdp2", "late", 0.0): r"already wrapped \(FSDPModule\) and cannot be split",
    ("zero1", "late", 0.0): r"already wrapped \(DeepSpeedEngine\) and cannot be split",
    ("zero2", "late", 0.0): r"already wrapped \(DeepSpeedEngine\) and cannot be split",
    ("zero3", "late", 0.0): r"already wrapped \(DeepSpeedEngine\) and cannot be split",
    ("zero3", "lateinit", 0.0): "sharded already and cannot be split",
    ("ddp", "latemask", 0.0): "DDP waits for the gradient",
    ("fsdp1", "latemask", 0.0): "wrapped in FSDP1, which never runs hooks",
    ("fsdp1", "early", 0.0): f"it has been taken apart since it was masked|{UNMASKED}",  # alone, it shards nothing
    ("fsdp2", "early", 0.0): UNMASKED,
}
if "hfzero3" in TRAINERS:  # transformers shards the model as it loads it
    REFUSED = REFUSED | {("hfzero3", "split", decay): "sharded already and cannot be split" for decay in (0.0, 0.1)}
CELLS = [cell for trainer in TRAINERS for cell in matrix.cells_of(trainer)]


def left_out(cell: Cell) -> bool:
    """Of CI: without decay next to nothing can leak, controls say the same in every way, some compile for long."""
    slow = cell.way == "inductor" or (cell.way == "compile" and cell.trainer in ("trl", "zero3"))
    if slow:
        return (cell.how, cell.dtype, cell.decay) != ("split", "fp32", 0.1) or (cell.trainer, cell.way) == (
            "hf",
            "inductor",
        )
    if cell.how in ("split", "mask"):
        return cell.decay == 0 and (cell.dtype, cell.way) != ("fp32", "clipping")
    return cell.way != "clipping"


@pytest.fixture(scope="session")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tied Llama with biases, grown, in both dtypes."""
    root = tmp_path_factory.mktemp("matrix")
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        torch.manual_seed(0)
        config = LlamaConfig(**checkpoints.TINY, mlp_bias=True, tie_word_embeddings=True)
        LlamaForCausalLM(config).to(kind).save_pretrained(root / f"base-{dtype}")  # type: ignore[no-untyped-call]
        ckptgrow.expand(root / f"base-{dtype}", root / dtype)
    return root


Judge = Callable[[Cell], Path]


@pytest.fixture(scope="session")
def trained(grown: Path, request: pytest.FixtureRequest) -> Judge:
    """The folder of a cell; when the first of a run is asked for, all of it that were collected are trained."""
    asked = [item.callspec.params["cell"] for item in request.session.items if hasattr(item, "callspec")]

    @cache
    def out(run: str) -> Path:
        cells = [cell for cell in asked if isinstance(cell, Cell) and TRAINERS[cell.trainer][1] == run]
        folder, file = grown / f"out-{run}", grown / f"{run}.json"
        if folder.exists():
            pytest.fail("its trainers stopped: see the first of its cells")
        folder.mkdir()
        file.write_text(matrix.told([cell for cell in cells if not matrix.missing(cell.trainer)]))
        train(cells[0].trainer, [str(file), str(grown), str(folder)])
        return folder

    return lambda cell: out(TRAINERS[cell.trainer][1]) / str(cell)


def train(trainer: str, arguments: list[str]) -> None:
    """Fails with the end of what was said where that did not go through."""
    processes = matrix.processes(trainer)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    script = str(Path(matrix.__file__))
    command = [sys.executable, *(launcher if TRAINERS[trainer][2] > 1 else []), script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=matrix.environment())
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert len(re.findall(r"^trained \d+$", done.stdout, re.MULTILINE)) == processes, said[-3000:]


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, id=str(cell), marks=[pytest.mark.full] if left_out(cell) else []) for cell in CELLS]
)
def test_a_cell(cell: Cell, trained: Judge, grown: Path) -> None:
    """It holds and learns; or is refused in these words; or, a control, is found out."""
    absent = matrix.missing(cell.trainer)
    if absent:
        pytest.skip(f"{cell.trainer} needs {absent}, which is not installed")
    if matrix.DEVICE != "cpu" and "zero3" in cell.trainer and cell.way == "compile":
        pytest.skip("DeepSpeed 0.19's ZeRO-3 compiled with aot_eager trains next to nothing on CUDA, whole or masked")
    folder, refused = trained(cell), REFUSED.get((cell.trainer, cell.how, cell.decay))
    stopped = folder.with_name(f"{cell}.txt")
    said = stopped.read_text() if stopped.exists() else ""
    if refused:
        assert re.search(refused, said), said or "it was not refused"
        return
    assert not said, said
    seen = ckptgrow.audit(grown / cell.dtype, folder)
    assert not seen.findings
    assert seen.total("changed") > 0.99 * seen.total("trainable")
    if cell.how in ("naive", "whole"):
        assert seen.exit_code == 1
        assert seen.cause == caught(cell)
    else:
        assert (seen.exit_code, seen.total("moved"), seen.total("moved_before_cast")) == (0, 0, 0)


def caught(cell: Cell) -> str:
    """What a control's audit must say. FSDP of either kind never runs the hooks of parameters."""
    return "decay" if cell.how == "naive" and "fsdp" not in cell.trainer else "trained"


def test_nothing_that_must_be_refused_is_missing() -> None:
    """Each refusal above is the fate of a cell, and CI meets every trainer, way and refusal."""
    named = {(cell.trainer, cell.how, cell.decay) for cell in CELLS}
    assert REFUSED.keys() <= named
    here = [cell for cell in CELLS if not left_out(cell)]
    assert REFUSED.keys() <= {(cell.trainer, cell.how, cell.decay) for cell in here}
    for trainer in TRAINERS.keys() - {"fsdp1"}:
        for how in ("split", "mask", "naive", "whole"):
            mine = [cell for cell in here if (cell.trainer, cell.how) == (trainer, how)]
            assert {cell.dtype for cell in mine} == set(matrix.DTYPES)
            if how == "split":
                assert {cell.way for cell in mine} >= set(matrix.WAYS)
