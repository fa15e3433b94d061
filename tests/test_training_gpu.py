"""The Trainer shards on GPUs alone: trained, stopped and resumed there, a grown model is as if it never had stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="trains real transformers models, which is not installed")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate, which is not installed")

import checkpoints
import matrix
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import ckptgrow

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="accelerate shards on GPUs alone: there is none"),
]
SCRIPT = """
import os, sys
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
import torch
from ckptgrow.training.transformers import FreezeCallback

grown, out, shards, how = sys.argv[1:]
layer = "MixtralDecoderLayer" if "mixtral" in grown else "LlamaDecoderLayer"
zero = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": int(shards[-1]), "stage3_gather_16bit_weights_on_model_save": True}}
fsdp = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [layer]}}
rows = [{"input_ids": row, "labels": row}
        for row in torch.randint(3, 64, (8, 10), generator=torch.Generator().manual_seed(0))]


def train(folder, resume=None):
    told = TrainingArguments(folder, max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        weight_decay=0.1, report_to=[], disable_tqdm=True, **(fsdp if shards == "fsdp2" else {"deepspeed": zero}))
    model = AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32)
    if "mixtral" in grown:  # else DeepSpeed's ZeRO-3 leaves the first layer's experts apart in the backward pass
        model.enable_input_require_grads()
    Trainer(model, told, train_dataset=rows, callbacks=[FreezeCallback(grown, how=how)]).train(resume)


train(out + "/whole")
train(out + "/again", out + "/whole/checkpoint-2")
torch.distributed.barrier()
print("held", flush=True)
os._exit(0)
"""


def grow(kind: str, root: Path) -> Path:
    torch.manual_seed(0)
    if kind == "mixtral":
        config = MixtralConfig(**checkpoints.TINY, num_local_experts=4)
        MixtralForCausalLM(config).save_pretrained(root / "base")  # type: ignore[no-untyped-call]
    else:
        LlamaForCausalLM(LlamaConfig(**checkpoints.TINY)).save_pretrained(root / "base")  # type: ignore[no-untyped-call]
    return Path(ckptgrow.expand(root / "base", root / kind).folder)


@pytest.mark.parametrize(
    ("kind", "shards", "how"),
    [("llama", shards, how) for shards in ("fsdp2", "zero2") for how in ("split", "mask")]
    + [("llama", "zero3", "mask")]
    + [("mixtral", shards, "mask") for shards in ("fsdp2", "zero2", "zero3")],
)
def test_resumed_equals_uninterrupted(kind: str, shards: str, how: str, tmp_path: Path) -> None:
    """And the audit of both is clean, under decay."""
    if shards != "fsdp2":
        pytest.importorskip("deepspeed", reason="ZeRO needs deepspeed, which is not installed")
    grown, script = grow(kind, tmp_path), tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={min(2, torch.cuda.device_count())}"]
    command = [sys.executable, *launcher, str(script), str(grown), str(tmp_path), shards, how]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=matrix.environment() | {"DS_ACCELERATOR": "cuda"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole, again = (tmp_path / run / "checkpoint-4" for run in ("whole", "again"))
    for folder in (whole, again):
        seen = ckptgrow.audit(grown, folder)
        assert (seen.exit_code, seen.total("moved_before_cast")) == (0, 0)
        assert seen.total("changed") > 0.9 * seen.total("trainable")  # an expert may see no token
    one, other = checkpoints.load(whole), checkpoints.load(again)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-6)
