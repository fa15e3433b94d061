"""fold over families: mixtures of experts, shared experts, stacks, interleaved and flat ones, several config keys, lists,
ratios, statistics over the width, scales in blocks. The base again byte for byte, and never another function.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from checkpoints import Tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAW, LAYOUTS
from test_fold import files, grow, outputs, run, same_outputs

import ckptgrow
from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.errors import CkptgrowError, FamilyError, PlanError, RequestError
from ckptgrow.families import EVERY, FAMILIES, Architecture, Mlp, locate
from ckptgrow.plan import Output, Part, Plan, Term

STACKS = ["dbrx", "gpt_oss", "jetmoe", "qwen3_vl_moe"]


def found_in(folder: Path) -> Architecture:
    opened = open_checkpoint(folder)
    return locate(opened.config, opened.infos)


def views(tensors: Tensors, mlp: Mlp, expert: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(role, [units, ...]) of each projection of an MLP or expert: views, to be written to."""
    for name, slot in mlp.tensors.items():
        tensor = tensors[name]
        if slot.flat:
            tensor = tensor.view(mlp.experts, -1, tensor.shape[-1])
        if slot.flat or slot.stacked:
            tensor = tensor[expert]
        tensor = tensor.movedim(slot.axis - int(slot.stacked), 0)
        if slot.span > 1:
            yield from ((role, tensor[i :: slot.span]) for i, role in enumerate(slot.lanes[0].split("_")))
        else:
            lanes = slot.lanes[:1] if slot.flat else slot.lanes
            yield from zip(lanes, tensor.chunk(len(lanes)), strict=True)


# ---------------------------------------------------------------- laws


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A tiny checkpoint of any layout, what is odd about one of its experts, and a growth of it."""
    name = draw(st.sampled_from(LAYOUTS))
    return {
        "base": {
            "model_type": name,
            "width": draw(st.sampled_from([8, 12])),
            "hidden": 4,
            "layers": draw(st.integers(1, 2)),
            "shards": draw(st.integers(1, 2)),
            "dtype": draw(st.sampled_from(sorted(checkpoints.DTYPES))),
            "bias": draw(st.booleans()),
            "seed": draw(st.integers(0, 3)),
        },
        "odd": draw(st.sampled_from(["", "zeros", "dead", "twins", "parallel"])),
        "growth": {
            "factor": draw(st.integers(2, 4)),
            "policy": draw(st.sampled_from(["g-freeze", "g-train", "down", "up"])),
            "shares": draw(st.sampled_from(["auto", "even", "random"])),
            "seed": draw(st.integers(0, 2)),
        },
        "layers": draw(st.sampled_from([None, None, "0"])),
    }


def odd(folder: Path, kind: str) -> None:
    """Make one expert's weights odd: what fold finds in them must not cost the base a unit."""
    mlp = found_in(folder).mlps[-1]

    def change(tensors: Tensors) -> None:
        for role, units in views(tensors, mlp, mlp.experts - 1):
            if kind == "zeros":
                units[1] = 0.0
            elif kind == "dead" and role == "down":
                units[-1] = 0.0
            elif kind == "twins" or (kind == "parallel" and role in ("gate", "down")):
                units[-1] = units[0].clone()

    checkpoints.edit(folder, change)


@settings(LAW, max_examples=80)
@given(cases())
def test_fold_undoes_expand_in_every_layout(case: dict[str, Any]) -> None:
    """fold(expand(x)) = x byte for byte, for one expert as for all, whatever its weights are."""
    with tempfile.TemporaryDirectory() as temporary:
        base = checkpoints.make(Path(temporary, "base"), **case["base"])
        odd(base, case["odd"])
        expected, grown = files(base), Path(temporary, "grown")
        layers = case["layers"] if case["base"]["layers"] > 1 else None
        try:
            grow(base, grown, layers=layers, **case["growth"])
        except CkptgrowError:  # `up` of interleaved ones, ...
            return
        done = ckptgrow.fold(grown, Path(temporary, "folded"))
        assert (done.exit_code, done.rounding.rounded) == (0, 0)
        assert [answer.verdict for answer in done.answers] == ["yes", "yes"]
        folded = files(Path(temporary, "folded"))
        assert [name for name in expected | folded if expected.get(name) != folded.get(name)] == []
