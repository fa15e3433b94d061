"""What all dialects speak of: the trainable tensors of one grown checkpoint, and where it lies."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ckptgrow.manifest import Manifest, Trainable
from ckptgrow.regions import Division, Spans
from ckptgrow.stacks import Held

_SAFE_START = (*string.ascii_letters, "/", ".")


@dataclass(frozen=True, slots=True)
class Trained:
    """One tensor of which something trains, by its name in a transformers model, and what of it does."""

    tensor: Trainable
    name: str
    division: Division

    @property
    def rows(self) -> Spans | None:
        """The ranges of the first dimension that train, where it is these."""
        return self.division.uniform if self.division.axis == 0 else None

    @property
    def whole(self) -> bool:
        return self.division.whole

    @property
    def is_bias(self) -> bool:
        return len(self.tensor.shape) == 1

    @property
    def stacked(self) -> bool:
        return len(self.tensor.shape) > 2

    @property
    def frozen(self) -> int:
        """How many of its elements are frozen."""
        return self.division.elements(self.division.frozen)


@dataclass(frozen=True)
class Subject:
    """A grown checkpoint: as the user named it, its folder, its manifest, and the names of all tensors in memory.

    `held`: how a transformers model holds experts that have tensors of their own on disk.
    """

    id: str
    revision: str | None
    folder: Path
    manifest: Manifest
    names: tuple[str, ...]
    held: Held

    @cached_property
    def trained(self) -> tuple[Trained, ...]:
        """As a model has them, in the order of the layers: experts in stacks."""
        return self._told(self.held.trainable)

    @property
    def on_disk(self) -> tuple[Trained, ...]:
        """The same as the manifest has them: each expert by itself."""
        return self._told(self.manifest.trainable)

    def _told(self, tensors: tuple[Trainable, ...]) -> tuple[Trained, ...]:
        found = (_trained(tensor, self.manifest) for tensor in tensors)
        return tuple(sorted(found, key=lambda one: (one.tensor.layer, one.name)))

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """The tensors of which nothing trains."""
        moving = {trained.name for trained in self.trained}
        return tuple(name for name in self.names if name not in moving)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers in which something trains."""
        return tuple(sorted({trained.tensor.layer for trained in self.trained}))

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return 1 + max(block.layer for block in self.manifest.blocks)

    @property
    def model(self) -> str:
        """The checkpoint as trainers take it."""
        return self.id.partition("@")[0] if self.revision else self.id

    def counted(self) -> str:
        """What trains, in a few words."""
        counts = self.manifest.counts
        return (
            f"policy {self.manifest.policy}: {counts.trainable:,} elements train"
            f" ({counts.trainable_share_of_base:.1%} of the base), {counts.frozen:,} are frozen"
        )


def _trained(tensor: Trainable, manifest: Manifest) -> Trained:
    return Trained(tensor, manifest.in_memory_names.get(tensor.name, tensor.name), tensor.division())


STACKED = (
    "Experts are named as transformers 5 holds them, in stacks [experts, units, hidden] or [experts, hidden, units]; on"
    '\ndisk each has tensors of its own. A stack cannot be split: ckptgrow.training.freeze needs how="mask".'
)


def caveats(subject: Subject) -> tuple[str, ...]:
    """What to say wherever names are given that the checkpoint on disk does not have."""
    return (STACKED,) if subject.held.stacks else ()


def head(subject: Subject, title: str) -> Iterator[str]:
    """The first lines of a text: what it is, what trains, and what to beware of."""
    yield from commented("\n".join([title, f"{subject.counted()}.", *caveats(subject)]))


def roles(trained: tuple[Trained, ...]) -> str:
    """How many tensors of which kind: `18 gate, 18 up`."""
    found = Counter(one.tensor.role for one in trained)
    return ", ".join(f"{count} {role}" for role, count in found.items())


def commented(text: str) -> Iterator[str]:
    """Lines of a comment in YAML, Python and plain lists."""
    yield from (f"# {line}".rstrip() for line in text.strip().splitlines())


def quoted(text: str) -> str:
    """A YAML string; a plain one where nothing in it could be misread."""
    plain = all(character.isalnum() or character in "/._-" for character in text) and text[:1] in _SAFE_START
    return text if plain else "'" + text.replace("'", "''") + "'"
