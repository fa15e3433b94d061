"""tensors.py: header bytes as the safetensors library writes and reads them, and every way in which one can lie."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import LAW, metadata, tensor_infos

from ckptgrow.errors import FormatError
from ckptgrow.tensors import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    Header,
    TensorInfo,
    arrange,
    header_length,
    parse_header,
)

TORCH = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NUMPY = {
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
    "F32": np.float32,
    "U32": np.uint32,
    "I32": np.int32,
    "F16": np.float16,
    "U16": np.uint16,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


# ---------------------------------------------------------------- writing


@LAW
@given(tensor_infos(tuple(TORCH)), metadata)
def test_headers_are_the_bytes_that_safetensors_writes_for_torch(
    infos: list[TensorInfo], words: dict[str, str]
) -> None:
    """Whatever the names, dtypes and shapes, the header is the library's own, byte for byte."""
    tensors = {info.name: torch.zeros(info.shape, dtype=TORCH[info.dtype]) for info in infos}
    written = safetensors.torch.save(tensors, words or None)
    header = arrange(infos, words)
    assert written == header.to_bytes() + bytes(header.body_bytes)


@LAW
@given(tensor_infos(tuple(NUMPY)), metadata)
def test_headers_are_the_bytes_that_safetensors_writes_for_numpy(
    infos: list[TensorInfo], words: dict[str, str]
) -> None:
    """The same for the library's numpy side."""
    tensors: dict[str, Any] = {info.name: np.zeros(info.shape, dtype=NUMPY[info.dtype]) for info in infos}
    written = safetensors.numpy.save(tensors, words or None)
    header = arrange(infos, words)
    assert written == header.to_bytes() + bytes(header.body_bytes)


@LAW
@given(tensor_infos(), metadata)
def test_a_written_header_is_read_back(infos: list[TensorInfo], words: dict[str, str]) -> None:
    """parse_header undoes to_bytes, for every dtype."""
    header = arrange(infos, words)
    assert parse_header(header.to_bytes()[LENGTH_BYTES:], header.body_bytes) == header


@LAW
@given(tensor_infos(), st.randoms())
def test_equal_headers_are_equal_bytes(infos: list[TensorInfo], shuffle: Any) -> None:
    """Neither the order of tensors nor that of metadata keys shows in the bytes."""
    mixed = list(infos)
    shuffle.shuffle(mixed)
    words = {"b": "1", "a": "2", "c": "3"}
    turned = dict(reversed(words.items()))
    assert arrange(infos, words).to_bytes() == arrange(mixed, turned).to_bytes()


def test_a_header_is_padded_to_eight_bytes() -> None:
    """The tensors begin at a multiple of 8, and the length prefix counts the padding."""
    text = arrange([TensorInfo("ab", "F32", (1,))], {}).to_bytes()
    assert text == b'\x38\0\0\0\0\0\0\0{"ab":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}} '


def test_the_body_of_no_tensors_is_empty() -> None:
    """A header without tensors is a file of the header alone."""
    assert arrange([], {}).body_bytes == 0
    assert parse_header(b"{}", 0) == Header((), {})


# ---------------------------------------------------------------- the length prefix


def test_a_length_is_little_endian() -> None:
    """The eight bytes before the header say how long it is."""
    assert header_length((300).to_bytes(8, "little") + b"{}", 308) == 300


@pytest.mark.parametrize(
    ("prefix", "file_bytes", "says"),
    [
        (b"", 0, "only 0 bytes long"),
        (b"1234567", 7, "only 7 bytes long"),
        ((9).to_bytes(8, "little"), 16, "claims 9 bytes"),
        ((2**63).to_bytes(8, "little"), 16, "claims 9,223,372,036,854,775,808 bytes"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), 2**40, "claims 100,000,001 bytes"),
    ],
    ids=["empty", "short", "longer than the file", "huge", "above the limit"],
)
def test_a_length_that_cannot_be_is_refused(prefix: bytes, file_bytes: int, says: str) -> None:
    """A file that cannot hold the header it claims is not read any further."""
    with pytest.raises(FormatError, match=says):
        header_length(prefix, file_bytes)


# ---------------------------------------------------------------- lies

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [8, 14]},
}
BODY = 14


def lying(name: str, **entry: Any) -> bytes:
    """GOOD with other values in one tensor's entry."""
    return json.dumps(GOOD | {name: GOOD[name] | entry}).encode()


def refusal(text: bytes, body: int = BODY) -> FormatError:
    with pytest.raises(FormatError) as caught:
        parse_header(text, body)
    return caught.value


def test_the_truth_is_accepted() -> None:
    """What the lies below are made of is itself fine."""
    header = parse_header(json.dumps(GOOD).encode(), BODY)
    assert header.tensors == (TensorInfo("a", "F32", (2, 1), 0, 8), TensorInfo("b", "BF16", (3,), 8, 14))
    assert header.metadata == {"format": "pt"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b' {"a": 1}', "not a JSON object"),
        (b"\xef\xbb\xbf{}", "not a JSON object"),
        (json.dumps(GOOD).encode()[:-5], "not valid JSON"),
        (b'{"\xff": 1}', "not valid JSON"),
        (b"{a: 1}", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b'{"a":' + b"[" * 100_000, "not valid JSON"),
        (json.dumps(GOOD | {"__metadata__": {"a": 1}}).encode(), "__metadata__"),
        (json.dumps(GOOD | {"__metadata__": ["a"]}).encode(), "__metadata__"),
        (json.dumps(GOOD | {"__metadata__": None}).encode(), "__metadata__"),
    ],
    ids=[
        "empty",
        "a list",
        "does not begin with {",
        "byte order mark",
        "truncated",
        "not UTF-8",
        "not JSON",
        "more than one",
        "too deep",
        "metadata of numbers",
        "metadata is a list",
        "metadata is null",
    ],
)
def test_a_header_that_is_not_one_is_refused(text: bytes, says: str) -> None:
    """Text that is not one JSON object of the right form."""
    assert says in str(refusal(text))


@pytest.mark.parametrize(
    ("text", "tensor", "says"),
    [
        (lying("b", dtype="F33"), "b", "unknown dtype 'F33'"),
        (lying("b", dtype=None), "b", "unknown dtype None"),
        (lying("b", shape=[-3]), "b", "whole numbers"),
        (lying("b", shape=[3.0]), "b", "whole numbers"),
        (lying("b", shape=[3, True]), "b", "whole numbers"),
        (lying("b", shape="3"), "b", "whole numbers"),
        (lying("b", data_offsets=[8, 14, 14]), "b", "whole numbers"),
        (lying("b", data_offsets=[8.0, 14]), "b", "whole numbers"),
        (lying("b", data_offsets=[False, 14]), "b", "whole numbers"),
        (lying("b", shape=[4]), "b", r"BF16 [4] does not fill its 6 bytes"),
        (lying("b", dtype="F32"), "b", r"F32 [3] does not fill its 6 bytes"),
        (lying("b", dtype="F4", shape=[13]), "b", "does not fill"),
        (lying("b", data_offsets=[14, 8]), "b", "does not fill its -6 bytes"),
        (lying("b", data_offsets=[9, 15]), "b", "begin at 9, not at 8"),
        (lying("b", data_offsets=[6, 12]), "b", "begin at 6, not at 8"),
        (lying("a", data_offsets=[2, 10]), "a", "begin at 2, not at 0"),
        (lying("b", extra=1), "b", "not {dtype, shape, data_offsets}"),
        (json.dumps(GOOD | {"b": 3}).encode(), "b", "not {dtype, shape, data_offsets}"),
        (json.dumps(GOOD | {"b": {"dtype": "F32"}}).encode(), "b", "not {dtype, shape, data_offsets}"),
        (b'{"b": 1, "b": 2}', "b", "named twice"),
    ],
    ids=[
        "unknown dtype",
        "dtype is null",
        "negative shape",
        "float shape",
        "bool shape",
        "shape is a string",
        "three offsets",
        "float offset",
        "bool offset",
        "shape too large",
        "dtype too large",
        "half a byte",
        "ends before it begins",
        "hole",
        "overlap",
        "hole at the start",
        "unknown key",
        "not an object",
        "keys missing",
        "duplicate key",
    ],
)
def test_a_lie_about_a_tensor_is_refused_by_its_name(text: bytes, tensor: str, says: str) -> None:
    """Each message says which tensor and what is wrong with it."""
    error = refusal(text)
    assert error.tensor == tensor
    assert says in error.problem


@pytest.mark.parametrize("body", [BODY - 1, BODY + 1, 0])
def test_a_body_that_is_not_covered_is_refused(body: int) -> None:
    """A file that is cut short, or that has bytes no tensor owns."""
    assert f"the tensors end at 14 of {body} bytes" in str(refusal(json.dumps(GOOD).encode(), body))


@pytest.mark.parametrize(
    "text",
    [
        lying("b", dtype=["BF16"]),
        lying("b", dtype={"BF16": 1}),
        b'{"\\ud800":{"dtype":"U8","shape":[14],"data_offsets":[0,14]}}',
        b'{"__metadata__":{"a":"\\udfff"},"a":{"dtype":"U8","shape":[14],"data_offsets":[0,14]}}',
        b'{"a":{"dtype":"U8","shape":[14],"data_offsets":[-0,14]}}',
        b'{"a":{"dtype":"U8","shape":[14],"data_offsets":[0,14]},"b":{"dtype":"U8","shape":[18446744073709551616,0],'
        b'"data_offsets":[14,14]}}',
        b'{"a":{"dtype":"U8","shape":[14],"data_offsets":[0,14]},"b":{"dtype":"U8","shape":[4294967296,4294967296,0],'
        b'"data_offsets":[14,14]}}',
    ],
    ids=[
        "dtype is a list",
        "dtype is an object",
        "half a surrogate pair in a name",
        "half a surrogate pair in metadata",
        "minus zero",
        "a size of more than 64 bits",
        "sizes whose product is more than 64 bits",
    ],
)
def test_what_only_the_library_would_notice_is_refused(text: bytes) -> None:
    """Headers that Python's json module takes and the safetensors library does not."""
    assert not library_reads(text, BODY)
    refusal(text)


# ---------------------------------------------------------------- against the library


def library_reads(text: bytes, body: int) -> bool:
    """Whether the safetensors library opens a file of this header and so many bytes."""
    try:
        safetensors.deserialize(len(text).to_bytes(8, "little") + text + bytes(body))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return False
    return True


def we_read(text: bytes, body: int) -> bool:
    try:
        parse_header(text, body)
    except FormatError:
        return False
    return True


ODD: list[Any] = [0, -1, 1, 2, 14, 1.0, 1e3, 2**32, 2**53, 2**64, 10**30, True, None, "", "F32", "U8", "F4", "\ud800"]
ODD += [[], [0], [0, 14], [14, 14], [14, 0], [2**40, 2**40, 0], {}, {"a": "b"}, {"a": 1}, ["F32"]]


@st.composite
def altered_values(draw: st.DrawFn) -> bytes:
    """GOOD with something odd somewhere, a key lost, or a key and its value again."""
    tree = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(1, 2))):
        node: Any = tree
        while isinstance(node, dict | list) and node:
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            if not isinstance(node[key], dict | list) or draw(st.booleans()):
                break
            node = node[key]
        if not node:
            continue
        act = draw(st.sampled_from(["set", "set", "delete", "move"]))
        if act == "set":
            node[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif act == "delete":
            del node[key]
        elif isinstance(node, dict):
            node[draw(st.sampled_from(["a", "c", "dtype", "\ud800", "__metadata__"]))] = node.pop(key)
    return json.dumps(tree, ensure_ascii=True, separators=draw(st.sampled_from([(",", ":"), (", ", ": ")]))).encode()


@st.composite
def altered_bytes(draw: st.DrawFn) -> bytes:
    """GOOD with a few characters put in, taken out or replaced."""
    text = bytearray(json.dumps(GOOD).encode())
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(text) - 1))
        new = draw(st.sampled_from([b"", b"0", b"-", b"1", b'"', b"{", b"]", b",", b" ", b"\\", b"\xff", b"\0", b"e"]))
        text[place : place + draw(st.integers(0, 2))] = new
    return bytes(text)


@settings(LAW, max_examples=600)
@given(altered_values() | altered_bytes(), st.sampled_from([BODY, BODY, BODY, BODY - 1, BODY + 2, 0]))
@example(json.dumps(GOOD).encode(), BODY)
def test_whatever_the_library_refuses_is_refused(text: bytes, body: int) -> None:
    """If we accept a header, so does the library; and nothing but FormatError is ever raised."""
    if we_read(text, body):
        assert library_reads(text, body)


def test_duplicate_keys_are_refused_where_the_library_is_silent() -> None:
    """The one thing on which we are stricter: the library would keep the last of two tensors of one name."""
    text = (
        b'{"a":{"dtype":"U8","shape":[14],"data_offsets":[0,14]},"a":{"dtype":"I8","shape":[14],"data_offsets":[0,14]}}'
    )
    assert library_reads(text, BODY)
    assert "named twice" in str(refusal(text))
