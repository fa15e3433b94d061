"""What trainers give back: opening the folders they write. Who is who in them is matching.py.

Taken: safetensors in any sharding, with or without config.json (DeepSpeed's zero_to_fp32.py writes none), and
torch.distributed.checkpoint folders (.metadata and *.distcp), whose tensors are loaded one by one. Refused, with the
way out: adapters that are not merged, pieces of tensors, pickles.

A .metadata file is a pickle. It is read here with a reader that knows torch's descriptions of tensors and no other
class, so it can run no code; the tensors go through torch.load(weights_only=True), as torch itself reads them.
"""

from __future__ import annotations

import pickle
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ckptgrow.checkpoint import CONFIG, Bits, Tensors, is_plain_name, open_weights, read_json
from ckptgrow.errors import CkptgrowError, FormatError, RequestError
from ckptgrow.layout import INDEX, SINGLE
from ckptgrow.tensors import DTYPE_BITS, TensorInfo

METADATA = ".metadata"
_PIECES = "DCP_SHARDING_INFO"  # in the header of a safetensors file that torch.distributed.checkpoint wrote


class Trained(Tensors, Protocol):
    """What a trainer wrote: a Checkpoint, or a dump. The config is empty where there is none."""

    @property
    def folder(self) -> Path: ...
    @property
    def config_text(self) -> str: ...
    @property
    def config(self) -> Mapping[str, Any]: ...


# ---------------------------------------------------------------- opening


def open_trained(folder: Path) -> Trained:
    """Open what a trainer wrote. Raises RequestError, with the way out, for what cannot be compared as it is."""
    if not folder.is_dir():
        raise RequestError("it is not a folder", file=str(folder), hint="Give the folder that the trainer wrote.")
    if (folder / "adapter_config.json").is_file():
        raise unmerged(folder)
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
    "Run its zero_to_fp32.py CHECKPOINT OUT --safe_serialization and give OUT.",
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


def unmerged(folder: Path) -> RequestError:
    return RequestError(
        "a LoRA that is not merged: the checkpoint below it did not move",
        file=str(folder),
        hint="Merge it first (PEFT's merge_and_unload, then save_pretrained) and give the result.",
    )


# ---------------------------------------------------------------- torch.distributed.checkpoint


@dataclass(frozen=True)
class Dump:
    """A torch.distributed.checkpoint folder; each tensor is put together from its pieces when it is asked for."""

    folder: Path
    config_text: str
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


def is_dump(trained: Trained) -> bool:
    """Whether it is a dump of a training run, or a view of one."""
    return isinstance(getattr(trained, "trained", trained), Dump)


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
    config_text, config = read_json(configs[0]) if configs else ("", {})
    return Dump(folder, config_text, config, infos, Reader(folder))


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
