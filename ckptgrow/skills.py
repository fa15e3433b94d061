"""A skill: what a growth's training learned, without the model it learned it in; and the model from base and skill.

    SKILL/
      skill.safetensors   of each tensor that trains the elements in its boxes, laid end to end along the boxes' axis
      ckptgrow.json       the growth's manifest: which base, which units, which boxes
      README.md           a model card

The header's metadata has, under `ckptgrow`, the manifest's digest and the dtypes in which tensors were trained that are
not the grown ones. All else of the trained checkpoint follows from the base, which is why nothing is extracted unless
everything outside the boxes is bit for bit what the growth made of the base.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckptgrow.checkpoint import MANIFEST, Checkpoint, Tensors, digest_of, open_file
from ckptgrow.config import set_value
from ckptgrow.drift import compare_names, examine
from ckptgrow.equivalence import Finding, Progress
from ckptgrow.errors import FormatError, PlanError, RequestError
from ckptgrow.execute import digest_of_output
from ckptgrow.folding import FLOAT32, widened
from ckptgrow.ingredients import recalled
from ckptgrow.inversion import Inverse, invert
from ckptgrow.layout import Layout, Shard
from ckptgrow.lineage import Past, check_growth, find_manifest, recall, stranger
from ckptgrow.manifest import CONFIG_KEY, grown_config, load_manifest
from ckptgrow.matching import Renamed
from ckptgrow.plan import Output, Part, Plan, Term, in_slices, unchanged
from ckptgrow.progress import uncounted
from ckptgrow.reference import Reference, Regrown, regrown
from ckptgrow.regions import Division
from ckptgrow.reversal import gone, named
from ckptgrow.tensors import TensorInfo, arrange
from ckptgrow.trained import Trained, open_trained

SKILL_FILE = "skill.safetensors"
METADATA_KEY = "ckptgrow"
TRAINED, SKILL = "trained", "skill"


@dataclass(frozen=True)
class Skill:
    """A skill folder, opened: the growth, its manifest's text, the learned elements, the dtypes that are not grown."""

    folder: Path
    past: Past
    text: bytes
    tensors: Tensors
    dtypes: Mapping[str, str]

    def digest(self, name: str) -> str:
        """The digest of what it has of a tensor."""
        return digest_of_output(unchanged(self.tensors.infos[name], SKILL), {SKILL: self.tensors})


# ---------------------------------------------------------------- taking it out


def from_itself(past: Past, text: bytes, trained: Renamed) -> tuple[Reference, tuple[Finding, ...]]:
    """What training started from, by the trained checkpoint's own frozen part, and the tensors of it that moved.

    The base is read back from the frozen part, held against the manifest's digests, and grown again. Raises
    RequestError where the frozen part does not determine the base.
    """
    inverse = invert(
        past.plan,
        past.base.infos,
        past.trained,
        exact_halves=past.manifest.inexact_halves == 0,
        source=TRAINED,
    )
    if inverse.lost:
        raise gone(past, inverse.lost)
    moved = tuple(_moved(past, inverse, trained))
    outputs = inverse.plan.named
    return regrown(past, Regrown({TRAINED: trained}, outputs), past.base, text), moved


def _moved(past: Past, inverse: Inverse, trained: Tensors) -> Iterator[Finding]:
    told = past.manifest.base.digests
    for output in inverse.plan.outputs:
        division = past.trained.get(output.name)
        if division is not None and division.whole:
            continue  # nothing of it is frozen
        if digest_of_output(output, {TRAINED: trained}) == told[output.name]:
            continue
        if output.name in inverse.doubtful:
            raise RequestError(
                f"whether its frozen part moved cannot be told: policy {past.manifest.policy} leaves too little of it",
                tensor=output.name,
                hint="Give --base BASE (or the grown folder) to compare with.",
            )
        yield Finding(output.name, "its frozen part is not what it was")


def moved(reference: Reference, trained: Trained, progress: Progress) -> tuple[Finding, ...]:
    """Every tensor of which something outside the boxes moved, and how far. Raises RequestError for a misfit."""
    job = compare_names(reference, trained)
    for finding in job.findings:
        raise RequestError(finding.problem, file=str(trained.folder), tensor=finding.tensor)
    seen, _ = examine(job, progress)
    return tuple(
        Finding(
            drift.tensor,
            f"{drift.moved_before_cast:,} of {drift.frozen:,} frozen elements moved by up to {drift.largest:.3g}",
        )
        for drift in seen.tensors
        if drift.moved_before_cast
    )


def layout_of(past: Past, text: bytes, trained: Renamed) -> Layout:
    """The skill's one file, in the trained dtypes. A Plan of the source TRAINED."""
    outputs = tuple(_boxed(name, trained.infos[name], past.trained[name]) for name in past.trained)
    dtypes = _foreign(past, trained)
    told = json.dumps({"manifest": digest_of(text), "dtypes": dtypes}, sort_keys=True)
    header = arrange((output.info for output in outputs), {"format": "pt", METADATA_KEY: told})
    by_name = {output.name: output for output in outputs}
    return Layout((Shard(SKILL_FILE, header, tuple(by_name[t.name] for t in header.tensors), False),), None)


def _foreign(past: Past, trained: Tensors) -> dict[str, str]:
    """The dtypes in which tensors were trained that are not the grown ones."""
    grown = past.plan.named
    return {name: info.dtype for name, info in trained.infos.items() if info.dtype != grown[name].dtype}


def _boxed(name: str, info: TensorInfo, division: Division, source: str = TRAINED) -> Output:
    """The elements in a tensor's boxes, laid end to end; of a stack of experts only those of which something trains."""
    shape, runs, taken = _narrowed(name, division), list[tuple[range | None, tuple[Part, ...]]](), 0
    for rows, spans in division.runs:
        if spans:
            here = range(taken, taken + len(rows))
            terms = ((Term(source, name, range(*span), shift=taken - rows.start), span) for span in spans)
            runs.append((here, tuple(Part(stop - start, (term,)) for term, (start, stop) in terms)))
            taken = here.stop
    return Output(name, info.dtype, shape, division.axis, in_slices(runs, taken))


def _narrowed(name: str, division: Division) -> tuple[int, ...]:
    """The shape of what trains. Raises RequestError where experts of one stack do not train equally much."""
    widths = {sum(stop - start for start, stop in spans) for _, spans in division.runs if spans}
    if len(widths) > 1:
        raise RequestError(
            "experts of its stack have different numbers of units that train, which are no one tensor",
            tensor=name,
            hint="Share the skills that were merged.",
        )
    shape = [widths.pop() if i == division.axis else size for i, size in enumerate(division.shape)]
    if division.axis:
        each = math.prod(division.shape[1 : division.axis])
        shape[0] = sum(len(rows) for rows, spans in division.runs if spans) // each
    return tuple(shape)


def check_extracted(layout: Layout, trained: Renamed, written: Skill) -> None:
    """Raise PlanError unless the skill that was written holds the trained bytes."""
    for output in layout.shards[0].outputs:
        if digest_of_output(output, {TRAINED: trained}) != written.digest(output.name):
            raise PlanError("what was written is not what was trained", tensor=output.name, hint="Nothing was kept.")


# ---------------------------------------------------------------- putting it back


def open_skill(folder: Path) -> Skill:
    """A skill folder. Raises FormatError where file and manifest are not whole or not each other's."""
    manifest = load_manifest(folder)
    past, text = recalled(manifest, str(folder / MANIFEST)), manifest.text().encode()
    tensors = open_file(folder, SKILL_FILE)
    try:
        told: dict[str, Any] = json.loads(tensors.headers[SKILL_FILE].metadata[METADATA_KEY])
        digest, dtypes = told["manifest"], {str(name): str(dtype) for name, dtype in told["dtypes"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FormatError("it does not say which growth it belongs to", file=str(folder / SKILL_FILE)) from None
    if digest != digest_of(text):
        raise FormatError(f"it belongs to another {MANIFEST} than the one beside it", file=str(folder / SKILL_FILE))
    grown = {output.name: output.info for output in past.plan.outputs}
    for name in past.trained.keys() ^ tensors.infos.keys():
        raise FormatError("skill and manifest do not both have it", file=str(folder / SKILL_FILE), tensor=name)
    for name, division in past.trained.items():
        wanted = dtypes.get(name, grown[name].dtype), _narrowed(name, division)
        if (tensors.infos[name].dtype, tensors.infos[name].shape) != wanted:
            raise FormatError(f"not {wanted[0]} {list(wanted[1])}", file=str(folder / SKILL_FILE), tensor=name)
    return Skill(folder, past, text, tensors, dtypes)


def skill_in(folder: Path, base: Checkpoint) -> Skill:
    """The skill in a folder: a skill's, or a grown checkpoint's, trained or not, that has its ckptgrow.json.

    Raises RequestError where it grew from another base, or where anything outside its boxes was trained.
    """
    if (folder / SKILL_FILE).is_file():
        skill = open_skill(folder)
        check_base(base, skill)
        check_growth(skill.past.manifest, str(folder))
        return skill
    found = open_trained(folder)
    path, _ = find_manifest(found, None)
    past = recall(load_manifest(path), str(path))
    text = past.manifest.text().encode()
    mine, _ = named(past, found)
    layout = layout_of(past, text, mine)
    boxes = Regrown({TRAINED: mine}, {output.name: output for output in layout.shards[0].outputs})
    skill = Skill(folder, past, text, boxes, _foreign(past, mine))
    check_base(base, skill)
    for finding in moved(regrown(past, base, base, text), found, uncounted):
        raise RequestError(f"outside the boxes, {finding.problem}", file=str(folder), tensor=finding.tensor)
    return skill


def check_base(base: Checkpoint, skill: Skill) -> None:
    """Raise RequestError, naming the tensor, unless the skill grew from that checkpoint, to the bit."""
    strange = stranger(base, skill.past.manifest.base)
    if strange:
        raise RequestError(
            ": ".join(strange),
            file=str(base.folder),
            hint=f"The skill {skill.folder} grew from another checkpoint: give that one.",
        )


def config_of(skill: Skill, base: Checkpoint, plan: Plan) -> str:
    """config.json of the trained checkpoint."""
    text = grown_config(base.config_text, plan, skill.past.manifest, skill.past.architecture)
    return set_value(text, f"{CONFIG_KEY}.manifest", digest_of(skill.text))


def applied(skill: Skill, base: Checkpoint, source: str = SKILL) -> Plan:
    """The Plan of the trained checkpoint: the growth of BASE, with what was learned in its boxes."""
    past, dtypes, plan = skill.past, skill.dtypes, skill.past.spliced(source)
    if set(dtypes.values()) == {FLOAT32}:
        return widened(plan, dtypes, base, past.architecture)
    return replace(plan, outputs=tuple(replace(o, dtype=dtypes.get(o.name, o.dtype)) for o in plan.outputs))


def check_applied(skill: Skill, base: Checkpoint, written: Trained, progress: Progress) -> None:
    """Raise PlanError unless what was written is the base's growth outside the boxes and the skill inside."""
    reference = regrown(skill.past, base, base, skill.text)
    wrong = [finding.tensor for finding in moved(reference, written, progress)]
    for name, division in skill.past.trained.items():
        inside = _boxed(name, written.infos[name], division)
        wrong += [name] if digest_of_output(inside, {TRAINED: written}) != skill.digest(name) else []
    if wrong:
        raise PlanError("what was written is not what it should be", tensor=wrong[0], hint="Nothing was kept.")
