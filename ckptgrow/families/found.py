"""What is found in a checkpoint: its MLPs by the tensors that carry their width, in groups that grow together.

A Group is all MLPs whose width one config key says. Its rule connects key and width in both directions: what a grown
config must say, and, for the checkers, what a config does say.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

from ckptgrow.errors import FamilyError, RequestError
from ckptgrow.families.form import Family, Rule, Site, Slot
from ckptgrow.layers import listed
from ckptgrow.plan import Edit, Member
from ckptgrow.tensors import TensorInfo


@dataclass(frozen=True)
class Mlp:
    """One MLP found in a checkpoint, or a stack of `experts` alike ones in the same tensors.

    `tensors` says what each tensor is in it; `width` (units of one expert) and `hidden` are read from their shapes.
    """

    block: str
    layer: int
    tensors: Mapping[str, Slot]  # tensor name -> slot, in the template's order
    width: int
    hidden: int
    site: Site
    experts: int = 1
    expert: int | None = None  # its number among experts that have tensors of their own

    def member(self, name: str) -> Member:
        slot = self.tensors[name]
        lanes = slot.lanes if slot.block == 1 else ("scale",) * len(slot.lanes)
        return Member(self.block, self.layer, lanes, slot.bias, slot.places)

    @property
    def numbers(self) -> range | tuple[None]:
        """The experts one by one; (None,) of an MLP that is not a stack of them."""
        return range(self.experts) if self.experts > 1 else (None,)

    def named(self, expert: int | None) -> str:
        """The block, or that one of the experts stacked in it."""
        return self.block if expert is None else f"{self.block}[{expert}]"

    def lanes(self, name: str, expert: int | None) -> Sequence[int]:
        """The lanes of a tensor that are an expert's: one of a flat tensor, of any other all."""
        slot = self.tensors[name]
        return (expert,) if slot.flat and expert is not None else range(len(slot.lanes))

    @cached_property
    def down(self) -> str:
        """The name of the tensor of shares; none ("") in a spare expert."""
        return next((name for name, slot in self.tensors.items() if slot.shared), "")

    @property
    def bilinear(self) -> bool:
        """Whether a unit is linear in its row of up, and in its column of down: with a gate, and nothing beside it."""
        template = self.site.template
        return bool(template.gated and self.down) and not (template.normed or self.site.bent or self.grain > 1)

    @property
    def grain(self) -> int:
        """How many neighbouring units can only be moved together: those of one block of scales."""
        return max(slot.block for slot in self.tensors.values())


# ---------------------------------------------------------------- what a config key says


def value_at(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, None where there is none."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _swiglu(ratio: int, hidden: int) -> int:
    """DINOv2's width: two thirds of hidden x ratio, rounded up to a multiple of 8."""
    return (int(int(hidden * ratio) * 2 / 3) + 7) // 8 * 8


DECI_STEP = 256  # DeciLM's widths are multiples of it


def _deci(factor: float, hidden: int) -> int:
    """DeciLM's width: two thirds of hidden x factor, rounded up to a multiple of 256 (vLLM's nemotron_nas.py)."""
    return -(-int(2 * factor * hidden / 3) // DECI_STEP) * DECI_STEP


def deci_factor(width: int, hidden: int) -> float:
    """A factor amid those that DeciLM rounds up to the width, with the six decimals that loaders keep."""
    return round((width - DECI_STEP // 2) * 1.5 / hidden, 6)


# rule -> the width that a value of the key says
_WIDTHS: Mapping[Rule, Callable[[Any, int], float]] = {
    "units": lambda value, hidden: value,
    "twice": lambda value, hidden: value / 2,
    "per hidden": lambda value, hidden: int(value * hidden),
    "swiglu": _swiglu,
    "deci": _deci,
}


def _ratio(width: int, hidden: int, present: Any) -> Any:
    """The ratio of a width to the hidden size, of the kind that the config has: loaders may take no other."""
    exact = Fraction(width, hidden)
    if isinstance(present, float) or (present is None and exact.denominator > 1):
        return float(exact)
    return exact.numerator // exact.denominator


# rule -> the value that says a width, in the type of the present value
_VALUES: Mapping[Rule, Callable[[int, int, Any], Any]] = {
    "units": lambda width, hidden, present: width,
    "twice": lambda width, hidden, present: 2 * width,
    "per hidden": _ratio,
    "swiglu": lambda width, hidden, present: next(r for r in range(1, width + 9) if _swiglu(r, hidden) >= width),
    "deci": lambda width, hidden, present: deci_factor(width, hidden),
}


@dataclass(frozen=True)
class Group:
    """The MLPs whose width one config key says; `says` is its present value, which may be missing or wrong."""

    path: str
    mlps: tuple[Mlp, ...]
    says: Any = None

    @property
    def site(self) -> Site:
        return self.mlps[0].site

    @cached_property
    def width(self) -> int:
        """The units that the key speaks of: those of the narrowest MLP, of which others may have a multiple."""
        base = [mlp.width for mlp in self.mlps if not mlp.site.multiple]
        return min(base or [mlp.width for mlp in self.mlps])

    @property
    def grain(self) -> int:
        return max(mlp.grain for mlp in self.mlps)

    def starts(self, layers: Collection[int] | None) -> list[int]:
        """The widths from which it grows: several only where its key is a list."""
        if not self.site.listed:
            return [self.width]
        return sorted({mlp.width for mlp in self.mlps if layers is None or mlp.layer in layers})

    @property
    def uniform(self) -> bool:
        return all(mlp.width == self.width for mlp in self.mlps)

    def widened(self, mlp: Mlp, old: int, new: int) -> int:
        """The width of one of the MLPs when what the key speaks of grows from `old` to `new`: by the same factor."""
        width = Fraction(mlp.width * new, old)
        if width.denominator != 1:
            raise RequestError(f"{new:,} / {old:,} times its {mlp.width:,} units is no whole number").at(
                tensor=mlp.block
            )
        return width.numerator

    def edits(self, widths: Mapping[str, int]) -> dict[str, Any]:
        """What config.json must say when the MLPs have these widths, by block. Raises FamilyError where it cannot."""
        edits = {self.path: self.value_of(widths)} | {self.site.under(key): wanted for key, wanted in self.site.also}
        for mlp in self.mlps:
            said = self.told(edits, mlp)
            if said != widths[mlp.block]:
                near = "" if said is None else f", only {said:,g}"
                raise FamilyError(
                    f"{self.path} cannot say that its width is {widths[mlp.block]:,}{near}",
                    tensor=mlp.block,
                    hint="Choose another width.",
                )
        return edits

    def value_of(self, widths: Mapping[str, int]) -> Any:
        """What the key must be for these widths, by block: a list only where it must be one."""
        if self.site.entry:
            return self._entries(widths)
        say, present = _VALUES[self.site.rule], None if isinstance(self.says, list) else self.says
        values = [say(widths[mlp.block] // self._times(mlp), mlp.hidden, present) for mlp in self.mlps]
        return values if self.site.listed and (isinstance(self.says, list) or len(set(values)) > 1) else values[0]

    def told(self, values: Mapping[str, Any], mlp: Mlp) -> float | None:
        """The width of an MLP that these values of config keys, by dotted path, say; None where they do not."""
        value = values.get(self.path)
        if self.site.entry:
            value = self._entry(value, mlp.layer)
        elif isinstance(value, list) and self.site.listed:
            value = value[mlp.layer] if len(value) == len(self.mlps) else None
        if type(value) is not int and not (type(value) is float and self.site.rule in ("per hidden", "deci")):
            return None
        units = _WIDTHS[self.site.rule](value, mlp.hidden)
        return units * self._times(mlp)

    def _entry(self, entries: Any, layer: int) -> Any:
        """What a list of objects says of a layer, None where it does not."""
        there = isinstance(entries, list) and layer < len(entries)
        return value_at(entries[layer], self.site.entry) if there else None

    def _entries(self, widths: Mapping[str, int]) -> Any:
        """The list of objects with these widths in it; where it says one already, it says it as it did."""
        entries, (*outer, key) = copy.deepcopy(self.says), self.site.entry.split(".")
        for mlp in self.mlps:
            if self.told({self.path: entries}, mlp) != widths[mlp.block]:
                inner = value_at(entries[mlp.layer], ".".join(outer)) if outer else entries[mlp.layer]
                inner[key] = _VALUES[self.site.rule](widths[mlp.block], mlp.hidden, None)
        return entries

    def beside(self, entries: Any) -> Any:
        """What a list of objects says besides the widths."""
        bare = copy.deepcopy(entries)
        *outer, key = self.site.entry.split(".")
        for entry in bare if isinstance(bare, list) else ():
            inner = value_at(entry, ".".join(outer)) if outer else entry
            if isinstance(inner, dict):
                inner.pop(key, None)
        return bare

    def _times(self, mlp: Mlp) -> int:
        """How many times the key's width this MLP has."""
        return mlp.width // self.width if mlp.site.multiple else 1


@dataclass(frozen=True)
class Architecture:
    """A family found in a checkpoint: all MLPs of the asked towers.

    Where it is told in another family's words (recast.py), `native` is the family that it has, and `recast` are the
    changes to its config. `listed` are the experts that should grow, where not all should.
    """

    family: Family
    groups: tuple[Group, ...]
    native: Family | None = None
    recast: tuple[Edit, ...] = ()
    listed: tuple[int, ...] | None = None

    @property
    def own(self) -> Family:
        """The family of the checkpoint, whatever words it is told in."""
        return self.native or self.family

    @property
    def retold(self) -> tuple[Edit, ...]:
        """What changes in its config for the words that it is told in, but for the keys of widths."""
        return tuple(edit for edit in self.recast if edit.path not in {group.path for group in self.groups})

    @cached_property
    def mlps(self) -> tuple[Mlp, ...]:
        return tuple(mlp for group in self.groups for mlp in group.mlps)

    @property
    def width(self) -> int:
        """The one width that all config keys say. Raises FamilyError where there are several."""
        several = dict.fromkeys(group.width for group in self.groups)
        if len(several) > 1:
            raise FamilyError(f"the MLPs have several widths ({', '.join(f'{width:,}' for width in several)})")
        return self.groups[0].width

    @property
    def widths(self) -> dict[str, int]:
        """The width of each MLP, by block."""
        return {mlp.block: mlp.width for mlp in self.mlps}

    @cached_property
    def names(self) -> frozenset[str]:
        """All tensors of all MLPs."""
        return frozenset(name for mlp in self.mlps for name in mlp.tensors)

    def nbytes(self, infos: Mapping[str, TensorInfo]) -> int:
        """How many bytes its MLPs have in a checkpoint, which may lack tensors."""
        return sum(infos[name].nbytes for name in self.names if name in infos)

    def only(self, experts: str = "all") -> Architecture:
        """What grows where not all experts should: `shared` is what every token passes, a list names experts.

        With a list, what shares a config key with experts is there too, to become as wide (`grows`). Raises
        RequestError where there are no such experts, or one key says the width of what should grow and should not.
        """
        wanted = listed(experts)
        routed = [mlp for mlp in self.mlps if mlp.site.part == "expert"]
        if experts == "all":
            return self
        if not routed:
            raise RequestError(f"--experts {experts}: this model has no experts")
        if wanted is not None:
            there = max(mlp.experts if mlp.expert is None else mlp.expert + 1 for mlp in routed)
            if wanted[-1] >= there:
                raise RequestError(f"--experts {experts}: there are {there} experts, numbered from 0")
            if len(wanted) == there:
                return self
        kept = tuple(
            group
            for group in self.groups
            if any(mlp.site.part == "expert" for mlp in group.mlps) == (wanted is not None)
        )
        if not kept:
            raise RequestError(f"--experts shared: {self.groups[0].path} says the width of the routed experts too")
        return replace(self, groups=kept, listed=wanted)

    def grows(self, mlp: Mlp, expert: int | None) -> bool:
        """Whether an MLP, or an expert stacked in it, is one of those that should grow by the list of experts."""
        number = mlp.expert if expert is None else expert
        return self.listed is None or (mlp.site.part == "expert" and (number or 0) in self.listed)
