"""fold: a trained, grown checkpoint back in a standard shape, where that is exact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ckptgrow import folding
from ckptgrow.card import folded_card, licence
from ckptgrow.checkpoint import CARD, CONFIG, MANIFEST, Checkpoint, open_checkpoint
from ckptgrow.config import set_value, without
from ckptgrow.equivalence import Answer, proved, untouched
from ckptgrow.errors import PlanError, RequestError
from ckptgrow.execute import write_shards
from ckptgrow.families import Architecture, locate, scoped
from ckptgrow.folding import TRAINED, Hints, hints_of, widened
from ckptgrow.hub import Origin, fetch
from ckptgrow.layout import INDEX, Layout, lay
from ckptgrow.manifest import CONFIG_KEY, previous
from ckptgrow.plan import Edit, Plan
from ckptgrow.progress import Meter, Progress, silent
from ckptgrow.redundancy import DEAD, Redundancy, find
from ckptgrow.regrouped import regrouped
from ckptgrow.results import FoldedBlock, Folding, Left
from ckptgrow.staging import Staging, check_apart, check_space, check_target
from ckptgrow.sums import Rounding, is_sum, roundings
from ckptgrow.version import __version__

Source = str | Path
Dtype = Literal["float32"]
FLOAT32 = "F32"
NAMED = 4  # units named for each reason


def plan_fold(
    trained: Source,
    out: Source,
    *,
    width: int | None = None,
    partial: bool = False,
    dtype: Dtype | None = None,
    progress: Progress | None = None,
    bars: bool = False,
) -> Folding:
    """What `fold` would do with the same options, for `--plan`: reads all weights and writes nothing."""
    return _prepare(fetch(trained, progress=bars), Path(out), _Wish(width, partial, dtype), progress or silent).told


def fold(
    trained: Source,
    out: Source,
    *,
    width: int | None = None,
    partial: bool = False,
    dtype: Dtype | None = None,
    force: bool = False,
    progress: Progress | None = None,
    bars: bool = False,
) -> Folding:
    """Fold the MLPs of `trained` into the new folder `out`: the same function, narrower (METHOD.md 5).

    To the base's width, which config.json says, or to the smallest exact one where it says none; `width` asks for
    another, `partial` takes the smallest that is exact, whatever it is. Where the weights do not allow that nothing is
    written and `exit_code` is 1. Sums are rounded once to their dtype, or with `dtype="float32"` kept in tensors of
    float32. Raises CkptgrowError for what cannot be read or asked, and then nothing is left on disk.
    """
    origin, report, target = fetch(trained, progress=bars), progress or silent, Path(out).resolve()
    check_apart(target, origin.folder)
    check_target(Path(out), force=force)
    job = _prepare(origin, Path(out), _Wish(width, partial, dtype), report)
    if job.layout is None or job.told.plan is None:
        return replace(job.told, planned=False)
    check_space(target, job.told.bytes_to_write)
    with Staging(target, job.identity, force=force) as staging:
        total = sum(shard.nbytes for shard in job.layout.shards)
        write_shards(job.layout, {TRAINED: job.trained}, staging, Meter(report, "writing", total))
        _write_rest(job, job.told.plan, staging)
        answers = _checked(job, open_checkpoint(staging.folder), report)
        staging.commit()
    return replace(job.told, planned=False, answers=answers)


# ---------------------------------------------------------------- what is asked, and what can be


@dataclass(frozen=True, slots=True)
class _Wish:
    """The options that say what to fold to."""

    width: int | None
    partial: bool
    dtype: str | None

    def check(self, old: int) -> None:
        if self.width is not None and self.partial:
            raise RequestError("--width and --partial exclude each other")
        if self.width is not None and not (type(self.width) is int and 0 < self.width < old):
            raise RequestError(f"--width {self.width} is not below the present width {old}, or not above 0")
        if self.dtype not in (None, "float32"):
            raise RequestError(f"--dtype {self.dtype}: sums are kept in float32, or in the dtype they have")

    def target(self, old: int, smallest: int, base_width: int | None) -> tuple[int | None, int | None]:
        """(the width that is asked for, where one is; the width to fold to, None where that is not exact)."""
        asked = self.width if self.width is not None else None if self.partial else base_width
        wanted = smallest if asked is None else asked
        return asked, wanted if smallest <= wanted < old else None


@dataclass(frozen=True, slots=True)
class _Job:
    """A fold that was looked into; without a layout there is nothing that can be done."""

    origin: Origin
    trained: Checkpoint
    architecture: Architecture
    hints: Hints
    told: Folding
    layout: Layout | None = None
    columns_only: bool = True  # nothing but columns of down was added up

    @property
    def identity(self) -> str:
        told = [__version__, "fold", self.told.plan.to_json() if self.told.plan else None, self.trained.config_text]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _prepare(origin: Origin, out: Path, wish: _Wish, report: Progress) -> _Job:
    """Everything but the writing: what is redundant, what that allows, and the Plan of it."""
    trained = open_checkpoint(origin.folder)
    architecture = locate(trained.config, trained.infos)
    wish.check(architecture.width)
    hints = hints_of(trained, architecture)
    meter = Meter(report, "comparing units", _mlp_bytes(trained, architecture))
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = list(pool.map(lambda mlp: find(trained, mlp, meter), architecture.mlps))
    smallest = max(one.needed for one in found)
    asked, width = wish.target(architecture.width, smallest, hints.base_width)
    told = Folding(
        trained=origin.id,
        out=str(out),
        base_width=hints.base_width,
        old_width=architecture.width,
        smallest=smallest,
        asked=asked,
        width=width,
        blocks=tuple(_block(one, hints) for one in found),
        rounding=Rounding(),
        widened=0,
        parameters_before=trained.parameters,
        parameters_after=trained.parameters,
        bytes_to_write=0,
        files_left_out=trained.companions()[1],
        planned=True,
    )
    job = _Job(origin, trained, architecture, hints, told)
    return job if width is None else _planned(job, found, width, wish, report)


def _block(one: Redundancy, hints: Hints) -> FoldedBlock:
    going, whole = one.full.go, one.full
    dead = int((whole.into == DEAD).sum())
    added = going[whole.into[going] != DEAD]
    equal = int((one.rows[added] == one.rows[whole.into[added]]).sum())
    left = (Left(len(units), why, tuple(units[:NAMED].tolist())) for why, units in one.tied_up(hints.partners(one.mlp)))
    new = None if hints.base_width is None else one.mlp.width - hints.base_width
    return FoldedBlock(
        name=one.mlp.block,
        layer=one.mlp.layer,
        width=one.mlp.width,
        smallest=one.needed,
        equal=equal,
        parallel=len(added) - equal,
        dead=dead,
        new=new,
        left=tuple(left),
    )


def _planned(job: _Job, found: list[Redundancy], width: int, wish: _Wish, report: Progress) -> _Job:
    """The job with its Plan, what that rounds, and where each byte will lie."""
    trained, architecture = job.trained, job.architecture
    chosen = {one.mlp.block: one.at(width, job.hints.partners(one.mlp)) for one in found}
    plan = folding.fold(trained.infos, architecture, chosen, width)
    plan.check({TRAINED: trained.infos})
    rounding = _rounding(plan, trained, report)
    wide = [name for name, cost in rounding.items() if cost.rounded] if wish.dtype else []
    if wide:
        plan = _with_dtype(widened(plan, wide, FLOAT32), trained, architecture)
        rounding |= _rounding(replace(plan, outputs=tuple(o for o in plan.outputs if o.name in wide)), trained, report)
    _check_size(rounding, plan)
    layout = lay(plan, trained.headers, trained.infos, trained.index, TRAINED)
    copied, _ = trained.companions()
    small = sum((trained.folder / file).stat().st_size for file in copied) + 2 * len(trained.config_text.encode())
    told = replace(
        job.told,
        rounding=sum(rounding.values(), Rounding()),
        widened=len(wide),
        parameters_after=sum(output.info.elements for output in plan.outputs),
        bytes_to_write=layout.nbytes + small,
        plan=plan,
    )
    only = all(one.columns_only(chosen[one.mlp.block]) for one in found)
    return replace(job, told=told, layout=layout, columns_only=only)


def _rounding(plan: Plan, trained: Checkpoint, report: Progress) -> dict[str, Rounding]:
    """What is rounded in each output that has sums."""
    summed = [output for output in plan.outputs if any(is_sum(part) for part in output.parts)]
    meter = Meter(report, "adding up", sum(output.info.nbytes for output in summed))
    with ThreadPoolExecutor(max_workers=2) as pool:
        costs = pool.map(lambda output: roundings(output, {TRAINED: trained}, meter), summed)
        return {output.name: cost for output, cost in zip(summed, costs, strict=True)}


def _check_size(rounding: dict[str, Rounding], plan: Plan) -> None:
    dtypes = {output.name: output.dtype for output in plan.outputs}
    for name, cost in rounding.items():
        if cost.too_large:
            raise RequestError(
                f"{cost.too_large:,} sums of its weights are too large for {dtypes[name]}",
                tensor=name,
                hint="Give --dtype float32." if dtypes[name] != FLOAT32 else None,
            )


def _with_dtype(plan: Plan, trained: Checkpoint, architecture: Architecture) -> Plan:
    """A loader that takes its dtype from the config must not round the sums after all."""
    scope, nested = architecture.family.scope, scoped(trained.config, architecture.family)
    found = [(key, trained.config) for key in ("dtype", "torch_dtype")]
    found += [(f"{scope}.{key}", nested) for key in ("dtype", "torch_dtype") if scope]
    edits = tuple(
        Edit(path, "float32") for path, config in found if isinstance(config.get(path.rpartition(".")[2]), str)
    )
    return replace(plan, config=(*plan.config, *edits))


def _mlp_bytes(checkpoint: Checkpoint, architecture: Architecture) -> int:
    return sum(checkpoint.infos[name].nbytes for mlp in architecture.mlps for name in mlp.tensors)


# ---------------------------------------------------------------- writing


def _write_rest(job: _Job, plan: Plan, staging: Staging) -> None:
    """All files but the shards; config last."""
    trained, folder = job.trained, job.trained.folder
    for file in trained.companions()[0]:
        staging.copy(folder / file, file)
    if job.layout is not None and job.layout.index is not None:
        staging.put(INDEX, job.layout.index)
    config, manifest = _config(job, plan)
    if manifest is not None:
        staging.put(MANIFEST, manifest)
    widths = (job.told.old_width, job.told.width or 0)
    name = job.hints.manifest.base.id if job.hints.manifest else folder.resolve().name
    layers = len(job.architecture.mlps)
    staging.put(CARD, folded_card(name, layers, widths, _sums(job.told), licence(folder / CARD)))
    staging.put(CONFIG, config)


def _config(job: _Job, plan: Plan) -> tuple[str, str | None]:
    """(config.json, ckptgrow.json): without the growth that was folded away, with the one before it if there was one.

    Where the base's own text says the same, it is that text.
    """
    text, manifest = without(job.trained.config_text, CONFIG_KEY), job.hints.manifest
    for edit in plan.config:
        text = set_value(text, edit.path, edit.value)
    if manifest is None or job.told.width != job.hints.base_width:
        return text, None
    try:
        was = json.loads(manifest.base.config)
        entry = was.pop(CONFIG_KEY, None)
        bare = set_value(without(manifest.base.config, CONFIG_KEY), plan.config[0].path, job.told.width)
    except (ValueError, AttributeError):
        return text, None
    if json.loads(bare) == json.loads(text):
        text = manifest.base.config
    elif entry is not None:
        text = set_value(text, CONFIG_KEY, entry)
    before = previous(manifest)
    known = before is not None and isinstance(entry, dict) and entry.get("manifest") == before.digest
    return text, before.text() if known and before is not None else None


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
            raise PlanError(
                f"what was written is not the same function ({finding.problem})",
                tensor=finding.tensor,
                hint="Nothing was kept. This is a bug in ckptgrow or a failing disk: please report it.",
            )
    return answers


def _answers(job: _Job, written: Checkpoint, report: Progress) -> Iterator[Answer]:
    """The trained one is a growth of the folded one where only columns were added; else its gates lead to the same."""
    trained, architecture = job.trained, locate(written.config, written.infos)
    inside = _mlp_bytes(trained, job.architecture) + _mlp_bytes(written, architecture)
    outside = trained.tensor_bytes + written.tensor_bytes - inside
    yield untouched(written, trained, architecture, Meter(report, "comparing", outside))
    cost, meter = job.told.rounding, Meter(report, "proving", inside)
    if job.columns_only:
        rounds = cost.rounded > 0 or job.told.widened > 0
        yield proved(written, trained, architecture, meter, rounded_once=rounds)
        return
    yield regrouped(written, trained, architecture, meter, rounded=cost.rounded > 0)
