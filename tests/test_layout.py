"""layout.py: which file each byte of the result will lie in, and the index that says so."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import LAW, Tiny, growths, tinies, tiny

from ckptgrow.layout import INDEX, SINGLE, Layout, lay
from ckptgrow.plan import Plan, unchanged
from ckptgrow.surgery import Growth, expand
from ckptgrow.tensors import LENGTH_BYTES, Header, TensorInfo, arrange, parse_header

FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
METADATA = {"format": "pt", "who": "me"}


def split(infos: Iterable[TensorInfo], files: dict[str, str]) -> dict[str, Header]:
    """The headers of the shards that hold these tensors."""
    those = list(infos)
    return {
        file: arrange([info for info in those if files[info.name] == file], METADATA)
        for file in sorted(set(files.values()))
    }


def apart(base: Tiny) -> dict[str, str]:
    """The MLPs in the first shard, everything else in the second."""
    return {name: FILES[".mlp." not in name] for name in base.infos}


def laid(base: Tiny, files: dict[str, str], index: Any = None, growth: Growth | None = None) -> Layout:
    plan = expand(base.infos, base.architecture, growth or Growth())
    return lay(plan, split(base.infos.values(), files), base.infos, index)


def index_of(files: dict[str, str], **metadata: Any) -> dict[str, Any]:
    return {"metadata": metadata, "weight_map": files}


# ---------------------------------------------------------------- shards


@LAW
@given(st.data())
def test_each_shard_keeps_its_name_and_its_tensors(data: st.DataObject) -> None:
    """One output shard per input shard, in the same order, with the tensors it had and the metadata."""
    base = data.draw(tinies)
    files = {name: data.draw(st.sampled_from(FILES)) for name in base.infos}
    layout = laid(base, files, growth=data.draw(growths(base.architecture.width)))
    assert [shard.file for shard in layout.shards] == sorted(set(files.values()))
    for shard in layout.shards:
        assert {output.name for output in shard.outputs} == {name for name in files if files[name] == shard.file}
        assert shard.header.metadata == METADATA
        assert shard.whole == all(output.is_copy_of(base.infos[output.name]) for output in shard.outputs)


@LAW
@given(st.data())
def test_a_shard_is_a_file_that_can_be_read(data: st.DataObject) -> None:
    """Its header describes its outputs, gapless and in the order in which they will be written."""
    base = data.draw(tinies)
    files = {name: data.draw(st.sampled_from(FILES)) for name in base.infos}
    for shard in laid(base, files, growth=data.draw(growths(base.architecture.width))).shards:
        read = parse_header(shard.header.to_bytes()[LENGTH_BYTES:], shard.header.body_bytes)
        assert read == shard.header
        assert [t.name for t in read.tensors] == [output.name for output in shard.outputs]
        assert [(t.dtype, t.shape) for t in read.tensors] == [(output.dtype, output.shape) for output in shard.outputs]
        assert shard.nbytes == len(shard.header.to_bytes()) + sum(output.info.nbytes for output in shard.outputs)


def test_a_shard_in_which_nothing_grows_is_whole() -> None:
    """Its header is the source's own, so that the file can be copied."""
    base = tiny()
    files = apart(base)
    grown, untouched = laid(base, files).shards
    assert (grown.whole, untouched.whole) == (False, True)
    assert untouched.header == split(base.infos.values(), files)[FILES[1]]


def test_one_grown_tensor_makes_a_shard_not_whole() -> None:
    """A file is copied only if all of it is the source's."""
    base = tiny()
    files = dict.fromkeys(base.infos, FILES[1]) | {base.architecture.mlps[0].down: FILES[0]}
    assert [shard.whole for shard in laid(base, files).shards] == [False, False]


def test_a_shard_that_loses_a_tensor_is_not_whole() -> None:
    """Copying it would bring the lost tensor back."""
    base = tiny()
    infos = list(base.infos.values())
    plan = Plan(tuple(map(unchanged, infos[1:])))
    (shard,) = lay(plan, split(infos, dict.fromkeys(base.infos, SINGLE)), base.infos, None).shards
    assert not shard.whole
    assert infos[0].name not in {output.name for output in shard.outputs}


def test_a_whole_shard_keeps_an_order_that_is_not_the_library_s() -> None:
    """Other writers lay tensors out in another order: the outputs follow the bytes that are there."""
    infos = {n: TensorInfo(n, "F32", (1,), i * 4, i * 4 + 4) for i, n in enumerate("cab")}
    header = Header(tuple(infos.values()), {})
    (shard,) = lay(Plan(tuple(map(unchanged, reversed(infos.values())))), {SINGLE: header}, infos, None).shards
    assert shard.whole
    assert shard.header is header
    assert [output.name for output in shard.outputs] == ["c", "a", "b"]


def test_a_grown_shard_has_the_library_s_order() -> None:
    """By dtype, widest first, then by name, whatever the order of the source."""
    base = tiny()
    (shard,) = laid(base, dict.fromkeys(reversed(base.infos), SINGLE)).shards
    assert [output.name for output in shard.outputs] == sorted(base.infos)


# ---------------------------------------------------------------- the index


def test_a_single_file_has_no_index() -> None:
    """Where the source had none, none appears."""
    layout = laid(tiny(), dict.fromkeys(tiny().infos, SINGLE))
    assert layout.index is None
    assert layout.nbytes == layout.shards[0].nbytes


@pytest.mark.parametrize("width", [5, 8, 12])
def test_the_totals_are_the_result_s(width: int) -> None:
    """total_size counts bytes of tensors (not of headers), total_parameters elements."""
    base = tiny()
    files = apart(base)
    layout = laid(base, files, index_of(files, total_size=1, total_parameters=2.0), Growth(width=width))
    more = (width - 4) * 3 * 3 * 2  # units, hidden size, projections, layers
    elements = sum(info.elements for info in base.infos.values()) + more
    metadata = json.loads(layout.index or "")["metadata"]
    assert metadata == {"total_size": 2 * elements, "total_parameters": elements}
    assert metadata["total_size"] == sum(shard.header.body_bytes for shard in layout.shards)
    assert layout.nbytes == sum(shard.nbytes for shard in layout.shards) + len((layout.index or "").encode())


def test_no_total_parameters_appear() -> None:
    """Only a total that was there is brought up to date; total_size is always written."""
    base = tiny()
    files = apart(base)
    assert list(json.loads(laid(base, files, index_of(files, total_size=1)).index or "")["metadata"]) == ["total_size"]
    assert json.loads(laid(base, files, {"weight_map": files}).index or "")["metadata"].keys() == {"total_size"}


def test_all_else_in_the_index_stays_and_in_its_order() -> None:
    """The map of tensors, keys nobody knows, and the order of all of them."""
    base = tiny()
    files = dict(reversed(apart(base).items()))
    metadata = {"zeta": {"b": 1, "a": None}, "total_size": 1, "é": "ü", "total_parameters": 1, "alpha": [1.5]}
    source = {"weight_map": files, "note": "naïve", "metadata": metadata, "another": 2}
    before = json.dumps(source)
    result = json.loads(laid(base, files, source).index or "")
    assert list(result) == list(source)
    assert list(result["metadata"]) == list(metadata)
    assert list(result["weight_map"].items()) == list(files.items())
    assert result | {"metadata": 0} == source | {"metadata": 0}
    assert {k: v for k, v in result["metadata"].items() if "total" not in k} == {
        "zeta": {"b": 1, "a": None},
        "é": "ü",
        "alpha": [1.5],
    }
    assert json.dumps(source) == before


def test_the_index_is_formatted_as_transformers_does() -> None:
    """Byte for byte what transformers writes: two spaces, ASCII, a line break at the end."""
    base = tiny()
    files = apart(base)
    source = dict(sorted(index_of(files, total_size=1, note="naïve").items()))
    expected = json.loads(laid(base, files, source).index or "")
    assert laid(base, files, source).index == json.dumps(expected, indent=2) + "\n"


def test_the_names_that_loaders_look_for() -> None:
    """Golden: the names of the one file and of the index."""
    assert (SINGLE, INDEX) == ("model.safetensors", "model.safetensors.index.json")
