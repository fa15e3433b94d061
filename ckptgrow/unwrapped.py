"""A trained folder under the names that its checkpoint had before a trainer wrapped it, for those who write it again.

Wrappers put words between the parts of a name (torch.compile's `_orig_mod`, DDP's `module`), and some trainers one
prefix in front of all. The words go; a prefix is known where ckptgrow.json lies in the folder and says the base's
names. What is no folder of whole tensors with a config.json is refused, with the commands that make it one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ckptgrow.checkpoint import CONFIG, MANIFEST, Checkpoint, ShardFile
from ckptgrow.errors import CkptgrowError, RequestError
from ckptgrow.manifest import load_manifest
from ckptgrow.matching import Shift, plain, shift_of
from ckptgrow.trained import open_trained

_WAY_OUT = (
    "`ckptgrow extract TRAINED SKILL --manifest GROWN` and `ckptgrow apply BASE SKILL OUT` write it as the grown"
    " checkpoint is written: fold OUT."
)


def open_unwrapped(folder: Path) -> Checkpoint:
    """The checkpoint in a folder that a trainer wrote. Raises CkptgrowError, with the way out, where there is none."""
    found = open_trained(folder)
    if not isinstance(found, Checkpoint):
        raise RequestError("its tensors lie in pieces (torch.distributed.checkpoint)", file=str(folder), hint=_WAY_OUT)
    if not found.config:
        raise RequestError(
            f"it has no {CONFIG}", file=str(folder), hint=f"Copy the grown checkpoint's to it. Or: {_WAY_OUT}"
        )
    names = {name: plain(name) for name in found.infos}
    shift = _shift(folder, list(names.values()))
    names = {name: shift.of(told) for name, told in names.items()}
    if all(name == told for name, told in names.items()):
        return found
    often = Counter(names.values())
    for name, told in names.items():
        if often[told] > 1:
            raise RequestError(f"another tensor is {told} too, once wrappers are taken off", tensor=name, hint=_WAY_OUT)
    return renamed(found, names)


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The same bytes under other names: own -> new."""
    shards: dict[str, ShardFile] = {}
    for file, shard in checkpoint.shards.items():
        tensors = tuple(replace(info, name=names[info.name]) for info in shard.header.tensors)
        shards[file] = replace(shard, header=replace(shard.header, tensors=tensors))
    index = checkpoint.index
    if index is not None:
        index = {**index, "weight_map": {names[name]: file for name, file in index["weight_map"].items()}}
    return replace(checkpoint, shards=shards, index=index)


def _shift(folder: Path, names: list[str]) -> Shift:
    """The prefix that the names have too much or too little, by the manifest, where there is one."""
    try:
        manifest = load_manifest(folder) if (folder / MANIFEST).is_file() else None
    except CkptgrowError:
        return Shift()
    known = frozenset(manifest.base.digests) if manifest else frozenset[str]()
    forms = [tensor.name for tensor in manifest.trainable[:1]] if manifest else []
    return shift_of(known, forms, names)
