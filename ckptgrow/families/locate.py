"""Holding a declaration against a checkpoint: its MLPs, every size read from tensor shapes.

There is no code per family: `locate` reads any of them, and refuses a checkpoint in which a declared tensor is
missing, an undeclared one lies beside it, or shapes contradict. Widths are never taken from the config, which omits
keys, holds None, or is wrong. Names are matched by their end, under any prefix; where several sites fit a block
(other names or another orientation of the same MLP), shapes decide.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ckptgrow.errors import CkptgrowError, FamilyError, RequestError
from ckptgrow.families.agree import Spot, check_together
from ckptgrow.families.form import Family, Site, Slot
from ckptgrow.families.found import Architecture, Group, Mlp, value_at
from ckptgrow.families.storage import Storage, refuse_signs, storage_of
from ckptgrow.families.table import FAMILIES, REFUSED
from ckptgrow.tensors import TensorInfo

HEAD = "lm_head.weight"
EVERY = "every"  # for `locate`: whatever tower can be read
# What shares can be made of. Other float formats need their scales grown with them.
GROWABLE_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
Infos = Mapping[str, TensorInfo]


def locate(
    config: Mapping[str, Any], infos: Infos, tower: str | None = None, family: Family | None = None
) -> Architecture:
    """The family of a checkpoint and the MLPs of one tower (by default its first), checked against the shapes.

    EVERY takes all towers that can be read, for those who must know what may have grown. Raises FamilyError.
    """
    family = family or family_of(config)
    if tower == EVERY:
        return _all_towers(config, infos, family)
    sites = _sites(config, family, family.towers[0] if tower is None else tower)
    storage = storage_of(config, sites)
    try:
        spots = _spots(family, sites, config, infos, storage)
    except FamilyError:
        refuse_signs(infos)
        raise
    groups: dict[str, list[Mlp]] = defaultdict(list)
    for spot in spots:
        groups[spot.mlp.site.path].append(spot.mlp)
    found = tuple(Group(path, tuple(mlps), value_at(config, path)) for path, mlps in groups.items())
    check_together(family, config, found, spots)
    return Architecture(family, found)


def _sites(config: Mapping[str, Any], family: Family, tower: str) -> tuple[Site, ...]:
    """The sites of a tower, with their keys where this config has them: older ones do not nest those of the text."""
    for name, why in family.refuses:
        if name == tower:
            raise FamilyError(f"the {tower} tower of model_type {family.model_type!r} cannot be grown: {why}")
    if tower not in family.towers:
        raise RequestError(f"--tower {tower or repr(tower)}: {family.model_type!r} has {', '.join(family.towers)}")
    sites = [site for site in family.sites if site.tower == tower]
    for i, site in enumerate(sites):
        if value_at(config, site.scope or "model_type") is None and site.width in config:
            sites[i] = replace(site, scope="")
        scoped(config, sites[i].scope, family)
    return tuple(sites)


def _all_towers(config: Mapping[str, Any], infos: Infos, family: Family) -> Architecture:
    groups: list[Group] = []
    refusals: list[CkptgrowError] = []
    for tower in family.towers:
        try:
            groups += locate(config, infos, tower, family).groups
        except CkptgrowError as error:
            refusals.append(error)
    if not groups:
        raise refusals[0]
    return Architecture(family, tuple(groups))


def family_of(config: Mapping[str, Any]) -> Family:
    """The declaration for this config's model_type. Raises FamilyError for unknown and for refused ones."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise FamilyError("it has no model_type", file="config.json")
    if model_type in REFUSED:
        raise FamilyError(f"model_type {model_type!r} cannot be grown: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        raise FamilyError(
            f"unknown model_type {model_type!r}",
            hint="ckptgrow inspect --propose SRC writes a declaration from names and shapes, --family FILE takes one."
            f" Known: {', '.join(sorted(FAMILIES))}.",
        )
    return FAMILIES[model_type]


def scoped(config: Mapping[str, Any], scope: str, family: Family) -> Mapping[str, Any]:
    """The (nested) config that holds a site's keys."""
    found = value_at(config, scope) if scope else config
    if not isinstance(found, Mapping):
        raise FamilyError(f"model_type {family.model_type!r} keeps its width in {scope}, which is missing")
    return found


def in_memory_name(family: Family, name: str) -> str:
    """The name under which transformers holds a tensor of this name on disk."""
    for disk, memory in family.in_memory:
        if name.startswith(disk):
            return memory + name.removeprefix(disk)
    return name


def ties(config: Mapping[str, Any], family: Family, infos: Infos) -> dict[str, str]:
    """Tensors that are not on disk because they are another one: {"lm_head.weight": the embedding's name}."""
    inner = value_at(config, family.sites[0].scope) if family.sites[0].scope else config
    told = [scope.get("tie_word_embeddings") for scope in (config, inner) if isinstance(scope, Mapping)]
    if False in told or any(ends_in(name, HEAD) for name in infos):
        return {}
    embeddings = [name for name in infos if ends_in(name, family.embedding)]
    return {HEAD: embeddings[0]} if embeddings else {}


def ends_in(name: str, ending: str) -> bool:
    """Whether a tensor's name is that one, under any prefix."""
    return name == ending or name.endswith("." + ending)


# ---------------------------------------------------------------- blocks by name


def pattern_of(stem: str) -> re.Pattern[str]:
    """What a tensor in a block of that stem is called: its block, the numbers in it, and the name below it."""
    filled = re.escape(stem).replace(r"\*\.", r"(?:.+\.)?").replace(r"\{\}", r"\d+")
    filled = re.sub(r"\\\{(layer|expert)\\\}", r"(?P<\1>\\d+)", filled)
    return re.compile(rf"(?P<block>(?P<prefix>(?:.+\.)?){filled})\.(?P<slot>.+)", re.DOTALL)


def _spots(
    family: Family, sites: tuple[Site, ...], config: Mapping[str, Any], infos: Infos, storage: Storage | None
) -> list[Spot]:
    """Every MLP with where it was found, in the order of the sites, then of prefix, layer and expert."""
    stems: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        stems[site.stem].append(site)
    spots, blocks = [], {}
    for stem, theirs in stems.items():
        matches: dict[str, dict[str, re.Match[str]]] = defaultdict(dict)
        for match in filter(None, map(pattern_of(stem).fullmatch, infos)):
            matches[match["block"]][match["slot"]] = match
        for block, named in matches.items():
            if any(slot.name in named for site in theirs for slot in site.template.slots if slot.required):
                spots.append(_spot(theirs, named, config, infos, storage))
                blocks[block] = named
    if not spots:
        wanted = min(slot.name for slot in sites[0].template.slots if slot.required)
        stem = sites[0].stem.replace("*.", "").replace("{layer}", "N").replace("{expert}", "N")
        raise FamilyError(f"model_type {family.model_type!r}, but no tensor is named [...]{stem}.{wanted}")
    _check_declared(family, spots, blocks, infos)
    order = {site.stem: place for place, site in enumerate(sites)}
    return sorted(spots, key=lambda s: (order[s.mlp.site.stem], s.prefix, s.mlp.layer, s.mlp.expert or 0, s.mlp.block))


def _spot(
    sites: list[Site],
    named: Mapping[str, re.Match[str]],
    config: Mapping[str, Any],
    infos: Infos,
    storage: Storage | None,
) -> Spot:
    """The MLP of one block: of the sites with its stem the one whose tensors are there and whose shapes fit."""
    match = next(iter(named.values()))
    missing = {site: [name for name in _needed(site) if name not in named] for site in sites}
    least = min(len(names) for names in missing.values())
    if least:
        site = next(site for site in sites if len(missing[site]) == least)
        raise FamilyError(
            "it is missing, but other tensors of its MLP are there", tensor=f"{match['block']}.{missing[site][0]}"
        )
    fitting, refusals = [], []
    most = max(len(_needed(site)) for site in sites if not missing[site])
    for site in (site for site in sites if not missing[site] and len(_needed(site)) == most):
        try:
            fitting.append(_mlp(site, match, named, config, infos, storage))
        except FamilyError as error:
            refusals.append(error)
    if not fitting:
        raise refusals[0]
    if len(fitting) > 1:  # of the two ways round, the one of the hidden size that the config says
        fitting = [m for m in fitting if value_at(config, m.site.under(m.site.hidden)) == m.hidden] or fitting
    if len(fitting) > 1:
        raise FamilyError("its shapes fit in both orientations: which axis has the units?", tensor=fitting[0].down)
    start, stop = match.span("layer") if "{layer}" in fitting[0].site.stem else (0, 0)
    return Spot(fitting[0], match["prefix"], start, stop)


def _needed(site: Site) -> list[str]:
    """The tensors that no MLP of this site is without."""
    return [slot.name for slot in site.template.slots if slot.required and not (slot.shared and site.spare)]


def _check_declared(
    family: Family, spots: list[Spot], blocks: Mapping[str, Mapping[str, re.Match[str]]], infos: Infos
) -> None:
    """No tensor beside those declared: none in a closed block, none in the modules of an open one or of its width."""
    declared = {name for spot in spots for name in spot.declared()}
    for spot in spots:
        mlp = spot.mlp
        modules = tuple({f"{name.rpartition('.')[0]}." for name in mlp.tensors})
        for name in sorted(match.string for match in blocks[mlp.block].values()):
            if name in declared or any(name.startswith(f"{other}.") for other in _inner(blocks, mlp.block)):
                continue
            if mlp.site.open and not name.startswith(modules) and infos[name].shape != (mlp.width,):
                continue
            if mlp.site.open and infos[name].shape == (mlp.hidden,) and not name.startswith(modules):
                continue
            raise FamilyError(
                f"model_type {family.model_type!r} declares no such tensor, and growing the MLP around it may break it",
                tensor=name,
                hint="A quantised or customised checkpoint? Grow a plain one.",
            )


def _inner(blocks: Mapping[str, Any], block: str) -> Iterator[str]:
    """The blocks that lie in this one."""
    yield from (other for other in blocks if other.startswith(block + "."))


# ---------------------------------------------------------------- one MLP by shape


def _mlp(
    site: Site,
    match: re.Match[str],
    named: Mapping[str, re.Match[str]],
    config: Mapping[str, Any],
    infos: Infos,
    storage: Storage | None,
) -> Mlp:
    """The MLP of one block as this site declares it."""
    block = match["block"]
    tensors: dict[str, Slot] = {}
    for slot in site.template.slots:
        name = re.escape(slot.name).replace(r"\{\}", r"\d+")
        for there in (n for n in named if re.fullmatch(name, n)) if slot.extra else ({slot.name} & named.keys()):
            tensors[f"{block}.{there}"] = slot
    tensors, experts = _with_experts(site, tensors, config, infos)
    if storage:
        tensors = storage.with_scales(tensors, infos)
    width, hidden = _sizes(site, tensors, infos, experts)
    numbers = match.groupdict()
    expert = numbers.get("expert")
    layer = int(numbers.get("layer") or 0)
    return Mlp(block, layer, tensors, width, hidden, site, experts, None if expert is None else int(expert))


def _with_experts(
    site: Site, tensors: Mapping[str, Slot], config: Mapping[str, Any], infos: Infos
) -> tuple[dict[str, Slot], int]:
    """The slots, a lane for each expert where those lie along the axis of units, and how many experts there are."""
    name, slot = next(iter(tensors.items()))
    if slot.stacked:
        return dict(tensors), infos[name].shape[0] if infos[name].shape else 0
    if not slot.flat:
        return dict(tensors), 1
    experts = value_at(config, site.under(site.experts))
    if type(experts) is not int or experts < 1:
        raise FamilyError(f"{site.under(site.experts)} must say how many experts are in it", tensor=name)
    return {name: replace(slot, lanes=slot.lanes * experts) for name, slot in tensors.items()}, experts


def _sizes(site: Site, tensors: Mapping[str, Slot], infos: Infos, experts: int) -> tuple[int, int]:
    """(width, hidden), read from the first tensor and demanded of the others, but for what a connector's down gives."""
    width = hidden = None
    for name, slot in tensors.items():
        info = infos[name]
        units, other = _units(info, slot, experts)
        width = units if width is None else width
        hidden = other if hidden is None else hidden
        other = hidden if slot.shared and not site.hidden else other
        if units != width or other not in (None, hidden):
            raise FamilyError(
                f"shape {list(info.shape)} contradicts the width {width} and hidden size {hidden} of its MLP",
                tensor=name,
            )
    if not width or not hidden or not experts:
        raise FamilyError("its MLP has no units", tensor=next(iter(tensors)))
    return width, hidden


def _units(info: TensorInfo, slot: Slot, experts: int) -> tuple[int, int | None]:
    """(units, hidden size) that one tensor shows; hidden is None where it has no such axis."""
    shape, role = info.shape, "_".join(dict.fromkeys(slot.lanes))
    places = len(slot.lanes) * slot.span
    first = int(slot.stacked)
    if (
        len(shape) != (1 if slot.vector else 2) + first
        or (slot.stacked and shape[0] != experts)
        or shape[slot.axis] % places
    ):
        raise FamilyError(f"shape {list(shape)} is not that of a {role} projection", tensor=info.name)
    if info.dtype not in GROWABLE_DTYPES:
        raise FamilyError(
            f"{info.dtype} weights cannot be shared out",
            tensor=info.name,
            hint=f"Grow a checkpoint in one of {', '.join(GROWABLE_DTYPES)}.",
        )
    other = None if slot.vector or slot.extra or slot.block > 1 else shape[2 * first + 1 - slot.axis]
    return shape[slot.axis] // places * slot.block, other
