"""Freeze policies (METHOD.md 4) and how base weights are shared out among copies (METHOD.md 2, 3).

A policy says which parts of which roles train; the boxes of the freeze mask are a reading of a Plan with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ckptgrow.errors import RequestError
from ckptgrow.layers import named
from ckptgrow.plan import Output, Rule, Share, joined

Extent = Literal["new", "all"]
Box = tuple[tuple[int, int], ...]
ShareChoice = Literal["auto", "even", "random"]
SHARE_CHOICES: tuple[ShareChoice, ...] = get_args(ShareChoice)


@dataclass(frozen=True, slots=True)
class Policy:
    """Which units of the gate, up and down projections train: the new ones, all, or (not named) none.

    A bias goes with its projection; the bias of down has no unit and never trains.
    """

    name: str
    trains: Mapping[str, Extent]
    about: str
    original_keeps_half: bool = False

    def trainable_copies(self, copies: int) -> int:
        """How many of a unit's copies have anything that trains; the first copy is the original."""
        return copies if "all" in self.trains.values() else copies - 1


POLICIES: Mapping[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy(
            "g-freeze",
            {"gate": "new", "up": "new", "down": "new"},
            "the new units train, everything that was there is frozen",
            original_keeps_half=True,
        ),
        Policy("g-train", {"gate": "all", "up": "all"}, "all gate and up rows train, old and new; down is frozen"),
        Policy("down", {"down": "new"}, "only the new columns of down train"),
        Policy("up", {"up": "new"}, "only the new rows of up train"),
    )
}


def boxes(output: Output, policy: Policy) -> tuple[Box, ...]:
    """The parts of this output that train, each one half-open [start, stop) pair per dimension.

    Where there are no new units nothing trains, whatever the policy: the MLP did not grow, or was only filled up.
    Raises RequestError where only one of two interleaved projections would train: that is no range.
    """
    found: list[Box] = []
    for rows, section in output.sections():
        if section.grown():
            spans = joined(span for lane in section.lanes() for span in _trained(section, policy, *lane))
            found += across(output.shape, output.axis, spans, rows)
    return tuple(found)


def across(
    shape: tuple[int, ...], axis: int, spans: Iterable[tuple[int, int]], rows: range | None = None
) -> tuple[Box, ...]:
    """Ranges along one axis as boxes, whole across the other dimensions.

    With `rows` only in these slices before the axis, a whole number of the slices of one place of the first dimension.
    """
    whole = [(0, size) for size in shape]
    if rows is not None and axis:
        each = math.prod(shape[1:axis])
        whole[0] = (rows.start // each, rows.stop // each)
    return tuple((*whole[:axis], span, *whole[axis + 1 :]) for span in spans)


def _trained(output: Output, policy: Policy, lane: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The [start, stop) ranges of one lane that train: none where none is new, as of an expert that is filled."""
    extents = {policy.trains.get(projection) for projection in lane.split("_")}
    if len(extents) > 1:
        raise RequestError(
            f"--policy {policy.name} trains one of {lane.replace('_', ' and ')}, which alternate in it",
            tensor=output.name,
            hint="Choose a policy that trains both.",
        )
    extent, new = extents.pop(), [(max(a, start), min(b, stop)) for a, b in output.grown() if a < stop and b > start]
    if extent is not None and new:
        yield from [(start, stop)] if extent == "all" else new


def shares(copies: int, policy: Policy, choice: ShareChoice, seed: int) -> Iterator[Share | None]:
    """The share of each copy of a unit, the original first; None where the unit is not copied.

    `auto` is random exactly where two trainable copies would otherwise stay equal for ever (METHOD.md 3). Unless
    random was asked for by name, a policy that freezes the original lets it keep round(W/2), so that the growth can
    be undone from the grown checkpoint alone; the rest is shared out among the new copies (METHOD.md 2).
    """
    if copies == 1:
        yield None
        return
    rule = rule_for(copies, policy, choice)
    drawn = seed if rule == "random" else 0
    if not policy.original_keeps_half or choice == "random" or copies == 2:
        yield from (Share(i, copies, rule, drawn) for i in range(copies))
        return
    kept, rest = Share(0, 2), Share(1, 2)
    yield kept
    yield from (Share(i, copies - 1, rule, drawn, of=rest) for i in range(copies - 1))


def kinds(old: int, new: int) -> tuple[tuple[int, range], ...]:
    """(copies, units): growing from `old` to `new` units gives the first `new % old` one copy more than the others."""
    copies, more = divmod(new, old)
    return tuple((count, units) for count, units in ((copies + 1, range(more)), (copies, range(more, old))) if units)


def rule_for(copies: int, policy: Policy, choice: ShareChoice) -> Rule:
    """The rule by which the shares of a unit with that many copies are made."""
    if choice != "auto":
        return choice
    return "random" if policy.trainable_copies(copies) > 1 else "even"


def said(
    old: int,
    new: int,
    policy: Policy,
    choice: ShareChoice,
    layers: tuple[int, ...] | None = None,
    experts: tuple[int, ...] | None = None,
) -> Iterator[str]:
    """How the columns of down are shared out, and why: a sentence for each number of copies that occurs."""
    where = f" of {named(experts, 'expert')}" if experts else ""
    where += f" in {named(layers)}" if layers else ""
    for count, units in kinds(old, new):
        if count == 1:
            yield f"the other {len(units):,} units{where} are not copied"
            continue
        rule = rule_for(count, policy, choice)
        sentence = f"{rule}: {len(units):,} units{where} come in {count} copies"
        if any(share and share.of for share in shares(count, policy, choice, 0)):
            sentence += ", the original keeps one half"
        if choice == "auto":
            alike = "two trainable copies would otherwise stay" if rule == "random" else "no two trainable copies are"
            sentence += f" (auto: {alike} equal)"
        yield sentence
