"""The base checkpoint back from a grown one, trained or not: its tensors by the inverted Plan, its files as they were.

Shard headers, index, config, README and the list of files come from the manifest's description of the base, so it does
not matter how the trainer cut its shards. Every tensor that was written is read again and held against the digest that
the manifest has of the base's: what training moved cannot pass. With the base at hand its own bytes are taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ckptgrow.checkpoint import CARD, CONFIG, MANIFEST, Checkpoint, Tensors, digest_of, open_checkpoint, open_weights
from ckptgrow.drift import compare_names, examine
from ckptgrow.equivalence import Finding
from ckptgrow.errors import PlanError, RequestError
from ckptgrow.execute import digest_of_output, write_shards
from ckptgrow.families import ties
from ckptgrow.ingredients import pasts
from ckptgrow.inversion import compose, invert, renamed
from ckptgrow.layout import INDEX, Layout, Shard
from ckptgrow.lineage import Past, Told, find_manifest, stranger
from ckptgrow.manifest import MERGE, Manifest, load_manifest, previous
from ckptgrow.matching import Renamed
from ckptgrow.plan import Plan, unchanged
from ckptgrow.progress import uncounted
from ckptgrow.reference import Reference, open_reference
from ckptgrow.staging import Staging, check_space
from ckptgrow.surgery import BASE
from ckptgrow.tensors import framed
from ckptgrow.trained import Trained, open_trained

TRAINED = "trained"


@dataclass(frozen=True, slots=True)
class Reversion:
    """What came back. `exit_code`: 0 the base, its tensors checked by digest; 1 frozen parts moved, nothing written."""

    grown: str
    folder: str
    base: str
    taken_from: str  # "trained": read back from what is frozen; "base": the base's own bytes
    undone: int  # growths
    tensors: int
    moved: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        return 1 if self.moved else 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"reverted": not self.moved, "exit_code": self.exit_code}


@dataclass(frozen=True)
class Undoing:
    """Growths ready to be undone: what comes back, the Plan of it, and where bytes and files are taken from."""

    past: Past  # the earliest growth to undo: its base is what comes back
    undone: int
    plan: Plan
    sources: Mapping[str, Tensors]
    doubtful: tuple[str, ...]
    files: tuple[Path, ...]  # folders in which the base's other files are looked for
    reference: Path | None  # the grown folder, where it is at hand
    notes: tuple[str, ...]

    @property
    def layout(self) -> Layout:
        """The files of the base, header bytes and all."""
        outputs, told = self.plan.named, self.past.manifest.base
        shards = []
        for file, header in self.past.base.headers.items():
            head = framed(told.shards[file]["text"].encode())
            shards.append(Shard(file, header, tuple(outputs[t.name] for t in header.tensors), False, head))
        return Layout(tuple(shards), told.index)


# ---------------------------------------------------------------- before anything is written


def prepare(grown: Path, base: Path | None, given: Path | None, *, every: bool) -> Undoing:
    """Everything that can be known, and refused, from headers and manifests."""
    found = open_trained(grown)
    path, notes = find_manifest(found, given)
    growths = pasts(load_manifest(path), str(path), every=every)
    past = growths[-1]
    if base is not None:
        source = open_checkpoint(base)
        strange = stranger(source, past.manifest.base)
        if strange:
            raise RequestError(": ".join(strange), file=str(base), hint="Give the checkpoint that was grown.")
        plan = Plan(tuple(unchanged(info, BASE) for info in source.infos.values()))
        return Undoing(past, len(growths), plan, {BASE: source}, (), (base,), None, notes)
    mine, said = named(growths[0], found)
    plan, doubtful = _inverted(growths)
    plan = renamed(plan, TRAINED, mine.names)
    plan.check({TRAINED: mine.trained.infos})
    folders = tuple(dict.fromkeys((path.parent, grown)))
    reference = path.parent if path.parent != grown and any(path.parent.glob("*.safetensors")) else None
    return Undoing(past, len(growths), plan, {TRAINED: mine.trained}, doubtful, folders, reference, (*notes, *said))


def _inverted(growths: tuple[Past, ...]) -> tuple[Plan, tuple[str, ...]]:
    """The Plan that undoes the growths, the last one first, and what the frozen parts do not determine."""
    whole, doubtful = None, set[str]()
    for past in growths:
        halves = past.manifest.inexact_halves == 0
        step = invert(past.plan, past.base.infos, past.trained, exact_halves=halves, source=TRAINED)
        if step.lost:
            raise gone(past, step.lost)
        whole = compose(step.plan, whole, TRAINED) if whole else step.plan
        doubtful |= set(step.doubtful)
    assert whole is not None
    return whole, tuple(name for name in growths[-1].base.infos if name in doubtful)


def gone(past: Past, lost: tuple[str, ...]) -> RequestError:
    """Why a merge does not have the base in it any more."""
    downs = {mlp.down for mlp in past.architecture.mlps} & set(lost)
    columns = [part for output in past.plan.outputs if output.name in downs for part in output.parts]
    weights = ", ".join(f"{skill['weight']:g}" for skill in past.manifest.skills)
    why = f"the weights ({weights}) cancel its columns, so the merge left its units out"
    if any(term.source == BASE for part in columns if not part.grown for term in part.terms):
        why = "the merge added up shares of its columns that are no halves, which cannot be undone"
    how_many = f"{len(lost):,} tensors of the base are" if len(lost) > 1 else "1 tensor of the base is"
    told = f"{how_many} not in it: {why}"
    return RequestError(told, tensor=lost[0], hint="Give --base BASE.")


def named(last: Past, found: Trained) -> tuple[Renamed, tuple[str, ...]]:
    """The trained tensors under the names of the grown checkpoint, all of them, and notes. Refuses a misfit."""
    told = Told(last)
    text = last.manifest.text().encode()
    reference = Reference(told, last.manifest.base.config, last.manifest, text, last.base)
    job = compare_names(reference, found)
    for finding in job.findings:
        raise RequestError(finding.problem, file=str(found.folder), tensor=finding.tensor)
    names = {pair.grown.name: pair.trained.name for pair in reversed(job.pairs)}  # of tied copies the first
    for name in told.infos.keys() - names.keys():  # a head that the trainer left out because it is tied
        rest = {other: info for other, info in told.infos.items() if other != name}
        names[name] = names[next(iter(ties(last.base.config, last.architecture.family, rest).values()))]
    return Renamed(job.trained, names), job.notes


def check_doubtful(job: Undoing) -> None:
    """Raise RequestError where training changed what the frozen part alone does not determine."""
    told, outputs = job.past.manifest.base.digests, job.plan.named
    changed = [name for name in job.doubtful if digest_of_output(outputs[name], job.sources) != told[name]]
    if changed:
        raise RequestError(f"{len(changed):,} {_why(job.past.manifest)}", tensor=changed[0], hint="Give --base BASE.")


def _why(manifest: Manifest) -> str:
    halves = manifest.inexact_halves
    if manifest.operation == MERGE:
        return f"tensors are not the base's any more: the merge rounded {halves:,} multiples of the base's weights"
    odd = f": {halves:,} of their weights have no exact half in their dtype" if halves else ""
    return (
        f"tensors are not the base's any more, and what policy {manifest.policy} freezes does not determine them{odd}"
    )


# ---------------------------------------------------------------- writing


def write(job: Undoing, grown: Path, out: Path, progress: Any) -> Reversion:
    """Write OUT, read it again, and let it appear only if every tensor is the base's."""
    layout, manifest = job.layout, job.past.manifest
    check_space(out, layout.nbytes)
    with Staging(out, "revert") as staging:
        write_shards(layout, job.sources, staging, progress)
        if layout.index is not None:
            staging.put(INDEX, layout.index)
        moved = tuple(_moved(job, open_weights(staging.folder)))
        notes = [*job.notes, *_put_files(job, staging)]
        if not moved:
            staging.commit()
    taken = BASE if BASE in job.sources else TRAINED
    told = (_how_far(job, grown, moved), tuple(notes)) if moved else ((), tuple(notes))
    return Reversion(str(grown), str(out), manifest.base.id, taken, job.undone, len(job.plan.outputs), *told)


def _moved(job: Undoing, written: Checkpoint) -> Iterator[Finding]:
    """Each tensor that is not the base's; raises PlanError where a header is not."""
    told = job.past.manifest.base
    for file, shard in written.shards.items():
        if (shard.digest, shard.nbytes) != (told.shards[file]["header"], told.shards[file]["bytes"]):
            raise PlanError("its header is not the base's", file=file, hint="Nothing was kept. Please report it.")
    for name, digest in told.digests.items():
        if written.digest(name) != digest:
            yield Finding(name, "its frozen part is not what it was")


def _how_far(job: Undoing, grown: Path, moved: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """The same findings with figures, where the grown checkpoint is at hand to compare with."""
    if job.reference is None:
        return tuple(replace(f, problem=f"{f.problem}; --manifest GROWN or audit says how far it moved") for f in moved)
    trained = open_trained(grown)
    seen, _ = examine(compare_names(open_reference(job.reference, trained), trained), uncounted)
    drifts = {drift.tensor: drift for drift in seen.tensors}
    return tuple(
        replace(
            finding,
            problem=f"{drifts[finding.tensor].moved:,} of {drifts[finding.tensor].frozen:,} frozen elements moved by up"
            f" to {drifts[finding.tensor].largest:.3g} (relative {drifts[finding.tensor].largest_relative:.2g})",
        )
        if finding.tensor in drifts
        else finding
        for finding in moved
    )


def _put_files(job: Undoing, staging: Staging) -> Iterator[str]:
    """Everything but the weights; what is said of files that are not what they were."""
    told = job.past.manifest.base
    for name, digest in told.files.items():
        there = [folder / name for folder in job.files if (folder / name).is_file()]
        same = [path for path in there if digest_of(path.read_bytes()) == digest]
        if same or there:
            staging.copy((same or there)[0], name)
        if not same:
            yield f"{name} {'is not the one that the base had' if there else 'is missing'}: give --manifest GROWN"
    if told.card is not None:
        staging.put(CARD, told.card)
    earlier = previous(job.past.manifest)
    if earlier is not None:
        staging.put(MANIFEST, earlier.text())
    staging.put(CONFIG, told.config)
