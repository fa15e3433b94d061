"""A read-only view over a checkpoint folder: config.json, the index and the shards' headers; bytes on demand.

    folder/
      config.json
      model.safetensors                      one file, or:
      model.safetensors.index.json           {"metadata": ..., "weight_map": {tensor: file}}
      model-00001-of-00003.safetensors ...

Opening reads headers only, and refuses a folder whose index and shards contradict each other. File names in an index
are untrusted: plain names only. Nothing is unpickled and no code from a checkpoint is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ckptgrow.errors import CkptgrowError, FormatError
from ckptgrow.layout import INDEX, SINGLE
from ckptgrow.tensors import DTYPE_BITS, LENGTH_BYTES, Header, TensorInfo, header_length, parse_header

Bits = NDArray[np.unsignedinteger[Any]]

CONFIG = "config.json"
MANIFEST = "ckptgrow.json"
CARD = "README.md"

# Other copies of the weights, adapters, and the state of a training run: they would not fit the grown model.
_STALE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".ot", ".npz")
_STALE_NAMES = ("trainer_state.json", "adapter_config.json")
_WRITTEN_ANEW = (CONFIG, INDEX, MANIFEST, CARD)


class Tensors(Protocol):
    """Tensors by name, from wherever they come."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...
    def bits(self, name: str) -> Bits: ...


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One safetensors file: its header, where its tensors begin, its size, and the digest of its header bytes."""

    header: Header
    start: int
    nbytes: int
    digest: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, opened. `shards` is in the order of the index."""

    folder: Path
    config_text: str
    config: Mapping[str, Any]
    index: Mapping[str, Any] | None
    shards: Mapping[str, ShardFile]

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, in the order of shards and of the bytes in them."""
        return {info.name: info for shard in self.shards.values() for info in shard.header.tensors}

    @cached_property
    def _home(self) -> Mapping[str, str]:
        return {info.name: file for file, shard in self.shards.items() for info in shard.header.tensors}

    @property
    def headers(self) -> Mapping[str, Header]:
        return {file: shard.header for file, shard in self.shards.items()}

    @property
    def parameters(self) -> int:
        return sum(info.elements for info in self.infos.values())

    @property
    def tensor_bytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())

    def span(self, name: str) -> tuple[Path, int, int]:
        """Where a tensor's bytes lie: file, offset in the file, length."""
        file, info = self._home[name], self.infos[name]
        return self.folder / file, self.shards[file].start + info.start, info.stop - info.start

    def bits(self, name: str) -> Bits:
        """A tensor's elements as unsigned integers of their width, mapped from the file and not read yet."""
        info, (path, offset, nbytes) = self.infos[name], self.span(name)
        if not nbytes:
            return np.empty(info.shape, f"<u{DTYPE_BITS[info.dtype] // 8}")
        raw = np.memmap(path, np.uint8, "r", offset, (nbytes,))
        return raw.view(np.ndarray).view(f"<u{DTYPE_BITS[info.dtype] // 8}").reshape(info.shape)

    def digest(self, name: str) -> str:
        """The digest of a tensor's bytes."""
        path, offset, nbytes = self.span(name)
        told = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while nbytes:
                data = file.read(min(nbytes, 1 << 20))
                if not data:
                    raise FormatError("the file became shorter while it was read", file=str(path), tensor=name)
                told.update(data)
                nbytes -= len(data)
        return "sha256:" + told.hexdigest()

    def head(self, file: str) -> bytes:
        """The first bytes of a shard: length prefix and header."""
        with (self.folder / file).open("rb") as opened:
            return opened.read(self.shards[file].start)

    def text(self, file: str) -> str | None:
        """A small text file of the folder; None where it is not there, or is no text."""
        try:
            return (self.folder / file).read_bytes().decode()
        except (OSError, ValueError):
            return None

    def companions(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(copied, left out): the other files of the folder, relative paths.

        Left out are other copies of the weights and files of a training run; hidden files are not looked at.
        """
        others = sorted(set(_files_below(self.folder)) - self.shards.keys() - set(_WRITTEN_ANEW))
        stale = tuple(file for file in others if _is_stale(file))
        return tuple(file for file in others if file not in stale), stale


def open_checkpoint(folder: Path, remote: Mapping[str, tuple[bytes, int]] | None = None) -> Checkpoint:
    """Open a folder. `remote` gives the first bytes (prefix and header) and size of shards that are not in it.

    Raises FormatError for anything missing, broken or contradictory, naming the file and the tensor.
    """
    return _opened(folder, remote or {}, bare=False)


def open_file(folder: Path, file: str) -> Checkpoint:
    """One safetensors file by itself, whatever its name."""
    try:
        return Checkpoint(folder, "", {}, None, {file: _shard(folder, file, {})})
    except CkptgrowError as error:
        error.file = str(folder / file)
        raise


def open_weights(folder: Path) -> Checkpoint:
    """Open a folder that may have tensors and no config.json, as exports of a trainer's state do."""
    return _opened(folder, {}, bare=not (folder / CONFIG).is_file())


def _opened(folder: Path, remote: Mapping[str, tuple[bytes, int]], *, bare: bool) -> Checkpoint:
    try:
        config_text, config = ("", {}) if bare else read_json(folder / CONFIG)
        index = _index(folder)
        shards = {file: _shard(folder, file, remote) for file in _shard_names(folder, index, remote)}
        checkpoint = Checkpoint(folder, config_text, config, index, shards)
        _check_names(checkpoint)
    except CkptgrowError as error:
        error.file = str(folder / error.file) if error.file else str(folder)
        raise
    return checkpoint


def read_json(path: Path) -> tuple[str, Mapping[str, Any]]:
    """A JSON object: its text and its value."""
    if not path.is_file():
        raise FormatError("there is no such file", file=path.name, hint="SRC must be a Hugging Face checkpoint folder.")
    try:
        text = path.read_bytes().decode("utf-8")
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not valid JSON ({error})", file=path.name) from None
    if not isinstance(value, dict):
        raise FormatError("not a JSON object", file=path.name)
    return text, value


def _index(folder: Path) -> Mapping[str, Any] | None:
    if not (folder / INDEX).is_file():
        return None
    _, index = read_json(folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("it has no weight_map", file=INDEX)
    if (folder / SINGLE).is_file() and set(weight_map.values()) != {SINGLE}:
        raise FormatError(
            f"both {SINGLE} and {INDEX} are here", hint="Loaders disagree on which one counts: remove the stale one."
        )
    if not isinstance(index.get("metadata", {}), dict):
        raise FormatError("its metadata is not an object", file=INDEX)
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not is_plain_name(file) or not file.endswith(".safetensors"):
            raise FormatError(f"{file!r} is not the plain name of a safetensors file", file=INDEX, tensor=tensor)
    return index


def is_plain_name(file: str) -> bool:
    """Whether an untrusted file name stays in its folder: no separator, drive, or way up."""
    return file not in ("", ".", "..") and not any(character in file for character in "/\\:\0")


def _shard_names(
    folder: Path, index: Mapping[str, Any] | None, remote: Mapping[str, tuple[bytes, int]]
) -> tuple[str, ...]:
    if index is not None:
        return tuple(sorted(set(index["weight_map"].values())))
    if SINGLE in remote or (folder / SINGLE).is_file():
        return (SINGLE,)
    others = sorted(path.name for path in folder.iterdir() if path.name.endswith(_STALE))
    found = f" ({', '.join(others[:3])} is not what loaders look for)" if others else ""
    raise FormatError(f"neither {SINGLE} nor {INDEX} is here{found}", hint="ckptgrow works on safetensors checkpoints.")


def _shard(folder: Path, file: str, remote: Mapping[str, tuple[bytes, int]]) -> ShardFile:
    head, nbytes = remote[file] if file in remote else _read_head(folder / file)
    try:
        length = header_length(head, nbytes)
        start = LENGTH_BYTES + length
        header = parse_header(head[LENGTH_BYTES:start], nbytes - start)
    except CkptgrowError as error:
        raise error.at(file=file) from None
    return ShardFile(header, start, nbytes, digest_of(head[:start]))


def digest_of(data: bytes) -> str:
    """How this project writes a digest."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _read_head(path: Path) -> tuple[bytes, int]:
    """The prefix and header of a file, and its size."""
    try:
        nbytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(LENGTH_BYTES)
            return prefix + file.read(header_length(prefix, nbytes)), nbytes
    except FileNotFoundError:
        raise FormatError("the index names it, but it is not here", file=path.name) from None
    except CkptgrowError as error:
        raise error.at(file=path.name) from None


def _check_names(checkpoint: Checkpoint) -> None:
    """Each tensor in one shard, and where there is an index, in the shard that it says."""
    seen: dict[str, str] = {}
    for file, shard in checkpoint.shards.items():
        for info in shard.header.tensors:
            if info.name in seen:
                raise FormatError(f"it is also in {seen[info.name]}", file=file, tensor=info.name)
            seen[info.name] = file
    if not seen:
        raise FormatError("no shard holds any tensor")
    declared = checkpoint.index["weight_map"] if checkpoint.index is not None else seen
    for name in declared.keys() | seen.keys():
        if declared.get(name) != seen.get(name):
            says = f"the index says {declared[name]}" if name in declared else "the index does not name it"
            holds = f"it is in {seen[name]}" if name in seen else "no shard holds it"
            raise FormatError(f"{says}, but {holds}", file=INDEX, tensor=name)


def _files_below(folder: Path) -> Iterator[str]:
    """Relative paths (with /) of all files, links to files included; hidden ones and linked folders are skipped."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from (f"{path.name}/{below}" for below in _files_below(path))
        elif path.is_file():
            yield path.name


def _is_stale(file: str) -> bool:
    name = file.rpartition("/")[2]
    top = file.partition("/")[0]
    return name.endswith(_STALE) or name.endswith(".index.json") or name in _STALE_NAMES or top == "original"
