"""fold: a trained, grown checkpoint back in a standard shape, where that is exact."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ckptgrow import folding
from ckptgrow.card import folded_card, licence
from ckptgrow.checkpoint import CARD, CONFIG, MANIFEST, Checkpoint, open_checkpoint, open_weights
from ckptgrow.config import set_value
from ckptgrow.equivalence import Answer, not_the_same, proved, untouched
from ckptgrow.errors import RequestError
from ckptgrow.execute import write_shards
from ckptgrow.families import EVERY, Architecture, Family, locate, recast_like
from ckptgrow.folding import FLOAT32, TRAINED, Hints, hints_of
from ckptgrow.hub import Origin, fetch
from ckptgrow.joining import DEAD, SPREAD
from ckptgrow.layout import INDEX, Layout, lay
from ckptgrow.manifest import CONFIG_KEY, Manifest
from ckptgrow.narrowing import Asked, Target, in_play, targets
from ckptgrow.operations.declaring import declaration
from ckptgrow.plan import Plan
from ckptgrow.progress import Meter, Progress, silent
from ckptgrow.redundancy import Redundancy, search
from ckptgrow.regrouped import regrouped
from ckptgrow.results import FoldedBlock, FoldedGroup, Folding, Left, Off
from ckptgrow.staging import Staging, check_apart, check_space, check_target
from ckptgrow.sums import Rounding, costs
from ckptgrow.unwrapped import open_unwrapped
from ckptgrow.version import __version__

Source = str | Path
Width = int | Mapping[str, int]  # of the one config key that says it, or of each by its name
Dtype = Literal["float32"]
NAMED = 4  # units named for each reason


def plan_fold(
    trained: Source,
    out: Source,
    *,
    width: Width | None = None,
    partial: bool = False,
    dtype: Dtype | None = None,
    atol: float = 0.0,
    lossy: bool = False,
    max_error: float | None = None,
    family: Source | None = None,
    progress: Progress | None = None,
    bars: bool = False,
) -> Folding:
    """What `fold` would do with the same options, for `--plan`: reads all weights and writes nothing.

    A lossy fold has no plan, since its error is measured on what was written. Raises RequestError for one.
    """
    if lossy:
        raise RequestError("the error of a lossy fold is measured on what was written: it has no --plan")
    wish = _Wish(width, partial, dtype, atol, lossy, max_error, declaration(family))
    return _prepare(fetch(trained, progress=bars), Path(out), wish, progress or silent).told


def fold(
    trained: Source,
    out: Source,
    *,
    width: Width | None = None,
    partial: bool = False,
    dtype: Dtype | None = None,
    atol: float = 0.0,
    lossy: bool = False,
    max_error: float | None = None,
    family: Source | None = None,
    force: bool = False,
    progress: Progress | None = None,
    bars: bool = False,
) -> Folding:
    """Fold the MLPs of `trained` into the new folder `out`: the same function, narrower (METHOD.md 5).

    To the base's widths, which config.json says, or to the smallest exact ones where it says none; `width` asks for
    another (where several config keys say widths: for one of each, by its name), `partial` takes the smallest that are
    exact, whatever they are. Where the weights do not allow that nothing is written and `exit_code` is 1. Sums are
    rounded once to their dtype, or with `dtype="float32"` kept in tensors of float32.

    Two ways give the exactness up, and measure the error of each MLP: `atol` lets rows count as equal that differ by no
    more, `lossy` makes of each unit and its copies the one unit that comes nearest, and writes nothing where a
    relative error is above `max_error`. Raises CkptgrowError for what cannot be read or asked, and then nothing is left
    on disk.
    """
    origin, report, target = fetch(trained, progress=bars), progress or silent, Path(out).resolve()
    check_apart(target, origin.folder)
    check_target(Path(out), force=force)
    wish = _Wish(width, partial, dtype, atol, lossy, max_error, declaration(family))
    job = _prepare(origin, Path(out), wish, report)
    if job.layout is None or job.told.plan is None:
        return replace(job.told, planned=False)
    check_space(target, job.told.bytes_to_write)
    with Staging(target, job.identity, force=force) as staging:
        total = sum(shard.nbytes for shard in job.layout.shards)
        write_shards(job.layout, {TRAINED: job.trained}, staging, Meter(report, "writing", total))
        off = _measured(job, staging, report) if job.inexact else ()
        told = replace(job.told, planned=False, errors=off)
        if max_error is not None and any(not one.error <= max_error for one in off):
            return replace(told, folds=False, plan=None)
        _write_rest(job, job.told.plan, staging, max((one.error for one in off), default=0.0))
        answers = _checked(job, open_checkpoint(staging.folder), report)
        staging.commit()
    return replace(told, answers=answers)


# ---------------------------------------------------------------- what is asked, and what can be


@dataclass(frozen=True, slots=True)
class _Wish:
    """The options that say what to fold to."""

    width: Width | None
    partial: bool
    dtype: str | None
    atol: float = 0.0
    lossy: bool = False
    max_error: float | None = None
    family: Family | None = None

    def check(self) -> None:
        if self.width is not None and self.partial:
            raise RequestError("--width and --partial exclude each other")
        if not 0 <= self.atol < math.inf:
            raise RequestError(f"--atol {self.atol}: give a difference of weights, 0 or above")
        if self.lossy != (self.max_error is not None):
            raise RequestError("--lossy and --max-error E go together: E is the largest relative error of an MLP")
        if self.lossy and (self.partial or self.atol or not 0 < (self.max_error or 0.0) < math.inf):
            raise RequestError("--lossy takes an error above 0, and neither --partial nor --atol")
        if self.dtype not in (None, "float32"):
            raise RequestError(f"--dtype {self.dtype}: sums are kept in float32, or in the dtype they have")

    @property
    def asked(self) -> Asked:
        return Asked(self.width, self.partial, self.lossy)


@dataclass(frozen=True, slots=True)
class _Job:
    """A fold that was looked into; without a layout there is nothing that can be done."""

    origin: Origin
    trained: Checkpoint
    architecture: Architecture
    hints: Hints
    told: Folding
    targets: tuple[Target, ...] = ()
    family: Family | None = None
    layout: Layout | None = None
    columns_only: bool = True  # nothing but columns of down was added up
    inexact: bool = False

    @property
    def widths(self) -> dict[str, int]:
        """The new width of each MLP, by block."""
        return {block: width for target in self.targets for block, width in (target.widths or {}).items()}

    @property
    def identity(self) -> str:
        told = [__version__, "fold", self.told.plan.to_json() if self.told.plan else None, self.trained.config_text]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _prepare(origin: Origin, out: Path, wish: _Wish, report: Progress) -> _Job:
    """Everything but the writing: what is redundant, what that allows, and the Plan of it."""
    wish.check()
    trained = open_unwrapped(origin.folder)
    whole = locate(trained.config, trained.infos, EVERY, wish.family)
    hints = hints_of(trained, whole)
    architecture = in_play(whole, hints, wish.asked)
    meter = Meter(report, "comparing units", architecture.nbytes(trained.infos))
    found = search(trained, architecture, hints.partners, wish.atol, meter)
    aims = targets(architecture, hints, wish.asked, found)
    every = [one for those in found.values() for one in those]
    told = Folding(
        trained=origin.id,
        out=str(out),
        groups=tuple(_group(aim) for aim in aims),
        folds=False,
        blocks=tuple(_block(one, aim) for aim in aims for mlp in aim.group.mlps for one in found[mlp.block]),
        rounding=Rounding(),
        widened=0,
        parameters_before=trained.parameters,
        parameters_after=trained.parameters,
        bytes_to_write=0,
        files_left_out=trained.companions()[1],
        planned=True,
        max_error=wish.max_error,
        apart=max(one.apart for one in every),
    )
    job = _Job(origin, trained, architecture, hints, told, aims, wish.family)
    narrower = any(width < architecture.widths[block] for block, width in job.widths.items())
    return _planned(job, every, wish, report) if narrower and all(aim.widths for aim in aims) else job


def _group(aim: Target) -> FoldedGroup:
    old = aim.spoken({mlp.block: mlp.width for mlp in aim.group.mlps})
    told = (aim.spoken(widths) for widths in (aim.base, aim.smallest, aim.asked, aim.widths))
    return FoldedGroup(aim.group.path, old, *told)


def _block(one: Redundancy, aim: Target) -> FoldedBlock:
    going, whole, mlp = one.full.go, one.full, one.mlp
    dead, spread = (int((whole.into == kind).sum()) for kind in (DEAD, SPREAD))
    added = going[whole.into[going] >= 0]
    equal = int((one.rows[added] == one.rows[whole.into[added]]).sum())
    base = aim.base[mlp.block] if aim.base else None
    left = (Left(len(units), why, tuple(units[:NAMED].tolist())) for why, units in one.tied_up())
    return FoldedBlock(
        name=mlp.block,
        layer=mlp.layer,
        expert=mlp.expert if one.expert is None else one.expert,
        width=mlp.width,
        smallest=one.needed,
        to=aim.widths[mlp.block] if aim.widths else None,
        equal=equal * mlp.grain,
        parallel=(len(added) - equal) * mlp.grain,
        combined=spread,
        dead=dead * mlp.grain,
        new=None if base is None else mlp.width - base,
        left=tuple(left),
    )


def _planned(job: _Job, found: list[Redundancy], wish: _Wish, report: Progress) -> _Job:
    """The job with its Plan, what that rounds, and where each byte will lie."""
    trained, architecture, widths = job.trained, job.architecture, job.widths
    exact = [one for one in found if one.takes(widths[one.mlp.block])]
    chosen = [(one, one.at(widths[one.mlp.block])) for one in exact]
    lossy = [one for one in found if not one.takes(widths[one.mlp.block])]
    made = folding.every_recipe(chosen) | _blended(job, lossy, report)
    sorted_out = {mlp.block: [made[mlp.block, expert] for expert in mlp.numbers] for mlp in architecture.mlps}
    plan = folding.fold(trained.infos, architecture, sorted_out, widths, job.hints)
    plan.check({TRAINED: trained.infos})
    rounding = costs(plan, {TRAINED: trained}, report)
    wide = [name for name, cost in rounding.items() if cost.rounded] if wish.dtype else []
    if wide:
        plan = folding.widened(plan, wide, trained, architecture)
        again = replace(plan, outputs=tuple(output for output in plan.outputs if output.name in wide))
        rounding |= costs(again, {TRAINED: trained}, report)
    _check_size(rounding, plan)
    wrapped = trained.infos.keys() != open_weights(trained.folder).infos.keys()
    layout = lay(plan, trained.headers, trained.infos, trained.index, None if wrapped else TRAINED)
    copied, _ = trained.companions()
    small = sum((trained.folder / file).stat().st_size for file in copied) + 2 * len(trained.config_text.encode())
    told = replace(
        job.told,
        folds=True,
        rounding=sum(rounding.values(), Rounding()),
        widened=len(wide),
        parameters_after=sum(output.info.elements for output in plan.outputs),
        bytes_to_write=layout.nbytes + small,
        plan=plan,
    )
    only = all(one.columns_only(merges) for one, merges in chosen)
    if told.rounding.rounded:  # a proof adds up what stays in twins, and each may have been rounded for itself
        only &= not any(one.twins(merges) for one, merges in chosen)
    inexact = len(exact) < len(found) or job.told.apart > 0
    return replace(job, told=told, layout=layout, columns_only=only, inexact=inexact)


def _blended(job: _Job, found: list[Redundancy], report: Progress) -> dict[tuple[str, int | None], folding.Recipes]:
    """The recipes of the MLPs and experts that do not fold exactly."""
    if not found:
        return {}
    from ckptgrow.lossy import blended

    total = sum(job.trained.infos[name].nbytes // one.mlp.experts for one in found for name in one.mlp.tensors)
    meter, made = Meter(report, "fitting", total), {}
    for one in found:
        mlp, expert = one.mlp, one.expert
        if one.classes is not None or one.grain > 1 or mlp.site.bent:
            why = "its weights are coded in blocks" if one.grain > 1 else "it takes statistics over its units"
            why = "it clamps what gate and up say" if mlp.site.bent else why
            raise RequestError(f"{why}, so nothing can be fitted", tensor=mlp.named(expert))
        partners = job.hints.partners(mlp)
        made[mlp.block, expert] = blended(job.trained, mlp, expert, job.widths[mlp.block], partners, meter)
    return made


def _check_size(rounding: dict[str, Rounding], plan: Plan) -> None:
    dtypes = {output.name: output.dtype for output in plan.outputs}
    for name, cost in rounding.items():
        if cost.too_large:
            raise RequestError(
                f"{cost.too_large:,} sums of its weights are too large for {dtypes[name]}",
                tensor=name,
                hint="Give --dtype float32." if dtypes[name] != FLOAT32 else None,
            )


# ---------------------------------------------------------------- writing


def _write_rest(job: _Job, plan: Plan, staging: Staging, error: float) -> None:
    """All files but the shards; config last."""
    trained, folder = job.trained, job.trained.folder
    for file in trained.companions()[0]:
        staging.copy(folder / file, file)
    if job.layout is not None and job.layout.index is not None:
        staging.put(INDEX, job.layout.index)
    config, manifest = folding.texts(job.trained.config_text, plan, _known(job), job.architecture)
    if manifest is not None:
        staging.put(MANIFEST, manifest)
    name = job.hints.manifest.base.id if job.hints.manifest else folder.resolve().name
    steps = [(mlp.width, job.widths[mlp.block]) for mlp in job.architecture.mlps]
    off = error if job.inexact else None
    staging.put(CARD, folded_card(name, steps, _sums(job.told), off, licence(folder / CARD)))
    if job.inexact:
        config = set_value(config, CONFIG_KEY, {"lossy": {"largest_error": float(f"{error:.3g}")}})
    staging.put(CONFIG, config)


def _known(job: _Job) -> Manifest | None:
    """The manifest of the growth that was folded away, where what is left has the base's widths."""
    exact = not job.inexact and all(target.widths == target.base for target in job.targets)
    return job.hints.manifest if exact else None


def _sums(told: Folding) -> str:
    cost = told.rounding
    if not cost.rounded:
        return "No weight had to be rounded."
    return (
        f"{cost.rounded:,} of the {cost.sums:,} weights that are sums had to be rounded, by a relative"
        f" {cost.largest:.2g} at most."
    )


# ---------------------------------------------------------------- checking what was written


def _checked(job: _Job, written: Checkpoint, report: Progress) -> tuple[Answer, ...]:
    """The trained checkpoint against what was written, from the bytes of both. Raises PlanError unless they agree."""
    answers = tuple(_answers(job, written, report))
    for answer in answers:
        for finding in answer.findings if answer.verdict == "no" else ():
            raise not_the_same(finding)
    return answers


def _measured(job: _Job, staging: Staging, report: Progress) -> tuple[Off, ...]:
    """The error of each MLP in the shards that lie there."""
    from ckptgrow.lossy import measured

    staging.put(CONFIG, folding.texts(job.trained.config_text, job.told.plan or Plan(()), None)[0])
    if job.layout is not None and job.layout.index is not None:
        staging.put(INDEX, job.layout.index)
    written = open_checkpoint(staging.folder)
    architecture = _again(written, job)
    nbytes = job.architecture.nbytes(job.trained.infos) + architecture.nbytes(written.infos)
    return measured(written, job.trained, architecture, job.architecture, Meter(report, "measuring", nbytes))


def _again(written: Checkpoint, job: _Job) -> Architecture:
    """The same MLPs in what was written, in the same words."""
    paths = {group.path for group in job.architecture.groups}
    found = locate(written.config, written.infos, EVERY, job.family)
    found = recast_like(found, written.config, written.infos, job.trained.config.get("model_type"))
    return replace(found, groups=tuple(group for group in found.groups if group.path in paths))


def _answers(job: _Job, written: Checkpoint, report: Progress) -> Iterator[Answer]:
    """The trained one is a growth of the folded one where only columns were added; else its gates lead to the same."""
    trained, architecture = job.trained, _again(written, job)
    inside = job.architecture.nbytes(trained.infos) + architecture.nbytes(written.infos)
    outside = trained.tensor_bytes + written.tensor_bytes - inside
    yield untouched(written, trained, architecture, Meter(report, "comparing", outside))
    if job.inexact:
        return
    cost, meter = job.told.rounding, Meter(report, "proving", inside)
    if job.columns_only:
        rounds = cost.rounded > 0 or job.told.widened > 0
        yield proved(written, trained, architecture, meter, rounded_once=rounds)
        return
    yield regrouped(written, trained, architecture, meter, rounded=cost.rounded > 0)
