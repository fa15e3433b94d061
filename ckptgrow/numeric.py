"""Arithmetic on weights: exact shares, sums, and the rounding between float formats, on the bits of numpy arrays.

Everything is computed in float64, which holds every product and difference here exactly for formats up to 32 bits,
and is rounded once, half to even, into the format. Even shares of 8- and 16-bit formats are looked up in a table of
all bit patterns that the same code makes.

Shares (METHOD.md 2) add up to the weight in real arithmetic, for every finite bit pattern and every count:

- even, count k up to 8: a = round(W/k), k-1 times, and the rest W - (k-1)·a, which is exact.
- random, two shares: b = round(β·W) with β in [0.5, 0.75), and W - b, exact since b >= W/2 (Sterbenz).
- more: the weight is split in two by the larger half of the count (even: in proportion, random: by a β of its own)
  and each side is shared again. Float64 weights are split in twos from the start.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptgrow.checkpoint import Bits
from ckptgrow.errors import CkptgrowError
from ckptgrow.plan import Share

Floats = NDArray[np.float64]
Draw = Callable[[str], Floats]


@dataclass(frozen=True, slots=True)
class Float:
    """A binary float format: mantissa bits without the leading one, least normal exponent, largest finite value."""

    bits: int
    mantissa: int
    least: int
    largest: float

    @property
    def bits_type(self) -> np.dtype[Any]:
        return np.dtype(f"<u{self.bits // 8}")


FLOATS = {
    "F64": Float(64, 52, -1022, float(np.finfo(np.float64).max)),
    "F32": Float(32, 23, -126, float(np.finfo(np.float32).max)),
    "BF16": Float(16, 7, -126, float.fromhex("0x1.fep127")),
    "F16": Float(16, 10, -14, 65504.0),
    "F8_E4M3": Float(8, 3, -6, 448.0),
    "F8_E5M2": Float(8, 2, -14, 57344.0),
}
# How many even shares the direct rule deals exactly; checked over all bit patterns for counts 2 to 8.
_DIRECT = {dtype: 2 if dtype == "F64" else 8 for dtype in FLOATS}


def decode(bits: Bits, dtype: str) -> Floats:
    """The values of these bit patterns."""
    if FLOATS[dtype].bits <= 16:
        return values_of(dtype).take(bits)
    return bits.view(f"<f{FLOATS[dtype].bits // 8}").astype(np.float64)


@cache
def values_of(dtype: str) -> Floats:
    """The value of every bit pattern of an 8- or 16-bit format, in order."""
    form = FLOATS[dtype]
    patterns = np.arange(2**form.bits, dtype=np.int64)
    mantissa, magnitude = patterns % 2**form.mantissa, patterns % 2 ** (form.bits - 1)
    exponent = magnitude >> form.mantissa
    scale = np.maximum(exponent, 1) - 1 + form.least - form.mantissa
    values = np.ldexp((mantissa + (exponent > 0) * 2.0**form.mantissa), scale)
    values[values > form.largest] = np.nan  # infinities too: neither can be shared out
    signed: Floats = np.where(patterns == magnitude, values, -values)
    return signed


def rounded(values: Floats, dtype: str) -> Floats:
    """The nearest values that the format holds, ties to even; signs of zero are kept, overflow is not looked at."""
    form = FLOATS[dtype]
    drop = 52 - form.mantissa
    if drop == 0:
        return values
    raw = np.ascontiguousarray(values).view(np.uint64)
    raw = raw + ((raw >> np.uint64(drop)) & np.uint64(1)) + np.uint64((1 << (drop - 1)) - 1)
    result: Floats = (raw & ~np.uint64((1 << drop) - 1)).view(np.float64)
    small = np.abs(values) < 2.0**form.least
    if small.any():  # below the normal range all values lie on one grid: adding a constant rounds to it
        grid = 1.5 * 2.0 ** (52 + form.least - form.mantissa)
        result[small] = np.copysign((values[small] + grid) - grid, values[small])
    return result


def added(terms: Iterable[Floats]) -> tuple[Floats, Floats]:
    """(the sum, rounded to float64 once however many terms there are; what that rounding lost).

    A term of zero changes nothing, not even the sign of a zero: the shares of -0.0, -0.0 and 0.0, add up to -0.0.
    """
    first, *rest = terms
    total, lost = first.copy(), np.zeros_like(first)
    for term in rest:  # Knuth's two-sum
        new = total + term
        back = new - total
        lost += (total - (new - back)) + (term - back)
        np.copyto(total, new, where=term != 0)
    if len(rest) > 1:  # more than one rounding: where there was any, once more without
        for place in np.argwhere(lost != 0):
            values = [float(term[tuple(place)]) for term in (first, *rest)]
            total[tuple(place)] = math.fsum(values)
            lost[tuple(place)] = math.fsum([*values, -total[tuple(place)]])
    return total, lost


def encode(values: Floats, dtype: str) -> Bits:
    """The bit patterns of the nearest values that the format holds. Raises CkptgrowError where one is too large."""
    form, nearest = FLOATS[dtype], rounded(values, dtype)
    bits: Bits
    if not (np.abs(nearest) <= form.largest).all():
        raise CkptgrowError(f"a value is not finite or too large for {dtype}")
    if form.bits >= 32 or dtype == "F16":
        bits = nearest.astype(f"<f{form.bits // 8}").view(form.bits_type)
    elif dtype == "BF16":
        bits = (nearest.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    else:
        bits = _nearest_code(nearest, dtype)
    return bits


def _nearest_code(nearest: Floats, dtype: str) -> NDArray[np.uint8]:
    """The 8-bit patterns of values that the format holds: its positive patterns are in ascending order."""
    positive = values_of(dtype)[:128]
    code = np.searchsorted(positive[~np.isnan(positive)], np.abs(nearest)).astype(np.uint8)
    code[np.signbit(nearest)] |= np.uint8(128)
    return code


def share_of(bits: Bits, dtype: str, share: Share, draw: Draw) -> Bits:
    """One share of each weight. `draw` gives the β of every weight for a key; called for random shares only."""
    if FLOATS[dtype].bits <= 16 and _is_even(share):
        return _even_table(dtype, share).take(bits)
    return encode(_dealt(decode(bits, dtype), dtype, share, draw), dtype)


@lru_cache(maxsize=64)
def _even_table(dtype: str, share: Share) -> Bits:
    values = values_of(dtype)
    finite = np.where(np.isnan(values), 0.0, values)
    return encode(_dealt(finite, dtype, share, _no_draw), dtype)


def _no_draw(key: str) -> Floats:
    raise AssertionError(f"an even share asked for random numbers: {key}")


def _is_even(share: Share) -> bool:
    return share.rule == "even" and (share.of is None or _is_even(share.of))


def _dealt(values: Floats, dtype: str, share: Share, draw: Draw) -> Floats:
    """The share's value for each weight, every step exact in the format (see the module's docstring)."""
    if share.of:
        values = _dealt(values, dtype, share.of, draw)
    low, high = 0, share.count
    while high - low > 1:
        count = high - low
        if share.rule == "even" and count <= _DIRECT[dtype]:
            each = rounded(values / count, dtype)
            return each if share.index < high - 1 else values - (count - 1) * each
        middle = low + (count + 1) // 2
        key = f"{share.seed}/{share.of}/{low}-{high}"
        ratio = draw(key) if share.rule == "random" else (middle - low) / count
        larger = rounded(values * ratio, dtype)
        if share.index < middle:
            values, high = larger, middle
        else:
            values, low = values - larger, middle
    return values


def betas(key: str, first: int, count: int) -> Floats:
    """The β of `count` consecutive weights from position `first` on: 16-bit steps in [0.5, 0.75).

    Counter-based (Philox keyed by the digest of `key`), so a weight's β does not depend on how its tensor is cut.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    source = np.random.Philox(key=int.from_bytes(digest, "little"))
    source.advance(first // 16)  # one step of the counter is 4 x 64 bits
    skipped = first % 16
    raw = source.random_raw(-(-(skipped + count) // 4)).astype("<u8").view("<u2")[skipped : skipped + count]
    return raw * 2.0**-18 + 0.5


def census(bits: Bits, dtype: str) -> tuple[int, int]:
    """(how many weights are not finite, how many have a half that the format does not hold)."""
    if FLOATS[dtype].bits <= 16:
        odd = _odd_table(dtype).take(bits)
        if not odd.any():
            return 0, 0
        return int(np.count_nonzero(odd == 2)), int(np.count_nonzero(odd == 1))
    values = decode(bits, dtype)
    finite = np.isfinite(values)
    half = rounded(values[finite] / 2, dtype) if dtype != "F64" else values[finite] / 2
    return int(values.size - half.size), int(np.count_nonzero(half * 2 != values[finite]))


@cache
def _odd_table(dtype: str) -> NDArray[np.uint8]:
    values = values_of(dtype)
    inexact = rounded(np.nan_to_num(values) / 2, dtype) * 2 != np.nan_to_num(values)
    return np.where(np.isnan(values), 2, inexact).astype(np.uint8)
