"""The safetensors format and nothing else: header bytes <-> tensor descriptions.

On disk a file is: 8 bytes, the length N of the header, unsigned little-endian; N bytes of JSON, padded with spaces to
a multiple of 8; then the tensors' bytes without gaps, each described by dtype, shape and [start, stop) offsets that
count from the end of the header. `parse_header` refuses whatever the safetensors library refuses, and duplicate keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ckptgrow.errors import FormatError

# Bits an element, in the order in which the safetensors library lays tensors out in a file (then by name).
DTYPE_BITS: Mapping[str, int] = {
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F32": 32,
    "U32": 32,
    "I32": 32,
    "BF16": 16,
    "F16": 16,
    "U16": 16,
    "I16": 16,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I8": 8,
    "U8": 8,
    "F6_E3M2": 6,
    "F6_E2M3": 6,
    "F4": 4,
    "BOOL": 8,
}
_ORDER = {dtype: place for place, dtype in enumerate(DTYPE_BITS)}
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as a header describes it; `start` and `stop` are bytes from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def around(self, axis: int) -> tuple[int, int, int]:
        """(outer, extent, inner): elements before, along and behind an axis, by which a tensor is seen in three
        dimensions. A scalar is one place along axis 0."""
        shape = self.shape or (1,)
        return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Header:
    """A whole header: tensors in file order, and the free-form string metadata."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]

    @property
    def body_bytes(self) -> int:
        return self.tensors[-1].stop if self.tensors else 0

    def to_bytes(self) -> bytes:
        """Length prefix and JSON, as the safetensors library writes them; metadata keys sorted so that equal
        headers are equal bytes (the library's own order is random)."""
        entries: dict[str, Any] = {"__metadata__": dict(sorted(self.metadata.items()))} if self.metadata else {}
        for t in self.tensors:
            entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.start, t.stop]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return framed(text)


def framed(text: bytes) -> bytes:
    """Header JSON with its length in front, as a file begins."""
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def arrange(tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> Header:
    """The header of a file that holds these tensors, laid out as the safetensors library would."""
    placed, position = [], 0
    for t in sorted(tensors, key=lambda t: (_ORDER[t.dtype], t.name)):
        placed.append(TensorInfo(t.name, t.dtype, t.shape, position, position + t.nbytes))
        position += t.nbytes
    return Header(tuple(placed), metadata)


def header_length(prefix: bytes, file_bytes: int) -> int:
    """How many bytes of JSON follow the 8-byte prefix. Raises FormatError where the file cannot hold them."""
    if len(prefix) < LENGTH_BYTES:
        raise FormatError(f"not a safetensors file: only {len(prefix)} bytes long")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES or LENGTH_BYTES + length > file_bytes:
        raise FormatError(f"not a safetensors file, or cut short: its header claims {length:,} bytes")
    return length


def parse_header(text: bytes, body_bytes: int) -> Header:
    """The header in `text` (without its length prefix) of a file with `body_bytes` bytes of tensors.

    Raises FormatError for anything that is not a gapless, complete, in-bounds description of the body.
    """
    try:
        entries = (
            json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_int=_natural)
            if text[:1] == b"{"
            else None
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the safetensors header is not valid JSON ({error})") from None
    if not isinstance(entries, dict):
        raise FormatError("the safetensors header is not a JSON object")
    metadata = _metadata(entries.pop("__metadata__", {}))
    tensors = sorted((_tensor(name, entry) for name, entry in entries.items()), key=lambda t: (t.start, t.stop))
    _check_gapless(tensors, body_bytes)
    return Header(tuple(tensors), metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        key.encode()  # ValueError for half a surrogate pair
        if isinstance(value, str):
            value.encode()
        if key in seen:
            raise FormatError("named twice in the header", tensor=key)
        seen[key] = value
    return seen


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FormatError("__metadata__ in the header is not a map of strings to strings")
    return value


def _tensor(name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError("its header entry is not {dtype, shape, data_offsets}", tensor=name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise FormatError(f"unknown dtype {dtype!r}", tensor=name)
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise FormatError("shape and data_offsets must be lists of whole numbers", tensor=name)
    info = TensorInfo(name, dtype, tuple(shape), offsets[0], offsets[1])
    if not _counts(shape, DTYPE_BITS[dtype]):
        raise FormatError("its shape is too large", tensor=name)
    if info.elements * DTYPE_BITS[dtype] % 8 or info.stop - info.start != info.nbytes:
        raise FormatError(
            f"{dtype} {list(shape)} does not fill its {info.stop - info.start:,} bytes in the file", tensor=name
        )
    return info


def _natural(digits: str) -> int | float:
    """A whole number as the library takes it: no minus zero, 64 bits; anything else is a float, and refused as one."""
    number = int(digits)
    return number if 0 <= number < 2**64 and digits[0] != "-" else float(digits)


def _counts(shape: list[int], bits: int) -> bool:
    """Whether the product, taken from the left, and its bits fit 64 bits at each step."""
    total = 1
    for size in shape:
        total *= size
        if total >= 2**64:
            return False
    return total * bits < 2**64


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_gapless(tensors: Iterable[TensorInfo], body_bytes: int) -> None:
    position = 0
    for t in tensors:
        if t.start != position:
            raise FormatError(f"its bytes begin at {t.start:,}, not at {position:,}: overlap or hole", tensor=t.name)
        position = t.stop
    if position != body_bytes:
        raise FormatError(f"the tensors end at {position:,} of {body_bytes:,} bytes: the file is cut short or padded")
