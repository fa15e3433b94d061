"""LLaMA-Factory's YAML, and the launcher that holds what it cannot say.

LLaMA-Factory freezes whole modules: `freeze_trainable_modules` are names directly below a layer,
`freeze_trainable_layers` are the last N layers (a negative number: the first N).
"""

from __future__ import annotations

from collections.abc import Iterator

from ckptgrow.dialects.subject import Subject, commented, head, quoted
from ckptgrow.errors import RequestError

LAUNCHER = "python -m ckptgrow.training.llamafactory"


def as_llamafactory(subject: Subject) -> str:
    """Lines for LLaMA-Factory's configuration file. Raises RequestError for names without a layer's number."""
    return "\n".join([*_lines(subject), ""])


def _lines(subject: Subject) -> Iterator[str]:
    layers, modules = span_of(subject), modules_of(subject)
    whole = [name for name in subject.frozen_names if _inside(name, subject, layers, modules)]
    lost = sum(one.frozen for one in subject.trained)
    yield from head(subject, "ckptgrow mask for LLaMA-Factory.")
    yield from commented(
        f"EXACT, whatever the weight decay: save this with your data and training arguments as train.yaml and run\n"
        f"    {LAUNCHER} train.yaml\nin place of `llamafactory-cli train train.yaml`. It freezes what the manifest says"
        " and audits what was saved."
    )
    lines = [f"{lost:,} elements that are frozen in {len(subject.trained)} tensors"] if lost else []
    lines += [f"{len(whole)} tensors that are frozen whole"] if whole else []
    if lines:
        yield from commented(
            f"NOT EXACT with `llamafactory-cli`: YAML knows whole modules only, so\n{' and '.join(lines)} train too."
            "\nNothing in it can mask them. `ckptgrow audit` reports that afterwards."
        )
    else:
        yield from commented("These lines alone say it too: whatever they unfreeze trains whole.")
    yield f"model_name_or_path: {quoted(subject.model)}"
    if subject.revision:
        yield f"model_revision: {quoted(subject.revision)}"
        yield f"ckptgrow_manifest: {quoted(str(subject.folder))}  # for the launcher only: llamafactory-cli refuses it"
    if any(one.stacked for one in subject.trained):
        yield "ckptgrow_how: mask  # for the launcher only: llamafactory-cli refuses it"
    yield "stage: sft"
    yield "finetuning_type: freeze"
    yield f"freeze_trainable_modules: {','.join(modules)}"
    yield f"freeze_trainable_layers: {layers}"


def modules_of(subject: Subject) -> tuple[str, ...]:
    """The modules directly below a layer that hold what trains."""
    return tuple(sorted({_below(one.name, one.tensor.layer) for one in subject.trained}))


def span_of(subject: Subject) -> int:
    """The fewest layers, counted from the end (or as a negative number from the start), that hold all that trains."""
    first, last = subject.layers[0], subject.layers[-1]
    from_end, from_start = subject.depth - first, last + 1
    return from_end if from_end <= from_start else -from_start


def _inside(name: str, subject: Subject, layers: int, modules: tuple[str, ...]) -> bool:
    """Whether LLaMA-Factory would unfreeze this tensor: it looks for `.LAYER.MODULE` in the name, not in towers."""
    chosen = range(subject.depth)[-layers:] if layers > 0 else range(-layers)
    stacks = {one.name.partition(f".{one.tensor.layer}.")[0] for one in subject.trained}
    return any(name.startswith(f"{stack}.{layer}.{m}") for stack in stacks for layer in chosen for m in modules)


def _below(name: str, layer: int) -> str:
    _, found, rest = name.partition(f".{layer}.")
    if not found:
        raise RequestError(f"it has no layer {layer} in its name, so LLaMA-Factory cannot find it", tensor=name)
    return rest.partition(".")[0]
