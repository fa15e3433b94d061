"""Grow the MLPs of a Hugging Face checkpoint without changing the function it computes, and prove it.

The verbs of the command line, with the same words:

    inspect(src)            what it is and whether it can grow; `propose` guesses what an unknown one is
    expand(src, out, ...)   grow it; `plan_expand` says what that would do
    verify(base, grown)     are they the same function?
    audit(grown, trained)   did training leave the frozen part alone?
    mask(grown, format)     what trains, in a trainer's own words
    fold(trained, out, ...) back to a standard shape, where exact; `plan_fold` says whether it is
    rank(base, tuned)       which layers did an ordinary fine-tuning change most?
    revert(grown, out)      the base back, byte for byte
    extract(trained, skill) what training learned, and nothing else
    apply(base, skill, out) the trained checkpoint from base and skill
    merge(base, skills, out) several skills in one model

Names are imported when they are first used, so that `ckptgrow --help` starts at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ckptgrow.version import __version__

if TYPE_CHECKING:
    from ckptgrow.drift import Audit
    from ckptgrow.errors import (
        CkptgrowError,
        FamilyError,
        FormatError,
        HubError,
        OutputError,
        PlanError,
        RequestError,
    )
    from ckptgrow.operations import (
        apply,
        audit,
        expand,
        extract,
        fold,
        inspect,
        mask,
        merge,
        plan_expand,
        plan_fold,
        propose,
        rank,
        revert,
        verify,
    )
    from ckptgrow.ranking import Ranking
    from ckptgrow.results import (
        Application,
        Declaration,
        Expansion,
        Extraction,
        Folding,
        Inspection,
        Mask,
        Merging,
        Proposal,
        Verification,
    )
    from ckptgrow.reversal import Reversion

__all__ = [
    "Application",
    "Audit",
    "CkptgrowError",
    "Declaration",
    "Expansion",
    "Extraction",
    "FamilyError",
    "Folding",
    "FormatError",
    "HubError",
    "Inspection",
    "Mask",
    "Merging",
    "OutputError",
    "PlanError",
    "Proposal",
    "Ranking",
    "RequestError",
    "Reversion",
    "Verification",
    "__version__",
    "apply",
    "audit",
    "expand",
    "extract",
    "fold",
    "inspect",
    "mask",
    "merge",
    "plan_expand",
    "plan_fold",
    "propose",
    "rank",
    "revert",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in ("errors", "operations", "results", "drift", "ranking", "reversal"):
            room = import_module(f"ckptgrow.{module}")
            if hasattr(room, name):
                return getattr(room, name)
    raise AttributeError(f"module 'ckptgrow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
