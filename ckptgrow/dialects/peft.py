"""PEFT: a LoRA that reaches the new rows and columns only, as a Python snippet that runs."""

from __future__ import annotations

from collections.abc import Iterator

from ckptgrow.dialects.patterns import patterns
from ckptgrow.dialects.subject import Subject, commented, head
from ckptgrow.errors import RequestError


def as_peft(subject: Subject) -> str:
    """The snippet. Raises RequestError where nothing that trains is a matrix."""
    return "\n".join([*_lines(subject), ""])


def targets(subject: Subject) -> str:
    """`target_modules`: the regular expression that fully matches the Linear layers of which something trains."""
    matrices = [one for one in subject.trained if len(one.tensor.shape) == 2]
    if not matrices or not all(one.name.endswith(".weight") for one in matrices):
        what = "are stacks of experts" if subject.held.stacks else "is none"
        raise RequestError(f"a LoRA adapts the weights of Linear layers, and what trains here {what}")
    modules = {one.name.removesuffix(".weight") for one in matrices}
    others = {name.rpartition(".")[0] for name in subject.names} - modules
    found = patterns(sorted(modules), others)
    return found[0] if len(found) == 1 else "|".join(f"(?:{regex})" for regex in found)


def _lines(subject: Subject) -> Iterator[str]:
    biases = [one for one in subject.trained if one.is_bias]
    stacks = [one for one in subject.trained if one.stacked]
    yield from head(subject, "ckptgrow mask for PEFT: a LoRA confined to what trains.")
    yield from commented(
        "A LoRA has no such setting: LoraConfig alone adapts whole layers, and merging it moves the frozen part.\n"
        "`confine` keeps zero the rows of B (gate, up) and the columns of A (down) that reach frozen elements, and\n"
        "merges without touching one bit of them. Weight decay does no harm: zero decays to zero."
    )
    yield from commented(
        "What it cannot express: full-rank updates of the new units."
        + _lost(len(biases), "biases")
        + _lost(len(stacks), "stacks of experts")
    )
    revision = f", revision={subject.revision!r}" if subject.revision else ""
    yield from SNIPPET.format(
        model=subject.model,
        folder=str(subject.folder),
        revision=revision,
        targets=targets(subject),
    ).splitlines()


def _lost(count: int, what: str) -> str:
    return f" The {count} {what} that may train stay as they are." if count else ""


SNIPPET = """\
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ckptgrow.training.peft import confine

model = AutoModelForCausalLM.from_pretrained({model!r}{revision})
config = LoraConfig(
    r=16,
    lora_alpha=32,
    lora_dropout=0.0,
    bias="none",
    target_modules=r"{targets}",
    task_type="CAUSAL_LM",
)
model = get_peft_model(model, config)
handle = confine(model, {folder!r})  # before the optimizer is made
# ... train: handle.trained().values() are the parameters ...
# handle.check()  # raises where something has moved that must not
# model.merge_and_unload().save_pretrained("trained")  # then: ckptgrow audit GROWN trained
# An adapter that was saved by itself is confined again after PeftModel.from_pretrained, before it is merged.
"""
