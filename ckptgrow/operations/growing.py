"""inspect, expand and verify: each wires the rooms together for one command."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ckptgrow import equivalence, surgery
from ckptgrow.card import card, licence
from ckptgrow.checkpoint import CARD, CONFIG, MANIFEST, Checkpoint, open_checkpoint
from ckptgrow.errors import FamilyError, FormatError
from ckptgrow.execute import write_shards
from ckptgrow.families import EVERY, Architecture, Family, locate, recast_like, ties
from ckptgrow.hub import Origin, fetch, preview
from ckptgrow.identity import identify
from ckptgrow.layers import chosen, ranked
from ckptgrow.layout import INDEX, Layout, lay
from ckptgrow.manifest import Grown, Manifest, describe, grown_config, history
from ckptgrow.marks import read_mask
from ckptgrow.operations.declaring import check_keys, declaration
from ckptgrow.policy import ShareChoice, said
from ckptgrow.progress import Meter, Progress, silent
from ckptgrow.proof import prove, prove_marks
from ckptgrow.results import Block, Expansion, Inspection, Proposal, Verification
from ckptgrow.staging import Staging, check_apart, check_space, check_target, free_bytes
from ckptgrow.surgery import BASE, Growth, Uneven
from ckptgrow.version import __version__

Source = str | Path
Layers = str | Iterable[int] | None


def inspect(src: Source, *, tower: str | None = None, family: Source | None = None) -> Inspection:
    """What `src` (a folder or `org/name[@revision]`) is and whether it can grow. Reads headers only.

    `tower` chooses one of a model of several, by default its first: the text model; `family` is a file that declares
    an architecture which the table does not have. Raises CkptgrowError where there is no readable checkpoint.
    """
    given = declaration(family)
    origin, base = _peek(src)
    architecture, reason, grown_before = None, None, 0
    try:
        architecture = locate(base.config, base.infos, tower, given)
        if given is not None:
            check_keys(architecture, base.config)
        grown_before = len(history(base))
    except (FamilyError, FormatError) as error:
        reason = str(error)
    return _inspection(origin, base, architecture, reason, grown_before)


def plan_expand(
    src: Source,
    out: Source,
    *,
    factor: int | None = None,
    width: int | None = None,
    multiple_of: int = 1,
    policy: str = "g-freeze",
    shares: ShareChoice = "auto",
    seed: int = 0,
    layers: Layers = None,
    uneven: Uneven = "uniform",
    tower: str | None = None,
    experts: str = "all",
    family: Source | None = None,
) -> Proposal:
    """What `expand` would do with the same options, for `--plan`: reads headers only and writes nothing.

    Raises CkptgrowError for whatever `expand` would refuse before its first byte, but for an existing OUT and a
    full disk, which the figures show.
    """
    origin, base = _peek(src)
    growth = Growth(factor, width, multiple_of, policy, shares, seed, _layers(layers), uneven, tower, experts)
    return _prepare(origin, base, Path(out), growth, declaration(family)).proposal


def expand(
    src: Source,
    out: Source,
    *,
    factor: int | None = None,
    width: int | None = None,
    multiple_of: int = 1,
    policy: str = "g-freeze",
    shares: ShareChoice = "auto",
    seed: int = 0,
    layers: Layers = None,
    uneven: Uneven = "uniform",
    tower: str | None = None,
    experts: str = "all",
    family: Source | None = None,
    force: bool = False,
    resume: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
    bars: bool = False,
) -> Expansion:
    """Grow the MLPs of `src` (a folder or `org/name[@revision]`) into the new folder `out`, the same function.

    `factor` (2 if neither is given) or `width` says how wide; `policy` what will train (METHOD.md 4); `shares` and
    `seed` how each column of down is shared out (METHOD.md 2, 3). `layers` names the layers that grow ("3-11,20",
    "@ranking.json", or numbers), the others being filled up or, by `uneven`, kept as they are (METHOD.md 7); `tower`
    one of several (else the text model); `experts` is all, shared, or numbers such as "0,4-7", the others being filled
    up; `family` a declaration. `force` replaces an existing `out` once the new one is complete; `resume` goes on from a
    killed run; `verify` proves what was written; `bars` lets huggingface_hub draw its own. Raises CkptgrowError, and
    leaves nothing on disk.
    """
    growth = Growth(factor, width, multiple_of, policy, shares, seed, _layers(layers), uneven, tower, experts)
    given, report, seen = declaration(family), progress or silent, preview(src)
    target = _target(Path(out), seen.origin, force)
    job = _prepare(seen.origin, open_checkpoint(seen.origin.folder, seen.headers), Path(out), growth, given)
    check_space(target, job.proposal.bytes_to_write)
    if seen.headers:  # all that can be refused has been: now the weights
        origin = fetch(src, progress=bars)
        job = _prepare(origin, open_checkpoint(origin.folder), Path(out), growth, given)
    with Staging(target, job.identity, force=force, resume=resume) as staging:
        inexact = write_shards(
            job.layout,
            {BASE: job.base},
            staging,
            Meter(report, "writing", sum(shard.nbytes for shard in job.layout.shards)),
        )
        manifest = _write_rest(job, staging, inexact)
        verification = _verified(job, staging.folder, report) if verify else None
        staging.commit()
    return Expansion(Path(out), job.proposal, manifest, verification)


def verify(
    base: Source,
    grown: Source,
    *,
    logits: Source | None = None,
    family: Source | None = None,
    progress: Progress | None = None,
    bars: bool = False,
) -> Verification:
    """Whether `grown` is the same function as `base`: three answers from the bytes of both, strongest first.

    Knows nothing of how `grown` was made, so it accepts any function-preserving duplication of units by any tool.
    `logits` names a text file on which transformers runs both models too. Raises CkptgrowError where it cannot tell.
    """
    from ckptgrow.probe import probed

    report = progress or silent
    mine, its = fetch(base, progress=bars), fetch(grown, progress=bars)
    one, other = open_checkpoint(mine.folder), open_checkpoint(its.folder)
    architecture = locate(one.config, one.infos, EVERY, declaration(family))
    architecture = recast_like(architecture, one.config, one.infos, other.config.get("model_type"))
    answers = list(_answers(one, other, architecture, report))
    if answers[-1].findings:
        answers.append(equivalence.Answer("probed", "not run", "the MLPs are not the same on their weights"))
    else:
        meter = Meter(report, "probing", sum(architecture.nbytes(checkpoint.infos) for checkpoint in (one, other)))
        answers.append(probed(one, other, architecture, meter))
    if logits is not None:
        from ckptgrow.logits import compared

        answers.append(compared(mine.folder, its.folder, Path(logits)))
    return Verification(str(base), str(grown), tuple(answers))


# ---------------------------------------------------------------- inspecting and planning


@dataclass(frozen=True, slots=True)
class _Job:
    """A growth ready to be carried out."""

    origin: Origin
    base: Checkpoint
    architecture: Architecture
    growth: Growth
    layout: Layout
    grown: Grown
    proposal: Proposal

    @property
    def identity(self) -> str:
        """What a resumed run must agree on: version, Plan, options, and the source's files as they are now."""
        files = {
            file: (shard.nbytes, shard.digest, (self.base.folder / file).stat().st_mtime_ns)
            for file, shard in self.base.shards.items()
        }
        told = json.dumps([__version__, self.proposal.plan.to_json(), repr(self.growth), files, self.base.config_text])
        return hashlib.sha256(told.encode()).hexdigest()


def _peek(src: Source) -> tuple[Origin, Checkpoint]:
    """A checkpoint of which the weights need not be here."""
    seen = preview(src)
    return seen.origin, open_checkpoint(seen.origin.folder, seen.headers)


def _inspection(
    origin: Origin, base: Checkpoint, architecture: Architecture | None, reason: str | None, grown_before: int
) -> Inspection:
    dtypes: Counter[str] = Counter()
    for info in base.infos.values():
        dtypes[info.dtype] += info.elements
    model_type = base.config.get("model_type")
    family = architecture.family if architecture else None
    return Inspection(
        source=origin.id,
        revision=origin.revision,
        model_type=model_type if isinstance(model_type, str) else None,
        growable=reason is None,
        reason=reason,
        gated=any(mlp.site.template.gated for mlp in architecture.mlps) if architecture else None,
        norm_after=family.norm_after if family else None,
        blocks=tuple(_blocks(base, architecture)) if architecture else (),
        parameters=base.parameters,
        bytes=base.tensor_bytes,
        shards=len(base.shards),
        dtypes=dict(dtypes.most_common()),
        ties=ties(base.config, family, base.infos) if family else {},
        grown_before=grown_before,
    )


def _blocks(base: Checkpoint, architecture: Architecture) -> Iterator[Block]:
    for mlp in architecture.mlps:
        dtypes = sorted({base.infos[name].dtype for name in mlp.tensors})
        yield Block(mlp.block, mlp.layer, mlp.width, mlp.hidden, tuple(dtypes))


def _layers(asked: Layers) -> tuple[int, ...] | None:
    """The layers to grow, ascending; None stands for all. `@FILE` names a ranking."""
    if not isinstance(asked, str) or not asked.startswith("@"):
        return None if asked is None else chosen(asked)
    try:
        return chosen(ranked(Path(asked[1:]).read_bytes(), asked[1:]))
    except OSError as error:
        raise FormatError(f"it cannot be read ({error.strerror})", file=asked[1:]) from None


def _prepare(origin: Origin, base: Checkpoint, out: Path, growth: Growth, family: Family | None) -> _Job:
    """Everything that can be known, and refused, before the first byte is written."""
    architecture = surgery.architecture_for(growth, base.config, base.infos, family)
    if family is not None:
        check_keys(architecture, base.config)
    history(base)
    plan = surgery.expand(base.infos, architecture, growth)
    prove(plan, base.infos, architecture)
    prove_marks(plan, architecture, growth.layers)
    layout = lay(plan, base.headers, base.infos, base.index)
    grown = read_mask(plan, base, architecture, growth)
    layers, grew = ({b.layer for b in grown.blocks if not (grew and b.filled)} for grew in (False, True))
    copied, left_out = base.companions()
    small = sum((base.folder / file).stat().st_size for file in copied) + 2 * len(base.config_text.encode())
    proposal = Proposal(
        source=origin.id,
        revision=origin.revision,
        out=str(out),
        family=architecture.own.model_type,
        recast=architecture.family.model_type if architecture.recast else None,
        policy=growth.policy,
        policy_about=growth.rules.about,
        shares=tuple(_said(architecture, growth)),
        blocks=grown.blocks,
        parameters_before=base.parameters,
        parameters_after=grown.counts.trainable + grown.counts.frozen,
        trainable=grown.counts.trainable,
        trainable_share_of_base=grown.counts.trainable_share_of_base,
        layers_filled=tuple(sorted(layers - grew)),
        experts_grown=architecture.listed,
        parameters_filled=grown.counts.filled,
        bytes_filled=grown.counts.filled_bytes,
        bytes_to_write=layout.nbytes + small,
        bytes_free=free_bytes(out),
        shards_rewritten=sum(not shard.whole for shard in layout.shards),
        shards_copied=sum(shard.whole for shard in layout.shards),
        files_copied=copied,
        files_left_out=left_out,
        plan=plan,
    )
    return _Job(origin, base, architecture, growth, layout, grown, proposal)


def _said(architecture: Architecture, growth: Growth) -> Iterator[str]:
    """How the columns of down are shared out; where there are several widths, under the key of each."""
    told = {}
    for group in architecture.groups:
        choice: ShareChoice = "even" if group.grain > 1 else growth.shares
        told[group.path] = [
            sentence
            for old in group.starts(growth.layers)
            for sentence in said(old, growth.new_width(old), growth.rules, choice, growth.layers, architecture.listed)
        ]
    alike = len(set(map(tuple, told.values()))) == 1
    for path, sentences in [*told.items()][: 1 if alike else None]:
        yield from (sentence if alike else f"{path}: {sentence}" for sentence in sentences)


# ---------------------------------------------------------------- writing


def _target(out: Path, origin: Origin, force: bool) -> Path:
    """Where the result goes. Raises OutputError where it cannot."""
    check_apart(out.resolve(), origin.folder)
    check_target(out, force=force)
    return out.resolve()


def _write_rest(job: _Job, staging: Staging, inexact: int) -> Manifest:
    """All files but the shards; index, manifest and config last."""
    base, origin = job.base, job.origin
    for file in job.proposal.files_copied:
        staging.copy(base.folder / file, file)
    name, revision = _named(origin)
    identity = identify(base, name, revision)
    manifest = describe(base, identity, job.architecture, job.growth, job.grown, inexact, __version__)
    staging.put(CARD, card(manifest, licence(base.folder / CARD)))
    if job.layout.index is not None:
        staging.put(INDEX, job.layout.index)
    staging.put(MANIFEST, manifest.text())
    staging.put(CONFIG, grown_config(base.config_text, job.proposal.plan, manifest, job.architecture))
    return manifest


def _named(origin: Origin) -> tuple[str, str | None]:
    """The base's Hub id and revision, also for a snapshot in the Hub cache; for a folder its name, not its path."""
    folder = origin.folder.absolute()
    repository = folder.parent.parent.name
    if origin.revision is None and folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1), folder.name
    return (origin.id, origin.revision) if origin.revision else (folder.resolve().name, None)


def _verified(job: _Job, folder: Path, report: Progress) -> Verification:
    """The first two answers on what was just written. Raises PlanError unless both are yes: a bug, not the user's."""
    written = open_checkpoint(folder)
    answers = tuple(_answers(job.base, written, job.architecture, report))
    verification = Verification(job.origin.id, job.proposal.out, answers)
    if verification.exit_code:
        raise equivalence.not_the_same(next(finding for answer in answers for finding in answer.findings))
    return verification


def _answers(
    one: Checkpoint, other: Checkpoint, architecture: Architecture, report: Progress
) -> Iterator[equivalence.Answer]:
    inside = sum(architecture.nbytes(checkpoint.infos) for checkpoint in (one, other))
    outside = one.tensor_bytes + other.tensor_bytes - inside
    yield equivalence.untouched(one, other, architecture, Meter(report, "comparing", outside))
    yield equivalence.proved(one, other, architecture, Meter(report, "proving", inside))
