"""Are two checkpoints the same function? Read from their bytes alone, knowing nothing of Plans and manifests.

Three answers, strongest first:

- untouched: every tensor outside the MLPs is byte-identical, none is missing, none is extra, and config.json says the
  same but for the width.
- proved: in every MLP each new unit's rows of gate, up and their biases equal some base unit's bit for bit, and the
  columns of down of each base unit's copies add up to its column exactly. A unit whose column is zero is free. Base
  units with equal rows count as one. This is M·S = I (METHOD.md 1) on the weights, whatever tool grew them.
- probed (probe.py): one forward of each MLP on random inputs.

This module shares no code with the writer but the reader and the decoding of bit patterns. Sums are made in float64
together with their rounding errors, so "exactly" holds for every format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ckptgrow.checkpoint import Bits, Checkpoint
from ckptgrow.errors import FormatError
from ckptgrow.families import Architecture, Mlp, Slot, scoped
from ckptgrow.numeric import Floats, decode

Verdict = Literal["yes", "no", "cannot tell", "not run"]
Progress = Callable[[int], None]
Digests = NDArray[Any]
Units = NDArray[np.int64]

BLOCK_BYTES = 1 << 20
SHOWN = 20  # findings kept for an answer
NEUTRAL_KEYS = frozenset({"ckptgrow", "transformers_version", "_name_or_path", "torch_dtype", "dtype"})


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be, and in which tensor (or file)."""

    tensor: str
    problem: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the answers: its verdict, a figure to show, and the findings that speak against it."""

    name: str
    verdict: Verdict
    figure: str
    findings: tuple[Finding, ...] = ()


def untouched(base: Checkpoint, grown: Checkpoint, architecture: Architecture, progress: Progress) -> Answer:
    """Every tensor outside the MLPs byte-identical, none missing, none extra; config.json differs in the width only."""
    inside = {name for mlp in architecture.mlps for name in mlp.tensors}
    findings = [Finding(name, "it is missing") for name in base.infos if name not in grown.infos]
    findings += [Finding(name, "the base has no such tensor") for name in grown.infos if name not in base.infos]
    shared = [name for name in base.infos if name in grown.infos and name not in inside]
    with _pool() as pool:
        problems = pool.map(lambda name: _difference(base, grown, name, progress), shared)
        findings += [Finding(name, problem) for name, problem in zip(shared, problems, strict=True) if problem]
    findings += _config_changes(base, grown, architecture)
    unclear = [*_config_unclear(base, grown, architecture)]
    verdict: Verdict = "no" if findings else "cannot tell" if unclear else "yes"
    same = sum(1 for name in shared) - sum(1 for finding in findings if finding.tensor in shared)
    figure = f"{same:,} of {len(base.infos) - len(inside):,} tensors outside the MLPs are byte-identical"
    return Answer("untouched", verdict, figure, tuple((findings + unclear)[:SHOWN]))


def proved(base: Checkpoint, grown: Checkpoint, architecture: Architecture, progress: Progress) -> Answer:
    """M·S = I, MLP by MLP, on the weights; the figure is the largest error of a sum of columns."""
    with _pool() as pool:
        results = list(pool.map(lambda mlp: _prove(base, grown, mlp, progress), architecture.mlps))
    findings = [finding for result in results for finding in result.findings]
    findings += _config_width(grown, architecture, {result.width for result in results})
    error = max(result.error for result in results)
    units, copies = sum(mlp.width for mlp in architecture.mlps), sum(result.width for result in results)
    figure = f"{copies:,} units are {units:,} base units in {len(results)} MLPs, largest error {error!r}"
    if findings:
        broken = len({finding.tensor for finding in findings})
        figure = f"wrong in {broken} tensor{'s' if broken != 1 else ''}, largest error {error!r}"
    return Answer("proved", "no" if findings else "yes", figure, tuple(findings[:SHOWN]))


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=2)


# ---------------------------------------------------------------- untouched


def _difference(base: Checkpoint, grown: Checkpoint, name: str, progress: Progress) -> str | None:
    """How a tensor that should be unchanged differs, or None."""
    one, other = base.infos[name], grown.infos[name]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return f"{other.dtype} {list(other.shape)}, in the base {one.dtype} {list(one.shape)}"
    (path, offset, nbytes), (theirs, start, _) = base.span(name), grown.span(name)
    differing = 0
    with path.open("rb", buffering=0) as left, theirs.open("rb", buffering=0) as right:
        left.seek(offset)
        right.seek(start)
        for done in range(0, nbytes, BLOCK_BYTES):
            size = min(BLOCK_BYTES, nbytes - done)
            mine, its = _exactly(left, size), _exactly(right, size)
            if mine != its:
                differing += int((np.frombuffer(mine, np.uint8) != np.frombuffer(its, np.uint8)).sum())
            progress(2 * size)
    return f"{differing:,} of its {nbytes:,} bytes differ" if differing else None


def _exactly(file: Any, size: int) -> bytes:
    data: bytes = file.read(size)
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            raise FormatError("the file became shorter while it was read", file=str(file.name))
        data += more
    return data


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested config, by dotted path, without the keys that say nothing about the function."""
    for key, value in config.items():
        if key in NEUTRAL_KEYS:
            continue
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _config_changes(base: Checkpoint, grown: Checkpoint, architecture: Architecture) -> Iterator[Finding]:
    mine, theirs = dict(_flat(base.config)), dict(_flat(grown.config))
    for key in (mine.keys() & theirs.keys()) - {architecture.width_path}:
        if mine[key] != theirs[key]:
            yield Finding("config.json", f"{key} is {theirs[key]!r}, in the base {mine[key]!r}")


def _config_unclear(base: Checkpoint, grown: Checkpoint, architecture: Architecture) -> Iterator[Finding]:
    """Keys that only one config has: the other uses a default that is not written anywhere here."""
    mine, theirs = dict(_flat(base.config)), dict(_flat(grown.config))
    for key in sorted((mine.keys() ^ theirs.keys()) - {architecture.width_path}):
        where = "the base" if key in mine else "the grown one"
        yield Finding("config.json", f"{key} stands only in {where}, so its value in the other is unknown")


def _config_width(grown: Checkpoint, architecture: Architecture, widths: set[int]) -> Iterator[Finding]:
    """The config must say the width that all tensors have, or nobody can load them."""
    says = scoped(grown.config, architecture.family).get(architecture.family.width)
    if widths != {says} and not (says is None and widths == {architecture.width}):
        found = ", ".join(str(width) for width in sorted(widths))
        yield Finding("config.json", f"{architecture.width_path} is {says!r}, but the tensors have width {found}")


# ---------------------------------------------------------------- proved


@dataclass(frozen=True, slots=True)
class _Rows:
    """One lane of a gate, up or bias in both checkpoints, seen as [outer, units, inner]."""

    name: str
    base: Bits
    grown: Bits


@dataclass(frozen=True, slots=True)
class _Proof:
    """What came out for one MLP: its width in the grown checkpoint, the largest error, what is wrong."""

    width: int
    error: float
    findings: tuple[Finding, ...]


def _prove(base: Checkpoint, grown: Checkpoint, mlp: Mlp, progress: Progress) -> _Proof:
    misfits = list(_misfits(base, grown, mlp))
    if misfits:
        return _Proof(0, 0.0, tuple(misfits))
    rows = [lane for name, slot in mlp.tensors.items() if name != mlp.down for lane in _lanes(base, grown, name, slot)]
    copies, originals = _match(rows, _fast_digests)
    wrong = _unequal(rows, copies, originals)
    if wrong is not None:  # the fast digest may collide: ask a slow one before saying no
        copies, originals = _match(rows, _slow_digests)
        wrong = _unequal(rows, copies, originals)
    for name in mlp.tensors:
        progress(base.infos[name].nbytes + grown.infos[name].nbytes)
    if wrong is not None:
        return _Proof(len(copies), 0.0, (wrong,))
    sums = _Sums(base, grown, mlp, copies, originals)
    findings = [*_strangers(rows, copies, sums.unmatched()), *sums.findings()]
    return _Proof(len(copies), sums.error, tuple(findings))


def _misfits(base: Checkpoint, grown: Checkpoint, mlp: Mlp) -> Iterator[Finding]:
    """Tensors of the grown MLP that are missing or do not have the shape of one MLP of the base's hidden size."""
    missing = [name for name in mlp.tensors if name not in grown.infos]
    yield from (Finding(name, "it is missing") for name in missing)
    if missing:
        return
    slots = mlp.tensors.items()
    width = grown.infos[mlp.down].shape[mlp.tensors[mlp.down].axis] if grown.infos[mlp.down].shape else 0
    for name, slot in slots:
        mine, its = base.infos[name], grown.infos[name]
        expected = tuple(width * len(slot.lanes) if i == slot.axis else n for i, n in enumerate(mine.shape))
        if its.shape != expected or its.dtype != mine.dtype:
            problem = f"{its.dtype} {list(its.shape)}, where {mine.dtype} {list(expected)} belongs to width {width}"
            yield Finding(name, problem)


def _lanes(base: Checkpoint, grown: Checkpoint, name: str, slot: Slot) -> Iterator[_Rows]:
    mine, its = _as_units(base, name, slot), _as_units(grown, name, slot)
    for i in range(len(slot.lanes)):
        yield _Rows(name, _lane(mine, i, len(slot.lanes)), _lane(its, i, len(slot.lanes)))


def _lane(bits: Bits, i: int, count: int) -> Bits:
    width = bits.shape[1] // count
    return bits[:, i * width : (i + 1) * width]


def _as_units(checkpoint: Checkpoint, name: str, slot: Slot) -> Bits:
    """A tensor as [outer, units, inner]."""
    shape = checkpoint.infos[name].shape
    outer = int(np.prod(shape[: slot.axis], dtype=np.int64))
    return checkpoint.bits(name).reshape(outer, shape[slot.axis], -1)


def _match(rows: list[_Rows], digests: Callable[[Bits], Digests]) -> tuple[Units, Units]:
    """For each new unit the first base unit with the same digests, or -1; the same for the base's own units."""
    width = rows[0].base.shape[1]
    together = np.zeros(width + rows[0].grown.shape[1], np.uint64)
    for lane in rows:  # an odd factor between tensors, so that equal digests of gate and up do not cancel
        together *= np.uint64(0x9E3779B97F4A7C15)
        together += np.concatenate([digests(lane.base), digests(lane.grown)])
    _, first, classes = np.unique(together, return_index=True, return_inverse=True)
    earliest = first[classes]
    copies = np.where(earliest[width:] < width, earliest[width:], -1)
    return copies.astype(np.int64), earliest[:width].astype(np.int64)


def _fast_digests(bits: Bits) -> Digests:
    """64 bits for each unit: its words times random odd numbers, added up modulo 2^64."""
    outer, units, inner = bits.shape
    random = np.random.Generator(np.random.Philox(key=0x636B707467726F77))
    if outer == 1 and inner * bits.itemsize % 8 == 0:
        words = bits[0].view("<u8")
        factors = random.integers(0, 2**64, words.shape[1], np.uint64) | np.uint64(1)
        step = max(1, BLOCK_BYTES // max(1, inner * bits.itemsize))
        return np.concatenate([words[i : i + step] @ factors for i in range(0, units, step)])
    total = np.zeros(units, np.uint64)
    step = max(1, BLOCK_BYTES // max(1, units * 8))
    flat = bits.transpose(0, 2, 1) if inner > 1 else bits.reshape(outer, 1, units)
    for slices in flat:
        for i in range(0, inner, step):
            some = slices[i : i + step].astype(np.uint64)
            total += (random.integers(0, 2**64, len(some), np.uint64) | np.uint64(1)) @ some
    return total


def _slow_digests(bits: Bits) -> Digests:
    """64 cryptographic bits for each unit."""
    strong = (hashlib.blake2b(bits[:, unit].tobytes(), digest_size=8).digest() for unit in range(bits.shape[1]))
    return np.frombuffer(b"".join(strong), "<u8")


def _unequal(rows: list[_Rows], copies: Units, originals: Units) -> Finding | None:
    """A unit whose rows are not those of the unit that its digest names; None if there is none."""
    for lane in rows:
        doubles = np.flatnonzero(originals != np.arange(len(originals)))
        for bits, units, sources in (
            (lane.grown, np.flatnonzero(copies >= 0), copies[copies >= 0]),
            (lane.base, doubles, originals[doubles]),
        ):
            unit = _first_difference(bits, units, lane.base, sources)
            if unit is not None:
                return Finding(lane.name, f"unit {unit} equals no unit of the base")
    return None


def _first_difference(one: Bits, units: Units, other: Bits, sources: Units) -> int | None:
    outer, _, inner = one.shape
    step = max(1, BLOCK_BYTES // max(1, outer * inner * one.itemsize))
    for i in range(0, len(units), step):
        some, theirs = _span(units[i : i + step]), _span(sources[i : i + step])
        same = (one[:, some] == other[:, theirs]).all(axis=(0, 2))
        if not same.all():
            return int(units[i + int(np.flatnonzero(~same)[0])])
    return None


def _span(picked: Units) -> slice | Units:
    """A slice where the units follow one another, which reads without a copy."""
    if len(picked) and (np.diff(picked) == 1).all():
        return slice(int(picked[0]), int(picked[-1]) + 1)
    return picked


def _strangers(rows: list[_Rows], copies: Units, strangers: Units) -> Iterator[Finding]:
    """New units that carry weight in down and equal no base unit: in which tensor, and by how much."""
    for unit in strangers[:SHOWN]:
        alone = [(lane, _match([lane], _fast_digests)[0]) for lane in rows]
        lost = [lane.name for lane, found in alone if found[unit] < 0]
        if lost:
            yield from (Finding(name, f"the row of unit {unit} is in no unit of the base") for name in lost)
        else:
            owners = ", ".join(f"{lane.name} unit {found[unit]}" for lane, found in alone)
            yield Finding(rows[0].name, f"unit {unit} mixes rows of different base units: {owners}")
    if len(strangers) > SHOWN:
        yield Finding(rows[0].name, f"and {len(strangers) - SHOWN:,} more units")


class _Sums:
    """The columns of down, added up over the copies of each base unit, streamed over the slices before the axis."""

    def __init__(self, base: Checkpoint, grown: Checkpoint, mlp: Mlp, copies: Units, originals: Units) -> None:
        self.name, slot = mlp.down, mlp.tensors[mlp.down]
        self.dtype, self.copies = base.infos[mlp.down].dtype, copies
        self._mine, self._its = _as_units(base, mlp.down, slot), _as_units(grown, mlp.down, slot)
        self._originals = list(_turns(originals))
        self._copies = list(_turns(copies))
        self._lost = np.flatnonzero(copies < 0)
        self._heavy = np.zeros(len(self._lost), bool)
        self.errors = np.zeros(len(originals))
        for rows, inner in self._blocks():
            self._add(self._mine[rows, :, inner], self._its[rows, :, inner])

    @property
    def error(self) -> float:
        """The largest difference of an element of a sum from the base's."""
        return float(self.errors.max())

    def unmatched(self) -> Units:
        """New units that equal no base unit although their column is not zero."""
        return self._lost[self._heavy]

    def findings(self) -> Iterator[Finding]:
        wrong = np.flatnonzero(self.errors)
        for unit in wrong[:1]:
            made = np.flatnonzero(self.copies == unit)
            shown = ", ".join(str(u) for u in made[:4]) + (", ..." if len(made) > 4 else "")
            yield Finding(
                self.name,
                f"{len(wrong):,} of {len(self.errors):,} base units do not get their column back: unit {unit}"
                f" (now unit{'s' if len(made) != 1 else ''} {shown or 'gone'}) is off by {float(self.errors[unit])!r}",
            )

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        outer, units, inner = self._its.shape
        columns = max(1, BLOCK_BYTES // (units * self._its.itemsize))
        if columns >= inner:
            step = max(1, columns // max(1, inner))
            yield from ((slice(i, i + step), slice(None)) for i in range(0, outer, step))
        else:
            yield from (
                (slice(o, o + 1), slice(i, i + columns)) for o in range(outer) for i in range(0, inner, columns)
            )

    def _add(self, mine: Bits, its: Bits) -> None:
        decoded = decode(np.ascontiguousarray(its), self.dtype)
        if len(self._lost):
            self._heavy |= (decoded[:, self._lost] != 0).any(axis=(0, 2))
        shape = (mine.shape[0], len(self.errors), mine.shape[2])
        wanted, got = _Exact(shape), _Exact(shape)
        wanted.add_turns(decode(np.ascontiguousarray(mine), self.dtype), self._originals)
        got.add_turns(decoded, self._copies)
        off = got.minus(wanted)
        if not np.isfinite(off).all():
            raise FormatError("it has weights that are infinite or NaN: nothing can be proved", tensor=self.name)
        np.maximum(self.errors, off.max(axis=(0, 2), initial=0.0), out=self.errors)


def _turns(owners: Units) -> Iterator[tuple[slice | Units, slice | Units]]:
    """(units, their base units): in each turn a base unit is met at most once, so that sums can be made at once."""
    members = np.flatnonzero(owners >= 0)
    order = members[np.argsort(owners[members], kind="stable")]
    owned = owners[order]
    starts = np.flatnonzero(np.diff(owned, prepend=-1))
    turn = np.arange(len(owned)) - np.repeat(starts, np.diff(np.append(starts, len(owned))))
    for i in range(int(turn.max(initial=-1)) + 1):
        yield _span(order[turn == i]), _span(owned[turn == i])


class _Exact:
    """Running sums in float64 with their rounding errors kept (Knuth's two-sum)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.high, self.low = np.zeros(shape), np.zeros(shape)

    def add_turns(self, values: Floats, turns: Iterable[tuple[slice | Units, slice | Units]]) -> None:
        for units, owners in turns:
            self._add(values[:, units], owners)

    def _add(self, term: Floats, owners: slice | Units) -> None:
        old = self.high[:, owners]
        new = old + term
        back = new - old
        self.low[:, owners] += (old - (new - back)) + (term - back)
        self.high[:, owners] = new

    def minus(self, other: _Exact) -> Floats:
        """|self - other|, zero only where they are equal."""
        difference: Floats = np.abs((self.high - other.high) + (self.low - other.low))
        return difference
