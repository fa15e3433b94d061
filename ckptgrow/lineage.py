"""Where a grown checkpoint comes from, as its manifest tells it: the base's description, and the Plan that grew it.

A manifest keeps the base's headers, index and config as texts, and the options of the growth. From them the base is
described without its bytes (as a Hub repository is before it is downloaded), and the Plan is made again by the same
surgery that made it, so that it can be read backwards. Nothing here reads a weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ckptgrow import surgery
from ckptgrow.checkpoint import CONFIG, MANIFEST, Bits, Checkpoint, ShardFile, digest_of
from ckptgrow.errors import CkptgrowError, FormatError, PlanError, RequestError
from ckptgrow.families import EVERY, Architecture, locate
from ckptgrow.families.declared import recalled
from ckptgrow.identity import Base
from ckptgrow.manifest import EXPAND, Manifest, growth_of, load_manifest, manifest_file, named_in
from ckptgrow.marks import read_mask
from ckptgrow.plan import Output, Part, Plan, Term, in_slices
from ckptgrow.regions import Division, Spans
from ckptgrow.surgery import Growth
from ckptgrow.tensors import TensorInfo, framed, header_length, parse_header
from ckptgrow.trained import Trained


@dataclass(frozen=True)
class Past:
    """One growth: its manifest, the base that went into it (described, without bytes), and its Plan."""

    manifest: Manifest
    base: Checkpoint
    architecture: Architecture
    plan: Plan

    def spliced(self, source: str) -> Plan:
        """The growth of BASE with what was learned in its boxes, which `source` has laid end to end."""
        return replace(self.plan, outputs=tuple(_spliced(output, self, source) for output in self.plan.outputs))

    @cached_property
    def of_base(self) -> Plan:
        """The Plan with zeros in the place of all that is not BASE's: of what the skills of a merge learned."""

        def known(part: Part) -> Part:
            return part if all(term.source == surgery.BASE for term in part.terms) else replace(part, terms=())

        outputs = (replace(output, parts=tuple(map(known, output.parts))) for output in self.plan.outputs)
        return replace(self.plan, outputs=tuple(outputs))

    @cached_property
    def trained(self) -> Mapping[str, Division]:
        """Of each tensor that trains, what of it does."""
        axes = {output.name: output.axis for output in self.plan.outputs}
        return {t.name: t.division(axes[t.name]) for t in self.manifest.trainable}


@dataclass(frozen=True)
class Told:
    """The grown tensors as far as a manifest tells: what they look like, and which of the untouched ones are equal."""

    past: Past

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {output.name: output.info for output in self.past.plan.outputs}

    def bits(self, name: str) -> Bits:
        """The base's digest in the place of the elements: equal where they are, and good for nothing else."""
        return np.frombuffer(self.digest(name).encode(), np.uint8)

    def digest(self, name: str) -> str:
        return self.past.manifest.base.digests[name]


def recall(manifest: Manifest, file: str) -> Past:
    """The growth that a manifest describes.

    Raises RequestError where it is no growth, FormatError where it does not say enough, or contradicts itself.
    """
    check_growth(manifest, file)
    try:
        growth = growth_of(manifest)
    except CkptgrowError as error:
        raise FormatError(f"its growth cannot be made again: {error}", file=file) from None
    past = made_again(manifest, growth, file)
    mask = past.manifest
    if (mask.blocks, mask.trainable, mask.counts) != (manifest.blocks, manifest.trainable, manifest.counts):
        raise FormatError(
            "growing the base again does not give what it describes: it was edited, or written by another version",
            file=file,
            hint="Give the grown checkpoint itself instead of its base.",
        )
    return replace(past, manifest=manifest)


def check_growth(manifest: Manifest, file: str) -> None:
    """Raise RequestError for the manifest of a merge."""
    if manifest.operation != EXPAND:
        raise RequestError(
            f"it is of a {manifest.operation}, which is made of skills and not of one base alone",
            file=file,
            hint="Give the skills that it was made of, or to compare with, the merged checkpoint.",
        )


def made_again(manifest: Manifest, growth: Growth, file: str) -> Past:
    """A growth of the base that a manifest describes, and its mask. Raises FormatError where there is none."""
    try:
        base, family = described(manifest.base), recalled(manifest.family, manifest.declaration)
        architecture = surgery.architecture_for(growth, base.config, base.infos, family)
        plan = surgery.expand(base.infos, architecture, growth)
        mask = read_mask(plan, base, architecture, growth)
    except CkptgrowError as error:
        raise FormatError(f"its growth cannot be made again: {error}", file=file) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"not a ckptgrow manifest ({error!r})", file=file) from None
    made = replace(manifest, blocks=mask.blocks, trainable=mask.trainable, counts=mask.counts)
    return Past(made, base, architecture, plan)


def _spliced(output: Output, past: Past, source: str) -> Output:
    """One tensor of the growth in which what trains comes from the skill, which has only the slices that train."""
    division = past.trained.get(output.name)
    if division is None:
        return output
    runs, before = [], 0  # slices that the skill does not have
    for rows, section, spans in division.sections(output):
        shift = before if spans else 0
        runs.append((rows, tuple(_inserted(section, spans, source, shift))))
        before += 0 if spans or rows is None else len(rows)
    return replace(output, parts=in_slices(runs, output.steps[0]))


def _inserted(output: Output, spans: Spans, source: str, shift: int) -> Iterator[Part]:
    taken = 0
    for start, part in output.placed():
        inside = [span for span in spans if span[0] < start + part.size and start < span[1]]
        if not inside or not part.size:
            yield part
            continue
        if not inside[0][0] <= start or start + part.size > inside[0][1]:
            raise PlanError("a box ends within what was copied at once", tensor=output.name)
        units = range(taken, taken + part.size)
        yield Part(part.size, (Term(source, output.name, units, shift=shift),), part.grown)
        taken += part.size


def architecture_of(manifest: Manifest) -> Architecture:
    """All MLPs of the base that a manifest describes: growing changes neither names nor layout.

    Raises FormatError where it does not say enough.
    """
    try:
        base = described(manifest.base)
        return locate(base.config, base.infos, EVERY, recalled(manifest.family, manifest.declaration))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"not a ckptgrow manifest ({error!r})", file=MANIFEST) from None


def described(base: Base) -> Checkpoint:
    """The base as a checkpoint that has headers, config and index but no bytes."""
    shards = {}
    for file, told in base.shards.items():
        text = told["text"].encode()
        head = framed(text)
        if digest_of(head) != told["header"]:
            raise FormatError("the header in the manifest is not the one its digest is of", file=file)
        header_length(head, told["bytes"])
        shards[file] = ShardFile(
            parse_header(text, told["bytes"] - len(head)), len(head), told["bytes"], told["header"]
        )
    index = json.loads(base.index) if base.index is not None else None
    return Checkpoint(Path(base.id), base.config, json.loads(base.config), index, shards)


def belonging(trained: Trained, text: bytes, path: Path) -> Iterator[str]:
    """Whether the trained checkpoint names this manifest. Raises RequestError where it names another."""
    named = named_in(trained.config)
    if named is None:
        yield f"{trained.folder} does not say in its {CONFIG} which growth it comes from"
    elif named != digest_of(text):
        raise RequestError(
            f"its {CONFIG} names another {MANIFEST} than {path}",
            file=str(trained.folder),
            hint="Give the grown checkpoint that this training started from.",
        )


def find_manifest(trained: Trained, given: Path | None) -> tuple[Path, tuple[str, ...]]:
    """The manifest's file, beside the weights or where the user says, and notes. Raises RequestError for none."""
    path = trained.folder / MANIFEST
    if given is not None:
        path = manifest_file(given)
    elif not path.is_file():
        raise RequestError(
            f"it has no {MANIFEST}: trainers do not copy it",
            file=str(trained.folder),
            hint="Name the grown folder, or its ckptgrow.json, with --manifest.",
        )
    return path, tuple(belonging(trained, load_manifest(path).text().encode(), path))


def stranger(opened: Checkpoint, base: Base) -> tuple[str, str] | None:
    """(file or tensor, why) by which a folder is not that base; None where it is, to the last bit of each weight."""
    for file in sorted(opened.shards.keys() | base.shards.keys()):
        shard, told = opened.shards.get(file), base.shards.get(file)
        if shard is None or told is None or (shard.nbytes, shard.digest) != (told["bytes"], told["header"]):
            return file, f"it is not {base.id}'s (another size or header)"
    for name, digest in base.digests.items():
        if opened.digest(name) != digest:
            return name, f"its weights are not {base.id}'s"
    return (CONFIG, f"it is not {base.id}'s") if opened.config_text != base.config else None
