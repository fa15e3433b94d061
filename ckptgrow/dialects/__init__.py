"""The freeze mask in the words of trainers: one small module a language, each a function of a Subject to its text.

Every text says in a comment what its language cannot express. Nothing is read and nothing is written here; the mask
as a checkpoint is stencil.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ckptgrow.dialects.axolotl import as_axolotl
from ckptgrow.dialects.llamafactory import as_llamafactory
from ckptgrow.dialects.peft import as_peft
from ckptgrow.dialects.plain import as_json, as_names
from ckptgrow.dialects.subject import Subject

DIALECTS: Mapping[str, Callable[[Subject], str]] = {
    "json": as_json,
    "names": as_names,
    "axolotl": as_axolotl,
    "llamafactory": as_llamafactory,
    "peft": as_peft,
}

__all__ = ["DIALECTS", "Subject"]
