"""Two formats that belong to no trainer: the boxes as JSON, and a list of tensors for a requires_grad loop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ckptgrow.dialects.subject import Subject, Trained, commented, head
from ckptgrow.stacks import Held

NOTES = (
    "boxes: one half-open, zero-based [start, stop) pair per dimension, by the tensor's name on disk. Whatever is in no"
    " box is frozen; tensors that are not named are frozen whole.",
    "in_memory is the name in a transformers model where that differs; tied names one tensor that has two names.",
    "A zero gradient does not hold a weight still: weight decay, momentum from before the mask, 8-bit states and"
    " averaging move it. Keep weight decay at 0 on these tensors and begin with a fresh optimizer, or train with"
    " ckptgrow.training.freeze, which needs neither.",
    "JSON cannot say how a mask is applied: fill gradients with zeros, do not multiply (0 x inf is NaN), and do it"
    " before gradients are clipped.",
)
IN_STACKS = (
    "Experts have tensors of their own on disk and lie in stacks in transformers 5: in_memory is the stack there, and"
    " in_memory_boxes are the boxes in it."
)


def as_json(subject: Subject) -> str:
    """The boxes by tensor name; what JSON cannot express stands under `notes`. One tensor a line."""
    manifest = subject.manifest
    facts: dict[str, Any] = {
        "format": "ckptgrow.mask",
        "version": 1,
        "manifest": manifest.digest,
        "default": "frozen",
        "policy": manifest.policy,
        "elements": {"trainable": manifest.counts.trainable, "frozen": manifest.counts.frozen},
        "training": {"weight_decay_on_these_tensors": 0, "optimizer_state": "fresh"},
        "tied": dict(manifest.ties),
    }
    notes = (*NOTES, *((IN_STACKS,) if subject.held.stacks else ()))
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items()]
    lines.append('  "notes": [\n' + ",\n".join(f"    {json.dumps(note)}" for note in notes) + "\n  ]")
    tensors = (f"    {json.dumps(t.tensor.name)}: {json.dumps(_described(t, subject.held))}" for t in subject.on_disk)
    lines.append('  "tensors": {\n' + ",\n".join(tensors) + "\n  }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _described(trained: Trained, held: Held) -> dict[str, Any]:
    tensor = trained.tensor
    named: dict[str, Any] = {"in_memory": trained.name} if trained.name != tensor.name else {}
    if tensor.name in held.places:
        stack, boxes = held.places[tensor.name]
        named = {"in_memory": stack, "in_memory_boxes": boxes}
    facts = {"role": tensor.role, "layer": tensor.layer, "shape": tensor.shape, "dtype": tensor.dtype}
    return named | facts | {"boxes": tensor.boxes}


def as_names(subject: Subject) -> str:
    """The tensors that hold something trainable, one a line, for a loop that sets requires_grad."""
    return "\n".join([*_names(subject), ""])


def _names(subject: Subject) -> Iterator[str]:
    partly = [one for one in subject.trained if not one.whole]
    yield from head(subject, "Tensors that hold something trainable.")
    if any(one.name != one.tensor.name for one in subject.trained):
        yield from commented("Names are those of a transformers model in memory; on disk the prefix differs.")
    if partly:
        lost = sum(one.frozen for one in partly)
        yield from commented(
            f"LOST: this format knows whole tensors only. {len(partly)} of these {len(subject.trained)} are partly"
            f" frozen: with nothing else\ntheir {lost:,} frozen elements train too. Train with"
            " ckptgrow.training.freeze, or mask their gradients\n(`--format json`, `--format safetensors`) and keep"
            " weight decay at 0; `ckptgrow audit` says whether it held."
        )
    else:
        yield from commented("Nothing is lost: each of these trains whole.")
    yield from (one.name for one in subject.trained)
