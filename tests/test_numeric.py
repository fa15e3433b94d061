"""Shares add up for every bit pattern; rounding and bit patterns agree with torch."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptgrow.errors import CkptgrowError
from ckptgrow.numeric import FLOATS, betas, census, decode, encode, rounded, share_of, values_of
from ckptgrow.plan import Share

SMALL = ("BF16", "F16", "F8_E4M3", "F8_E5M2")
COUNTS = (*range(2, 9), 9, 13, 16, 31, 100)


def patterns(dtype: str) -> NDArray[Any]:
    """All finite bit patterns of a format, as torch decides it."""
    form = FLOATS[dtype]
    every = np.arange(2**form.bits).astype(form.bits_type)
    return every[np.isfinite(torch_values(every, dtype))]


def torch_values(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The values of bit patterns according to torch."""
    values: NDArray[Any] = torch.from_numpy(bits.copy()).view(DTYPES[dtype]).double().numpy()
    return values


def draw_for(bits: NDArray[Any], seed: int = 0) -> Any:
    """The β of weights 0, 1, 2, ... for any key."""
    return lambda key: betas(f"{seed}{key}", 0, bits.size)


@pytest.mark.parametrize("dtype", SMALL)
def test_decoding_agrees_with_torch(dtype: str) -> None:
    """Every finite pattern decodes to torch's value; every other pattern to NaN."""
    every = np.arange(2 ** FLOATS[dtype].bits).astype(FLOATS[dtype].bits_type)
    ours, theirs = values_of(dtype), torch_values(every, dtype)
    finite = np.isfinite(theirs)
    assert (ours[finite] == theirs[finite]).all()
    assert (np.signbit(ours[finite]) == np.signbit(theirs[finite])).all()
    assert np.isnan(ours[~finite]).all()
    assert (encode(ours[finite], dtype) == every[finite]).all()


@pytest.mark.parametrize("rule", ["even", "random"])
@pytest.mark.parametrize("dtype", SMALL)
def test_shares_add_up_for_every_pattern(dtype: str, rule: Any) -> None:
    """METHOD.md 2: for all finite patterns and k from 2 to 8 (and some larger) the shares add up exactly."""
    bits = patterns(dtype)
    for count in COUNTS:
        shares = Share(0, count, rule, 1 if rule == "random" else 0).siblings
        total = sum(torch_values(share_of(bits, dtype, share, draw_for(bits)), dtype) for share in shares)
        assert (total == torch_values(bits, dtype)).all(), count


@pytest.mark.parametrize("dtype", SMALL)
def test_nested_shares_add_up(dtype: str) -> None:
    """With g-freeze the original keeps round(W/2) and the rest is shared out again, evenly or at random."""
    bits = patterns(dtype)
    kept, rest = Share(0, 2), Share(1, 2)
    half = torch_values(share_of(bits, dtype, kept, None), dtype)  # type: ignore[arg-type]
    expected = torch.from_numpy(torch_values(bits, dtype) / 2).to(DTYPES[dtype]).double().numpy()
    assert (half == expected).all()
    for count in range(2, 8):
        for rule in ("even", "random"):
            dealt = [Share(i, count, rule, 0, of=rest) for i in range(count)]  # type: ignore[arg-type]
            total = half + sum(torch_values(share_of(bits, dtype, s, draw_for(bits)), dtype) for s in dealt)
            assert (total == torch_values(bits, dtype)).all()


def test_even_shares_of_every_float32_mantissa() -> None:
    """Exact for all 2^23 mantissas at one exponent (the rule does not depend on it), k from 2 to 8."""
    bits = (np.arange(2**23) + (127 << 23)).astype(np.uint32)
    wanted = decode(bits, "F32")
    for count in (3, 5, 6, 7):
        each = decode(share_of(bits, "F32", Share(0, count), None), "F32")  # type: ignore[arg-type]
        last = decode(share_of(bits, "F32", Share(count - 1, count), None), "F32")  # type: ignore[arg-type]
        assert ((count - 1) * each + last == wanted).all()


@given(
    st.sampled_from(["F32", "F64"]), st.integers(0, 2**64 - 1), st.integers(2, 40), st.sampled_from(["even", "random"])
)
def test_wide_formats_add_up(dtype: str, pattern: int, count: int, rule: Any) -> None:
    """Any float32 or float64 weight, subnormals included, any number of copies: exact as fractions."""
    form = FLOATS[dtype]
    bits = np.array([pattern % 2**form.bits], form.bits_type)
    if not np.isfinite(decode(bits, dtype)).all():
        return
    shares = Share(0, count, rule, 5 if rule == "random" else 0).siblings
    made = [decode(share_of(bits, dtype, share, draw_for(bits)), dtype)[0] for share in shares]
    assert sum(map(Fraction, made)) == Fraction(decode(bits, dtype)[0])


def test_the_naive_rule_does_not_add_up() -> None:
    """The check can fail: W/3 three times is off for 43,350 of the 65,280 finite bfloat16 patterns (METHOD.md 2)."""
    bits = patterns("BF16")
    naive = rounded(decode(bits, "BF16") / 3, "BF16") * 3
    assert (len(bits), int((naive != decode(bits, "BF16")).sum())) == (65280, 43350)


@pytest.mark.parametrize("dtype", [*SMALL, "F32"])
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_rounding_agrees_with_torch(dtype: str, value: float) -> None:
    """One rounding, half to even, like torch's cast from float64; too large values are refused."""
    if dtype == "BF16" and float(np.float32(min(abs(value), 3e38))) != min(abs(value), 3e38):
        value = float(np.float32(max(min(value, 3e38), -3e38)))  # torch casts through float32 and rounds twice
    if abs(value) > FLOATS[dtype].largest:
        return
    expected = torch.tensor([value], dtype=torch.float64).to(DTYPES[dtype])
    if dtype == "F8_E5M2" or dtype == "F8_E4M3":
        value = float(np.float32(value))  # the same
        expected = torch.tensor([value]).to(DTYPES[dtype])
    bits = encode(np.array([value]), dtype)
    assert torch.equal(torch.from_numpy(bits.copy()).view(DTYPES[dtype]).double(), expected.double())
    assert np.signbit(value) == np.signbit(decode(bits, dtype)[0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_encoding_refuses_what_does_not_fit(dtype: str, bad: float) -> None:
    """Infinite, NaN and too large values are an error, not a clipped weight."""
    with pytest.raises(CkptgrowError, match=dtype):
        encode(np.array([bad]), dtype)
    if dtype != "F64":
        with pytest.raises(CkptgrowError, match=dtype):
            encode(np.array([FLOATS[dtype].largest * 2]), dtype)


@given(st.integers(0, 5000), st.integers(1, 300), st.integers(0, 299))
def test_betas_do_not_depend_on_the_cut(first: int, count: int, cut: int) -> None:
    """A weight's β is the same however the tensor is cut into blocks, and lies in [0.5, 0.75)."""
    whole = betas("key", first, count)
    cut = min(cut, count)
    assert (np.concatenate([betas("key", first, cut), betas("key", first + cut, count - cut)]) == whole).all()
    assert ((whole >= 0.5) & (whole < 0.75)).all()


def test_betas_golden() -> None:
    """The stream is part of what a manifest's seed means: it may never change."""
    assert (betas("ckptgrow", 14, 4) * 2**18).tolist() == [184764, 155546, 183527, 184748]
    assert betas("a", 0, 1000).std() > 0.06
    assert not (betas("a", 0, 100) == betas("b", 0, 100)).all()


@pytest.mark.parametrize("dtype", SMALL)
def test_tables_equal_the_general_path(dtype: str) -> None:
    """Even shares of small formats are looked up: the same as computing them one by one."""
    from ckptgrow import numeric

    bits = patterns(dtype)
    for count in (2, 3, 8, 12):
        for share in Share(0, count).siblings:
            computed = encode(numeric._dealt(decode(bits, dtype), dtype, share, draw_for(bits)), dtype)
            assert (share_of(bits, dtype, share, draw_for(bits)) == computed).all()


@pytest.mark.parametrize("dtype", SMALL)
def test_census_counts_every_pattern(dtype: str) -> None:
    """(not finite, inexact half) over all patterns, against torch: 2,048 for float16 (METHOD.md 2)."""
    every = np.arange(2 ** FLOATS[dtype].bits).astype(FLOATS[dtype].bits_type)
    values = torch_values(every, dtype)
    finite = values[np.isfinite(values)]
    half = torch.from_numpy(finite / 2).to(DTYPES[dtype]).double().numpy()
    expected = (len(every) - len(finite), int((half * 2 != finite).sum()))
    assert census(every, dtype) == expected
    if dtype == "F16":
        assert expected[1] == 2048
