"""A first declaration for an unknown model_type, from names and shapes: which axes of one size pair up.

A guess to be read, not a fact: it looks at the blocks that hold the most layers, at two- and three-dimensional tensors
of the hidden size and one other, and at the words in their names. What it proposes is held against the checkpoint.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckptgrow.errors import FamilyError
from ckptgrow.families.form import Family, Site, Slot, Template
from ckptgrow.tensors import TensorInfo

Infos = Mapping[str, TensorInfo]
_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "model_dim", "hidden_dim")
_WIDTH = re.compile("inter|ffn|ff|mlp|inner|feed|ratio", re.IGNORECASE)
_DEPTH = re.compile("^(num_hidden_layers|n_?layers?|num_layers|num_blocks|depth|.*coder_layers)$")
_NOT_AN_MLP = re.compile("attn|attention|norm|embed|head|mixer|conv|rotary", re.IGNORECASE)
_ACTIVATION = re.compile("^(.*hidden_act|hidden_activation|activation_function|activation|act_fn|ffn?_act.*)$")
_EXPERT = re.compile("expert", re.IGNORECASE)
_GATE = re.compile(r"gate|w1\b|wi_0|fc12", re.IGNORECASE)
_DOWN = re.compile(r"down|w2\b|wo\b|fc2|out|proj|4h_to_h|lin2|value|output", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Found:
    """The first block of a stem: what is in it, how many such blocks there are, whether other things lie in it."""

    block: str
    template: Template
    width: int
    layers: int
    others: bool


def propose(config: Mapping[str, Any], infos: Infos) -> tuple[Family, tuple[str, ...]]:
    """A declaration of what may be this checkpoint's MLPs, and what to look at in it. Raises FamilyError for none."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise FamilyError("it has no model_type", file="config.json")
    keys = dict(_leaves(config))
    hidden = _hidden(keys, infos)
    blocks = _blocks(infos)
    best: dict[str, _Found] = {}
    for (stem, block), names in sorted(blocks.items()):
        found = _template(block, names, infos, hidden)
        if found and stem not in best:
            known = {f"{block}.{slot.name}" for slot in found[0].slots} | {f"{block}.{s}" for s in found[0].still}
            others = any(name.startswith(block + ".") and name not in known for name in infos)
            best[stem] = _Found(block, *found, len({b for s, b in blocks if s == stem}), others)
    if not best:
        raise FamilyError(
            f"no two tensors pair up around the hidden size {hidden}: no MLP was recognised",
            hint="Write a declaration by hand; the README shows one.",
        )
    trusted = {stem: one for stem, one in best.items() if _named(one, keys)} or best
    sites, notes = [], [f"hidden size {hidden}"]
    for stem, one in best.items():
        site, said = _site(stem, one, keys)
        if stem in trusted:
            sites.append(site)
        else:  # beside MLPs that the config knows, more likely something else
            said = f"left out, since {said}"
        notes.append(f"{one.block}: width {one.width:,}, {said}")
    declared = {name for (stem, _), names in blocks.items() if stem in trusted for name in names}
    notes += [note for one in trusted.values() for note in _beside(one, declared, infos)]
    return Family(model_type, tuple(sites)), tuple(notes)


def _beside(one: _Found, declared: set[str], infos: Infos) -> Iterator[str]:
    """What else in the layer has an axis of that size, and may have to grow too."""
    layer = re.match(r".*?\.\d+\.", f"{one.block}.")
    for name in sorted(infos.keys() - declared):
        if layer and name.startswith(layer[0]) and one.width in infos[name].shape:
            yield f"{name} {[*infos[name].shape]} has an axis of {one.width:,} too: does it belong to it?"


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in a nested config that is no object, by dotted key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _hidden(keys: Mapping[str, Any], infos: Infos) -> int:
    """The hidden size: what the config calls so, or else the size that most matrices share."""
    for name in _HIDDEN:
        for key, value in keys.items():
            if key.rpartition(".")[2] == name and type(value) is int:
                return value
    sizes = Counter(size for info in infos.values() if len(info.shape) == 2 for size in set(info.shape))
    if not sizes:
        raise FamilyError("it has no matrices")
    return sizes.most_common(1)[0][0]


def _blocks(infos: Infos) -> dict[tuple[str, str], list[str]]:
    """Tensors by (stem, block): the block is what holds the module, its stem has its numbers as placeholders."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in infos:
        parts = name.split(".")
        module = parts[:-1] if parts[-1] in ("weight", "bias") else parts
        numbers = [i for i, part in enumerate(module[:-1]) if part.isdecimal()]
        if not numbers or _NOT_AN_MLP.search(".".join(module[numbers[0] : -1])):
            continue
        block, start = module[:-1], numbers[0] - 1
        for i in numbers:
            expert = i > 0 and _EXPERT.search(block[i - 1])
            block[i] = "{layer}" if i == numbers[0] else "{expert}" if expert else "{}"
        found[".".join(block[start:]), ".".join(module[:-1])].append(name)
    return found


def _template(block: str, names: list[str], infos: Infos, hidden: int) -> tuple[Template, int] | None:
    """(template, width) of the tensors in one block, if they pair up: one down and one, two or a fused other."""
    matrices = {name: infos[name].shape for name in names if len(infos[name].shape) in (2, 3)}
    shapes = {name: shape[-2:] for name, shape in matrices.items() if hidden in shape[-2:] and shape[-2] != shape[-1]}
    if len(shapes) < 2 or len(shapes) != len(matrices) or len({len(shape) for shape in matrices.values()}) != 1:
        return None
    stacked = len(next(iter(matrices.values()))) == 3
    for turned in (False, True):
        downs = [name for name, shape in shapes.items() if shape[int(turned)] == hidden]
        ups = [name for name in shapes if name not in downs]
        if len(downs) != 1 or not 1 <= len(ups) <= 2 or (len(ups) == 1 and not _DOWN.search(downs[0][len(block) :])):
            continue
        width = shapes[downs[0]][int(not turned)]
        sizes = {shapes[name][int(turned)] for name in ups}
        if sizes == {width} or (len(ups) == 1 and sizes == {2 * width}):
            roles = _roles(ups, sizes == {2 * width}, block)
            slots = [_slot(name, block, lanes, turned, stacked) for name, lanes in roles.items()]
            biases = [_bias(name, block, lanes, infos) for name, lanes in roles.items()]
            slots += [bias for bias in biases if bias]
            slots.append(_slot(downs[0], block, ("down",), turned, stacked))
            still = (f"{downs[0][len(block) + 1 :].removesuffix('.weight')}.bias",)
            return Template(tuple(slots), still, any("gate" in slot.lanes for slot in slots)), width
    return None


def _roles(ups: list[str], fused: bool, block: str) -> dict[str, tuple[str, ...]]:
    """Which projection each is, by the words in its name; the first of two is the gate where words do not tell."""
    if len(ups) == 1:
        words = ups[0][len(block) :]
        first_up = 0 <= words.find("up") < words.find("gate")
        return {ups[0]: (("up", "gate") if first_up else ("gate", "up")) if fused else ("up",)}
    gates = [name for name in ups if _GATE.search(name[len(block) :])]
    gate = gates[0] if len(gates) == 1 else sorted(ups)[0]
    return {gate: ("gate",), next(name for name in ups if name != gate): ("up",)}


def _slot(name: str, block: str, lanes: tuple[str, ...], turned: bool, stacked: bool) -> Slot:
    return Slot(name[len(block) + 1 :], lanes, int((lanes == ("down",)) != turned) + stacked, stacked=stacked)


def _bias(name: str, block: str, lanes: tuple[str, ...], infos: Infos) -> Slot | None:
    bias = name.removesuffix(".weight") + ".bias"
    return Slot(bias[len(block) + 1 :], lanes, 0, bias=True) if bias in infos and name.endswith(".weight") else None


def _named(one: _Found, keys: Mapping[str, Any]) -> list[str]:
    """The config keys that say the width of a block."""
    return [key for key, value in keys.items() if _says(value, one.width) and _WIDTH.search(key.rpartition(".")[2])]


def _says(value: Any, width: int) -> bool:
    return type(value) in (int, float) and value == width


def _site(stem: str, one: _Found, keys: Mapping[str, Any]) -> tuple[Site, str]:
    """The site with the config keys that say these sizes, and how sure they are."""
    named = _named(one, keys)
    empty = [key for key, value in keys.items() if value is None and _WIDTH.search(key.rpartition(".")[2])]
    depths = [key for key, value in keys.items() if value == one.layers and _DEPTH.search(key.rpartition(".")[2])]
    key = (named or empty or ["intermediate_size"])[0]
    scope = key.rpartition(".")[0]
    depth = next((d.removeprefix(f"{scope}.") for d in depths if d.startswith(scope)), "num_hidden_layers")
    hidden = next((k for k in _HIDDEN if f"{scope}.{k}".removeprefix(".") in keys), "hidden_size")
    guess = f"{key}, which is null," if empty else key
    said = f"{key} says it" if named else f"no key says it: {guess} is a guess, which loaders must know"
    activation = next((k for k in keys if _ACTIVATION.search(k.rpartition(".")[2]) and isinstance(keys[k], str)), "")
    part: Any = "expert" if _EXPERT.search(stem) and "shared" not in stem else "mlp"
    site = Site(one.template, stem, key.rpartition(".")[2], part, scope=scope, depth=depth, hidden=hidden)
    if activation.rpartition(".")[0] == scope:
        site = replace(site, activation=activation.rpartition(".")[2] or site.activation)
    site = replace(site, open=one.others)
    return site, said + (f" (or {', '.join(named[1:])})" if len(named) > 1 else "")
