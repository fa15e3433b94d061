"""What the library's verbs return: frozen values with `to_json()`. How they read as text is in report.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ckptgrow.equivalence import Answer, Finding
from ckptgrow.manifest import GrownBlock, Manifest
from ckptgrow.plan import Plan
from ckptgrow.sums import Rounding


@dataclass(frozen=True, slots=True)
class Block:
    """One MLP as found: its name, layer, width and hidden size in units, and the dtypes of its tensors."""

    name: str
    layer: int
    width: int
    hidden: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a checkpoint is and whether it can grow; `reason` says why not."""

    source: str
    revision: str | None
    model_type: str | None
    growable: bool
    reason: str | None
    gated: bool | None
    norm_after: bool | None
    blocks: tuple[Block, ...]
    parameters: int
    bytes: int
    shards: int
    dtypes: Mapping[str, int]  # elements by dtype
    ties: Mapping[str, str]
    grown_before: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Declaration:
    """A guess of what an unknown architecture is, in the words of `--family`; `problem`: why it does not hold yet."""

    source: str
    declaration: Mapping[str, Any]
    notes: tuple[str, ...]
    problem: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Proposal:
    """What `expand` is going to do; nothing is written yet. Sizes in bytes, counts in elements."""

    source: str
    revision: str | None
    out: str
    family: str
    recast: str | None  # the model_type that the result has instead
    policy: str
    policy_about: str
    shares: tuple[str, ...]  # one sentence for each kind of unit
    blocks: tuple[GrownBlock, ...]
    parameters_before: int
    parameters_after: int
    trainable: int
    trainable_share_of_base: float
    layers_filled: tuple[int, ...]  # these only become as wide as those that grow
    experts_grown: tuple[int, ...] | None  # where not all do: the others only become as wide
    parameters_filled: int
    bytes_filled: int
    bytes_to_write: int
    bytes_free: int
    shards_rewritten: int
    shards_copied: int
    files_copied: tuple[str, ...]
    files_left_out: tuple[str, ...]
    plan: Plan

    def to_json(self) -> dict[str, Any]:
        """Everything, the whole Plan included."""
        shown = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "plan"}
        return shown | {"blocks": [block.to_json() for block in self.blocks], "plan": self.plan.to_json()}


@dataclass(frozen=True, slots=True)
class Verification:
    """The answers, strongest first. `exit_code`: 0 the same function, 1 not, 2 cannot tell."""

    base: str
    grown: str
    answers: tuple[Answer, ...]

    @property
    def exit_code(self) -> int:
        verdicts = {answer.verdict for answer in self.answers}
        return 1 if "no" in verdicts else 2 if "cannot tell" in verdicts else 0

    @property
    def same(self) -> bool | None:
        return {0: True, 1: False, 2: None}[self.exit_code]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"same": self.same, "exit_code": self.exit_code}


@dataclass(frozen=True, slots=True)
class Expansion:
    """What `expand` did: the proposal it carried out, the manifest, and what verification said (None: not asked)."""

    folder: Path
    proposal: Proposal
    manifest: Manifest
    verification: Verification | None

    def to_json(self) -> dict[str, Any]:
        described = self.proposal.to_json()
        del described["plan"]
        return {
            "folder": str(self.folder),
            **described,
            "inexact_halves": self.manifest.inexact_halves,
            "manifest": self.manifest.digest,
            "verification": self.verification.to_json() if self.verification else None,
        }


@dataclass(frozen=True, slots=True)
class Mask:
    """A freeze mask in some format: its text (None: it is a checkpoint), where it was written, and what trains."""

    grown: str
    format: str
    text: str | None
    out: Path | None
    tensors: int
    trainable: int
    frozen: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out) if self.out is not None else None}


@dataclass(frozen=True, slots=True)
class Left:
    """Units that do not fold, and why; the first few of them by number."""

    units: int
    why: str
    first: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FoldedBlock:
    """One MLP or expert: its width, the smallest exact one, the new one, how many units can be folded away and by what,
    what does not fold.

    `new` counts the units behind the base's width, where that is known; `to` is None where it does not fold.
    """

    name: str
    layer: int
    expert: int | None
    width: int
    smallest: int
    to: int | None
    equal: int
    parallel: int
    combined: int  # spread over several that stay
    dead: int
    new: int | None
    left: tuple[Left, ...]


Widths = int | tuple[int, ...]  # of one config key; where that is a list, of each MLP


@dataclass(frozen=True, slots=True)
class FoldedGroup:
    """The MLPs of one config key: their width, the base's where it is known, the smallest exact one, the one asked for
    (None: the smallest), the new one (None: that is not exact)."""

    path: str
    old_width: Widths | None
    base_width: Widths | None
    smallest: Widths | None
    asked: Widths | None
    width: Widths | None


@dataclass(frozen=True, slots=True)
class Off:
    """How far a folded MLP is from the trained one: |difference| / |output| over a batch of random inputs."""

    name: str
    layer: int
    error: float


@dataclass(frozen=True, slots=True)
class Folding:
    """What `fold` did, or with `planned` would do. `exit_code`: 0 done, 1 it does not fold to what was asked.

    `folds`: whether it was, or could be, written; `widened` counts tensors that are float32 now so that no sum in them
    is rounded.
    """

    trained: str
    out: str
    groups: tuple[FoldedGroup, ...]
    folds: bool
    blocks: tuple[FoldedBlock, ...]
    rounding: Rounding
    widened: int
    parameters_before: int
    parameters_after: int
    bytes_to_write: int
    files_left_out: tuple[str, ...]
    planned: bool
    plan: Plan | None = None
    answers: tuple[Answer, ...] = ()
    max_error: float | None = None
    apart: float = 0.0  # how far rows that counted as equal are from each other
    errors: tuple[Off, ...] = ()  # of a fold that is not exact

    @property
    def width(self) -> Widths | None:
        """The new width that the first key says; None where nothing was written."""
        return self.groups[0].width if self.folds else None

    @property
    def exit_code(self) -> int:
        return 0 if self.folds else 1

    def to_json(self) -> dict[str, Any]:
        """Everything; the whole Plan where it was only planned."""
        described = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("plan", "answers")
        }
        described["blocks"] = [asdict(block) for block in self.blocks]
        described["groups"] = [asdict(group) for group in self.groups]
        described["errors"] = [asdict(off) for off in self.errors]
        described |= {"rounding": asdict(self.rounding), "answers": [asdict(answer) for answer in self.answers]}
        if self.planned and self.plan is not None:
            described["plan"] = self.plan.to_json()
        return described | {"exit_code": self.exit_code}


@dataclass(frozen=True, slots=True)
class Extraction:
    """What `extract` wrote: tensors and elements of the skill, bytes of its file. Where something moved, nothing."""

    trained: str
    skill: str
    base: str
    tensors: int
    elements: int
    bytes: int
    moved: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        return 1 if self.moved else 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"extracted": not self.moved, "exit_code": self.exit_code}


@dataclass(frozen=True, slots=True)
class Application:
    """What `apply` wrote: how many tensors, and in how many of them the skill's elements lie."""

    base: str
    skill: str
    out: str
    tensors: int
    learned: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Merging:
    """What `merge` wrote: each skill with its weight, the MLPs, what was rounded, and what the check said."""

    base: str
    skills: tuple[tuple[str, float], ...]
    out: str
    blocks: tuple[GrownBlock, ...]
    parameters_before: int
    parameters_after: int
    rounding: Rounding
    answers: tuple[Answer, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
