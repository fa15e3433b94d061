"""The cells of the training matrix, and the process that trains them: one for all cells of some trainers.

    python tests/matrix.py CELLS.json GROWN OUT        (under torchrun for ddp, fsdp2 and zero)

On the CPU, or with CKPTGROW_DEVICE=cuda on GPUs: there the Trainer also shards, with FSDP2 and with ZeRO-3.

Each cell trains a tiny grown Llama as people do with that trainer and leaves in OUT/<cell> what the trainer saved, or
in OUT/<cell>.txt why it stopped. What must come of it is said, and held, by test_matrix.py.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ckptgrow.errors import CkptgrowError

DEVICE = os.environ.get("CKPTGROW_DEVICE", "cpu")
STEPS, RATE = 3, 0.1  # with decay 0.1 a step shrinks by 1 %, which bfloat16 cannot hide
DTYPES = {"fp32": "F32", "bf16": "BF16"}
WAYS = ("accumulation", "clipping", "checkpointing", "compile")
# The modules that a trainer needs; in which run it trains, with how many processes.
TRAINERS: Mapping[str, tuple[tuple[str, ...], str, int]] = {
    "plain": ((), "alone", 1),
    "hf": (("accelerate",), "alone", 1),
    "trl": (("accelerate", "trl", "datasets"), "alone", 1),
    "lightning": (("lightning",), "alone", 1),
    "ddp": ((), "sharded", 2),
    "fsdp1": ((), "sharded", 2),
    "fsdp2": ((), "sharded", 2),
    "zero1": (("deepspeed",), "zero", 2),
    "zero2": (("deepspeed",), "zero", 2),
    "zero3": (("deepspeed",), "zero", 2),
}
# What accelerate shards on GPUs alone.
if DEVICE != "cpu":
    TRAINERS = {
        **TRAINERS,
        "hffsdp2": (("accelerate",), "hfsharded", 2),
        "hfzero2": (("accelerate", "deepspeed"), "hfzero", 2),
        "hfzero3": (("accelerate", "deepspeed"), "hfzero", 2),
    }


@dataclass(frozen=True)
class Cell:
    """One way to train. `how` is split or mask; a control, naive (own gradient hooks) or whole (no mask at all);
    a mask unguarded; or one at the wrong time: late and latemask (of what is wrapped), early (before sharding), and
    init (of what ZeRO-3 has partitioned already), lateinit (a split of that)."""

    trainer: str
    how: str
    decay: float
    dtype: str
    way: str

    def __str__(self) -> str:
        return f"{self.trainer}-{self.how}-{self.decay:g}-{self.dtype}-{self.way}"


# ---------------------------------------------------------------- the model and its batches


def load(cell: Cell, grown: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if cell.dtype == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(grown, dtype=dtype).to(DEVICE)
    if cell.way == "checkpointing":
        getattr(model, f"{checkpointing()}_enable")({"use_reentrant": False})
    return model.train()


def checkpointing() -> str:
    """Renamed in transformers 5; the old name warns."""
    from transformers import TrainingArguments

    new = "activation_checkpointing"
    return new if hasattr(TrainingArguments, new) else "gradient_checkpointing"


def batches(rank: int = 0, processes: int = 1) -> Any:
    """All rows that one process sees, as one batch."""
    import torch

    tokens = torch.randint(3, 64, (8, 10), generator=torch.Generator().manual_seed(0))
    return tokens[rank::processes]


def backend(cell: Cell) -> str:
    return "inductor" if cell.way == "inductor" else "aot_eager"


def compiled(cell: Cell) -> bool:
    return cell.way in ("compile", "inductor")


def freeze(cell: Cell, model: Any, grown: Path) -> Any:
    """The handle; None for the controls, which do what people do without it."""
    from ckptgrow.training import freeze as hold

    if cell.how in ("naive", "whole"):
        return by_hand(model, grown, hooks=cell.how == "naive")
    return hold(model, grown, "split" if cell.how in ("split", "late", "lateinit") else "mask")


def by_hand(model: Any, grown: Path, hooks: bool) -> None:
    """Only the manifest's tensors require a gradient; hooks zero it where they are frozen."""
    from ckptgrow.manifest import load_manifest
    from ckptgrow.training.resolve import resolve

    model.requires_grad_(False)
    for target in resolve(model, load_manifest(grown)):
        target.parameter.requires_grad_(True)
        if hooks and target.cut is not None:
            target.parameter.register_hook(partial(_zeroed, target.cut))  # type: ignore[no-untyped-call]


def _zeroed(cut: Any, gradient: Any) -> Any:
    gradient = gradient.clone()
    for part in cut.slices(gradient, cut.frozen):
        part.zero_()
    return gradient


def adamw(cell: Cell, model: Any) -> Any:
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=RATE, weight_decay=cell.decay)


def guard(cell: Cell, handle: Any, optimizer: Any) -> None:
    if handle is not None and cell.how != "unguarded":
        handle.guard(optimizer)


# ---------------------------------------------------------------- loops of one's own


def loop(cell: Cell, runner: Any, optimizer: Any, tokens: Any, apart: Callable[[bool], Any]) -> None:
    """`apart` gives the context, or does the switching, for a micro-batch: is it the last of its step?"""
    import torch

    micro = 2 if cell.way == "accumulation" else 1
    for _ in range(STEPS):
        for i, part in enumerate(tokens.to(DEVICE).chunk(micro)):
            with apart(i == micro - 1) or nullcontext():
                runner(input_ids=part, labels=part).loss.backward()
        if cell.way == "clipping":
            torch.nn.utils.clip_grad_norm_([p for p in runner.parameters() if p.requires_grad], 0.1)
        optimizer.step()
        optimizer.zero_grad()


def plain(cell: Cell, grown: Path, out: Path) -> None:
    import torch

    model = load(cell, grown)
    handle = freeze(cell, model, grown)
    optimizer = adamw(cell, model)
    guard(cell, handle, optimizer)
    runner: Any = torch.compile(model, backend=backend(cell)) if compiled(cell) else model
    loop(cell, runner, optimizer, batches(), lambda last: None)
    if handle is not None:
        handle.check(optimizer)
    if compiled(cell):
        save(runner.state_dict(), out)  # its names begin with _orig_mod.
    else:
        model.save_pretrained(out)


def ddp(cell: Cell, grown: Path, out: Path) -> None:
    import torch

    model = load(cell, grown)
    late = cell.how.startswith("late")
    handle = None if late else freeze(cell, model, grown)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    handle = freeze(cell, wrapped, grown) if late else handle
    optimizer = adamw(cell, model)
    guard(cell, handle, optimizer)
    runner: Any = torch.compile(wrapped, backend=backend(cell)) if compiled(cell) else wrapped
    loop(cell, runner, optimizer, batches(*place()), lambda last: None if last else wrapped.no_sync())
    if handle is not None:
        handle.check(optimizer)
    if place()[0] == 0:
        save(wrapped.state_dict(), out)  # its names begin with module.


def fsdp2(cell: Cell, grown: Path, out: Path) -> None:
    import torch
    from torch.distributed import checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = load(cell, grown)
    before = cell.how in ("split", "early", "naive", "whole")
    handle = freeze(cell, model, grown) if before else None
    mesh = init_device_mesh(DEVICE, (place()[1],))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    handle = handle if before else freeze(cell, model, grown)
    optimizer = adamw(cell, model)
    guard(cell, handle, optimizer)
    runner: Any = torch.compile(model, backend=backend(cell)) if compiled(cell) else model
    loop(cell, runner, optimizer, batches(*place()), lambda last: model.set_requires_gradient_sync(last))
    if handle is not None:
        handle.check(optimizer)
    checkpoint.save(model.state_dict(), checkpoint_id=out)


def fsdp1(cell: Cell, grown: Path, out: Path) -> None:
    """It holds a state dict's tensors in one flat one, so they are read one by one and put together by us."""
    import torch
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = load(cell, grown)
    late = cell.how.startswith("late")
    handle = None if late else freeze(cell, model, grown)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device(DEVICE))
    handle = freeze(cell, wrapped, grown) if late else handle
    optimizer = adamw(cell, wrapped)
    guard(cell, handle, optimizer)
    loop(cell, wrapped, optimizer, batches(*place()), lambda last: None)
    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
        if place()[0] == 0:
            save_whole(dict(wrapped.named_parameters()), grown, out)


def zero(cell: Cell, grown: Path, out: Path) -> None:
    import deepspeed

    config = settings(cell)
    model = load(cell, grown)
    if cell.how.endswith("init"):
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    handle = None if cell.how == "late" else freeze(cell, model, grown)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(cell, model), config=config)
    handle = freeze(cell, engine, grown) if cell.how == "late" else handle
    guard(cell, handle, engine.optimizer)
    if compiled(cell):
        engine.compile(backend=backend(cell))
    for _ in range(STEPS):
        for part in batches(*place()).to(DEVICE).chunk(config["gradient_accumulation_steps"]):
            engine.backward(engine(input_ids=part, labels=part).loss)
            engine.step()
    if handle is not None:
        handle.check()
    state = consolidated(cell, engine, str(out) + ".zero")
    if place()[0] == 0:
        save_whole(state, grown, out)


def settings(cell: Cell) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2 if cell.way == "accumulation" else 1,
        "gradient_clipping": 0.1 if cell.way == "clipping" else 0.0,
        "bf16": {"enabled": cell.dtype == "bf16"},
        "zero_optimization": {"stage": int(cell.trainer[-1]), "reduce_bucket_size": 1 << 20},  # buffers that add up
        "zero_allow_untested_optimizer": True,
    }


def consolidated(cell: Cell, engine: Any, folder: str) -> Mapping[str, Any]:
    """The masters, in which drift shows first, as zero_to_fp32.py makes them of DeepSpeed's own checkpoint.

    Of stage 1 that leaves out what is frozen, so there it is the weights, as save_16bit_model does.
    """
    import torch
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if cell.trainer == "zero1":
        state: Mapping[str, Any] = engine.module_state_dict()
        return state
    engine.save_checkpoint(folder)
    torch.distributed.barrier()
    masters: Mapping[str, Any] = get_fp32_state_dict_from_zero_checkpoint(folder) if place()[0] == 0 else {}
    return masters


def place() -> tuple[int, int]:
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def save(state: Mapping[str, Any], out: Path) -> None:
    """As safetensors, which refuses shared memory."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, out / "model.safetensors")


def save_whole(state: Mapping[str, Any], grown: Path, out: Path) -> None:
    """What was put together from parameters, where a split shows."""
    from ckptgrow.training import whole

    save(whole(state, grown), out)


# ---------------------------------------------------------------- trainers


def arguments(cell: Cell, out: Path) -> dict[str, Any]:
    """What Hugging Face's and TRL's trainers are told alike."""
    return {
        "output_dir": str(out),
        "max_steps": STEPS,
        "save_steps": STEPS,
        "save_only_model": True,
        "per_device_train_batch_size": 2,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": cell.decay,
        "gradient_accumulation_steps": 2 if cell.way == "accumulation" else 1,
        "max_grad_norm": 0.1 if cell.way == "clipping" else 0.0,
        checkpointing(): cell.way == "checkpointing",
        "torch_compile": compiled(cell),
        "torch_compile_backend": backend(cell) if compiled(cell) else None,
        "bf16": cell.dtype == "bf16",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": DEVICE == "cpu",
        "dataloader_pin_memory": False,
    }


def callbacks(cell: Cell, model: Any, grown: Path) -> list[Any]:
    from ckptgrow.training.transformers import FreezeCallback

    if cell.how in ("naive", "whole"):
        by_hand(model, grown, hooks=cell.how == "naive")
        return []
    return [FreezeCallback(how=cell.how)]  # type: ignore[arg-type]


def hf(cell: Cell, grown: Path, out: Path, **more: Any) -> None:
    """Under ZeRO-3 transformers partitions a model as it loads it, since there are arguments that say so."""
    from transformers import Trainer, TrainingArguments

    told = TrainingArguments(**arguments(cell, Path(str(out) + ".hf")) | more)
    model = load(cell, grown)
    rows = [{"input_ids": row, "labels": row} for row in batches()]
    Trainer(model, told, train_dataset=rows, callbacks=callbacks(cell, model, grown)).train()
    if place()[0] == 0:
        Path(str(out) + ".hf", f"checkpoint-{STEPS}").rename(out)


def trl(cell: Cell, grown: Path, out: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = load(cell, grown)
    rows = Dataset.from_dict({"input_ids": batches().tolist()})
    told = SFTConfig(**arguments(cell, Path(str(out) + ".trl")), max_length=16)
    SFTTrainer(
        model, told, train_dataset=rows, processing_class=words(), callbacks=callbacks(cell, model, grown)
    ).train()
    Path(str(out) + ".trl", f"checkpoint-{STEPS}").rename(out)


def lightning(cell: Cell, grown: Path, out: Path) -> None:
    """Saves the module's state dict, which a .ckpt has too, in a pickle; its names begin with net."""
    import torch
    from lightning.pytorch import LightningModule, Trainer

    from ckptgrow.training.lightning import FreezeCallback

    model = load(cell, grown)
    runner: Any = torch.compile(model, backend=backend(cell)) if compiled(cell) else model

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, tokens: Any, _: int) -> Any:
            return runner(input_ids=tokens, labels=tokens).loss

        def configure_optimizers(self) -> Any:
            return adamw(cell, model)

    ours = [] if cell.how in ("naive", "whole") else [FreezeCallback(how=cell.how)]  # type: ignore[arg-type]
    if not ours:
        by_hand(model, grown, hooks=cell.how == "naive")
    module, micro = Module(), 2 if cell.way == "accumulation" else 1
    trainer = Trainer(
        accelerator=DEVICE,
        devices=1,
        max_steps=STEPS,
        precision="bf16-true" if cell.dtype == "bf16" else "32-true",
        accumulate_grad_batches=micro,
        gradient_clip_val=0.1 if cell.way == "clipping" else None,
        callbacks=ours,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=2))
    save(module.state_dict(), out)


def hf_fsdp2(cell: Cell, grown: Path, out: Path) -> None:
    """The Trainer's own way to shard. Trained in bf16 its masters are fp32, and so is what it saves."""
    shards = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    shards["activation_checkpointing"] = cell.way == "checkpointing"
    hf(cell, grown, out, fsdp=True, fsdp_config=shards, **{checkpointing(): False})


def hf_zero(cell: Cell, grown: Path, out: Path) -> None:
    config = settings(cell) | {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    config["zero_optimization"] |= {"stage3_gather_16bit_weights_on_model_save": True}
    hf(cell, grown, out, deepspeed=config)


def words() -> Any:
    """A tokenizer of 64 words, which TRL asks for."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 64)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, "</s>")), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


RUNNERS: Mapping[str, Callable[[Cell, Path, Path], None]] = {
    "plain": plain,
    "hf": hf,
    "trl": trl,
    "lightning": lightning,
    "ddp": ddp,
    "fsdp1": fsdp1,
    "fsdp2": fsdp2,
    "zero1": zero,
    "zero2": zero,
    "zero3": zero,
    "hffsdp2": hf_fsdp2,
    "hfzero2": hf_zero,
    "hfzero3": hf_zero,
}


# ---------------------------------------------------------------- the process


def missing(trainer: str) -> str | None:
    """The first module that this trainer needs and that is not installed."""
    found: Iterable[str] = (name for name in TRAINERS[trainer][0] if importlib.util.find_spec(name) is None)
    return next(iter(found), None)


def main(file: Path, grown: Path, out: Path) -> None:
    """Train every cell; what one raises is written down, and the next one goes on."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    cells = [Cell(**told) for told in json.loads(file.read_text())]
    if "LOCAL_RANK" in os.environ:
        start(cells)
    for cell in cells:
        torch.manual_seed(0)
        torch._dynamo.reset()
        began = time.monotonic()
        try:
            RUNNERS[cell.trainer](cell, grown / cell.dtype, out / str(cell))
        except Exception as error:  # the test says whether it had to be
            told = str(error) if isinstance(error, CkptgrowError) else traceback.format_exc()
            (out / f"{cell}.txt").write_text(told)
        print(f"{time.monotonic() - began:6.2f} s  {cell}", flush=True)
    sys.stdout.write(f"trained {len(cells)}\n")  # in one piece, since two processes write to one pipe
    sys.stdout.flush()
    if "LOCAL_RANK" in os.environ:
        torch.distributed.barrier()
        os._exit(0)  # gloo's threads now and then abort a process that takes itself down in order


def start(cells: list[Cell]) -> None:
    import torch

    backend = "gloo" if DEVICE == "cpu" else "nccl"
    if DEVICE != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if "zero" in cells[0].trainer:
        import deepspeed

        deepspeed.init_distributed(backend)
    else:
        torch.distributed.init_process_group(backend)


def environment() -> dict[str, str]:
    """For that process: one thread, DeepSpeed on the CPU, and the package that this one has."""
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": DEVICE, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return os.environ | settings


def processes(trainer: str) -> int:
    """As many as it takes to shard, and as there are GPUs."""
    import torch

    return TRAINERS[trainer][2] if DEVICE == "cpu" else min(TRAINERS[trainer][2], torch.cuda.device_count())


def told(cells: Iterable[Cell]) -> str:
    return json.dumps([asdict(cell) for cell in cells])


# What a trainer has beside the product: how, and the decay.
EXTRA: Mapping[str, tuple[tuple[str, float], ...]] = {
    "plain": (("unguarded", 0.0), ("unguarded", 0.1)),
    "ddp": (("unguarded", 0.0), ("unguarded", 0.1), ("late", 0.0), ("latemask", 0.0)),
    "fsdp1": (("split", 0.1), ("naive", 0.0), ("early", 0.0), ("late", 0.0), ("latemask", 0.0)),
    "fsdp2": (("unguarded", 0.0), ("unguarded", 0.1), ("late", 0.0), ("early", 0.0)),
    "zero1": (("unguarded", 0.0), ("unguarded", 0.1), ("late", 0.0)),
    "zero2": (("unguarded", 0.0), ("unguarded", 0.1), ("late", 0.0)),
    "zero3": (("unguarded", 0.0), ("unguarded", 0.1), ("late", 0.0), ("init", 0.1), ("lateinit", 0.0)),
}


def cells_of(trainer: str) -> Iterator[Cell]:
    """The whole matrix of a trainer, its controls, what must be refused, and a real compilation."""
    product = [(decay, dtype, way) for decay in (0.0, 0.1) for dtype in DTYPES for way in WAYS]
    if trainer != "fsdp1":  # it is here for what it must refuse
        yield from (Cell(trainer, how, *rest) for how in ("split", "mask") for rest in product)
        yield from (Cell(trainer, "naive" if decay else "whole", decay, *rest) for decay, *rest in product)
    for how, decay in EXTRA.get(trainer, ()):
        yield from (Cell(trainer, how, decay, dtype, "clipping") for dtype in DTYPES)
    if trainer in ("plain", "hf"):
        yield from (Cell(trainer, how, 0.1, "fp32", "inductor") for how in ("split", "mask"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
