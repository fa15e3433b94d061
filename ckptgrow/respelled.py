"""A trained checkpoint under the names of another that spells its MLPs otherwise: a view, put before `match`.

transformers 5 holds the experts of a layer in stacks, and a trainer that saves a model's state dict writes those. The
view has the tensors of the other spelling: each a place in a stack, mapped from its file, or put together from several
where it is the stack that is wanted. Which projection lies where is told by the family's sites (families/spelling.py).
Refused: stacks that are not there as a whole, of another number of experts, or of another shape.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ckptgrow.checkpoint import Bits
from ckptgrow.errors import RequestError
from ckptgrow.families import Architecture, Slot, in_memory_name
from ckptgrow.families.spelling import Place, Twin, twins
from ckptgrow.matching import Matching, Naming, match, plain, shift_of
from ckptgrow.recognition import recognised
from ckptgrow.tensors import DTYPE_BITS, TensorInfo
from ckptgrow.trained import Trained

_KEPT = 2  # trained tensors that are held at a time, where they have to be put together to be read
Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Respelled:
    """The tensors of `trained`, some of them cut or put together: `made` says of what projections each of those is."""

    trained: Trained
    infos: Infos
    made: Mapping[str, tuple[Twin, ...]]
    _turn: threading.Lock = field(default_factory=threading.Lock)

    @property
    def folder(self) -> Path:
        return self.trained.folder

    @property
    def config_text(self) -> str:
        return self.trained.config_text

    @property
    def config(self) -> Mapping[str, Any]:
        return self.trained.config

    @cached_property
    def _holder(self) -> Callable[[str], Bits]:
        return lru_cache(_KEPT)(self.trained.bits)

    def bits(self, name: str) -> Bits:
        """A tensor; where it is one place in another, that place."""
        if name not in self.made:
            return self.trained.bits(name)
        if self._is_place(name):
            return self._part(self.made[name][0])
        info = self.infos[name]
        whole = np.empty(info.shape, f"<u{DTYPE_BITS[info.dtype] // 8}")
        for twin in self.made[name]:
            whole[twin.own.index(info.shape)] = self._part(twin)
        return whole

    def _part(self, twin: Twin) -> Bits:
        with self._turn:
            holder = self._holder(twin.other.name)
        found: Bits = holder[twin.other.index(holder.shape)]
        return found.T if twin.turned else found

    def _is_place(self, name: str) -> bool:
        (first, *others), shape = self.made[name], self.infos[name].shape
        return not others and first.own.part_of(shape) == shape

    def found_as(self, name: str) -> str:
        """Where a tensor lies in what the trainer wrote: `...experts.gate_up_proj[3, 0:48]`."""
        if name not in self.made:
            return name
        first, *others = (twin.other for twin in self.made[name])
        if others:
            more = len({other.name for other in others} - {first.name})
            return first.name + (f" and {more} more" if more else "")
        index = first.index(self.trained.infos[first.name].shape)
        places = [str(at) if isinstance(at, int) else f"{at.start}:{at.stop}" if at.stop else ":" for at in index]
        while places and places[-1] == ":":
            places.pop()
        return first.name + (f"[{', '.join(places)}]" if places else "")

    @cached_property
    def laid(self) -> Mapping[str, tuple[str, ...]] | None:
        """Of each trained tensor, those of this view whose bytes, end to end, are its own; None where they are not."""
        held: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for name, (first, *_) in self.made.items():
            if not self._is_place(name) or first.turned or not first.other.contiguous:
                return None
            held[first.other.name].append((first.other.expert or 0, first.other.lane, name))
        ordered = {holder: tuple(name for _, _, name in sorted(parts)) for holder, parts in held.items()}
        return {name: ordered.get(name, (name,)) for name in self.trained.infos}


def found(own: Naming, trained: Trained, architecture: Callable[[], Architecture]) -> tuple[Trained, Matching]:
    """The trained checkpoint as `own` spells it, and which tensor is which.

    `architecture` is asked for only where names or shapes are not as they are. Raises RequestError, naming the
    tensor, where the projections of some experts lie together in it and no model has them so.
    """
    matching = match(own, trained)
    alike = (own.tensors.infos[name].shape == trained.infos[its].shape for name, its in matching.names.items())
    if not matching.missing and all(alike):
        return trained, matching
    view = respelled(own, trained, architecture())
    matching = match(own, view) if view.made else matching
    renamed = recognised(own.tensors, matching.missing, view, matching.strangers)
    if renamed:
        view = _renamed(view, {matching.shift.back(name): (name, its) for name, its in renamed.items()})
        matching = match(own, view)
    return (view, matching) if view.made else (trained, matching)


def found_as(trained: Trained, name: str) -> str:
    """The name under which a tensor lies in what the trainer wrote, and where in that."""
    return trained.found_as(name) if isinstance(trained, Respelled) else name


def notes_on(trained: Trained) -> tuple[str, ...]:
    """That tensors are not in the trained checkpoint as they are compared."""
    if not isinstance(trained, Respelled):
        return ()
    held: dict[str, list[str]] = defaultdict(list)
    for name, parts in trained.made.items():
        for holder in dict.fromkeys(twin.other.name for twin in parts):
            held[holder].append(name)
    renamed = [its for its, names in held.items() if len(names) == 1 and len(trained.made[names[0]]) == 1]
    others = {holder: names for holder, names in held.items() if holder not in renamed}
    notes = [f"{len(renamed):,} tensors have other names, as {its}" for its in renamed[:1]]
    count = len({name for names in others.values() for name in names})
    return tuple(notes + [f"{count:,} tensors lie in {len(others):,} others, as {its}" for its in [*others][:1]])


def halves(trained: Trained) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Of each stack that holds two projections of an expert: its name, and the tensors that those of the first are."""
    held: dict[str, list[str]] = defaultdict(list)
    for name, (first, *_) in trained.made.items() if isinstance(trained, Respelled) else ():
        if first.other.slot and len(first.other.slot.lanes) == 2 and not first.other.expert:
            held[first.other.name].append(name)
    yield from ((holder, tuple(names)) for holder, names in held.items() if len(names) == 2)


def respelled(own: Naming, trained: Trained, architecture: Architecture) -> Respelled:
    """The view itself. Raises RequestError as `found` does."""
    infos, wanted = own.tensors.infos, _wanted(own, architecture)
    known = own.known.keys() | wanted.keys()
    probes = [form for form, name in own.known.items() if name == own.probe]
    probes += [form for form, those in wanted.items() if any(twin.own.name == own.probe for twin in those)]
    shift = shift_of(known, probes, [plain(name) for name in trained.infos])
    forms = {name: next((f for f in (shift.of(plain(name)), plain(name)) if f in known), "") for name in trained.infos}
    there = {
        own.known[form]
        for name, form in forms.items()
        if form in own.known and infos[own.known[form]].shape == trained.infos[name].shape
    }
    made: dict[str, list[Twin]] = defaultdict(list)
    used: dict[str, str] = {}
    for name, form in forms.items():
        those = [twin for twin in wanted.get(form, ()) if own.known.get(form) not in there]
        if those and not any(twin.own.name in there for twin in those):
            for twin in _fitting(those, trained.infos[name], infos, trained.folder):
                made[twin.own.name].append(twin.moved(name))
                used[form] = name
    _check_whole(made, wanted, used, there)
    return _view(trained, {shift.back(name): tuple(parts) for name, parts in made.items()}, infos)


def _renamed(view: Respelled, names: Mapping[str, tuple[str, str]]) -> Respelled:
    """The view with whole tensors under other names: new -> (own, the trained one's)."""
    made = {new: (Twin(Place(own), Place(its)),) for new, (own, its) in names.items()}
    called = {its: new for new, (_, its) in names.items()}
    infos = {called.get(name, name): replace(info, name=called.get(name, name)) for name, info in view.infos.items()}
    return Respelled(view.trained, infos, {**view.made, **made})


def _wanted(own: Naming, architecture: Architecture) -> dict[str, list[Twin]]:
    """By the names that a tensor may have instead, on disk or in memory: the projections that would lie in it."""
    wanted: dict[str, list[Twin]] = defaultdict(list)
    for twin in twins(architecture, tuple(own.tensors.infos)):
        if twin.own.name in own.tensors.infos:
            for form in dict.fromkeys((twin.other.name, in_memory_name(architecture.family, twin.other.name))):
                wanted[form].append(twin)
    return wanted


def _fitting(those: list[Twin], holder: TensorInfo, infos: Infos, folder: Path) -> list[Twin]:
    """The projections in one tensor, in the layout that its shape is of: stacks are called alike in both layouts."""
    layouts: dict[Slot | None, list[Twin]] = defaultdict(list)
    for twin in dict.fromkeys(those):  # two sites may say the same
        layouts[twin.other.slot].append(twin)
    wished: dict[tuple[int, ...], list[Twin]] = {}
    for slot, some in layouts.items():
        experts = len({twin.other.expert for twin in some})
        shapes = {twin.holder(infos[twin.own.name].shape, experts) for twin in some}
        if len(shapes) == 1 and (slot is None or len(some) == experts * len(slot.lanes)):
            wished.setdefault(shapes.pop(), some)
    if holder.shape in wished or layouts.keys() == {None} or not wished:
        return wished.get(holder.shape, [])
    raise RequestError(
        f"shape {list(holder.shape)}, where the experts of the grown checkpoint make"
        f" {' or '.join(str([*shape]) for shape in wished)}",
        file=str(folder),
        tensor=holder.name,
        hint="Give the grown checkpoint that this training started from.",
    )


def _check_whole(
    made: Mapping[str, list[Twin]], wanted: Mapping[str, list[Twin]], used: Collection[str], there: Collection[str]
) -> None:
    """Raise RequestError where of a block that is spelled otherwise a tensor is missing, or of a tensor a part."""
    blocks = {form.rpartition(".")[0]: form for form in used}
    placed = {twin.own for those in made.values() for twin in those}
    for form, those in wanted.items():
        lost = [twin for twin in those if twin.own not in placed and twin.own.name not in there and twin.other.slot]
        beside = blocks.get(form.rpartition(".")[0]) or next((t.own.name for t in lost if t.own.name in made), None)
        if lost and beside and form not in used:
            raise RequestError(
                f"it is missing, but {beside} is there", tensor=form, hint="Give all that the trainer saved."
            )


def _view(trained: Trained, made: Mapping[str, tuple[Twin, ...]], own: Infos) -> Respelled:
    """The trained tensors in their order, each with what is made of it in its place."""
    infos: dict[str, TensorInfo] = {}
    of: dict[str, list[str]] = defaultdict(list)
    for name, parts in made.items():
        for holder in dict.fromkeys(twin.other.name for twin in parts):
            of[holder].append(name)
    for holder, info in trained.infos.items():
        for name in of.get(holder, (holder,)):
            first = made[name][0] if name in made else None
            shape = own[first.own.name].shape if first else info.shape
            infos.setdefault(name, TensorInfo(name, info.dtype, shape))
    return Respelled(trained, infos, made)
