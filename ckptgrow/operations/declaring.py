"""Declarations of families from outside the table: read from a file, or proposed for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptgrow.checkpoint import CONFIG, open_checkpoint
from ckptgrow.errors import CkptgrowError, FamilyError, FormatError
from ckptgrow.families import FAMILIES, Architecture, Family, declared, locate, value_at
from ckptgrow.families.propose import propose as guess
from ckptgrow.hub import preview
from ckptgrow.results import Declaration

Source = str | Path


def propose(src: Source) -> Declaration:
    """A declaration for the architecture of `src`, guessed from names and shapes: to be read, and given as `family`.

    Reads headers only. `problem` says why it does not hold for this checkpoint as it is. Raises CkptgrowError where
    nothing in it looks like an MLP.
    """
    seen = preview(src)
    base = open_checkpoint(seen.origin.folder, seen.headers)
    family, notes = guess(base.config, base.infos)
    if family.model_type in FAMILIES:
        notes = (*notes, f"{family.model_type} is in the table: without --family that is taken")
    problem = None
    try:
        check_keys(locate(base.config, base.infos, family=family), base.config)
    except CkptgrowError as error:
        problem = str(error)
    return Declaration(seen.origin.id, declared.to_json(family), notes, problem)


def check_keys(architecture: Architecture, config: Mapping[str, Any]) -> None:
    """Raise FamilyError where a key that a declaration names is not the one that says its widths.

    The table knows its keys; a declaration may name another, and then loaders would never learn of the new width.
    """
    for group in architecture.groups:
        outer, _, key = group.path.rpartition(".")
        if key not in ((value_at(config, outer) if outer else config) or {}):
            raise FamilyError(
                f"it has no {group.path}, which should say the width {group.width:,}",
                file=CONFIG,
                hint="Mend the key in the declaration, or write it there if loaders know it.",
            )
        for mlp in group.mlps:
            said = group.told({group.path: group.says}, mlp)
            if group.says is not None and said != mlp.width:
                raise FamilyError(
                    f"{group.path} is {group.says!r}, which does not say its width {mlp.width:,}", tensor=mlp.block
                )


def declaration(file: Source | None) -> Family | None:
    """The declaration in a JSON file; None for no file. Raises CkptgrowError, naming the file."""
    if file is None:
        return None
    try:
        return declared.from_text(Path(file).read_bytes(), str(file))
    except OSError as error:
        raise FormatError(f"it cannot be read ({error.strerror})", file=str(file)) from None
