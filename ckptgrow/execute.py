"""The executor: streams the bytes of any Plan into the files of its Layout, in bounded memory.

A part that is a source's bytes is copied inside the kernel where its bytes are contiguous, and an output of nothing but
zeros is a hole in the file. Everything else goes in blocks of a few MiB: whole slices along the axis where they are
small, stretches of one slice where they are large.
Sources are mapped, so anonymous memory holds a few blocks for each thread (one a shard) and nothing else.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from ckptgrow.checkpoint import Bits, Checkpoint, Tensors
from ckptgrow.errors import CkptgrowError, FormatError
from ckptgrow.layout import Layout, Shard
from ckptgrow.numeric import Floats, added, betas, census, decode, encode, share_of
from ckptgrow.plan import Output, Part, Term
from ckptgrow.staging import Staging
from ckptgrow.tensors import DTYPE_BITS

BLOCK_BYTES = 1 << 20
COPY_BYTES = 64 << 20
Progress = Callable[[int], None]  # called with the number of bytes just written, from any thread
Sources = Mapping[str, Tensors]  # bytes are copied inside the kernel where it is a Checkpoint, which has files
_Scalar = TypeVar("_Scalar", bound=np.generic)
# Other file system, old kernel, special file, sandbox: copy through memory instead.
_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)


@dataclass(frozen=True, slots=True)
class Block:
    """Slices `rows` along the dimensions before the axis, places [start, stop) along it: contiguous in the output."""

    rows: range
    start: int
    stop: int


def write_shards(layout: Layout, sources: Sources, staging: Staging, progress: Progress) -> int:
    """Write every shard that `staging` does not have yet; return the number of shared weights whose half is inexact.

    Raises CkptgrowError for weights that cannot be shared out (not finite) and OSError where the disk fails.
    """
    turn, stop = threading.Lock(), threading.Event()

    def write(shard: Shard) -> None:
        facts = {"inexact_halves": _write_shard(staging.folder, shard, sources, _checked(progress, stop))}
        with turn:
            staging.record(shard.file, facts)

    for shard in layout.shards:
        progress(shard.nbytes if shard.file in staging.finished else 0)
    waiting = [shard for shard in layout.shards if shard.file not in staging.finished]
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        try:
            tasks = [pool.submit(write, shard) for shard in waiting]
            wait(tasks, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    for task in tasks:
        if not task.cancelled() and not isinstance(task.exception(), _StoppedError):
            task.result()
    return sum(facts["inexact_halves"] for facts in staging.finished.values())


class _StoppedError(Exception):
    """Another shard failed, or the user interrupted."""


def _checked(progress: Progress, stop: threading.Event) -> Progress:
    def step(nbytes: int) -> None:
        if stop.is_set():
            raise _StoppedError
        progress(nbytes)

    return step


def _write_shard(folder: Path, shard: Shard, sources: Sources, progress: Progress) -> int:
    """One file: under a temporary name, flushed to disk, renamed."""
    temporary = folder / (shard.file + ".tmp")
    inexact = 0
    with temporary.open("wb", buffering=0) as target:
        target.truncate(shard.nbytes)
        head = shard.head or shard.header.to_bytes()
        if shard.whole:
            head = _head_of(shard, sources)
        _write_all(target, head)
        progress(len(head))
        for output in shard.outputs:
            try:
                inexact += write_output(target, output, sources, progress)
            except CkptgrowError as error:
                raise error.at(file=shard.file, tensor=output.name) from None
        target.truncate(target.tell())
        os.fsync(target.fileno())
    temporary.rename(folder / shard.file)
    return inexact


def _head_of(shard: Shard, sources: Sources) -> bytes:
    """The source file's own header bytes: a shard in which nothing changes is copied as it is."""
    term = shard.outputs[0].parts[0].terms[0]
    source = sources[term.source]
    assert isinstance(source, Checkpoint)
    path, offset, _ = source.span(term.name)
    info = source.infos[term.name]
    with path.open("rb") as file:
        return file.read(offset - info.start)


def write_output(target: BinaryIO, output: Output, sources: Sources, progress: Progress) -> int:
    """Stream one tensor; return the number of shared weights whose half is not exact in the dtype."""
    runs = list(contiguous(output, sources))
    if runs:
        for path, offset, nbytes in runs:
            copy_bytes(path, offset, nbytes, target, progress)
        return 0
    if all(part.is_zero for part in output.parts):
        _leave_hole(target, output.info.nbytes, progress)
        return 0
    inexact, held = 0, {name: _Held(source) for name, source in sources.items()}
    for block in blocks(output):
        data, odd = _filled(output, block, held)
        _write_all(target, data.data)
        progress(data.nbytes)
        inexact += odd
    return inexact


def made(output: Output, sources: Sources) -> Bits:
    """One tensor of the result, in memory."""
    outer, inner = output.steps
    whole = np.empty((outer, output.extent, inner), f"<u{DTYPE_BITS[output.dtype] // 8}")
    for block in blocks(output):
        data, _ = _filled(output, block, sources)
        whole[block.rows.start : block.rows.stop, block.start : block.stop] = data
    return whole.reshape(output.shape)


class _Held:
    """A source of which each tensor is fetched once while one output is written: some have to put it together."""

    def __init__(self, source: Tensors) -> None:
        self.infos, self.bits = source.infos, cache(source.bits)


def digest_of_output(output: Output, sources: Sources) -> str:
    """The digest of the bytes that `write_output` would write."""
    told, held = hashlib.sha256(), {name: _Held(source) for name, source in sources.items()}
    for block in blocks(output):
        told.update(_filled(output, block, held)[0].data)
    return "sha256:" + told.hexdigest()


def contiguous(output: Output, sources: Sources) -> Iterator[tuple[Path, int, int]]:
    """The byte ranges (file, offset, length) that laid end to end are the output; none where it is not that simple."""
    outer, inner = output.steps
    terms = [part.bytes_of for part in output.parts if part.slices is None]
    ranges = [(term, term.units) for term in terms if term is not None and isinstance(term.units, range)]
    if len(ranges) != len(output.parts) or (outer > 1 and len(terms) > 1):
        return
    found = []
    for term, units in ranges:
        source, info = sources[term.source], sources[term.source].infos[term.name]
        if not isinstance(source, Checkpoint) or info.dtype != output.dtype:
            return
        if term.shift or info.around(output.axis)[0] != outer or (outer > 1 and info.shape != output.shape):
            return
        found.append((units, source.span(term.name)))
    place = inner * DTYPE_BITS[output.dtype] * outer  # bits a place along the axis takes, over all slices
    for units, (path, offset, _) in found:
        yield path, offset + units.start * place // 8, len(units) * place // 8


def blocks(output: Output, limit: int = BLOCK_BYTES) -> Iterator[Block]:
    """The output cut into blocks of at most `limit` bytes (or one place along the axis), in file order."""
    outer, inner = output.steps
    place = max(1, inner * DTYPE_BITS[output.dtype] // 8)
    rows, places = limit // max(1, place * output.extent), max(1, limit // place)
    if rows:
        for row in range(0, outer, rows):
            yield Block(range(row, min(row + rows, outer)), 0, output.extent)
        return
    for row in range(outer):
        for start in range(0, output.extent, places):
            yield Block(range(row, row + 1), start, min(start + places, output.extent))


def _filled(output: Output, block: Block, sources: Sources) -> tuple[Bits, int]:
    """The bits of one block, and how many of its shared weights have an inexact half."""
    _, inner = output.steps
    data = np.empty((len(block.rows), block.stop - block.start, inner), f"<u{DTYPE_BITS[output.dtype] // 8}")
    inexact = 0
    for start, part in output.placed():
        low, high = max(start, block.start), min(start + part.size, block.stop)
        rows = part.rows(block.rows)
        if low < high and rows:
            top = slice(rows.start - block.rows.start, rows.stop - block.rows.start)
            place = slice(low - block.start, high - block.start)
            data[top, place], odd = _summed(output, part, rows, slice(low - start, high - start), sources)
            inexact += odd
    return data, inexact


def _summed(output: Output, part: Part, rows: range, picked: slice, sources: Sources) -> tuple[Bits | int, int]:
    """One part, or some of its places: a value, bytes, one share, or a sum made in float64 and rounded once."""
    inexact, values = 0, list[Floats]()
    if part.fill:
        return encode(np.array([part.fill]), output.dtype), 0
    for term in part.terms:
        piece = Piece(term, rows, picked, output.axis, sources[term.source])
        bits, dtype = piece.bits(), piece.dtype
        if term.share:
            odd = piece.check(bits)
            inexact += 0 if part.grown else odd
            bits = share_of(bits, dtype, term.share, piece.draw)
        if len(part.terms) == 1 and term.scale == 1.0 and dtype == output.dtype:
            return bits, inexact
        values.append(decode(bits, dtype) * piece.scale)
    return (encode(added(values)[0], output.dtype) if values else 0), inexact


@dataclass(frozen=True, slots=True)
class Piece:
    """Some units of some slices of one tensor, seen as [slices, units, inner]; `rows` as the output counts them."""

    term: Term
    rows: range
    picked: slice
    axis: int
    source: Tensors

    @property
    def dtype(self) -> str:
        return self.source.infos[self.term.name].dtype

    @property
    def scale(self) -> float | Floats:
        """One factor for all, or one for each unit."""
        scale = self.term.scale
        return scale if isinstance(scale, float) else np.array(scale[self.picked])[:, None]

    def _pick(self, whole: NDArray[_Scalar]) -> NDArray[_Scalar]:
        units = self.term.units[self.picked]
        return whole[:, units.start : units.stop] if isinstance(units, range) else whole[:, list(units)]

    @property
    def _own(self) -> range:
        """The slices as the source counts them."""
        return range(self.rows.start - self.term.shift, self.rows.stop - self.term.shift)

    def _shape(self) -> tuple[int, int, int]:
        return self.source.infos[self.term.name].around(self.axis)

    def bits(self) -> Bits:
        whole = self.source.bits(self.term.name).reshape(self._shape())
        return self._pick(whole[self._own.start : self._own.stop])

    def shared(self) -> Bits:
        """The bits, or the share of them that the term asks for."""
        share = self.term.share
        return share_of(self.bits(), self.dtype, share, self.draw) if share else self.bits()

    def check(self, bits: Bits) -> int:
        """The number of weights with an inexact half. Raises FormatError for weights that are not finite."""
        broken, odd = census(bits, self.dtype)
        if broken:
            raise FormatError(f"{broken} of its weights are infinite or NaN and cannot be shared out")
        return odd

    def draw(self, key: str) -> Floats:
        """The β of these weights, by their places in the source tensor."""
        _, units, inner = self._shape()
        key = f"{self.term.name}/{key}"
        picked = self.term.units[self.picked]
        if len(self.rows) == 1 and isinstance(picked, range):
            first = (self._own.start * units + picked.start) * inner
            return betas(key, first, len(picked) * inner).reshape(1, len(picked), inner)
        whole = betas(key, self._own.start * units * inner, len(self.rows) * units * inner)
        return self._pick(whole.reshape(len(self.rows), units, inner))


def _leave_hole(target: BinaryIO, nbytes: int, progress: Progress) -> None:
    """Zeros that are not written: a file reads as zeros where nothing was."""
    stop = target.tell() + nbytes
    if target.seek(0, os.SEEK_END) < stop:
        target.truncate(stop)
    target.seek(stop)
    progress(nbytes)


def copy_bytes(path: Path, offset: int, nbytes: int, target: BinaryIO, progress: Progress) -> None:
    """Append a range of a file to the target, inside the kernel where the system can."""
    with path.open("rb", buffering=0) as source:
        while nbytes:
            done = _kernel_copy(source, offset, min(nbytes, COPY_BYTES), target)
            if not done:
                source.seek(offset)
                data = source.read(min(nbytes, BLOCK_BYTES))
                if not data:
                    raise FormatError("the file became shorter while it was read", file=str(path))
                _write_all(target, data)
                done = len(data)
            offset, nbytes = offset + done, nbytes - done
            progress(done)


def _kernel_copy(source: BinaryIO, offset: int, nbytes: int, target: BinaryIO) -> int:
    """Bytes copied by copy_file_range to the target's position; 0 where it is not to be had for these files."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source.fileno(), target.fileno(), nbytes, offset)
    except OSError as error:
        if error.errno in _NO_KERNEL_COPY:
            return 0
        raise


def _write_all(target: BinaryIO, data: bytes | memoryview) -> None:
    """An unbuffered write may take less than it is given."""
    view = memoryview(data).cast("B")
    while view:
        view = view[target.write(view) :]
