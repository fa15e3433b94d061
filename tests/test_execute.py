"""What is streamed equals what the safetensors library writes for the same tensors put together in memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from checkpoints import DTYPES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from strategies import FREE, LAYOUTS

import ckptgrow
from ckptgrow import execute
from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.errors import FormatError
from ckptgrow.execute import blocks, write_shards
from ckptgrow.families import locate
from ckptgrow.layout import lay
from ckptgrow.numeric import FLOATS, betas, decode, encode
from ckptgrow.plan import Output, Part, Plan, Share, Term, unchanged
from ckptgrow.staging import Staging
from ckptgrow.surgery import Growth, rounds

SLOW_FIXTURES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def even(weights: torch.Tensor, count: int, keeps_half: bool) -> list[torch.Tensor]:
    """METHOD.md 2, even shares, written down again with torch and whole tensors."""
    if keeps_half and count > 2:
        half = (weights.double() / 2).to(weights.dtype)
        return [half, *even((weights.double() - half.double()).to(weights.dtype), count - 1, False)]
    each = (weights.double() / count).to(weights.dtype)
    return [each] * (count - 1) + [(weights.double() - (count - 1) * each.double()).to(weights.dtype)]


def grown_by_cat(folder: Path, more: int, keeps_half: bool) -> checkpoints.Tensors:
    """The grown model by torch.cat in memory, for even shares."""
    base, opened = checkpoints.load(folder), open_checkpoint(folder)
    grown = dict(base)
    for mlp in locate(opened.config, opened.infos).mlps:
        old, new = mlp.width, mlp.width + more
        for name, slot in mlp.tensors.items():
            lanes = []
            for lane in base[name].chunk(len(slot.lanes), slot.axis):
                copied = [lane.narrow(slot.axis, 0, slot.span * len(units)) for units in rounds(old, new)]
                down = slot.lanes[0] == "down"
                pieces = shared_pieces(lane, slot.axis, old, new, keeps_half) if down else [lane, *copied]
                lanes.append(torch.cat(pieces, slot.axis))
            grown[name] = torch.cat(lanes, slot.axis)
    return grown


def shared_pieces(down: torch.Tensor, axis: int, old: int, new: int, keeps_half: bool) -> list[torch.Tensor]:
    copies, more = divmod(new, old)
    once, others = down.narrow(axis, 0, more), down.narrow(axis, more, old - more)
    first = even(once, copies + 1, keeps_half)
    rest = even(others, copies, keeps_half) if copies > 1 else [others]
    pieces = []
    for turn in range(copies + 1):
        pieces += [first[turn]] if more else []
        pieces += [rest[turn]] if turn < len(rest) else []
    return pieces


@SLOW_FIXTURES
@given(
    family=st.sampled_from(sorted({*LAYOUTS} & {*FREE})),
    dtype=st.sampled_from(["BF16", "F16", "F32", "F64"]),
    layers=st.integers(1, 3),
    hidden=st.integers(1, 9),
    width=st.integers(1, 9),
    more=st.integers(1, 20),
    shards=st.integers(1, 3),
    bias=st.booleans(),
    tied=st.booleans(),
    policy=st.sampled_from(["g-freeze", "down"]),
    block=st.sampled_from([1, 24, 100, 1 << 20]),
)
def test_streamed_equals_torch_cat(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, more: int, block: int, **made: Any
) -> None:
    """Every output shard is byte-equal to save_file of whole tensors put together by torch.cat, whatever the block."""
    folder, policy = tmp_path_factory.mktemp("streamed"), made.pop("policy")
    family, width = made.pop("family"), made["width"]
    more = min(more, width if made["dtype"] == "F64" else 7 * width)  # beyond, shares are split in two first
    monkeypatch.setattr(execute, "BLOCK_BYTES", block)
    monkeypatch.setattr(blocks, "__defaults__", (block,))
    base = checkpoints.make(folder / "base", family, **made)
    ckptgrow.expand(base, folder / "out", width=width + more, policy=policy, shares="even")
    expected = grown_by_cat(base, more, policy == "g-freeze")
    for file in base.glob("*.safetensors"):
        names = checkpoints.load_file(file).keys()
        save_file({name: expected[name].contiguous() for name in names}, folder / "expected", {"format": "pt"})
        assert (folder / "out" / file.name).read_bytes() == (folder / "expected").read_bytes()


def test_the_comparison_can_fail(base: Path, tmp_path: Path) -> None:
    """The law above is no empty one: with the halves swapped for thirds the bytes differ."""
    ckptgrow.expand(base, tmp_path / "out", shares="even")
    wrong, right = grown_by_cat(base, 24, False), grown_by_cat(base, 12, True)
    ours = checkpoints.load(tmp_path / "out")
    assert all(torch.equal(ours[name], right[name]) for name in ours)
    assert not all(torch.equal(ours[name], wrong[name]) for name in ours)


@pytest.mark.parametrize(
    "options", [{}, {"policy": "g-train", "factor": 3, "seed": 4}, {"width": 19, "shares": "random"}]
)
def test_equal_inputs_give_equal_folders(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Same source, same options: every file of OUT is the same, byte for byte."""
    ckptgrow.expand(base, tmp_path / "one", **options)
    ckptgrow.expand(base, tmp_path / "two", **options)
    assert checkpoints.snapshot(tmp_path / "one") == checkpoints.snapshot(tmp_path / "two")


def test_another_seed_gives_other_shares(base: Path, tmp_path: Path) -> None:
    """The seed reaches the weights, and both are the same function."""
    for seed in (1, 2):
        ckptgrow.expand(base, tmp_path / str(seed), shares="random", seed=seed)
        assert ckptgrow.verify(base, tmp_path / str(seed)).exit_code == 0
    one, two = checkpoints.load(tmp_path / "1"), checkpoints.load(tmp_path / "2")
    assert {n for n in one if not torch.equal(one[n], two[n])} == {n for n in one if "down_proj" in n}


def run_plan(base: Path, out: Path, outputs: list[Output]) -> checkpoints.Tensors:
    """Execute a hand-made Plan: the named outputs, everything else unchanged."""
    source = open_checkpoint(base)
    changed = {output.name: output for output in outputs}
    plan = Plan(tuple(changed.get(name) or unchanged(info) for name, info in source.infos.items()))
    plan.check({"base": source.infos})
    with Staging(out, "test") as staging:
        write_shards(lay(plan, source.headers, source.infos, source.index), {"base": source}, staging, lambda n: None)
        staging.commit()
    return checkpoints.load(out)


@SLOW_FIXTURES
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    target=st.sampled_from(["F32", "BF16", "F64"]),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    data=st.data(),
    block=st.sampled_from([1, 16, 64, 1 << 20]),
)
def test_any_plan_equals_numpy(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    target: str,
    shape: list[int],
    data: st.DataObject,
    block: int,
) -> None:
    """Zeros, picked units, scales, shares, sums and casts along any axis: as computed on whole arrays."""
    folder = tmp_path_factory.mktemp("plan")
    monkeypatch.setattr(blocks, "__defaults__", (block,))
    weights = torch.randn(*shape).to(DTYPES[dtype])
    base = checkpoints.make(folder / "base", shards=1)
    checkpoints.edit(base, lambda tensors: tensors.update({"extra": weights}))
    axis = data.draw(st.integers(0, len(shape) - 1))
    parts = tuple(data.draw(st.lists(a_part(shape[axis]), min_size=1, max_size=4)))
    total = sum(part.size for part in parts)
    output = Output("extra", target, (*shape[:axis], total, *shape[axis + 1 :]), axis, parts)
    made = run_plan(base, folder / "out", [output])["extra"]
    expected = np.concatenate([evaluated(part, weights, dtype, axis) for part in parts], axis)
    assert made.dtype == DTYPES[target]
    assert np.array_equal(made.double().numpy(), decode(encode(expected, target), target))


@st.composite
def a_part(draw: st.DrawFn, extent: int) -> Part:
    """Zeros, or up to two terms over a range or a list of units."""
    start = draw(st.integers(0, extent - 1))
    stop = draw(st.integers(start + 1, extent))
    units = draw(st.one_of(st.just(range(start, stop)), st.permutations(range(start, stop)).map(tuple)))
    share = draw(
        st.sampled_from([None, Share(1, 2), Share(0, 3, "random", 9), Share(1, 2, "random", 1, of=Share(0, 2))])
    )
    terms = tuple(
        Term("base", "extra", units, draw(st.sampled_from([1.0, -0.5])), share) for _ in range(draw(st.integers(0, 2)))
    )
    return Part(len(units), terms)


def evaluated(part: Part, weights: torch.Tensor, dtype: str, axis: int) -> Any:
    """A part computed on the whole array at once."""
    values = weights.double().numpy()
    total = np.zeros((*values.shape[:axis], part.size, *values.shape[axis + 1 :]))
    for term in part.terms:
        shared = whole_share(values, dtype, term.share) if term.share else values
        total = total + np.take(shared, list(term.units), axis) * term.scale
    return total


def whole_share(values: Any, dtype: str, share: Share) -> Any:
    from ckptgrow.numeric import share_of

    form = FLOATS[dtype]
    bits = encode(values, dtype).astype(form.bits_type)
    return decode(
        share_of(bits, dtype, share, lambda key: betas(f"extra/{key}", 0, values.size).reshape(values.shape)), dtype
    )


def test_copying_without_the_kernel(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path is only a fast path: without copy_file_range the bytes are the same."""
    ckptgrow.expand(base, tmp_path / "fast")
    monkeypatch.setattr(execute, "_kernel_copy", lambda *arguments: 0)
    ckptgrow.expand(base, tmp_path / "slow")
    assert checkpoints.snapshot(tmp_path / "fast") == checkpoints.snapshot(tmp_path / "slow")


@pytest.mark.parametrize("code", execute._NO_KERNEL_COPY)
def test_a_system_that_refuses_kernel_copies(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Where the system call fails for these files, the copy goes through memory."""

    def refuse(*arguments: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    ckptgrow.expand(base, tmp_path / "out")
    assert ckptgrow.verify(base, tmp_path / "out").exit_code == 0


def test_untouched_bytes_stay(base: Path, tmp_path: Path) -> None:
    """Tensors outside the MLPs, other files, and the shape of the folder; the index gets the new totals only."""
    ckptgrow.expand(base, tmp_path / "out")
    before, after = checkpoints.load(base), checkpoints.load(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if ".mlp." not in name)
    for file in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (base / file).read_bytes()
    mine, its = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (base, tmp_path / "out"))
    assert its["weight_map"] == mine["weight_map"]
    assert its["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in after.values())
    assert its["metadata"]["total_parameters"] == sum(t.numel() for t in after.values())


def test_a_shard_without_mlps_is_copied_whole(tmp_path: Path) -> None:
    """Its header too, even where another tool wrote it in an order and padding of its own."""
    base = checkpoints.make(tmp_path / "base", shards=1)
    tensors = checkpoints.load(base)
    checkpoints.write_shards(base, tensors, 2)
    (base / "model.safetensors").unlink()
    head = json.dumps(
        {
            "b": {"shape": [2], "dtype": "F16", "data_offsets": [0, 4]},
            "a": {"shape": [1], "dtype": "F32", "data_offsets": [4, 8]},
        }
    ).encode()
    foreign = (len(head) + 3).to_bytes(8, "little") + head + b"   " + bytes(range(8))
    (base / "foreign.safetensors").write_bytes(foreign)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {"a": "foreign.safetensors", "b": "foreign.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    ckptgrow.expand(base, tmp_path / "out")
    assert (tmp_path / "out/foreign.safetensors").read_bytes() == foreign


def test_weights_that_are_not_finite_are_refused(base: Path, tmp_path: Path) -> None:
    """They cannot be shared out: refused by name, nothing left."""
    name = "model.layers.1.mlp.down_proj.weight"
    checkpoints.edit(base, lambda tensors: tensors[name].view(-1)[5:6].fill_(float("inf")))
    with pytest.raises(FormatError, match=f"{name}.*infinite or NaN"):
        ckptgrow.expand(base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_growth_defaults() -> None:
    """Doubling, g-freeze, auto."""
    assert (Growth().new_width(10), Growth().policy, Growth().shares) == (20, "g-freeze", "auto")
