"""Where each byte of a Plan's result will lie: shards, headers, offsets and the index. Nothing is written here.

One output shard per input shard, under the same name, so that a shard in which nothing changes is a plain file copy.
Within a shard the order is the safetensors library's own. `total_size` in the index counts tensor bytes.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptgrow.plan import Output, Plan
from ckptgrow.tensors import Header, TensorInfo, arrange

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the result: its header, and its outputs in the order in which their bytes follow."""

    file: str
    header: Header
    outputs: tuple[Output, ...]
    whole: bool  # every tensor is the source's: the file is copied as it is
    head: bytes | None = None  # its first bytes, where they must be those of a file that once was

    @property
    def nbytes(self) -> int:
        return len(self.head or self.header.to_bytes()) + self.header.body_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """All files of tensors of the result, and the text of the index if there is one."""

    shards: tuple[Shard, ...]
    index: str | None

    @property
    def nbytes(self) -> int:
        """Bytes to write, the index included."""
        return sum(shard.nbytes for shard in self.shards) + len((self.index or "").encode())


def lay(
    plan: Plan,
    headers: Mapping[str, Header],
    infos: Mapping[str, TensorInfo],
    index: Mapping[str, Any] | None,
    source: str | None = "base",
) -> Layout:
    """The files of the result of a Plan, laid out as `source` is: its shard headers and index (None: one file).

    `source` None: no shard is any source's file, whatever its tensors are.
    """
    home = {info.name: file for file, header in headers.items() for info in header.tensors}
    outputs: dict[str, list[Output]] = defaultdict(list)
    for output in plan.outputs:
        outputs[home[output.name]].append(output)
    shards = tuple(_shard(file, outputs[file], header, infos, source) for file, header in headers.items())
    return Layout(shards, _index(index, plan) if index is not None else None)


def _shard(file: str, outputs: list[Output], was: Header, infos: Mapping[str, TensorInfo], source: str | None) -> Shard:
    same = source is not None and all(o.is_copy_of(infos[o.name], source) for o in outputs)
    whole = same and len(outputs) == len(was.tensors)
    header = was if whole else arrange((o.info for o in outputs), was.metadata)
    by_name = {output.name: output for output in outputs}
    return Shard(file, header, tuple(by_name[t.name] for t in header.tensors), whole)


def _index(source: Mapping[str, Any], plan: Plan) -> str:
    """The source's index with the new totals, keys in their order, formatted as transformers does."""
    index = copy.deepcopy(dict(source))
    metadata = index.setdefault("metadata", {})
    metadata["total_size"] = sum(output.info.nbytes for output in plan.outputs)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(output.info.elements for output in plan.outputs)
    return json.dumps(index, indent=2) + "\n"
