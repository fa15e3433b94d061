"""The trained checkpoint with its frozen elements put back bit for bit: a Plan of two sources, and how it is written.

In a tensor that drifted the parts alternate between the trained checkpoint, where the boxes are, and the grown one.
The trained dtype stays: a grown value goes into a wider one exactly. Safetensors keep their names and sharding; what
lies otherwise (a torch.distributed.checkpoint) becomes safetensors with the grown checkpoint's names and sharding.
Refused where repair would destroy what was learned, or could not help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ckptgrow.checkpoint import CARD, CONFIG, MANIFEST, Checkpoint
from ckptgrow.config import set_value
from ckptgrow.drift import Audit, Job, Pair, Progress, compare_names, examine
from ckptgrow.errors import PlanError, RequestError
from ckptgrow.execute import write_shards
from ckptgrow.layout import INDEX, Layout, Shard, lay
from ckptgrow.manifest import CONFIG_KEY
from ckptgrow.plan import Output, Part, Plan, Term, in_slices, unchanged
from ckptgrow.progress import uncounted
from ckptgrow.regions import between
from ckptgrow.respelled import Respelled
from ckptgrow.staging import Staging, check_space
from ckptgrow.traces import CAUSES
from ckptgrow.trained import Trained, open_trained

GROWN, TRAINED = "grown", "trained"


def check_repairable(job: Job, seen: Audit, force: bool) -> None:
    """Raise RequestError where putting the frozen part back would not help, or would do harm."""
    if seen.findings:
        first = seen.findings[0]
        raise RequestError("what cannot be compared cannot be repaired: " + first.problem, tensor=first.tensor)
    if seen.cause == "narrowed":
        raise RequestError(CAUSES["narrowed"], hint="Save the trained model in the dtype of the grown checkpoint.")
    if seen.cause == "trained" and not force:
        raise RequestError(
            f"{seen.total('moved_before_cast'):,} frozen elements were trained, by up to a relative"
            f" {max(drift.largest_relative for drift in seen.tensors):.2g}: going back destroys what they learned",
            hint="Train again with the mask in force, or give --force.",
        )


def restoration(job: Job, drifted: tuple[Pair, ...]) -> Plan:
    """The Plan of the trained safetensors in which the frozen parts of these tensors are the grown one's."""
    pairs = {pair.trained.name: pair for pair in drifted}
    return Plan(
        tuple(
            _restored(pairs[name], name) if name in pairs else unchanged(info, TRAINED)
            for name, info in job.trained.infos.items()
        )
    )


def renewal(job: Job, drifted: tuple[Pair, ...]) -> Plan:
    """The Plan of the same under the names of the grown checkpoint; a tied head that was dropped is there again."""
    pairs = {pair.grown.name: pair for pair in reversed(job.pairs)}  # of tied copies the first, which is not the head
    outputs = []
    for name, info in job.reference.tensors.infos.items():
        if name not in pairs:
            outputs.append(unchanged(info, GROWN))
        elif pairs[name] in drifted:
            outputs.append(_restored(pairs[name], name))
        else:
            outputs.append(replace(unchanged(pairs[name].trained, TRAINED), name=name))
    return Plan(tuple(outputs))


def _restored(pair: Pair, name: str) -> Output:
    division, runs = pair.division, list[tuple[range | None, tuple[Part, ...]]]()
    for rows, spans in division.runs:
        places = [(span, GROWN, pair.grown.name) for span in between(spans, division.extent)]
        places += [(span, TRAINED, pair.trained.name) for span in spans]
        parts = (Part(b - a, (Term(source, owner, range(a, b)),)) for (a, b), source, owner in sorted(places))
        runs.append((rows, tuple(parts)))
    whole = Output(name, pair.trained.dtype, pair.trained.shape, division.axis, ())
    return replace(whole, parts=in_slices(runs, whole.steps[0]))


def repair(job: Job, seen: Audit, drifted: tuple[Pair, ...], out: Path, progress: Progress) -> None:
    """Write OUT, audit it, and only then let it appear."""
    reference, trained = job.reference, job.trained
    found, laid = _as_it_lies(trained)
    if found is not None:
        plan, files = restoration(job, drifted), found
        layout = relaid(plan, files, laid) if laid else lay(plan, files.headers, files.infos, files.index, TRAINED)
        beside = [*files.companions()[0], *(name for name in (CARD,) if (files.folder / name).is_file())]
    else:
        plan, files = renewal(job, drifted), reference.files
        layout = lay(plan, files.headers, files.infos, files.index, source=None)
        beside = [*files.companions()[0]]
    plan.check({GROWN: reference.tensors.infos, TRAINED: trained.infos})
    check_space(out, layout.nbytes + sum((files.folder / file).stat().st_size for file in beside))
    with Staging(out, "repair") as staging:
        write_shards(layout, {GROWN: reference.tensors, TRAINED: trained}, staging, progress)
        for file in beside:
            staging.copy(files.folder / file, file)
        if layout.index is not None:
            staging.put(INDEX, layout.index)
        staging.put(MANIFEST, reference.manifest_text.decode())
        staging.put(CONFIG, _config(job))
        again, _ = examine(compare_names(reference, open_trained(staging.folder)), uncounted)
        if again.cause != "nothing" or again.findings or again.total("changed") != seen.total("changed"):
            raise PlanError("the repaired checkpoint is not what it should be", hint="Nothing was kept. Report it.")
        staging.commit()


def _as_it_lies(trained: Trained) -> tuple[Checkpoint | None, Mapping[str, tuple[str, ...]] | None]:
    """The files of safetensors that are to be written again, and where the tensors compared are places in theirs,
    which of them make up each. None where the grown checkpoint's files are to be written instead."""
    if isinstance(trained, Respelled):
        whole = trained.trained
        return (whole, trained.laid) if isinstance(whole, Checkpoint) and trained.laid else (None, None)
    return (trained, None) if isinstance(trained, Checkpoint) else (None, None)


def relaid(plan: Plan, files: Checkpoint, laid: Mapping[str, tuple[str, ...]]) -> Layout:
    """The same files with the same headers, where the outputs of a Plan laid end to end are the tensors in them."""
    outputs = plan.named
    shards = [
        Shard(
            file,
            header,
            tuple(outputs[name] for info in header.tensors for name in laid[info.name]),
            False,
            files.head(file),
        )
        for file, header in files.headers.items()
    ]
    return Layout(tuple(shards), files.text(INDEX))


def _config(job: Job) -> str:
    """The trained config.json, or the grown one; it names the manifest."""
    text = job.trained.config_text
    if not text or CONFIG_KEY in job.trained.config:
        return text or job.reference.config_text
    return set_value(text, CONFIG_KEY, job.reference.config[CONFIG_KEY])
