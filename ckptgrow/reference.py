"""The grown checkpoint that a training started from: its own folder, or made anew from the base and the manifest.

A folder is the grown checkpoint where its config.json names the manifest's digest. Otherwise it must be the base that
the manifest describes, and then the same Plan is made again and each tensor filled in memory when it is asked for, so
that no grown folder need exist. Refused: any other folder, a manifest that the trained checkpoint does not name, a
growth that comes out otherwise than the manifest says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ckptgrow.checkpoint import CONFIG, MANIFEST, Bits, Checkpoint, Tensors, digest_of, open_checkpoint
from ckptgrow.config import set_value
from ckptgrow.errors import RequestError
from ckptgrow.execute import made
from ckptgrow.identity import Base
from ckptgrow.lineage import Past, belonging, recall, stranger
from ckptgrow.manifest import (
    CONFIG_KEY,
    Manifest,
    check_described,
    grown_config,
    history,
    load_manifest,
    manifest_file,
    named_in,
)
from ckptgrow.plan import Output
from ckptgrow.surgery import BASE
from ckptgrow.tensors import TensorInfo
from ckptgrow.trained import Trained


@dataclass(frozen=True)
class Reference:
    """The grown checkpoint and its manifest. `files` is the folder whose shards, index and other files it shares."""

    tensors: Tensors
    config_text: str
    manifest: Manifest
    manifest_text: bytes
    files: Checkpoint
    notes: tuple[str, ...] = ()

    @cached_property
    def config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = json.loads(self.config_text)
        return config


@dataclass(frozen=True)
class Regrown:
    """The result of a Plan that lies on no disk: each tensor is made from its sources when it is asked for."""

    sources: Mapping[str, Tensors]
    outputs: Mapping[str, Output]

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: output.info for name, output in self.outputs.items()}

    def bits(self, name: str) -> Bits:
        """The whole tensor: in memory where the Plan changed it, the source's own where not."""
        output = self.outputs[name]
        for source, tensors in self.sources.items():
            if name in tensors.infos and output.is_copy_of(tensors.infos[name], source):
                return tensors.bits(name)
        return made(output, self.sources)


def open_reference(folder: Path, trained: Trained, manifest: Path | None = None) -> Reference:
    """What `trained` started from: `folder` is that checkpoint, or its base; `manifest` a file or a folder that has it.

    Raises CkptgrowError where folder, manifest and trained checkpoint do not belong together.
    """
    opened = open_checkpoint(folder)
    history(opened)  # raises where its own manifest is another checkpoint's
    path = _found(folder, trained, manifest)
    described = load_manifest(path)
    text = described.text().encode()
    notes = tuple(belonging(trained, text, path))
    if named_in(opened.config) == digest_of(text):
        check_described(opened, described)
        return Reference(opened, opened.config_text, described, text, opened, notes)
    reason = _unlike(opened, described)
    if reason:
        raise RequestError(
            f"it is neither the grown checkpoint that {path} describes, since its {CONFIG} does not name it, nor the"
            f" base of that growth: {reason}",
            file=str(folder),
            hint="Give the folder that ckptgrow expand wrote, or the one that it grew.",
        )
    return replace(_regrown(opened, described, text, path), notes=(*notes, f"made anew from {folder} by {path}"))


def _found(folder: Path, trained: Trained, manifest: Path | None) -> Path:
    """The manifest's file: the one asked for, the one that the trained checkpoint names, the one of the folder."""
    if manifest is not None:
        return manifest_file(manifest)
    places = (folder, trained.folder, trained.folder.parent)
    paths = [place / MANIFEST for place in places if (place / MANIFEST).is_file()]
    named = [path for path in paths if digest_of(path.read_bytes()) == named_in(trained.config)]
    if named or (paths and paths[0].parent == folder):
        return (named or paths)[0]
    if paths and paths[0].parent == trained.folder:
        raise RequestError(
            f"its {CONFIG} does not name it, so it may belong to another growth",
            file=str(paths[0]),
            hint="If it is the right one, give it with --manifest.",
        )
    raise RequestError(
        f"it has no {MANIFEST}, and neither has {trained.folder}",
        file=str(folder),
        hint="Give the folder that ckptgrow expand wrote, or --manifest FILE: it says which elements train.",
    )


def _unlike(opened: Checkpoint, manifest: Manifest) -> str | None:
    """Why a folder is not the base that a manifest describes; None where it is."""
    found = stranger(opened, manifest.base)
    if found is None:
        return None
    for entry in manifest.history:
        if "base" in entry and stranger(opened, Base(**entry["base"])) is None:
            return f"it is the base of an earlier one, and what was trained in between is only in {manifest.base.id}"
    return ": ".join(found)


def _regrown(base: Checkpoint, manifest: Manifest, text: bytes, path: Path) -> Reference:
    """The growth made again. Raises FormatError where it does not come out as the manifest says."""
    return regrown(recall(manifest, str(path)), base, base, text)


def regrown(past: Past, base: Tensors, files: Checkpoint, text: bytes) -> Reference:
    """What a growth makes of the base's tensors, which need not lie in `files`; `text` is its manifest's."""
    config = grown_config(files.config_text, past.plan, past.manifest, past.architecture)
    config = set_value(config, f"{CONFIG_KEY}.manifest", digest_of(text))  # an older version may write it otherwise
    return Reference(Regrown({BASE: base}, past.of_base.named), config, past.manifest, text, files)
