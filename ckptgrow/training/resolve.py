"""Which parameters of a model a manifest speaks of, and whether it speaks of this model at all.

Refuses a manifest that does not belong: another digest in config.json, a tensor the model lacks, another shape.
Shapes come from the manifest, since a partitioned parameter reports another one or none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ckptgrow.checkpoint import MANIFEST
from ckptgrow.errors import FormatError, FreezeError
from ckptgrow.hub import preview
from ckptgrow.manifest import CONFIG_KEY, Manifest, Trainable, load_manifest
from ckptgrow.matching import WRAPPERS, plain
from ckptgrow.stacks import held_in
from ckptgrow.training.cut import Cut, StackCut, cut_of

_LEADING = re.compile(r"^(?:base_model\.model\.)?(?:model\.(?=model\.))*")


@dataclass(frozen=True)
class Target:
    """One parameter of which some elements train: the manifest's tensor, where it lives, how it divides."""

    tensor: Trainable
    name: str
    module: nn.Module
    attribute: str
    cut: Cut | StackCut | None  # None: all of it trains

    @property
    def parameter(self) -> Tensor:
        """The parameter as it is now: wrappers replace parameters, so nobody should keep one."""
        found: Tensor = getattr(self.module, self.attribute)
        return found


def find_manifest(model: nn.Module, manifest: Manifest | Path | str | None) -> Manifest:
    """The manifest asked for, or the one beside the model's checkpoint, held against the digest in its config."""
    if not isinstance(manifest, Manifest):
        manifest = load_manifest(Path(manifest) if manifest is not None else _beside(model))
    entry = getattr(_config(model), CONFIG_KEY, None)
    digest = entry.get("manifest") if isinstance(entry, Mapping) else None
    if digest not in (None, manifest.digest):
        raise FreezeError(
            f"the manifest's digest {manifest.digest[:15]}... is not the {digest[:15]}... in the model's config",
            tensor=manifest.trainable[0].name,
            hint=f"Pass the {MANIFEST} of the checkpoint that this model was loaded from.",
        )
    return manifest


def resolve(model: nn.Module, manifest: Manifest) -> tuple[Target, ...]:
    """The model's parameters for all trainable tensors of the manifest: one each, or one in which several lie.

    Raises FreezeError, changes nothing.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    plain = {plain_name(name): name for name in named}

    def find(known: str) -> str | None:
        candidates = list(_variants(known))
        return next((n for n in candidates if n in named), None) or next(
            (plain[n] for n in candidates if n in plain), None
        )

    def find_shape(known: str) -> tuple[str, tuple[int, ...]] | None:
        name = find(known)
        return None if name is None else (name, _shape(named[name]))

    one = {}
    for tensor in manifest.trainable:
        names = filter(None, map(find, dict.fromkeys((tensor.name, manifest.in_memory_names.get(tensor.name, "")))))
        one[tensor.name] = next(names, None)
    others = [t for t in manifest.trainable if (n := one[t.name]) is None or _shape(named[n]) != t.shape]
    held, placed = held_in(others, manifest, find_shape) if others else ({}, set())
    targets = []
    for tensor in manifest.trainable:
        if tensor.name not in placed:
            targets.append(_target(model, named, one[tensor.name], tensor))
    return (*targets, *(_target(model, named, name, tensor) for name, tensor in held.items()))


def cuts_by_name(manifest: Manifest) -> dict[str, Cut]:
    """The cut of every half-frozen tensor along one axis, by each of the names it may have, without wrappers."""
    cuts = ((tensor.name, _cut(tensor)) for tensor in manifest.trainable)
    return {
        plain_name(known): cut for name, cut in cuts if isinstance(cut, Cut) for known in _candidates(name, manifest)
    }


def _target(model: nn.Module, named: Mapping[str, Tensor], name: str | None, tensor: Trainable) -> Target:
    if name is None:
        raise FreezeError(
            "the model has no such parameter",
            tensor=tensor.name,
            hint="The manifest belongs to another model, or the model was taken apart before it was frozen.",
        )
    found = _shape(named[name])
    if found != tensor.shape:
        raise FreezeError(
            f"the model's parameter has the shape {list(found)}, the manifest's {list(tensor.shape)}",
            tensor=tensor.name,
            hint="The manifest belongs to another model.",
        )
    path, _, attribute = name.rpartition(".")
    return Target(tensor, name, model.get_submodule(path), attribute, _cut(tensor))


def _cut(tensor: Trainable) -> Cut | StackCut | None:
    try:
        return cut_of(tensor.division())
    except FormatError as error:
        raise FreezeError(error.problem, tensor=tensor.name) from None


def _candidates(name: str, manifest: Manifest) -> Iterator[str]:
    """The names under which a tensor may be held: as on disk, as in memory, below or without a model's head."""
    for known in dict.fromkeys((name, manifest.in_memory_names.get(name, name))):
        yield from _variants(known)


def _variants(known: str) -> Iterator[str]:
    """A name itself, and below or without a model's head."""
    yield known
    yield "model." + known
    if known.startswith("model."):
        yield known.removeprefix("model.")


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers, and PEFT, put into it."""
    return _LEADING.sub("", plain(name, WRAPPERS | {"base_layer"}))


def _shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter: ZeRO-3 leaves it empty and keeps the shape beside it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _config(model: nn.Module) -> Any:
    """The config of the model, under whatever wraps it."""
    for inner in model.modules():
        if hasattr(inner, "config"):
            return inner.config
    return None


def _beside(model: nn.Module) -> Path:
    """The manifest's path in the folder, or the Hub repository, that the model was loaded from."""
    config = _config(model)
    source = getattr(config, "_name_or_path", "") or getattr(config, "name_or_path", "")
    commit = getattr(config, "_commit_hash", None)
    folder = preview(f"{source}@{commit}").origin.folder if source and commit else Path(source)
    if not source or not (folder / MANIFEST).is_file():
        where = f"{source} is no folder with a {MANIFEST}" if source else "the model does not say where it came from"
        raise FreezeError(
            f"the manifest was not found: {where}", hint="Pass the grown checkpoint's folder: freeze(model, folder)."
        )
    return folder / MANIFEST
