"""The trained checkpoint with its frozen elements put back bit for bit: a Plan of two sources, and how it is written.

In a tensor that drifted the parts alternate between the trained checkpoint, where the boxes are, and the grown one.
The trained dtype stays: a grown value goes into a wider one exactly. Refused where that would destroy what was
learned, or could not help.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckptgrow.checkpoint import CARD, CONFIG, MANIFEST, Checkpoint
from ckptgrow.config import set_value
from ckptgrow.drift import CAUSES, Audit, Job, Pair, Progress, compare_names, examine
from ckptgrow.errors import PlanError, RequestError
from ckptgrow.execute import write_shards
from ckptgrow.layout import INDEX, lay
from ckptgrow.manifest import CONFIG_KEY
from ckptgrow.plan import Output, Part, Plan, Term, unchanged
from ckptgrow.staging import Staging, check_space
from ckptgrow.tensors import TensorInfo


def check_repairable(job: Job, seen: Audit, force: bool) -> None:
    """Raise RequestError where putting the frozen part back would not help, or would do harm."""
    if seen.findings:
        first = seen.findings[0]
        raise RequestError("what cannot be compared cannot be repaired: " + first.problem, tensor=first.tensor)
    if seen.cause == "narrowed":
        raise RequestError(CAUSES["narrowed"], hint="Save the trained model in the dtype of the grown checkpoint.")
    if not isinstance(job.trained, Checkpoint):
        raise RequestError(
            "a torch.distributed.checkpoint is audited but not repaired",
            file=str(job.trained.folder),
            hint="Write it as safetensors first (accelerate merge-weights, or the trainer's own export).",
        )
    if seen.cause == "trained" and not force:
        raise RequestError(
            f"{seen.total('moved_before_cast'):,} frozen elements were trained, by up to a relative"
            f" {max(drift.largest_relative for drift in seen.tensors):.2g}: going back destroys what they learned",
            hint="Train again with the mask in force, or give --force.",
        )


def restoration(infos: Mapping[str, TensorInfo], drifted: tuple[Pair, ...]) -> Plan:
    """The Plan of the trained checkpoint in which the frozen parts of these tensors are the grown one's."""
    pairs = {pair.trained.name: pair for pair in drifted}
    outputs = (_restored(pairs[name]) if name in pairs else unchanged(info, "trained") for name, info in infos.items())
    return Plan(tuple(outputs))


def _restored(pair: Pair) -> Output:
    spans = [(span, "grown", pair.grown.name) for span in pair.frozen]
    spans += [(span, "trained", pair.trained.name) for span in pair.trainable]
    parts = tuple(Part(b - a, (Term(source, name, range(a, b)),)) for (a, b), source, name in sorted(spans))
    return Output(pair.trained.name, pair.trained.dtype, pair.trained.shape, pair.axis, parts)


def repair(job: Job, seen: Audit, drifted: tuple[Pair, ...], out: Path, progress: Progress) -> None:
    """Write OUT, audit it, and only then let it appear."""
    trained = job.trained
    assert isinstance(trained, Checkpoint)
    plan = restoration(trained.infos, drifted)
    plan.check({"grown": job.grown.infos, "trained": trained.infos})
    layout = lay(plan, trained.headers, trained.infos, trained.index, "trained")
    files = [*trained.companions()[0], *(name for name in (CARD,) if (trained.folder / name).is_file())]
    check_space(out, layout.nbytes + sum((trained.folder / file).stat().st_size for file in files))
    with Staging(out, "repair") as staging:
        write_shards(layout, {"grown": job.grown, "trained": trained}, staging, progress)
        for file in files:
            staging.copy(trained.folder / file, file)
        if layout.index is not None:
            staging.put(INDEX, layout.index)
        staging.copy(job.grown.folder / MANIFEST, MANIFEST)
        text = trained.config_text or job.grown.config_text
        if CONFIG_KEY not in (trained.config if trained.config_text else job.grown.config):
            text = set_value(text, CONFIG_KEY, job.grown.config[CONFIG_KEY])
        staging.put(CONFIG, text)
        again, _ = examine(compare_names(job.grown.folder, staging.folder), lambda _: None)
        if again.cause != "nothing" or again.findings or again.total("changed") != seen.total("changed"):
            raise PlanError("the repaired checkpoint is not what it should be", hint="Nothing was kept. Report it.")
        staging.commit()
