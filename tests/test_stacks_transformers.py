"""Mixtures of experts in real transformers, which holds their experts in stacks: masked, trained, saved both ways."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="trains real mixtures of experts with transformers, which is not installed")

import checkpoints
import torch
import trainings
from matrix import by_hand
from safetensors.torch import save_file
from test_families_transformers import CASES, build, inputs, load
from torch import nn

import ckptgrow
from ckptgrow.families import FAMILIES
from ckptgrow.manifest import load_manifest
from ckptgrow.operations import audit
from ckptgrow.training import FreezeError, freeze
from ckptgrow.training.resolve import resolve
from ckptgrow.training.transformers import FreezeCallback

pytestmark = [pytest.mark.transformers, pytest.mark.usefixtures("quiet"), pytest.mark.filterwarnings("ignore")]

TRAINED = ("mixtral", "qwen2_moe", "deepseek_v3")
# Families with experts that transformers stacks. Of kimi_linear it also fuses convolutions, which no site declares.
STACKED = [
    n for n in CASES if any(s.part == "expert" and "{expert}" in s.stem for s in FAMILIES[n.partition(":")[0]].sites)
]
RATE, DECAY, STEPS = 1e-2, 0.1, 4


@pytest.fixture
def grown(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model of the family, grown on disk."""
    build(CASES[request.param], tmp_path / "base")
    return Path(ckptgrow.expand(tmp_path / "base", tmp_path / "grown").folder)


def name_of(grown: Path) -> str:
    return load_manifest(grown).family


def train(grown: Path, *, guarded: bool = True) -> nn.Module:
    """A few steps of AdamW with decay, under a guarded mask, or with hooks of one's own that zero gradients."""
    model = load(CASES[name_of(grown)], grown).train()
    handle = freeze(model, how="mask") if guarded else None
    if not guarded:
        by_hand(model, grown, hooks=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=DECAY)
    if handle is not None:
        handle.guard(optimizer)
    given = inputs(model)
    for _ in range(STEPS):
        model(**given, labels=given["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if handle is not None:
        handle.check(optimizer)
    return model


def save(model: nn.Module, folder: Path) -> Path:
    """A state dict as it is: names and stacks in memory."""
    folder.mkdir()
    whole = {id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    state = model.state_dict()
    save_file({name: state[name].contiguous() for name in whole.values()}, folder / "model.safetensors")
    return folder


def both(model: Any, root: Path) -> tuple[Path, Path]:
    model.save_pretrained(root / "disk")
    return root / "disk", save(model, root / "memory")


@pytest.mark.parametrize("grown", TRAINED, indirect=True)
def test_a_guarded_mask_holds_the_experts(grown: Path, tmp_path: Path) -> None:
    """Names on disk or in memory: the frozen part is untouched, all that trains has moved."""
    for folder in both(train(grown), tmp_path):
        seen = audit(grown, folder)
        assert (seen.exit_code, seen.cause, seen.findings) == (0, "nothing", ())
        assert seen.total("changed") > 0.99 * seen.total("trainable")
        assert (seen.total("trainable"), seen.total("frozen")) == (
            load_manifest(grown).counts.trainable,
            load_manifest(grown).counts.frozen,
        )
    assert any(tensor.dim() == 3 for tensor in checkpoints.load(tmp_path / "memory").values())
    assert not any(tensor.dim() == 3 for tensor in checkpoints.load(tmp_path / "disk").values())


@pytest.mark.parametrize("grown", TRAINED, indirect=True)
def test_decay_is_named_and_put_back_both_ways(grown: Path, tmp_path: Path) -> None:
    """Without the guard; repaired in the names that were given, and the model takes its state dict again."""
    model = train(grown, guarded=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for folder in both(model, tmp_path):
        seen = audit(grown, folder)
        assert (seen.exit_code, seen.cause, seen.findings) == (1, "decay", ())
        out = tmp_path / f"{folder.name}-repaired"
        assert audit(grown, folder, repair=out).repaired
        again = audit(grown, out)
        assert (again.exit_code, again.total("moved_before_cast"), again.total("changed")) == (
            0,
            0,
            seen.total("changed"),
        )
        assert checkpoints.load(out).keys() == checkpoints.load(folder).keys()
    told = model.load_state_dict(checkpoints.load(tmp_path / "memory-repaired"), strict=False)
    assert not told.unexpected_keys
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    (tmp_path / "memory-repaired" / "model.safetensors").unlink()
    assert audit(grown, save(model, tmp_path / "again")).total("moved_before_cast") == 0


@pytest.mark.parametrize("grown", TRAINED, indirect=True)
def test_experts_are_not_split(grown: Path) -> None:
    """The default says why, and what to do."""
    with pytest.raises(FreezeError, match=r'experts\.gate_up_proj: it is a stack of 4 experts .* how="mask"'):
        freeze(load(CASES[name_of(grown)], grown))


@pytest.mark.parametrize("grown", ["mixtral"], indirect=True)
def test_the_trainer_with_a_mask(grown: Path, tmp_path: Path) -> None:
    """FreezeCallback(how="mask") in the Trainer at its default optimizer with decay."""
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate, which is not installed")
    from transformers import Trainer, TrainingArguments

    rows = torch.randint(3, 64, (8, 10), generator=torch.Generator().manual_seed(0))
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=3, weight_decay=DECAY, learning_rate=RATE, report_to=[], use_cpu=True
    )
    model = load(CASES["mixtral"], grown)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[FreezeCallback(grown, how="mask")])
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    for folder in (tmp_path / "trained", save(model, tmp_path / "memory")):
        seen = audit(grown, folder)
        assert (seen.exit_code, seen.findings) == (0, ())
        assert seen.total("changed") > 0.99 * seen.total("trainable")


@pytest.mark.parametrize("grown", TRAINED, indirect=True)
def test_the_mask_checkpoint_lies_where_the_boxes_do(grown: Path, tmp_path: Path) -> None:
    """Loaded as a model it is stacked alike: 1 where `freeze` lets train, by the same names as `--format names`."""
    ckptgrow.mask(grown, "safetensors", out=tmp_path / "mask")
    ones = load(CASES[name_of(grown)], tmp_path / "mask").state_dict()
    targets = {target.name: target for target in resolve(load(CASES[name_of(grown)], grown), load_manifest(grown))}
    for name, tensor in ones.items():
        expected = torch.zeros_like(tensor)
        for box in targets[name].tensor.boxes if name in targets else ():
            expected[tuple(slice(*span) for span in box)] = 1
        assert torch.equal(tensor, expected), name
    names = (ckptgrow.mask(grown, "names").text or "").splitlines()
    assert {name for name in names if not name.startswith("#")} == targets.keys()


SHARDED = """
import os, sys, warnings
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from ckptgrow.training import freeze

warnings.simplefilter("ignore")
torch.set_num_threads(1)
grown, out = map(Path, sys.argv[1:])
dist.init_process_group("gloo")
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
model = AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32)
model.set_experts_implementation("eager")
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
handle = freeze(model, grown, how="mask")
optimizer = torch.optim.AdamW(handle.trained().values(), lr=1e-2, weight_decay=0.1)
handle.guard(optimizer)
tokens = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(dist.get_rank()))
for _ in range(3):
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
handle.check(optimizer)
checkpoint.save(model.state_dict(), checkpoint_id=out)
dist.barrier()
os._exit(0)
"""


def check_sharded(grown: Path, folder: Path) -> None:
    """Trained by FSDP2 in two processes and dumped, it passes the audit and has learned."""
    (folder / "script.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(folder / "script.py"), str(grown), str(folder / "dump")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = audit(grown, folder / "dump")
    assert (seen.exit_code, seen.findings) == (0, ())
    assert seen.total("changed") > 0.99 * seen.total("trainable")


@pytest.mark.parametrize("grown", ["mixtral"], indirect=True)
def test_fsdp2_and_its_dump(grown: Path, tmp_path: Path) -> None:
    """Experts sharded over two processes, dumped by torch.distributed.checkpoint."""
    check_sharded(grown, tmp_path)


# What else goes by other names in memory, and what is not taken: tensors outside the MLPs in other pieces.
RENAMED = ("dinov2:swiglu", "fuyu", "gemma3", "gte", "nomic_bert", "swin", "t5gemma2", "vit")
IN_PIECES = {"gte": "self_attn", "kimi_linear": "conv1d", "nomic_bert": "self_attn"}


@pytest.mark.parametrize("name", [*STACKED, *RENAMED])
def test_every_family_comes_back_from_memory(name: str, tmp_path: Path) -> None:
    """Trained on disk, loaded, and saved as the state dict that transformers makes of it; and frozen in memory."""
    build(CASES[name], tmp_path / "base")
    grown = Path(ckptgrow.expand(tmp_path / "base", tmp_path / "grown").folder)
    handle = freeze(load(CASES[name], grown), how="mask")
    assert handle.stats().trained == load_manifest(grown).counts.trainable
    folder = save(load(CASES[name], trainings.trained(grown)), tmp_path / "memory")
    seen = audit(grown, folder)
    if name in IN_PIECES:
        assert seen.exit_code == 2
        assert all(IN_PIECES[name] in f.tensor for f in seen.findings if "has no such tensor" in f.problem)
        return
    assert (seen.exit_code, seen.findings) == (0, ())
    assert seen.total("changed") > 0.9 * seen.total("trainable")
