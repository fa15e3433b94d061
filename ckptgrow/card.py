"""README.md of a grown checkpoint: a Hub model card that says what was done and how to train the result."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ckptgrow.layers import named
from ckptgrow.manifest import Manifest
from ckptgrow.policy import POLICIES
from ckptgrow.stacks import in_stacks

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# One entry of the front matter with its continuation lines.
_LICENCE = re.compile(r"^(?:license|license_name|license_link):.*(?:\n(?:[ \t]|-).*)*", re.MULTILINE)


def licence(readme: Path) -> tuple[str, ...]:
    """The licence entries of a model card's front matter, as they stand there."""
    try:
        return licence_in(readme.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return ()


def licence_in(text: str) -> tuple[str, ...]:
    """The same of a card's text."""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    entries = (entry.rstrip() for entry in _LICENCE.findall(front[1])) if front else ()
    return tuple(entry for entry in entries if not entry.endswith(":"))


def card(manifest: Manifest, licence_lines: tuple[str, ...]) -> str:
    """The whole text; depends on nothing but the manifest and the base's licence."""
    lines = [*_front(manifest, licence_lines), "", *_done(manifest), "", *_loading(manifest), *_train(manifest)]
    return "\n".join([*lines, ""])


def _front(manifest: Manifest, licence_lines: tuple[str, ...]) -> Iterator[str]:
    yield "---"
    if manifest.base.revision is not None and _HUB_ID.fullmatch(manifest.base.id):
        yield f"base_model: {manifest.base.id}"
        yield "base_model_relation: finetune"
    yield "library_name: transformers"
    yield from licence_lines
    yield from ("tags:", "- ckptgrow", "- grown", f"- {manifest.policy}", "---")


def _done(manifest: Manifest) -> Iterator[str]:
    counts, base = manifest.counts, manifest.base
    revision = f" (revision `{base.revision}`)" if base.revision else ""
    yield f"# {base.id}, grown"
    yield ""
    yield (
        f"This is `{base.id}`{revision} with the MLPs of {_which(manifest)} by"
        f" [ckptgrow](https://pypi.org/project/ckptgrow/) {manifest.tool['version']}."
        " Units of the gate and up projections were copied, and each column of the down projection was shared out among"
        " the copies of its unit, so it is the same function: the shares add up to the base's weights exactly."
        " Nothing has been trained yet."
    )
    yield ""
    yield f"- parameters: {counts.base:,} before, {counts.trainable + counts.frozen:,} now"
    yield (
        f"- freeze policy `{manifest.policy}`: {POLICIES[manifest.policy].about}."
        f" {counts.trainable:,} parameters train, {counts.trainable_share_of_base:.1%} of the base"
    )
    yield f"- shares: {' and '.join(manifest.shares['used'])}"
    if counts.filled:
        what = "layers" if manifest.experts is None else "experts"
        yield (
            f"- filling: {counts.filled:,} parameters, {counts.filled_bytes:,} bytes. The {what} that did not grow are"
            " as wide as the others, since the config has one width, with copies of their units whose columns of down"
            " are zero. They change nothing, never train, and can be dropped again"
        )
    yield "- method: Grow, Don't Overwrite ([arXiv 2603.08647](https://arxiv.org/abs/2603.08647))"


def _which(manifest: Manifest) -> str:
    """Which layers were widened, from which width to which."""
    grown = [block for block in manifest.blocks if not block.filled]
    layers = f"its {len(grown)} layers" if manifest.layers is None else named(manifest.layers)
    if manifest.experts is not None:
        there = len({block.layer for block in grown})
        where = named(manifest.layers) if manifest.layers else f"its {there} layer{'s' if there > 1 else ''}"
        layers = f"{named(manifest.experts, 'expert')} of {where}"
    steps = dict.fromkeys(f"from {block.old_width:,} to {block.new_width:,}" for block in grown)
    return f"{layers} widened {', '.join(steps)} units"


def _loading(manifest: Manifest) -> Iterator[str]:
    """What loads a checkpoint that needs code from elsewhere, and how to add it."""
    if not _needs_code(manifest):
        return
    yield "## Load it"
    yield ""
    yield (
        "Its layers have widths of their own, so its config is that of `DeciLMForCausalLM` (model_type `nemotron-nas`),"
        " which builds them from `block_configs`. mlx-lm loads it as it is. vLLM has the model built in but takes the"
        " config class from the checkpoint, and transformers takes the model from there too: copy"
        " `block_config.py`, `configuration_decilm.py`, `modeling_decilm.py` and the"
        " `transformers_*.py` files beside them from a repository of NVIDIA's such as"
        " `nvidia/Llama-3_3-Nemotron-Super-49B-v1` into this folder, add to config.json"
    )
    yield ""
    yield "```json"
    yield '"auto_map": {'
    yield '  "AutoConfig": "configuration_decilm.DeciLMConfig",'
    yield '  "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM"'
    yield "}"
    yield "```"
    yield ""
    yield "and load it with `trust_remote_code`. That code is not part of this checkpoint and was not run by ckptgrow."
    yield ""


def _needs_code(manifest: Manifest) -> bool:
    """Whether it is a model that transformers does not have, without code of its own."""
    return bool(manifest.recast) or (manifest.family == "nemotron-nas" and '"auto_map"' not in manifest.base.config)


def _train(manifest: Manifest) -> Iterator[str]:
    yield "## Train it"
    yield ""
    how = "Load it with `trust_remote_code`" if _needs_code(manifest) else "Load it with transformers as usual"
    yield (
        f"{how}. Only the elements in the boxes of `ckptgrow.json` should train: one"
        " half-open `[start, stop)` pair per dimension, by tensor name; everything else is frozen. In plain PyTorch:"
    )
    yield ""
    yield "```python"
    yield 'folder = "."  # where this README lies'
    yield from SNIPPET.strip().splitlines()
    yield "```"
    yield ""
    if in_stacks(manifest):
        yield (
            "transformers 5 holds the experts in stacks, so there this code stops at its check:"
            ' `ckptgrow.training.freeze(model, folder, how="mask")`, and `guard(optimizer)` of what that returns, find'
            " the boxes in the stacks."
        )
        yield ""
    yield (
        "Keep the weight decay at 0 and start with a fresh optimizer: decay and old momentum move weights whose"
        " gradient is zero. Train in float32, since bfloat16 rounds small steps away; saved in the dtype it came in,"
        " the frozen part is the same bits again."
    )


def folded_card(
    name: str, steps: Iterable[tuple[int, int]], sums: str, error: float | None, licence_lines: tuple[str, ...]
) -> str:
    """The whole text of a folded checkpoint's card.

    `steps`: the width of each MLP before and after; `sums`: what was rounded; `error`: the largest of an MLP, where the
    fold is not exact.
    """
    lossy = ["- lossy"] if error is not None else []
    front = ["---", "library_name: transformers", *licence_lines, "tags:", "- ckptgrow", "- folded", *lossy, "---"]
    what = (
        "units that are equal, parallel or dead were added to those that stay, so it is the same function."
        if error is None
        else f"this fold is lossy. It is not the same function: the MLPs are off by a relative {error:.2g} at most, on"
        " normalised random inputs."
    )
    widths = [(f"from {old:,} to {new:,}", old > new) for old, new in steps]
    unlike = " and ".join(dict.fromkeys(step for step, narrower in widths if narrower))
    told = (
        f"This is `{name}` with {sum(narrower for _, narrower in widths)} MLPs folded {unlike} units by"
        f" [ckptgrow](https://pypi.org/project/ckptgrow/): {what} {sums}"
    )
    return "\n".join([*front, "", f"# {name}, folded", "", told, ""])


def skill_card(manifest: Manifest, elements: int, licence_lines: tuple[str, ...]) -> str:
    """The whole text of a skill's card. `elements`: how many weights it holds."""
    base = manifest.base
    tool = "[ckptgrow](https://pypi.org/project/ckptgrow/)"
    what = f"What a training of `{base.id}`, grown by {tool}, learned: the {elements:,} weights that policy"
    what += f" `{manifest.policy}` lets train"
    if manifest.skills:
        what = f"What {len(manifest.skills)} skills of `{base.id}`, merged by {tool}, and training after that learned:"
        what += f" the {elements:,} weights that are not the base's"
    told = f"{what}, and nothing else. With the base they make the trained model again, bit for bit:"
    code = ("```sh", f"ckptgrow apply {base.id} THIS_FOLDER OUT", "```", "")
    return "\n".join(
        [*_plain_front(manifest, "skill", licence_lines), "", f"# A skill for {base.id}", "", told, "", *code]
    )


def applied_card(manifest: Manifest, licence_lines: tuple[str, ...]) -> str:
    """The whole text of the card of a checkpoint made from base and skill."""
    tool = "[ckptgrow](https://pypi.org/project/ckptgrow/)"
    how = f"grown by {tool} with policy `{manifest.policy}` and trained"
    if manifest.skills:
        how = f"with {len(manifest.skills)} skills merged by {tool}"
    told = (
        f"This is `{manifest.base.id}`, {how}, put together from the base and a skill. `ckptgrow.json` says which"
        " weights are the base's; `ckptgrow revert` gives the base back where the policy allows it."
    )
    front = _plain_front(manifest, "grown", licence_lines)
    return "\n".join([*front, "", f"# {manifest.base.id}, grown and trained", "", told, ""])


def merged_card(manifest: Manifest, licence_lines: tuple[str, ...]) -> str:
    """The whole text of a merged checkpoint's card."""
    told = (
        f"This is `{manifest.base.id}` with {len(manifest.skills)} skills that grew from it, merged by"
        " [ckptgrow](https://pypi.org/project/ckptgrow/): each MLP is, as a function, the base's and"
        " Σ λ·(skill - base) on the same input. Layers add up one after the other, so as a whole it is no such sum."
    )
    used = [f"- {skill['policy']}, λ = {skill['weight']:g}, growth `{skill['manifest']}`" for skill in manifest.skills]
    front = _plain_front(manifest, "merged", licence_lines)
    return "\n".join([*front, "", f"# {manifest.base.id}, {len(used)} skills merged", "", told, "", *used, ""])


def _plain_front(manifest: Manifest, kind: str, licence_lines: tuple[str, ...]) -> Iterator[str]:
    yield "---"
    if manifest.base.revision is not None and _HUB_ID.fullmatch(manifest.base.id):
        yield f"base_model: {manifest.base.id}"
    yield from ("library_name: transformers", *licence_lines, "tags:", "- ckptgrow", f"- {kind}", "---")


# Run by a test on a real grown checkpoint, with `folder` set.
SNIPPET = """
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
manifest = json.loads(Path(folder, "ckptgrow.json").read_text())
boxes = {
    manifest["in_memory_names"].get(tensor["name"], tensor["name"]): tensor["boxes"]
    for tensor in manifest["trainable"]
}

def keep_only(boxes):
    def hook(gradient):
        kept = torch.zeros_like(gradient)
        for box in boxes:
            place = tuple(slice(start, stop) for start, stop in box)
            kept[place] = gradient[place]
        return kept
    return hook

missing = boxes.keys() - {name for name, _ in model.named_parameters()}
assert not missing, f"this model does not have {missing}"
for name, parameter in model.named_parameters():
    parameter.requires_grad_(name in boxes)
    if name in boxes:
        parameter.register_hook(keep_only(boxes[name]))
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
"""
