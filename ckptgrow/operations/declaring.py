"""Declarations of families from outside the table: read from a file, or proposed for a checkpoint."""

from __future__ import annotations

from pathlib import Path

from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.errors import CkptgrowError, FormatError
from ckptgrow.families import FAMILIES, Family, declared, locate
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
        locate(base.config, base.infos, family=family)
    except CkptgrowError as error:
        problem = str(error)
    return Declaration(seen.origin.id, declared.to_json(family), notes, problem)


def declaration(file: Source | None) -> Family | None:
    """The declaration in a JSON file; None for no file. Raises CkptgrowError, naming the file."""
    if file is None:
        return None
    try:
        return declared.from_text(Path(file).read_bytes(), str(file))
    except OSError as error:
        raise FormatError(f"it cannot be read ({error.strerror})", file=str(file)) from None
