"""To which widths a checkpoint folds: what is asked, what the base had, what is exact. One config key after the other.

All MLPs of a key become narrower by one factor, since the key says one number; where it is a list, each by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from ckptgrow.errors import FamilyError, RequestError
from ckptgrow.families import Architecture, Group, Mlp
from ckptgrow.folding import Hints
from ckptgrow.redundancy import Redundancy

Widths = Mapping[str, int]  # by block


@dataclass(frozen=True, slots=True)
class Asked:
    """The widths that were asked for: of the only key, of each by its name, or the smallest that are exact."""

    width: int | Mapping[str, int] | None = None
    partial: bool = False
    lossy: bool = False

    def of(self, group: Group, groups: Sequence[Group]) -> int | None:
        """What --width says of one of the keys that are there."""
        if isinstance(self.width, Mapping):
            return self.width.get(group.path, self.width.get(_last(group)))
        if self.width is not None and len(groups) > 1:
            told = ", ".join(f"{other.path} {other.width:,}" for other in groups)
            raise RequestError(
                f"--width {self.width}: several keys say its widths ({told})",
                hint="Give --width KEY=N for each of them, or --partial.",
            )
        return self.width


@dataclass(frozen=True, slots=True)
class Target:
    """What the MLPs of one config key fold to: the base's widths where they are known, the smallest exact ones, those
    that are asked for (the base's, where nothing else is), and the new ones, None where those are not exact."""

    group: Group
    base: Widths | None
    smallest: Widths
    asked: Widths | None
    widths: Widths | None

    def spoken(self, widths: Widths | None) -> int | tuple[int, ...] | None:
        """Widths as the key says them: one number, or one for each MLP."""
        if widths is None:
            return None
        if listed(self.group):
            return tuple(widths[mlp.block] for mlp in self.group.mlps)
        return widths[next(mlp.block for mlp in self.group.mlps if mlp.width == self.group.width)]


def in_play(architecture: Architecture, hints: Hints, asked: Asked) -> Architecture:
    """The MLPs that are to fold: those of keys that have grown or are asked for by name; without any hint all."""
    groups, named = architecture.groups, asked.width if isinstance(asked.width, Mapping) else {}
    for key in named:
        fitting = [group for group in groups if key in (group.path, _last(group))]
        if len(fitting) != 1:
            known = ", ".join(group.path for group in groups)
            raise RequestError(f"--width {key}={named[key]}: the keys of its widths are {known}")
    grown = tuple(g for g in groups if g.mlps[0].block in hints.widths or {g.path, _last(g)} & named.keys())
    return replace(architecture, groups=grown or groups)


def targets(
    architecture: Architecture, hints: Hints, asked: Asked, found: Mapping[str, Sequence[Redundancy]]
) -> tuple[Target, ...]:
    """What each key's MLPs fold to. `found`: what is redundant in them, by block. Raises RequestError for a width that
    cannot be asked for."""
    return tuple(_target(group, architecture.groups, hints, asked, found) for group in architecture.groups)


def _target(
    group: Group,
    groups: Sequence[Group],
    hints: Hints,
    asked: Asked,
    found: Mapping[str, Sequence[Redundancy]],
) -> Target:
    known = group.mlps[0].block in hints.widths
    base = {mlp.block: hints.widths[mlp.block] for mlp in group.mlps} if known else None
    number, smallest = asked.of(group, groups), smallest_of(group, found)
    wanted: Widths | None = None if asked.partial else base
    if number is not None:
        wanted = _narrowed(group, number)
    if asked.lossy and wanted is None:
        raise RequestError("config.json does not say how wide the base was", hint="Give --width N.")
    widths = smallest if wanted is None else wanted
    exact = _all_take(group, found, widths)
    return Target(group, base, smallest, wanted, widths if exact or asked.lossy else None)


def listed(group: Group) -> bool:
    """Whether each of its MLPs has a width of its own in config.json."""
    return group.site.listed and isinstance(group.says, list)


def _narrowed(group: Group, number: int) -> Widths:
    """The widths of a group's MLPs where --width is that number. Raises RequestError for one that is none."""
    old = max(mlp.width for mlp in group.mlps) if listed(group) else group.width
    if not (type(number) is int and 0 < number < old):
        raise RequestError(f"--width {number} is not below the present width {old}, or not above 0")
    if listed(group):
        return {mlp.block: min(number, mlp.width) for mlp in group.mlps}
    return {mlp.block: group.widened(mlp, old, number) for mlp in group.mlps}


def smallest_of(group: Group, found: Mapping[str, Sequence[Redundancy]]) -> Widths:
    """The narrowest widths that are exact for all MLPs of a key, and that it can say."""
    needed = {mlp.block: max(one.needed for one in found[mlp.block]) for mlp in group.mlps}
    if listed(group):
        return {mlp.block: _least(group, mlp, needed[mlp.block], found[mlp.block]) for mlp in group.mlps}
    least = max(-(-needed[mlp.block] * group.width // mlp.width) for mlp in group.mlps)
    return next(widths for widths in _possible(group, least) if _all_take(group, found, widths))


def _least(group: Group, mlp: Mlp, needed: int, found: Sequence[Redundancy]) -> int:
    """The narrowest width of one MLP of a list."""
    present = {other.block: other.width for other in group.mlps}
    widths = (width for width in range(needed, mlp.width) if all(one.takes(width) for one in found))
    return next((width for width in widths if _can_say(group, {**present, mlp.block: width})), mlp.width)


def _possible(group: Group, least: int) -> Iterator[Widths]:
    """The widths that a group can have, from its key's `least` to the present one."""
    for number in range(least, group.width):
        widths = {mlp.block: Fraction(mlp.width * number, group.width) for mlp in group.mlps}
        whole = {block: width.numerator for block, width in widths.items() if width.denominator == 1}
        if len(whole) == len(widths) and _can_say(group, whole):
            yield whole
    yield {mlp.block: mlp.width for mlp in group.mlps}


def _can_say(group: Group, widths: Widths) -> bool:
    """Whether the group's key has a value for these widths."""
    try:
        group.edits(widths)
    except FamilyError:
        return False
    return True


def _all_take(group: Group, found: Mapping[str, Sequence[Redundancy]], widths: Widths) -> bool:
    return all(one.takes(widths[mlp.block]) for mlp in group.mlps for one in found[mlp.block])


def _last(group: Group) -> str:
    return group.path.rpartition(".")[2]
