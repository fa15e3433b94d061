"""merge: several skills of one base in one model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from ckptgrow.card import licence, merged_card
from ckptgrow.checkpoint import CARD, CONFIG, MANIFEST, Checkpoint, Tensors, open_checkpoint
from ckptgrow.config import edited, set_value
from ckptgrow.equivalence import Answer, untouched
from ckptgrow.errors import PlanError, RequestError
from ckptgrow.execute import write_shards
from ckptgrow.families import Architecture
from ckptgrow.folding import widened
from ckptgrow.hub import fetch
from ckptgrow.ingredients import ingredient, moved_rows, source_of, union
from ckptgrow.layout import INDEX, Layout, lay
from ckptgrow.manifest import CONFIG_KEY, Manifest
from ckptgrow.merging import merge as merge_plan
from ckptgrow.mixture import Mixed, merge_manifest
from ckptgrow.plan import Part, Plan
from ckptgrow.progress import Meter, Progress, silent, uncounted
from ckptgrow.reference import Regrown
from ckptgrow.results import Merging
from ckptgrow.skills import SKILL, Skill, applied, skill_in
from ckptgrow.staging import Staging, check_apart, check_space, check_target
from ckptgrow.sums import Rounding, costs, is_sum, roundings
from ckptgrow.surgery import BASE
from ckptgrow.weighed import Weighed, weighed

Source = str | Path
Dtype = Literal["float32"]


@dataclass(frozen=True)
class _Job:
    """A merge ready to be carried out."""

    base: Checkpoint
    architecture: Architecture
    skills: tuple[Skill, ...]
    weights: tuple[Fraction, ...]
    plan: Plan
    layout: Layout
    rounding: Rounding
    inexact: int

    @property
    def sources(self) -> Mapping[str, Tensors]:
        return {BASE: self.base} | {source_of(i): skill.tensors for i, skill in enumerate(self.skills)}


def merge(
    base: Source,
    skills: Sequence[Source],
    out: Source,
    *,
    weights: Sequence[float | str] | None = None,
    dtype: Dtype | None = None,
    progress: Progress | None = None,
    bars: bool = False,
) -> Merging:
    """Write base + Σ λ·(skill - base), MLP by MLP as functions, into the new folder `out` (METHOD.md 6).

    `skills` are skills, or grown checkpoints with their ckptgrow.json, that grew from `base`; `weights` their λ, 1
    where not given. Columns are added in float64 and rounded once to their dtype, or with `dtype="float32"` kept in
    tensors of float32. Raises CkptgrowError for skills of another base, and for what cannot be merged; then nothing is
    left on disk.
    """
    mine, its = fetch(base, progress=bars).folder, [fetch(skill, progress=bars).folder for skill in skills]
    target, report = Path(out).resolve(), progress or silent
    check_target(target, force=False)
    for folder in (mine, *its):
        check_apart(target, folder)
    job = _prepare(mine, its, _weights(weights, len(its)), dtype, report)
    check_space(target, job.layout.nbytes)
    with Staging(target, "merge") as staging:
        write_shards(job.layout, job.sources, staging, Meter(report, "writing", job.layout.nbytes))
        manifest = _write_rest(job, staging)
        answers = tuple(_checked(job, open_checkpoint(staging.folder), report))
        staging.commit()
    blocks = manifest.blocks if manifest else ()
    counts = sum(output.info.elements for output in job.plan.outputs)
    used = tuple((str(skill), float(weight)) for skill, weight in zip(skills, job.weights, strict=True))
    return Merging(str(base), used, str(out), blocks, job.base.parameters, counts, job.rounding, answers)


def _weights(asked: Sequence[float | str] | None, count: int) -> tuple[Fraction, ...]:
    """One exact weight for each skill."""
    if not count:
        raise RequestError("there is no skill to merge")
    if asked is None:
        return (Fraction(1),) * count
    if len(asked) != count:
        raise RequestError(f"{len(asked)} weights for {count} skills", hint="Give one weight for each, in their order.")
    try:
        weights = tuple(Fraction(str(weight).strip()) for weight in asked)
    except (ValueError, ZeroDivisionError):
        raise RequestError(f"--weights {','.join(map(str, asked))}: give numbers, like 1,0.5") from None
    if not all(math.isfinite(float(weight)) for weight in weights):
        raise RequestError("a weight is too large")
    return weights


def _prepare(
    base: Path, folders: Sequence[Path], weights: tuple[Fraction, ...], dtype: Dtype | None, report: Progress
) -> _Job:
    """Everything that can be known, and refused, before the first byte is written."""
    opened = open_checkpoint(base)
    skills = tuple(skill_in(folder, opened) for folder in folders)
    _check_different(skills)
    architecture = union([skill.past for skill in skills], [str(skill.folder) for skill in skills])
    wide = {name for skill, weight in zip(skills, weights, strict=True) if weight for name in _wider(skill)}
    _check_wide(wide, dtype, opened, architecture, skills)
    mixed = (ingredient(s.past, w, source_of(i)) for i, (s, w) in enumerate(zip(skills, weights, strict=True)))
    plan = merge_plan(opened.infos, architecture, list(mixed))
    sources: dict[str, Tensors] = {BASE: opened} | {source_of(i): skill.tensors for i, skill in enumerate(skills)}
    plan.check({name: source.infos for name, source in sources.items()})
    found = costs(plan, sources, report)
    if dtype is not None:
        plan = widened(plan, {name for name, cost in found.items() if cost.rounded} | wide, opened, architecture)
        found = costs(plan, sources, report)
    for name, cost in found.items():
        if cost.too_large:
            raise RequestError(f"{cost.too_large:,} of its weights become too large for their dtype", tensor=name)
    layout = lay(plan, opened.headers, opened.infos, opened.index)
    total = sum(found.values(), Rounding())
    return _Job(opened, architecture, skills, weights, plan, layout, total, _inexact(plan, sources, skills, total))


def _inexact(plan: Plan, sources: Mapping[str, Tensors], skills: Sequence[Skill], total: Rounding) -> int:
    """How many weights of the base a merge does not have in it exactly, as far as it has them."""
    halves = max(skill.past.manifest.inexact_halves for skill in skills)
    if not total.rounded:
        return halves

    def of_base(part: Part) -> bool:
        return is_sum(part) and all(term.source == BASE for term in part.terms)

    return halves + sum(roundings(output, sources, uncounted, of_base).rounded for output in plan.outputs)


def _wider(skill: Skill) -> set[str]:
    """The tensors of which it has elements in another dtype than the base's."""
    return {name for name in skill.past.trained if name in skill.dtypes}


def _check_wide(
    wide: set[str], dtype: Dtype | None, base: Checkpoint, architecture: Architecture, skills: Sequence[Skill]
) -> None:
    """Raise RequestError where a skill has weights in a dtype that the merged tensor cannot have."""
    coded = {name for mlp in architecture.mlps for name, slot in mlp.tensors.items() if slot.coded}
    if not wide or (dtype is not None and not wide & coded):
        return
    name = min(wide & coded or wide)
    its = next(skill.dtypes[name] for skill in skills if name in skill.dtypes)
    if name in coded:
        raise RequestError(f"it is {its} in a skill, and what the scales of the base stand for otherwise", tensor=name)
    raise RequestError(
        f"it is {its} in a skill and {base.infos[name].dtype} in the base, so the skill's own rows would be rounded",
        tensor=name,
        hint="Give --dtype float32, or a skill extracted from a checkpoint in the base's dtype.",
    )


def _check_different(skills: Sequence[Skill]) -> None:
    """Raise RequestError where one skill is given twice: its units would only be doubled."""
    seen: dict[tuple[bytes, tuple[str, ...]], Path] = {}
    for skill in skills:
        print_of = skill.text, tuple(skill.digest(name) for name in sorted(skill.tensors.infos))
        if print_of in seen:
            raise RequestError(
                f"it is the same skill as {seen[print_of]}",
                file=str(skill.folder),
                hint="Give it once, with the sum of the weights.",
            )
        seen[print_of] = skill.folder


# ---------------------------------------------------------------- writing


def _write_rest(job: _Job, staging: Staging) -> Manifest | None:
    """All files but the shards; config last. Where no unit is a skill's, the result is the base, and says so."""
    base = job.base
    for file in base.companions()[0]:
        staging.copy(base.folder / file, file)
    if job.layout.index is not None:
        staging.put(INDEX, job.layout.index)
    mixed = Mixed(
        job.plan, base, job.architecture, [skill.past.manifest for skill in job.skills], job.weights, job.inexact
    )
    manifest, config = merge_manifest(mixed), edited(base.config_text, job.plan.config)
    if manifest is not None:
        staging.put(MANIFEST, manifest.text())
        staging.put(CARD, merged_card(manifest, licence(base.folder / CARD)))
        config = set_value(config, CONFIG_KEY, manifest.config_entry(job.architecture))
    staging.put(CONFIG, config)
    return manifest


def _checked(job: _Job, written: Checkpoint, report: Progress) -> Iterator[Answer]:
    """What was written, read again. Raises PlanError unless it is the base plus the skills."""
    from ckptgrow.merged import merged

    outside = job.base.tensor_bytes - job.architecture.nbytes(job.base.infos)
    size = job.architecture.nbytes(written.infos)
    grown = [
        Weighed(
            weight,
            Regrown({BASE: job.base, SKILL: skill.tensors}, applied(skill, job.base).named),
            frozenset(name for block in skill.past.manifest.blocks for name in block.grew),
            moved_rows(skill.past),
        )
        for skill, weight in zip(job.skills, job.weights, strict=True)
    ]
    rounded, functions = bool(job.rounding.rounded), [(skill.weight, skill.tensors) for skill in grown]
    for answer in (
        untouched(job.base, written, job.architecture, Meter(report, "comparing", 2 * outside)),
        weighed(job.base, grown, written, job.architecture, Meter(report, "proving", size)),
        merged(job.base, functions, written, job.architecture, rounded, Meter(report, "probing", size)),
    ):
        if answer.verdict == "no":
            first = answer.findings[0]
            raise PlanError(f"what was written is not base and skills ({first.problem})", tensor=first.tensor)
        yield answer
