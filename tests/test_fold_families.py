"""fold over families: mixtures of experts, shared experts, stacks, interleaved and flat ones, several config keys,
lists, ratios, statistics over the width, scales in blocks. The base again byte for byte, and never another function.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
import trainings
from checkpoints import Tensors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import LAW, LAYOUTS
from test_fold import files, grow, run, same_outputs
from test_native import llama

import ckptgrow
from ckptgrow import folding
from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.errors import FamilyError, PlanError, RequestError
from ckptgrow.families import Architecture, Mlp, locate
from ckptgrow.plan import Output, Part, Plan, Term
from ckptgrow.regrouped import regrouped

STACKS = ["dbrx", "gpt_oss", "jetmoe", "gemma4"]


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


@settings(LAW, max_examples=30)
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
        except RequestError as refused:  # of two projections that alternate one cannot train
            assume("alternate in it" not in str(refused))
            raise
        done = ckptgrow.fold(grown, Path(temporary, "folded"))
        assert (done.exit_code, done.rounding.rounded) == (0, 0)
        assert [answer.verdict for answer in done.answers] == ["yes", "yes"]
        folded = files(Path(temporary, "folded"))
        assert [name for name in expected | folded if expected.get(name) != folded.get(name)] == []


@st.composite
def states(draw: st.DrawFn) -> dict[str, Any]:
    """Units of each expert drawn from few, so that equal, parallel and dead ones come up, elsewhere in each."""
    units = draw(st.integers(2, 6))
    of = {"elements": st.integers(0, 1), "min_size": units, "max_size": units}
    factors = {"elements": st.sampled_from([1.0, 1.0, -1.0, 2.0, 0.0]), "min_size": units, "max_size": units}
    experts = [
        {role: (draw(st.lists(**of)), draw(st.lists(**factors))) for role in ("up", "down")}
        | {"gate": draw(st.lists(**of))}
        for _ in range(4)
    ]
    family = draw(st.sampled_from([*STACKS, "gpt2", "mixtral", "qwen2_moe", "nllb-moe", "bitnet", "zamba2", "swin"]))
    return {"units": units, "experts": experts, "family": family, "dtype": draw(st.sampled_from(["F32", "BF16"]))}


def built(folder: Path, state: dict[str, Any]) -> Path:
    """A checkpoint in that state; its weights are small whole numbers, so that no sum is rounded."""
    checkpoints.make(folder, state["family"], width=state["units"], layers=1, hidden=4, shards=1, dtype=state["dtype"])
    draw = np.random.default_rng(7)
    rows = {role: torch.tensor(draw.integers(1, 4, (2, 8)), dtype=torch.float64) for role in ("gate", "up", "down")}

    def change(tensors: Tensors) -> None:
        experts = iter(state["experts"] * 8)
        for mlp in found_in(folder).mlps:
            for number in range(mlp.experts):
                expert = next(experts)
                for role, units in views(tensors, mlp, number):
                    if role == "norm":
                        continue
                    which, factors = (expert[role], None) if role == "gate" else expert[role]
                    made = rows[role][which][:, : units[0].numel()]
                    made = made if factors is None else made * torch.tensor(factors, dtype=torch.float64)[:, None]
                    units.copy_(made.reshape(units.shape))

    checkpoints.edit(folder, change)
    return folder


@settings(LAW, max_examples=50)
@given(states())
def test_partial_never_changes_the_function(state: dict[str, Any]) -> None:
    """Whatever the experts are, each answers as before, and all of a key have one width."""
    with tempfile.TemporaryDirectory() as temporary:
        trained, out = built(Path(temporary, "trained"), state), Path(temporary, "out")
        done = ckptgrow.fold(trained, out, partial=True)
        assert out.exists() == (done.exit_code == 0)
        if done.exit_code:
            assert all(group.smallest == group.old_width for group in done.groups)
            return
        assert same_outputs(trained, out)
        assert all(answer.verdict == "yes" for answer in done.answers)
        assert {mlp.width for mlp in found_in(out).mlps} == {block.to for block in done.blocks}


@pytest.mark.parametrize("model_type", STACKS)
def test_experts_of_one_stack_fold_by_themselves(model_type: str, tmp_path: Path) -> None:
    """Each has its own pair of twins: the Plan says so slice by slice, and what is written answers the same."""
    base = checkpoints.make(tmp_path / "base", model_type)
    mlp = found_in(base).mlps[-1]

    def twins(tensors: Tensors) -> None:
        for one in found_in(base).mlps:
            for expert in range(one.experts):
                for role, units in views(tensors, one, expert):
                    if role != "down":
                        units[5 + expert] = units[1 + 3 * expert].clone()

    checkpoints.edit(base, twins)
    assert mlp.experts == checkpoints.EXPERTS
    planned = ckptgrow.plan_fold(base, tmp_path / "out")
    assert planned.plan is not None
    planned.plan.check({"trained": open_checkpoint(base).infos})
    done = ckptgrow.fold(base, tmp_path / "out", dtype="float32")
    assert (done.exit_code, {group.width for group in done.groups}) == (0, {11})
    assert same_outputs(base, tmp_path / "out", 1e-6)
    slices = {part.slices for o in planned.plan.outputs if o.name in mlp.tensors for part in o.parts}
    assert (None in slices) == (model_type == "dbrx")  # whose experts lie along the axis of units


@pytest.mark.parametrize("model_type", ["phi3", "granitemoe", "llama4_text", "mixtral"])
def test_sums_of_up_are_kept_in_float32_beside_their_gate(model_type: str, tmp_path: Path) -> None:
    """Both may lie in one tensor, which is then of another dtype than before: its gates are still known again."""
    base = checkpoints.make(tmp_path / "base", model_type, dtype="BF16")
    grown = trainings.trained(trainings.grow(base, tmp_path / "grown", policy="up"))
    assert ckptgrow.fold(grown, tmp_path / "narrow").rounding.rounded
    done = ckptgrow.fold(grown, tmp_path / "wide", dtype="float32")
    assert (done.exit_code, done.rounding.rounded, done.widened > 0) == (0, 0, True)


# ---------------------------------------------------------------- the check of what was written


def one_gate(folder: Path, family: str) -> Path:
    """Pairs of units with one gate and one column, whose rows of up differ: each pair is one unit (case 2)."""
    experts = [{"gate": [0, 0, 1, 1], "up": ([0, 1, 0, 1], [1.0] * 4), "down": ([0, 0, 1, 1], [1.0] * 4)}] * 4
    return built(folder, {"units": 4, "experts": experts, "family": family, "dtype": "F32"})


@pytest.mark.parametrize("model_type", [*sorted({*STACKS} - {"gpt_oss"}), "mixtral", "qwen2_moe"])
def test_a_fold_through_up_is_checked(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layout: right it passes, and with one expert's sums forgotten nothing is written."""
    trained, honest = one_gate(tmp_path / "trained", model_type), folding._placed
    done = ckptgrow.fold(trained, tmp_path / "out")
    assert (done.exit_code, [answer.name for answer in done.answers]) == (0, ["untouched", "regrouped"])
    assert {block.to for block in done.blocks} == {2}
    assert same_outputs(trained, tmp_path / "out")
    monkeypatch.setattr(folding, "_placed", lambda *told: [recipe[:1] for recipe in honest(*told)])
    with pytest.raises(PlanError, match=r"(one gate leads|2 gates lead) to something else"):
        ckptgrow.fold(trained, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("model_type", [*STACKS, "bitnet", "gpt2", "nllb-moe", "zamba2"])
def test_a_fold_through_down_is_checked(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first expert's places taken from their neighbours: found in the bytes."""
    grown, honest = grow(checkpoints.make(tmp_path / "base", model_type), tmp_path / "grown"), folding._placed

    def shifted(mlp: Mlp, slot: Any, lane: int, recipes: Any) -> Any:
        placed = honest(mlp, slot, lane, recipes)
        return placed[1:] + placed[:1] if slot.shared else placed

    monkeypatch.setattr(folding, "_placed", shifted)
    with pytest.raises(PlanError, match="what was written is not the same function"):
        ckptgrow.fold(grown, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_gates_that_no_longer_come_equally_often_are_seen(tmp_path: Path) -> None:
    """gemma3n after `up` training folds gate by gate; the check asks how often each gate comes, and can say no."""
    base = checkpoints.make(tmp_path / "base", "gemma3n_text")
    grown = grow(base, tmp_path / "grown", policy="up")
    up = "model.layers.0.mlp.up_proj.weight"
    checkpoints.edit(grown, lambda tensors: tensors[up][12:].mul_(0.5).add_(1.0))
    done = ckptgrow.fold(grown, tmp_path / "out")
    assert [answer.name for answer in done.answers] == ["untouched", "regrouped"]
    checkpoints.edit_config(base, model_type="llama")
    for folder in (base, grow(base, tmp_path / "wide", width=18)):
        checkpoints.edit_config(folder, model_type="gemma3n_text")
    one, other = open_checkpoint(base), open_checkpoint(tmp_path / "wide")
    answer = regrouped(one, other, locate(one.config, one.infos), lambda _: None, rounded=False)
    assert (answer.verdict, answer.findings[0].tensor) == ("no", "model.layers.0.mlp")
    assert "some come more often than before" in answer.findings[0].problem


# ---------------------------------------------------------------- parts of some slices


def slab(start: int, stop: int, *units: int) -> Part:
    return Part(len(units), (Term("trained", "w", tuple(units)),), slices=range(start, stop))


def plan_of(*parts: Part) -> Plan:
    return Plan((Output("w", "F32", (3, 2, 2), 1, parts),))


def test_parts_of_some_slices() -> None:
    """Each run of slices fills the axis, begins where the one before it ended, and none is left out."""
    infos = {"trained": {"w": replace(plan_of().outputs[0].info, shape=(3, 4, 2))}}
    good = plan_of(slab(0, 1, 0, 1), slab(1, 3, 3), slab(1, 3, 0))
    good.check(infos)
    assert [start for start, _ in good.outputs[0].placed()] == [0, 0, 1]
    assert good.to_json()["outputs"][0]["parts"][1]["slices"] == [1, 3]
    for parts in (
        (slab(0, 1, 0, 1),),
        (slab(0, 1, 0, 1), slab(1, 3, 3)),
        (slab(0, 1, 0, 1), slab(2, 3, 0, 1)),
        (slab(0, 2, 0, 1), slab(1, 3, 0, 1)),
        (slab(1, 3, 0, 1), slab(0, 1, 0, 1)),
        (slab(0, 3, 0, 1), Part(2, (Term("trained", "w", range(2)),))),
        (),
    ):
        with pytest.raises(PlanError, match="do not fill"):
            plan_of(*parts).check(infos)


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v4"])
def test_clamped_units_are_not_linear_in_up(model_type: str, tmp_path: Path) -> None:
    """gpt_oss computes (clamp(up) + 1)·act(gate): rows of up cannot be added, and one of zeros is not dead."""
    trained = one_gate(tmp_path / "trained", model_type)
    done = ckptgrow.fold(trained, tmp_path / "out")
    assert (done.exit_code, {block.smallest for block in done.blocks}) == (1, {4})
    base = checkpoints.make(tmp_path / "base", model_type)

    def clear(tensors: Tensors) -> None:
        for mlp in found_in(base).mlps:
            for expert in range(mlp.experts):
                for role, units in views(tensors, mlp, expert):
                    if role == "up":
                        units[2] = 0.0

    checkpoints.edit(base, clear)
    assert {block.dead for block in ckptgrow.plan_fold(base, tmp_path / "out").blocks} == {0}
    grown = grow(base, tmp_path / "grown")
    with pytest.raises(RequestError, match="it clamps what gate and up say"):
        ckptgrow.fold(grown, tmp_path / "out", lossy=True, max_error=0.5, width=6)


def moved(folder: Path, size: float) -> Mlp:
    """Noise on the new gate rows of the last expert."""
    mlp = found_in(folder).mlps[-1]

    def change(tensors: Tensors) -> None:
        for role, units in views(tensors, mlp, mlp.experts - 1):
            if role == "gate":
                new = units[mlp.width // 2 :]
                new += size * torch.randn(new.shape, generator=torch.Generator().manual_seed(2))

    checkpoints.edit(folder, change)
    return mlp


@pytest.mark.parametrize("model_type", ["dbrx", "gemma4", "jetmoe", "mixtral", "qwen2_moe"])
def test_one_expert_that_does_not_fold(model_type: str, tmp_path: Path) -> None:
    """It is named; --lossy fits it alone and says its error, --atol takes its rows as equal."""
    base = checkpoints.make(tmp_path / "base", model_type, dtype="F32", hidden=16)
    grown = grow(base, tmp_path / "grown")
    mlp = moved(grown, 3e-2)
    done = ckptgrow.fold(grown, tmp_path / "out")
    wrong = [block for block in done.blocks if block.left]
    number = mlp.experts - 1 if mlp.experts > 1 else mlp.expert
    assert (done.exit_code, [(b.name, b.expert, b.left[0].units) for b in wrong]) == (1, [(mlp.block, number, 12)])
    lossy = ckptgrow.fold(grown, tmp_path / "lossy", lossy=True, max_error=0.2)
    off = {one.name: one.error for one in lossy.errors}
    named = mlp.named(number if mlp.experts > 1 else None)
    assert 1e-5 < off.pop(named) < 5e-2
    assert max(off.values(), default=0.0) < 1e-6
    near = ckptgrow.fold(grown, tmp_path / "near", atol=0.2)
    assert 0 < near.apart <= 0.2
    assert 1e-5 < max(one.error for one in near.errors) < 0.1


# ---------------------------------------------------------------- several keys


def test_several_keys_are_reported_and_asked_for_one_by_one(tmp_path: Path) -> None:
    """Experts, the shared expert and dense layers: each key has its widths; a bare --width cannot mean all of them."""
    base = checkpoints.make(tmp_path / "base", "qwen2_moe")
    grown = grow(base, tmp_path / "grown")
    said = run(grown, tmp_path / "out", "--plan")
    assert "MLPs        model.layers.0-1.mlp: 24 -> 12 units (12 equal)" in said
    assert "MLPs        model.layers.0-1.mlp.experts.0-1: 24 -> 12 units (12 equal)" in said
    with pytest.raises(RequestError, match=r"several keys say its widths \(intermediate_size 24, moe_inter") as caught:
        ckptgrow.fold(grown, tmp_path / "out", width=18)
    assert "--width KEY=N" in str(caught.value)
    for key, told in (("nothing", "the keys of its widths are"), ("moe_intermediate_size", "not below")):
        with pytest.raises(RequestError, match=told):
            ckptgrow.fold(grown, tmp_path / "out", width={key: 24})
    run(grown, tmp_path / "one", "--width", "moe_intermediate_size=18")
    config = json.loads((tmp_path / "one/config.json").read_text())
    keys = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
    assert [config[key] for key in keys] == [12, 18, 12]
    assert same_outputs(grown, tmp_path / "one")
    for bad in (["--width", "x"], ["--width", "9", "--width", "8"], ["--width", "a=1", "--width", "a=2"]):
        run(grown, tmp_path / "two", *bad, code=2)


def test_what_did_not_grow_stays(tmp_path: Path) -> None:
    """What every token passes grew: routed experts keep their bytes, redundant or not."""
    base = checkpoints.make(tmp_path / "base", "qwen2_moe")
    checkpoints.edit(base, lambda tensors: [t.zero_() for name, t in tensors.items() if ".experts.0.down" in name])
    expected, grown = files(base), grow(base, tmp_path / "grown", experts="shared")
    done = ckptgrow.fold(grown, tmp_path / "out")
    assert [group.path for group in done.groups] == ["intermediate_size", "shared_expert_intermediate_size"]
    assert files(tmp_path / "out") == expected


def test_a_tower_that_grew_is_found(tmp_path: Path) -> None:
    """The growth of another tower than the first folds without being told."""
    base = checkpoints.make(tmp_path / "base", "clip")
    text = checkpoints.load(base)
    vision = {name.replace("text_model", "vision_model"): t.clone() for name, t in text.items() if ".mlp." in name}
    for file in base.glob("*.safetensors*"):
        file.unlink()
    checkpoints.write_shards(base, text | vision, 1)
    inner = json.loads((base / "config.json").read_text())["text_config"]
    checkpoints.edit_config(base, vision_config=inner)
    expected, grown = files(base), grow(base, tmp_path / "grown", tower="vision")
    assert [group.path for group in ckptgrow.fold(grown, tmp_path / "out").groups] == [
        "vision_config.intermediate_size"
    ]
    assert files(tmp_path / "out") == expected


def test_layers_of_a_list_fold_by_themselves(tmp_path: Path) -> None:
    """gemma3n, grown natively: each layer comes back to its own width, from a number or a list in the base."""
    for name, value in (("number", 12), ("list", [12, 12])):
        base = checkpoints.make(tmp_path / name, "gemma3n_text", config={"intermediate_size": value})
        expected, grown = files(base), grow(base, tmp_path / f"{name}-grown", layers="1", uneven="native")
        assert json.loads((grown / "config.json").read_text())["intermediate_size"] == [12, 24]
        done = ckptgrow.fold(grown, tmp_path / f"{name}-out")
        assert (done.width, done.groups[0].old_width) == ((12, 12), (12, 24))
        assert files(tmp_path / f"{name}-out") == expected
        (grown / "ckptgrow.json").unlink()
        ckptgrow.fold(grown, tmp_path / f"{name}-bare")
        assert files(tmp_path / f"{name}-bare") == expected


def test_a_llama_told_otherwise_folds_to_a_llama(tmp_path: Path) -> None:
    """Grown natively it is a nemotron-nas: with the manifest the base's config comes back, without it the widths."""
    base = llama(tmp_path / "base")
    ckptgrow.expand(base, tmp_path / "grown", layers="1,3", uneven="native")
    expected, grown = files(base), tmp_path / "grown"
    done = ckptgrow.fold(grown, tmp_path / "out")
    assert [answer.verdict for answer in done.answers] == ["yes", "yes"]
    assert files(tmp_path / "out") == expected
    (grown / "ckptgrow.json").unlink()
    lies = json.loads((grown / "config.json").read_text())
    ckptgrow.fold(grown, tmp_path / "bare")
    config = json.loads((tmp_path / "bare/config.json").read_text())
    assert (config["model_type"], [mlp.width for mlp in found_in(tmp_path / "bare").mlps]) == (
        "nemotron-nas",
        [256] * 4,
    )
    lies["ckptgrow"]["base_width"]["block_configs"][0]["attention"]["n_heads_in_group"] = 1
    (grown / "config.json").write_text(json.dumps(lies))
    ckptgrow.fold(grown, tmp_path / "lied")
    assert json.loads((tmp_path / "lied/config.json").read_text())["block_configs"] == config["block_configs"]


# ---------------------------------------------------------------- statistics over the width, scales in blocks


@pytest.mark.parametrize("model_type", ["bitnet", "gemma3n_text"])
def test_statistics_want_each_unit_equally_often(model_type: str, tmp_path: Path) -> None:
    """Whole copies go, of each unit as many; a width between them, or a dead unit, would move the statistics."""
    base = checkpoints.make(tmp_path / "base", model_type)
    expected, grown = files(base), grow(base, tmp_path / "grown", factor=4)
    with pytest.raises(ckptgrow.CkptgrowError):
        ckptgrow.fold(grown, tmp_path / "out", lossy=True, max_error=0.5, width=6)
    assert ckptgrow.fold(grown, tmp_path / "out", width=18).exit_code == 1
    half = ckptgrow.fold(grown, tmp_path / "half", width=24)
    assert (half.exit_code, [answer.verdict for answer in half.answers]) == (0, ["yes", "yes"])
    assert same_outputs(grown, tmp_path / "half", 2e-2)  # quarters of a bf16 weight need not add up to one
    ckptgrow.fold(grown, tmp_path / "out")
    assert files(tmp_path / "out") == expected
    checkpoints.edit(base, lambda tensors: [t[:, 3].zero_() for n, t in tensors.items() if "down_proj" in n])
    done = ckptgrow.plan_fold(base, tmp_path / "dead")
    assert (done.exit_code, done.groups[0].smallest) == (1, 12)
    assert done.blocks[0].left[0].why.startswith("statistics are taken over the units")


def test_a_norm_that_was_trained_does_not_fold(tmp_path: Path) -> None:
    """Its weight is part of the unit."""
    grown = grow(checkpoints.make(tmp_path / "base", "bitnet"), tmp_path / "grown")
    norm = "model.layers.0.mlp.ffn_sub_norm.weight"
    checkpoints.edit(grown, lambda tensors: tensors[norm][14:15].mul_(1.5))
    assert "1 of 12 new units do not fold" in run(grown, tmp_path / "out", code=1)


def scaled(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint in FP8 with a scale for each 4 x 4 weights, as DeepSeek-V3's are for each 128 x 128."""
    checkpoints.make(folder, "mixtral", width=16, hidden=8, dtype="F8_E4M3", shards=1)
    generator = torch.Generator().manual_seed(11)

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            rows, columns = tensors[name].shape
            tensors[name + "_scale_inv"] = torch.rand(rows // 4, columns // 4, generator=generator).to(dtype) + 0.5
        for name in [name for name in tensors if ".experts." not in name]:
            tensors[name] = tensors[name].to(torch.bfloat16)

    checkpoints.edit(folder, change)
    checkpoints.edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [4, 4]})
    return folder


@pytest.mark.parametrize("factor", [2, 4])
def test_scaled_blocks_fold(factor: int, tmp_path: Path) -> None:
    """Equal blocks are one: their scales are added; a block whose payload moved is named."""
    base = scaled(tmp_path / "base")
    expected, grown = files(base), grow(base, tmp_path / "grown", factor=factor, policy="down")
    done = ckptgrow.fold(grown, tmp_path / "out")
    assert [answer.verdict for answer in done.answers] == ["yes", "yes"]
    assert files(tmp_path / "out") == expected
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    checkpoints.edit(grown, lambda tensors: tensors[name].view(torch.uint8)[21].bitwise_xor_(1))
    said = run(grown, tmp_path / "no", code=1)
    assert f"4 of {16 * (factor - 1)} new units do not fold: rows of a block of rows differ" in said
    assert "(units 20, 21, 22, 23)" in said


# ---------------------------------------------------------------- keys that say a width otherwise


def test_widths_that_a_key_cannot_say(tmp_path: Path) -> None:
    """An int ratio: a width in between is refused by the key's name, and --partial takes the next that it can say."""
    base = checkpoints.make(tmp_path / "base", "dinov2", width=16, config={"mlp_ratio": 2})
    expected, grown = files(base), grow(base, tmp_path / "grown", factor=2)
    with pytest.raises(FamilyError, match="mlp_ratio cannot say that its width is 20"):
        ckptgrow.fold(grown, tmp_path / "out", width=20)
    first = next(name for name in checkpoints.load(grown) if name.endswith("layer.0.mlp.fc1.weight"))
    checkpoints.edit(grown, lambda tensors: tensors[first][17].mul_(3))
    done = ckptgrow.fold(grown, tmp_path / "part", partial=True)
    assert (done.width, done.groups[0].smallest, done.blocks[0].smallest) == (24, 24, 17)
    assert same_outputs(grown, tmp_path / "part")
    assert repr(json.loads((tmp_path / "part/config.json").read_text())["mlp_ratio"]) == "3"
    assert expected
