"""ckptgrow.json: what was done to a checkpoint, to which base, and which elements train.

The schema is manifest.schema.json beside this file. A trainable tensor is named as on disk, with explicit boxes: one
half-open, zero-based [start, stop) pair per dimension. Every tensor, and every element, that is not named is frozen.
Growing a grown checkpoint again keeps its manifest in `history`, oldest first. Nothing in it depends on time or place,
so equal inputs and options give an equal file; config.json carries its digest under the key `ckptgrow`, the one thing
that survives a trainer's save_pretrained.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ckptgrow.checkpoint import MANIFEST, Checkpoint, digest_of
from ckptgrow.config import edited, set_value
from ckptgrow.errors import FormatError, RequestError
from ckptgrow.families import Architecture, in_memory_name, ties
from ckptgrow.families.declared import outside
from ckptgrow.identity import Base
from ckptgrow.layers import listed
from ckptgrow.plan import Plan
from ckptgrow.policy import Box, kinds, rule_for
from ckptgrow.regions import Division, divided
from ckptgrow.surgery import Growth

SCHEMA = 1
CONFIG_KEY = "ckptgrow"
EXPAND, MERGE = "expand", "merge"
_DIGEST = re.compile("sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class GrownBlock:
    """One MLP: its width before and after, and which base unit each new unit copies, as ranges of equal length.

    `filled`: the new units have zero columns and train nothing; they only make the MLP as wide as those that grew.
    `experts`: the ones that grew of those stacked in it, where the others are filled.
    """

    block: str
    layer: int
    old_width: int
    new_width: int
    copies: tuple[Mapping[str, tuple[int, int]], ...]
    filled: bool = False
    experts: tuple[int, ...] | None = None

    @property
    def grew(self) -> tuple[str, ...]:
        """The MLP by its name, or those of the experts stacked in it that grew; none where it was only filled up."""
        if self.experts is not None:
            return tuple(f"{self.block}[{expert}]" for expert in self.experts)
        return () if self.filled else (self.block,)

    def to_json(self) -> dict[str, Any]:
        """`experts` only where there are some: the file of a growth of all is what it always was."""
        described = asdict(self)
        return described if self.experts is not None else {k: v for k, v in described.items() if k != "experts"}


@dataclass(frozen=True, slots=True)
class Trainable:
    """One tensor of which some elements train: the boxes, each a [start, stop) pair per dimension."""

    name: str
    role: str
    layer: int
    shape: tuple[int, ...]
    dtype: str
    boxes: tuple[Box, ...]

    def division(self, axis: int = 0) -> Division:
        """The boxes read as ranges, along `axis` where they may be of several. Raises FormatError for what are none.

        Only experts may differ: in a stack of matrices, or of biases.
        """
        found = divided(self.shape, self.boxes, axis)
        if found.uniform is None and len(self.shape) < 3 and not self.role.endswith("_bias"):
            raise FormatError(f"boxes {self.boxes} are not ranges along one axis of {self.shape}")
        return found

    @property
    def elements(self) -> int:
        return sum(math.prod(stop - start for start, stop in box) for box in self.boxes)


@dataclass(frozen=True, slots=True)
class Counts:
    """Elements of the grown checkpoint, and of the base; the share is of the base's parameters.

    `filled` of the frozen ones are the filling of layers and experts that did not grow, and take `filled_bytes`.
    """

    trainable: int
    frozen: int
    base: int
    trainable_share_of_base: float
    filled: int = 0
    filled_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole of ckptgrow.json."""

    schema: int
    tool: Mapping[str, str]
    operation: str
    base: Base
    family: str
    policy: str
    growth: Mapping[str, Any]
    shares: Mapping[str, Any]
    blocks: tuple[GrownBlock, ...]
    trainable: tuple[Trainable, ...]
    counts: Counts
    inexact_halves: int
    ties: Mapping[str, str]
    in_memory_names: Mapping[str, str]
    history: tuple[Mapping[str, Any], ...]
    layers: tuple[int, ...] | None = None  # the ones that grew; None: all
    declaration: Mapping[str, Any] | None = None  # the family, where it is not one of the table
    recast: Mapping[str, Any] | None = None  # the config in another family's words: what changed but for the widths
    skills: tuple[Mapping[str, Any], ...] = ()  # of a merge: each skill's manifest, growth and weight
    _file: str | None = field(default=None, init=False, compare=False, repr=False)  # a changed copy does not have it

    @property
    def experts(self) -> tuple[int, ...] | None:
        """The experts that grew, where others beside them did not."""
        grown = {block.layer for block in self.blocks if not block.filled}
        some = any(block.experts or (block.filled and block.layer in grown) for block in self.blocks)
        return listed(self.growth.get("experts", "all")) if some else None

    def to_json(self) -> dict[str, Any]:
        described = asdict(self) | {"blocks": tuple(block.to_json() for block in self.blocks)}
        del described["_file"]
        return described

    def text(self) -> str:
        """The file: as it was read, since another version may write it otherwise; of a new one, two levels indented,
        each block and each trainable tensor on a line of its own."""
        if self._file is not None:
            return self._file
        lines = [f"  {json.dumps(key)}: {_spread(value)}" for key, value in self.to_json().items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @property
    def digest(self) -> str:
        return digest_of(self.text().encode())

    def config_entry(self, architecture: Architecture) -> dict[str, Any]:
        """What config.json gets under `ckptgrow`; `grown_layers` and `grown_experts` where not all grew."""
        base_width = {group.path: group.value_of(architecture.widths) for group in architecture.groups}
        entry: dict[str, Any] = {"manifest": self.digest, "base_width": base_width}
        entry |= {} if self.layers is None else {"grown_layers": [*self.layers]}
        return entry if architecture.listed is None else entry | {"grown_experts": [*architecture.listed]}


@dataclass(frozen=True, slots=True)
class Grown:
    """Which elements of a Plan's result train, known before anything is written."""

    blocks: tuple[GrownBlock, ...]
    trainable: tuple[Trainable, ...]
    counts: Counts


def describe(
    base: Checkpoint,
    identity: Base,
    architecture: Architecture,
    growth: Growth,
    grown: Grown,
    inexact: int,
    version: str,
) -> Manifest:
    """The manifest of a growth that has been carried out."""
    family = architecture.own
    renamed = {tensor.name: in_memory_name(family, tensor.name) for tensor in grown.trainable}
    rules = sorted(set(_rules(architecture, growth)))
    return Manifest(
        schema=SCHEMA,
        tool={"name": "ckptgrow", "version": version},
        operation=EXPAND,
        base=identity,
        family=family.model_type,
        policy=growth.policy,
        growth=asdict(growth),
        shares={"asked": growth.shares, "used": rules, "seed": growth.seed},
        blocks=grown.blocks,
        trainable=grown.trainable,
        counts=grown.counts,
        inexact_halves=inexact,
        ties=ties(base.config, family, base.infos),
        in_memory_names={disk: memory for disk, memory in renamed.items() if disk != memory},
        history=history(base),
        layers=growth.layers,
        declaration=outside(family),
        recast={edit.path: edit.value for edit in architecture.recast} or None,
    )


def history(base: Checkpoint) -> tuple[Mapping[str, Any], ...]:
    """The manifests of the growths that the base already went through, oldest first, without their own histories.

    Where a trainer saved the base without its ckptgrow.json, the digest in its config.json is all there is.
    Raises FormatError where the two contradict each other.
    """
    digest, path = named_in(base.config), base.folder / MANIFEST
    if not path.is_file():
        return ({"manifest": digest},) if digest else ()
    text = path.read_bytes()
    if digest != digest_of(text):
        raise FormatError(
            "its digest is not the one in config.json: it belongs to another checkpoint",
            file=str(path),
            hint="Remove it, or put the right one there.",
        )
    manifest = _parsed(text, path)
    return (*manifest.pop("history"), manifest)


def named_in(config: Mapping[str, Any]) -> str | None:
    """The digest of the manifest that a config.json names."""
    entry = config.get(CONFIG_KEY)
    digest = entry.get("manifest") if isinstance(entry, Mapping) else None
    return digest if isinstance(digest, str) and _DIGEST.fullmatch(digest) else None


def growth_of(manifest: Manifest) -> Growth:
    """The growth that a manifest describes, to be made again. Raises CkptgrowError for one that is not to be had."""
    return growth_from(manifest.growth)


def growth_from(options: Mapping[str, Any]) -> Growth:
    """The growth that options in a manifest say. Raises CkptgrowError for one that is not to be had."""
    known: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        return Growth(**known)
    except TypeError:
        raise FormatError(f"its growth has options that are not known: {sorted(options)}") from None


def grown_config(text: str, plan: Plan, manifest: Manifest, architecture: Architecture) -> str:
    """config.json of the result: the base's text with the Plan's edits and the manifest's digest."""
    return set_value(edited(text, plan.config), CONFIG_KEY, manifest.config_entry(architecture))


def previous(manifest: Manifest) -> Manifest | None:
    """The manifest of the base, where the base was itself grown and its manifest was there."""
    if not manifest.history:
        return None
    *earlier, last = manifest.history
    try:
        return _typed({**last, "history": earlier})
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def manifest_file(given: Path) -> Path:
    """A manifest's file, where that or the folder that holds it is given."""
    return given / MANIFEST if given.is_dir() else given


def load_manifest(path: Path) -> Manifest:
    """The manifest in a file, or in a grown checkpoint's folder. Raises FormatError for anything else."""
    path = manifest_file(path)
    try:
        text = path.read_bytes()
        manifest = _typed(_parsed(text, path))
        object.__setattr__(manifest, "_file", text.decode())
        return manifest
    except OSError as error:
        raise FormatError(f"it cannot be read ({error.strerror})", file=str(path)) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"not a ckptgrow manifest ({error!r})", file=str(path)) from None


def manifest_of(grown: Checkpoint) -> Manifest:
    """The manifest in a grown checkpoint's folder, held against its config and headers.

    Raises RequestError where there is none, and FormatError where it is another checkpoint's.
    """
    if not (grown.folder / MANIFEST).is_file():
        raise RequestError(
            f"it has no {MANIFEST}: this works with the grown checkpoint, not with its base",
            file=str(grown.folder),
            hint="Give the folder that ckptgrow expand wrote; the same expand of the base writes the same bytes again.",
        )
    history(grown)
    manifest = load_manifest(grown.folder)
    check_described(grown, manifest)
    return manifest


def check_described(grown: Checkpoint, manifest: Manifest) -> None:
    """Raise FormatError where a trainable tensor is not in the checkpoint as the manifest describes it."""
    for tensor in manifest.trainable:
        info = grown.infos.get(tensor.name)
        if info is None or (info.shape, info.dtype) != (tensor.shape, tensor.dtype):
            raise FormatError(
                f"the manifest describes it as {tensor.dtype} {list(tensor.shape)}",
                file=str(grown.folder),
                tensor=tensor.name,
            )


def _typed(described: dict[str, Any]) -> Manifest:
    """The frozen value of what `Manifest.to_json` made; lists become tuples again."""
    copied = [_grown_block(block) for block in described["blocks"]]
    trainable = [
        Trainable(**{**tensor, "shape": tuple(tensor["shape"]), "boxes": tuple(map(_box, tensor["boxes"]))})
        for tensor in described["trainable"]
    ]
    typed = {"base": Base(**described["base"]), "counts": Counts(**described["counts"])}
    typed |= {"growth": {k: tuple(v) if isinstance(v, list) else v for k, v in described["growth"].items()}}
    typed |= {"blocks": tuple(copied), "trainable": tuple(trainable), "history": tuple(described["history"])}
    typed |= {"skills": tuple(described.get("skills", ()))}
    typed |= {"layers": tuple(described["layers"])} if described.get("layers") else {}
    return Manifest(**{**described, **typed})


def _grown_block(block: Mapping[str, Any]) -> GrownBlock:
    copies = tuple({k: (v[0], v[1]) for k, v in run.items()} for run in block["copies"])
    experts = block.get("experts")
    return GrownBlock(**{**block, "copies": copies, "experts": None if experts is None else tuple(experts)})


def _box(spans: list[list[int]]) -> Box:
    return tuple((int(start), int(stop)) for start, stop in spans)


def _parsed(text: bytes, path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise FormatError(f"not valid JSON ({error})", file=str(path)) from None
    if (
        not isinstance(manifest, dict)
        or manifest.get("schema") != SCHEMA
        or not isinstance(manifest.get("history"), list)
    ):
        raise FormatError(f"not a ckptgrow manifest of schema {SCHEMA}", file=str(path))
    return manifest


def _rules(architecture: Architecture, growth: Growth) -> Iterator[str]:
    """The rules by which shares are made: units with one copy more than the others may need another rule."""
    for group in architecture.groups:
        for old in group.starts(growth.layers):
            for count, _ in kinds(old, growth.new_width(old)):
                if count > 1:
                    yield "even" if group.grain > 1 else rule_for(count, growth.rules, growth.shares)


def _spread(value: Any) -> str:
    """A list or an object of objects with one item a line; anything else on one line."""
    if isinstance(value, list | tuple) and value:
        return "[\n" + ",\n".join(f"    {json.dumps(item)}" for item in value) + "\n  ]"
    if isinstance(value, Mapping) and any(isinstance(item, Mapping) for item in value.values()):
        return json.dumps(value, indent=2).replace("\n", "\n  ")
    return json.dumps(value)
