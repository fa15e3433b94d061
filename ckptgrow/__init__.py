"""Grow the MLPs of a Hugging Face checkpoint without changing the function it computes, and prove it.

The three verbs of the command line, with the same words:

    inspect(src)            what it is and whether it can grow
    expand(src, out, ...)   grow it; `plan_expand` says what that would do
    verify(base, grown)     are they the same function?
"""

from ckptgrow.errors import (
    CkptgrowError,
    FamilyError,
    FormatError,
    HubError,
    OutputError,
    PlanError,
    RequestError,
)
from ckptgrow.operations import expand, inspect, plan_expand, verify
from ckptgrow.results import Expansion, Inspection, Proposal, Verification
from ckptgrow.version import __version__

__all__ = [
    "CkptgrowError",
    "Expansion",
    "FamilyError",
    "FormatError",
    "HubError",
    "Inspection",
    "OutputError",
    "PlanError",
    "Proposal",
    "RequestError",
    "Verification",
    "__version__",
    "expand",
    "inspect",
    "plan_expand",
    "verify",
]
