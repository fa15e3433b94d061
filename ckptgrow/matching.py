"""Which tensors of one checkpoint are those of another, under whatever names a trainer gave them back.

Names may carry wrappers anywhere, one prefix more or less, or be those of a transformers model in memory; tied heads
may be added or dropped. Bytes are read only to tell whether a head that is not there was a copy. Tensors are matched
one to one: where a trainer stacks what lies apart on disk, a view with the names on disk has to stand before it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptgrow.checkpoint import Bits, Tensors
from ckptgrow.families import HEAD, Family, ends_in, in_memory_name, ties
from ckptgrow.tensors import TensorInfo
from ckptgrow.trained import Trained, is_dump, unmerged

# Put between the parts of a name by torch.compile, DDP, FSDP1, activation checkpointing.
WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# What lies beside the model in a dump of a whole training run.
_STATE = frozenset({"optimizer", "optimizers", "optim", "lr_scheduler", "scheduler", "dataloader", "train_state"})


@dataclass(frozen=True, slots=True)
class Shift:
    """One prefix that all trained names have too much or too little."""

    drop: str = ""
    add: str = ""

    def of(self, name: str) -> str:
        return self.add + name.removeprefix(self.drop) if name.startswith(self.drop) else name

    def back(self, name: str) -> str:
        """What a tensor of that name would be called among the trained ones."""
        return self.drop + name.removeprefix(self.add)


@dataclass(frozen=True)
class Naming:
    """A checkpoint as others may name it.

    `known` has every name, on disk and in memory, under which one of its tensors may come back, and that tensor's own;
    `probe` is a tensor that must be there, by which a prefix is found.
    """

    tensors: Tensors
    config: Mapping[str, Any]
    family: Family | None
    ties: Mapping[str, str]
    known: Mapping[str, str]
    probe: str


@dataclass(frozen=True, slots=True)
class Matching:
    """Which trained tensor is which; heads that were added because they are tied; what does not fit."""

    names: Mapping[str, str]  # own -> trained
    heads: Mapping[str, str]  # trained -> the own tensor that it is a copy of
    doubles: Mapping[str, str]  # trained -> the own tensor that another trained one is already
    strangers: tuple[str, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    shift: Shift


@dataclass(frozen=True)
class Renamed:
    """The trained tensors that were found, under the names of the checkpoint they were matched with."""

    trained: Tensors
    names: Mapping[str, str]

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: self.trained.infos[theirs] for name, theirs in self.names.items()}

    def bits(self, name: str) -> Bits:
        return self.trained.bits(self.names[name])


def naming(
    tensors: Tensors,
    config: Mapping[str, Any],
    family: Family | None,
    tied: Mapping[str, str],
    probe: str,
    in_memory: Mapping[str, str] | None = None,
) -> Naming:
    """What is known of a checkpoint's names; `in_memory` where its manifest says more than its family does."""
    known = {plain(name): name for name in tensors.infos} | {name: name for name in tensors.infos}
    for name in tensors.infos:
        memory = (in_memory or {}).get(name) or (in_memory_name(family, name) if family else name)
        known.setdefault(memory, name)
    return Naming(tensors, config, family, tied, known, probe)


def match(own: Naming, trained: Trained) -> Matching:
    """Find every own tensor among the trained ones. Raises RequestError for the names of an unmerged LoRA."""
    if any(".lora_" in name for name in trained.infos):
        raise unmerged(trained.folder)
    forms = [form for form, name in own.known.items() if name == own.probe]
    shift = shift_of(own.known, forms, [plain(name) for name in trained.infos])
    names: dict[str, str] = {}
    doubles, others = {}, []
    for name in trained.infos:
        found = own.known.get(shift.of(plain(name))) or own.known.get(plain(name))
        if found in names:
            doubles[name] = found
        elif found is not None:
            names[found] = name
        else:
            others.append(name)
    heads = _heads(own, names, others)
    strangers = [name for name in others if name not in heads and name not in names.values()]
    beside = [n for n in strangers if is_dump(trained) and n.partition(".")[0] in _STATE]
    dropped = {name for name in own.tensors.infos if name not in names and _is_tied(own, name)}
    return Matching(
        names,
        heads,
        doubles,
        strangers=tuple(name for name in strangers if name not in beside),
        missing=tuple(name for name in own.tensors.infos if name not in names and name not in dropped),
        notes=tuple(_notes(shift, heads, dropped, beside)),
        shift=shift,
    )


def plain(name: str, wrappers: frozenset[str] = WRAPPERS) -> str:
    """The name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in wrappers)


def shift_of(known: Collection[str], forms: Iterable[str], names: Sequence[str]) -> Shift:
    """The prefix under which most names are known, looked for on one tensor that must be there in one of `forms`."""
    shifts = [Shift()]
    for form in forms:
        shifts += [Shift(drop=name.removesuffix(form)) for name in names if name.endswith("." + form)]
        shifts += [Shift(add=form.removesuffix(name)) for name in names if form.endswith("." + name)]
    return max(dict.fromkeys(shifts), key=lambda shift: sum(shift.of(name) in known for name in names))


def _heads(own: Naming, names: dict[str, str], others: list[str]) -> dict[str, str]:
    """Heads among the unknown names: the own one under another prefix, or a copy of what they are tied to.

    Where only the head is left of two tied tensors, it stands for the other one: then it is entered in `names`.
    """
    mine = [name for name in own.tensors.infos if ends_in(name, HEAD) and name not in names]
    heads: dict[str, str] = {}
    for name in others:
        tied = [owner for head, owner in own.ties.items() if ends_in(plain(name), head)]
        if ends_in(plain(name), HEAD) and len(mine) == 1 and mine[0] not in names:
            names[mine[0]] = name
        elif tied and tied[0] not in names:
            names[tied[0]] = name
        elif tied:
            heads[name] = tied[0]
    return heads


def _is_tied(own: Naming, name: str) -> bool:
    """Whether a tensor may be left out because the model ties it to another one with the same bytes."""
    if own.family is None or not ends_in(name, HEAD):
        return False
    infos = own.tensors.infos
    owner = ties(own.config, own.family, {other: info for other, info in infos.items() if other != name}).get(HEAD)
    if owner is None or (infos[owner].dtype, infos[owner].shape) != (infos[name].dtype, infos[name].shape):
        return False
    one, other = own.tensors.bits(name).reshape(-1), own.tensors.bits(owner).reshape(-1)
    return all(bool((one[i : i + (1 << 20)] == other[i : i + (1 << 20)]).all()) for i in range(0, len(one), 1 << 20))


def _notes(shift: Shift, heads: Mapping[str, str], dropped: set[str], beside: list[str]) -> Iterator[str]:
    if shift.drop or shift.add:
        yield f"all names have {shift.drop or shift.add!r} too {'much' if shift.drop else 'little'} in front"
    yield from (f"{name} was added: it is tied to {owner}" for name, owner in heads.items())
    yield from (f"{name} was dropped: it is tied" for name in sorted(dropped))
    if beside:
        yield f"{len(beside):,} tensors beside the model (optimizer state) were not looked at"
