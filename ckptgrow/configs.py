"""What two config.json say: whether the same but for the widths, and whether the widths that the tensors have."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ckptgrow.families import Architecture, value_at

NEUTRAL_KEYS = frozenset({"ckptgrow", "transformers_version", "_name_or_path", "torch_dtype", "dtype"})
Config = Mapping[str, Any]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested config, by dotted path, without the keys that say nothing about the function."""
    for key, value in config.items():
        if key in NEUTRAL_KEYS:
            continue
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def retold(base: Config, architecture: Architecture) -> Config:
    """The base's config in the words in which the architecture is told."""
    return {**base, **{edit.path: edit.value for edit in architecture.recast}}


def width_keys(architecture: Architecture) -> set[str]:
    """The config keys that growth may change."""
    keys = {group.path for group in architecture.groups}
    return keys | {g.site.under(key) for g in architecture.groups for key, _ in g.site.also}


def changes(base: Config, grown: Config, architecture: Architecture) -> Iterator[str]:
    """Keys that both have, with other values, but for those of the widths."""
    mine, theirs = dict(_flat(retold(base, architecture))), dict(_flat(grown))
    for key in (mine.keys() & theirs.keys()) - width_keys(architecture):
        if json.dumps(mine[key]) != json.dumps(theirs[key]):  # as text: NaN is itself, 1 is not 1.0
            yield f"{key} is {theirs[key]!r}, in the base {mine[key]!r}"
    for group in (group for group in architecture.groups if group.site.entry):
        if group.beside(mine.get(group.path)) != group.beside(theirs.get(group.path)):
            yield f"{group.path} says other things besides the widths than in the base"


def unclear(base: Config, grown: Config, architecture: Architecture) -> Iterator[str]:
    """Keys that only one config has: transformers writes its defaults out when it saves, the Hub often does not."""
    mine, theirs = dict(_flat(retold(base, architecture))), dict(_flat(grown))
    for key in sorted((mine.keys() ^ theirs.keys()) - width_keys(architecture)):
        where = "the base" if key in mine else "the grown one"
        yield f"{key} stands only in {where}: the other has a default that is not written here"


def untold(base: Config, grown: Config, architecture: Architecture, widths: Mapping[str, int]) -> Iterator[str]:
    """The config must say the widths that the tensors have, or nobody can load them (0: one that could not be read)."""
    for group in architecture.groups:
        values = {path: value_at(grown, path) for path in width_keys(architecture)}
        beside = {group.site.under(key): wanted for key, wanted in group.site.also}
        found = [widths[mlp.block] for mlp in group.mlps if widths[mlp.block]]
        old = [mlp.width for mlp in group.mlps if widths[mlp.block]]
        if found == old and values[group.path] in (None, value_at(retold(base, architecture), group.path)):
            continue
        told = [group.told(values, mlp) for mlp in group.mlps if widths[mlp.block]]
        if told != found:
            shown = ", ".join(str(width) for width in sorted(set(found)))
            says = f"says {told}" if group.site.entry else f"is {values[group.path]!r}"
            yield f"{group.path} {says}, but the tensors have width {shown}"
        for key, wanted in beside.items():
            if found != old and values[key] != wanted:
                yield f"{key} is {values[key]!r}, but {wanted!r} goes with the width it says"
