"""Families as data: which tensors carry an MLP's width, family by family, and that data held against a checkpoint.

form.py        what a declaration is
templates.py   the shapes that most families share
decoders.py, mixtures.py, encoders.py, multimodal.py, table.py     the declarations
found.py       what is found: MLPs, in groups that one config key describes
storage.py     weights that are no plain floats
agree.py       what the MLPs of one checkpoint must have in common
locate.py      a declaration held against a checkpoint
recast.py      a checkpoint in the words of a family whose config says a width for each layer
"""

from ckptgrow.families.form import MAIN, Family, Site, Slot, Template, adapted, flat, linear, stack
from ckptgrow.families.found import Architecture, Group, Mlp, value_at
from ckptgrow.families.locate import (
    EVERY,
    GROWABLE_DTYPES,
    HEAD,
    ends_in,
    family_of,
    in_memory_name,
    locate,
    scoped,
    ties,
)
from ckptgrow.families.recast import recast, recast_like
from ckptgrow.families.storage import SCALES
from ckptgrow.families.table import FAMILIES, REFUSED

__all__ = [
    "EVERY",
    "FAMILIES",
    "GROWABLE_DTYPES",
    "HEAD",
    "MAIN",
    "REFUSED",
    "SCALES",
    "Architecture",
    "Family",
    "Group",
    "Mlp",
    "Site",
    "Slot",
    "Template",
    "adapted",
    "ends_in",
    "family_of",
    "flat",
    "in_memory_name",
    "linear",
    "locate",
    "recast",
    "recast_like",
    "scoped",
    "stack",
    "ties",
    "value_at",
]
