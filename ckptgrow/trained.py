"""What trainers give back, read as the grown checkpoint it came from: folders, names, tied heads.

Taken: safetensors in any sharding, with or without config.json (DeepSpeed's zero_to_fp32.py writes none), and
torch.distributed.checkpoint folders (.metadata and *.distcp), whose tensors are loaded one by one. Names may carry
wrappers anywhere, one prefix more or less, or be those of a transformers model in memory. Refused, with the way out:
adapters that are not merged, pieces of tensors, pickles.

A .metadata file is a pickle. It is read here with a reader that knows torch's descriptions of tensors and no other
class, so it can run no code; the tensors go through torch.load(weights_only=True), as torch itself reads them.
"""

from __future__ import annotations

import pickle
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ckptgrow.checkpoint import CONFIG, Bits, Checkpoint, is_plain_name, open_weights, read_json
from ckptgrow.equivalence import Finding
from ckptgrow.errors import CkptgrowError, FormatError, RequestError
from ckptgrow.families import FAMILIES, HEAD, ends_in, in_memory_name, ties
from ckptgrow.layout import INDEX, SINGLE
from ckptgrow.manifest import Manifest
from ckptgrow.tensors import DTYPE_BITS, TensorInfo

# Put between the parts of a name by torch.compile, DDP, FSDP1, activation checkpointing.
WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
METADATA = ".metadata"
# What lies beside the model in a dump of a whole training run.
_STATE = frozenset({"optimizer", "optimizers", "optim", "lr_scheduler", "scheduler", "dataloader", "train_state"})
_PIECES = "DCP_SHARDING_INFO"  # in the header of a safetensors file that torch.distributed.checkpoint wrote


class Tensors(Protocol):
    """Tensors by name: a Checkpoint, or a dump."""

    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...
    def bits(self, name: str) -> Bits: ...


# ---------------------------------------------------------------- opening


def open_trained(folder: Path) -> Tensors:
    """Open what a trainer wrote. Raises RequestError, with the way out, for what cannot be compared as it is."""
    if not folder.is_dir():
        raise RequestError("it is not a folder", file=str(folder), hint="Give the folder that the trainer wrote.")
    if (folder / "adapter_config.json").is_file():
        raise _unmerged(folder)
    if (folder / INDEX).is_file() or (folder / SINGLE).is_file():
        found = open_weights(folder)
        for file, header in found.headers.items():
            if _PIECES in header.metadata:
                raise RequestError(_RANKS[0], file=str(folder / file), hint=_RANKS[1])
        return found
    dumps = [place for place in (folder, *sorted(folder.iterdir())) if (place / METADATA).is_file()]
    dumps = [place for place in dumps if place == folder or "optim" not in place.name]
    if len(dumps) == 1:
        return open_dump(dumps[0], folder)
    raise _refusal(folder)


_ZERO = (
    "DeepSpeed's pieces of tensors, one file a rank",
    "Run its zero_to_fp32.py CHECKPOINT OUT --safe_serialization and audit OUT.",
)
_RANKS = (
    "pieces of tensors, one file a rank",
    "Put them together first: torch.distributed.checkpoint's consolidate_safetensors_files, accelerate merge-weights,"
    " or the trainer's own export.",
)
_PICKLES = (
    "the weights are a pickle, which is never opened",
    "Write safetensors: zero_to_fp32.py --safe_serialization for DeepSpeed, save_pretrained for transformers.",
)
# The first pattern that a file fits says what the folder is.
_REFUSED: tuple[tuple[str, tuple[str, str]], ...] = (
    ("global_step*", _ZERO),
    ("*_model_states.pt", _ZERO),
    ("*_optim_states.pt", _ZERO),
    ("*rank*", _RANKS),
    ("shard-*.safetensors", _RANKS),
    ("*.bin", _PICKLES),
    ("*.pt", _PICKLES),
    ("*.pth", _PICKLES),
    ("*.ckpt", _PICKLES),
)


def _refusal(folder: Path) -> RequestError:
    for pattern, (problem, hint) in _REFUSED:
        if any(folder.glob(pattern)):
            return RequestError(problem, file=str(folder), hint=hint)
    return RequestError(
        f"neither {SINGLE}, {INDEX} nor a torch.distributed.checkpoint is here",
        file=str(folder),
        hint="Give the folder of the trained model, as the trainer saved it.",
    )


def _unmerged(folder: Path) -> RequestError:
    return RequestError(
        "a LoRA that is not merged: the checkpoint below it did not move",
        file=str(folder),
        hint="Merge it first (PEFT's merge_and_unload, then save_pretrained) and audit the result.",
    )


# ---------------------------------------------------------------- torch.distributed.checkpoint


@dataclass(frozen=True)
class Dump:
    """A torch.distributed.checkpoint folder; each tensor is put together from its pieces when it is asked for."""

    folder: Path
    config: Mapping[str, Any]
    infos: Mapping[str, TensorInfo]
    reader: Any
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def bits(self, name: str) -> Bits:
        """The whole tensor, in memory: one at a time is as little as torch's reader gives."""
        import torch
        from torch.distributed.checkpoint.state_dict_loader import load

        info = self.infos[name]
        tensor = torch.empty(info.shape, dtype=_torch_dtypes()[info.dtype])
        with self._turn, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group
            load({name: tensor}, storage_reader=self.reader, no_dist=True)
        kind = f"<u{DTYPE_BITS[info.dtype] // 8}"
        raw: Bits = np.empty(0, np.uint8) if not info.elements else tensor.reshape(-1).view(torch.uint8).numpy()
        return raw.view(kind).reshape(info.shape)


def open_dump(folder: Path, beside: Path) -> Dump:
    """Open a torch.distributed.checkpoint; config.json is looked for in it and in the folder that was given."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = _read_metadata(folder / METADATA)
    for stored in metadata.storage_data.values():
        if not is_plain_name(stored.relative_path):
            raise FormatError(f"{stored.relative_path!r} is not a file in it", file=str(folder / METADATA))

    class Reader(FileSystemReader):  # torch's own, but for what it would unpickle
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return metadata

    names = {dtype: name for name, dtype in _torch_dtypes().items()}
    infos = {
        name: TensorInfo(name, names.get(told.properties.dtype, str(told.properties.dtype)), tuple(told.size))
        for name, told in metadata.state_dict_metadata.items()
        if isinstance(told, TensorStorageMetadata)
    }
    configs = [place / CONFIG for place in (folder, beside) if (place / CONFIG).is_file()]
    config = read_json(configs[0])[1] if configs else {}
    return Dump(folder, config, infos, Reader(folder))


def _torch_dtypes() -> Mapping[str, Any]:
    import torch

    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    dtypes |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8}
    return dtypes | {"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}


_DESCRIPTIONS: Mapping[str, frozenset[str]] = {
    "torch.distributed.checkpoint.metadata": frozenset(
        {"BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"}
        | {"TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"}
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch": frozenset({"Size", "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"})
    | {"bool", "uint8", "int8", "int16", "int32", "int64", "complex64", "complex128"},
    "collections": frozenset({"OrderedDict"}),
    "pathlib": frozenset({"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}),
}


class _Descriptions(pickle.Unpickler):
    """A pickle reader that makes torch's descriptions of tensors and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module.startswith("pathlib.") else module
        if name not in _DESCRIPTIONS.get(module, ()):
            raise FormatError(f"it asks for {module}.{name}, which no list of tensors needs: it is not opened")
        return super().find_class(module, name)


def _read_metadata(path: Path) -> Any:
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    try:
        with path.open("rb") as file:
            metadata = _Descriptions(file).load()
    except CkptgrowError as error:
        raise error.at(file=str(path)) from None
    except Exception as error:
        raise FormatError(f"not a torch.distributed.checkpoint ({error!r})", file=str(path)) from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, Mapping):
        raise FormatError("not a torch.distributed.checkpoint", file=str(path))
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    return metadata


# ---------------------------------------------------------------- names


@dataclass(frozen=True, slots=True)
class Matching:
    """Which trained tensor is which grown one; heads that were added because they are tied; what does not fit."""

    names: Mapping[str, str]  # grown -> trained
    heads: Mapping[str, str]  # trained -> the grown tensor that it is a copy of
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


def match(grown: Checkpoint, manifest: Manifest, trained: Tensors) -> Matching:
    """Find every grown tensor among the trained ones. Raises RequestError for the names of an unmerged LoRA."""
    if any(".lora_" in name for name in trained.infos):
        raise _unmerged(trained.folder)
    known = _known(grown, manifest)
    shift = _shift(known, manifest, [plain(name) for name in trained.infos])
    names: dict[str, str] = {}
    findings, others = [], []
    for name in trained.infos:
        found = known.get(shift.of(plain(name))) or known.get(plain(name))
        if found in names:
            findings.append(Finding(name, f"it and {names[found]} are both {found}"))
        elif found is not None:
            names[found] = name
        else:
            others.append(name)
    heads = _heads(grown, manifest, names, others)
    strangers = [name for name in others if name not in heads and name not in names.values()]
    beside = [n for n in strangers if isinstance(trained, Dump) and n.partition(".")[0] in _STATE]
    findings += [Finding(name, _stranger(name)) for name in strangers if name not in beside]
    dropped = {name for name in grown.infos if name not in names and _is_tied(grown, manifest, name)}
    findings += [Finding(n, "it is missing") for n in grown.infos if n not in names and n not in dropped]
    return Matching(names, heads, tuple(findings), tuple(_notes(shift, heads, dropped, beside)))


@dataclass(frozen=True, slots=True)
class _Shift:
    """One prefix that all trained names have too much or too little."""

    drop: str = ""
    add: str = ""

    def of(self, name: str) -> str:
        return self.add + name.removeprefix(self.drop) if name.startswith(self.drop) else name


def plain(name: str, wrappers: frozenset[str] = WRAPPERS) -> str:
    """The name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _known(grown: Checkpoint, manifest: Manifest) -> dict[str, str]:
    """Every name, on disk and in memory, under which a grown tensor may come back; those on disk come first."""
    family = FAMILIES.get(manifest.family)
    known = {plain(name): name for name in grown.infos} | {name: name for name in grown.infos}
    for name in grown.infos:
        memory = manifest.in_memory_names.get(name) or (in_memory_name(family, name) if family else name)
        known.setdefault(memory, name)
    return known


def _shift(known: Mapping[str, str], manifest: Manifest, names: list[str]) -> _Shift:
    """The prefix under which most names are known, looked for on one tensor that must be there."""
    probe = manifest.trainable[0].name
    forms = [form for form, name in known.items() if name == probe]
    shifts = [_Shift()]
    for form in forms:
        shifts += [_Shift(drop=name.removesuffix(form)) for name in names if name.endswith("." + form)]
        shifts += [_Shift(add=form.removesuffix(name)) for name in names if form.endswith("." + name)]
    return max(dict.fromkeys(shifts), key=lambda shift: sum(shift.of(name) in known for name in names))


def _heads(grown: Checkpoint, manifest: Manifest, names: dict[str, str], others: list[str]) -> dict[str, str]:
    """Heads among the unknown names: the grown one under another prefix, or a copy of what they are tied to.

    Where only the head is left of two tied tensors, it stands for the other one: then it is entered in `names`.
    """
    own = [name for name in grown.infos if ends_in(name, HEAD) and name not in names]
    heads: dict[str, str] = {}
    for name in others:
        tied = [owner for head, owner in manifest.ties.items() if ends_in(plain(name), head)]
        if ends_in(plain(name), HEAD) and len(own) == 1 and own[0] not in names:
            names[own[0]] = name
        elif tied and tied[0] not in names:
            names[tied[0]] = name
        elif tied:
            heads[name] = tied[0]
    return heads


def _is_tied(grown: Checkpoint, manifest: Manifest, name: str) -> bool:
    """Whether a tensor may be left out because the model ties it to another one with the same bytes."""
    family = FAMILIES.get(manifest.family)
    if family is None or not ends_in(name, HEAD):
        return False
    rest = {other: info for other, info in grown.infos.items() if other != name}
    owner = ties(grown.config, family, rest).get(HEAD)
    if owner is None or (grown.infos[owner].dtype, grown.infos[owner].shape) != (
        grown.infos[name].dtype,
        grown.infos[name].shape,
    ):
        return False
    one, other = grown.bits(name).reshape(-1), grown.bits(owner).reshape(-1)
    return all(bool((one[i : i + (1 << 20)] == other[i : i + (1 << 20)]).all()) for i in range(0, len(one), 1 << 20))


def _stranger(name: str) -> str:
    if ".parametrizations." in name:
        return "a parametrization stands in its place: remove_parametrizations before saving"
    return "the grown checkpoint has no such tensor"


def _notes(shift: _Shift, heads: Mapping[str, str], dropped: set[str], beside: list[str]) -> Iterator[str]:
    if shift.drop or shift.add:
        yield f"all names have {shift.drop or shift.add!r} too {'much' if shift.drop else 'little'} in front"
    yield from (f"{name} was added: it is tied to {owner}" for name, owner in heads.items())
    yield from (f"{name} was dropped: it is tied" for name in sorted(dropped))
    if beside:
        yield f"{len(beside):,} tensors beside the model (optimizer state) were not looked at"
