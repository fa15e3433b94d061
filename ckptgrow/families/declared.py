"""Declarations as JSON, for `--family FILE` and the manifest: the fields of form.py by name, defaults left out.

{"model_type": "newcomer",
 "sites": [{"stem": "blocks.{layer}.ffn", "width": "ffn_dim", "depth": "n_layers", "hidden": "dim",
            "slots": [{"name": "w1.weight", "lanes": ["gate"], "axis": 0},
                      {"name": "w3.weight", "lanes": ["up"], "axis": 0},
                      {"name": "w2.weight", "lanes": ["down"], "axis": 1}]}]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, get_args

from ckptgrow.errors import FamilyError, FormatError
from ckptgrow.families.form import Family, Rule, Site, Slot, Template
from ckptgrow.families.table import FAMILIES

_LANES = frozenset({"gate", "up", "down", "norm", "gate_up", "up_gate"})
_RULES = get_args(Rule)
_PARTS = ("mlp", "expert", "shared")
_KEY = re.compile(r"[\w.-]+")


def to_json(family: Family) -> dict[str, Any]:
    """The declaration as JSON values; fields that have their default are left out."""
    sites = [{**_set(site, "template"), **_template(site.template)} for site in family.sites]
    return {"model_type": family.model_type, "sites": sites} | _set(family, "model_type", "sites")


def _template(template: Template) -> dict[str, Any]:
    return {"slots": [_set(slot) for slot in template.slots]} | ({"still": [*template.still]} if template.still else {})


def _set(value: Any, *without: str) -> dict[str, Any]:
    """The fields of a frozen value that do not have their default."""
    told = {field.name: getattr(value, field.name) for field in fields(value) if field.name not in without}
    defaults = {field.name: field.default for field in fields(value)}
    return {name: _plain(it) for name, it in told.items() if it != defaults[name]}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def from_text(text: bytes, file: str) -> Family:
    """The declaration in a JSON file, checked. Raises FormatError and FamilyError, naming the file."""
    try:
        return from_json(json.loads(text))
    except ValueError as error:
        raise FormatError(f"not valid JSON ({error})", file=file) from None
    except FamilyError as error:
        raise error.at(file=file) from None


def from_json(told: Any) -> Family:
    """The declaration that these JSON values are. Raises FamilyError for anything that is none."""
    read: Family = _fields(Family, told, "the declaration", {"sites": _sites})
    check(read)
    return read


def _sites(told: Any) -> tuple[Site, ...]:
    if not isinstance(told, list) or not told:
        raise FamilyError("sites must be a list, and not empty")
    return tuple(_site(site, f"site {i}") for i, site in enumerate(told))


def _site(told: Any, where: str) -> Site:
    if not isinstance(told, dict) or not isinstance(told.get("slots"), list) or not told["slots"]:
        raise FamilyError(f"{where} must be an object with slots, a list")
    slots = tuple(_fields(Slot, slot, f"slot {i} of {where}", {}) for i, slot in enumerate(told["slots"]))
    still = _value("still", told.get("still", []), (), f"{where}: ")
    gated = any("gate" in lane for slot in slots for lane in slot.lanes)
    rest = {key: value for key, value in told.items() if key not in ("slots", "still")}
    read: Site = _fields(Site, rest | {"template": Template(slots, still, gated)}, where, {"template": lambda it: it})
    return read


def _fields(kind: Any, told: Any, where: str, readers: Mapping[str, Any]) -> Any:
    """A frozen value from an object: every key known, every field there that has no default, each of its type."""
    if not isinstance(told, dict):
        raise FamilyError(f"{where} is no object")
    known: dict[str, Field[Any]] = {field.name: field for field in fields(kind)}
    missing = [name for name, field in known.items() if field.default is MISSING and name not in told]
    if told.keys() - known.keys() or missing:
        odd = sorted(told.keys() - known.keys())
        raise FamilyError(f"{where} has unknown keys {odd}" if odd else f"{where} lacks {', '.join(missing)}")
    read = {}
    for name, value in told.items():
        default = {"lanes": (), "axis": 0, "name": "", "model_type": ""}.get(name, known[name].default)
        read[name] = readers[name](value) if name in readers else _value(name, value, default, f"{where}: ")
    return kind(**read)


def _value(name: str, value: Any, default: Any, where: str) -> Any:
    """A value of the default's type; a tuple is a list of strings, or of pairs."""
    if isinstance(default, tuple):
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        pairs = isinstance(value, list) and all(isinstance(item, list) and len(item) == 2 for item in value)
        if pairs and all(isinstance(first, str) and isinstance(second, str | int) for first, second in value):
            return tuple((first, second) for first, second in value)
    elif type(value) is type(default):
        return value
    raise FamilyError(f"{where}{name} is {value!r}, not of the kind of {default!r}")


def recalled(model_type: str, told: Mapping[str, Any] | None) -> Family | None:
    """The family that a manifest names: the table's, or the one that it carries itself."""
    return FAMILIES.get(model_type) if told is None else from_json(told)


def outside(family: Family) -> dict[str, Any] | None:
    """What a manifest must carry of a family so that it is known again: nothing of those in the table."""
    return None if FAMILIES.get(family.model_type) == family else to_json(family)


def check(family: Family) -> None:
    """Raise FamilyError where a declaration contradicts itself, whatever the checkpoint."""
    for i, site in enumerate(family.sites):
        for problem in _problems(site):
            raise FamilyError(f"site {i} of {family.model_type!r}: {problem}")
    relative = FAMILIES.get(family.recast)
    if family.recast and (relative is None or not all(site.entry for site in relative.sites)):
        raise FamilyError(f"recast of {family.model_type!r} names no family whose config says a width for each layer")
    if len(set(family.sites)) != len(family.sites):
        raise FamilyError(f"{family.model_type!r} declares a site twice")


def _problems(site: Site) -> Iterator[str]:
    slots = site.template.slots
    if site.rule not in _RULES or site.part not in _PARTS:
        yield f"rule is one of {', '.join(_RULES)}, part one of {', '.join(_PARTS)}"
    if site.stem.count("{layer}") > 1 or set(re.findall(r"\{(.*?)\}", site.stem)) - {"layer", "expert", ""}:
        yield f"stem {site.stem!r} may have one {{layer}}, {{expert}} and {{}}"
    if any(key and not _KEY.fullmatch(key) for key in (site.width, site.depth, site.hidden, site.scope)):
        yield "a config key is no dotted name"
    if sum(slot.shared for slot in slots) != 1 or not any("up" in lane for slot in slots for lane in slot.lanes):
        yield "it must have one down and an up"
    if not slots[0].required or len({slot.name for slot in slots}) != len(slots):
        yield "its first slot must be a weight, and no name may come twice"
    for slot in slots:
        if not slot.lanes or set(slot.lanes) - _LANES or slot.span < 1 or slot.block != 1 or slot.coded:
            yield f"{slot.name}: lanes are some of {', '.join(sorted(_LANES))}"
        if not 0 <= slot.axis < (1 if slot.vector else 2) + slot.stacked or (slot.stacked and slot.axis == 0):
            yield f"{slot.name}: axis {slot.axis} is not one that has units"
