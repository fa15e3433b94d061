"""fold: back to the base byte for byte, the same function whatever it finds, and a plain no where it does not fold."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from checkpoints import Tensors
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from strategies import LAW, PLAIN, Tiny, answer, growths
from test_training import Toy

import ckptgrow
from ckptgrow import equivalence
from ckptgrow.checkpoint import CARD, MANIFEST, open_checkpoint
from ckptgrow.cli import main
from ckptgrow.config import set_value, without
from ckptgrow.errors import CkptgrowError, OutputError, PlanError, RequestError
from ckptgrow.families import locate
from ckptgrow.layout import INDEX
from ckptgrow.regrouped import regrouped
from ckptgrow.training import freeze

BLOCK = "model.layers.0.mlp"
GATE, UP, DOWN = (f"{BLOCK}.{name}_proj.weight" for name in ("gate", "up", "down"))


def grow(base: Path, out: Path, **options: Any) -> Path:
    return Path(ckptgrow.expand(base, out, verify=False, **options).folder)


def files(folder: Path) -> dict[str, Any]:
    """All files but the model card, which expand replaced: their bytes, of the index the JSON."""
    found: dict[str, Any] = {name: data for name, data in checkpoints.snapshot(folder).items() if name != CARD}
    return found | {INDEX: json.loads(found[INDEX])} if INDEX in found else found


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["fold", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, result.output
    return result.stdout


def outputs(folder: Path) -> list[np.ndarray[Any, Any]]:
    """What each MLP of a checkpoint answers to a fixed input, in float64."""
    opened = open_checkpoint(folder)
    weights = {name: tensor.double().numpy() for name, tensor in checkpoints.load(folder).items()}
    architecture = locate(opened.config, opened.infos)
    return [answer(weights, Tiny(dict(opened.infos), architecture), i) for i in range(len(architecture.mlps))]


def same_outputs(one: Path, other: Path, tolerance: float = 1e-12) -> bool:
    pairs = zip(outputs(one), outputs(other), strict=True)
    return all(np.allclose(a, b, rtol=0, atol=tolerance * max(0.1, np.abs(a).max())) for a, b in pairs)


# ---------------------------------------------------------------- laws


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A tiny checkpoint, what is odd about its weights, and a growth of it."""
    width = draw(st.integers(1, 6))
    return {
        "base": {
            "model_type": draw(st.sampled_from(PLAIN)),
            "width": width,
            "hidden": draw(st.sampled_from([2, 3, 8])),
            "layers": draw(st.integers(1, 2)),
            "shards": draw(st.integers(1, 3)),
            "dtype": draw(st.sampled_from(sorted(checkpoints.DTYPES))),
            "bias": draw(st.booleans()),
            "tied": draw(st.booleans()),
            "seed": draw(st.integers(0, 3)),
        },
        "odd": draw(st.sampled_from(["", "zeros", "minus zeros", "subnormal", "dead", "twins", "parallel"])),
        "growth": draw(growths(width)),
    }


def odd(kind: str) -> Callable[[Tensors], None]:
    """Make the MLPs' weights odd: what fold finds in them must not cost the base a unit."""

    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if ".mlp." not in name or tensor.dim() != 2:
                continue
            down = name.endswith(("down_proj.weight", "fc2.weight", "c_proj.weight"))
            units = tensor.T if down else tensor
            if kind in ("zeros", "minus zeros"):
                tensor[0] = 0.0 if kind == "zeros" else -0.0
            elif kind == "subnormal":
                small = torch.finfo(tensor.dtype).smallest_normal / 2
                tensor.copy_(torch.where(tensor.double() > 0, small, tensor.double()))
            elif kind == "dead" and down:
                units[-1] = 0.0
            elif kind == "twins" or (kind == "parallel" and (down or "gate_proj" in name)):
                units[-1] = units[0]

    return change


@LAW
@given(cases())
def test_fold_undoes_expand(case: dict[str, Any]) -> None:
    """fold(expand(x)) = x byte for byte: shards, index, config.json; no ckptgrow.json; nothing rounded."""
    growth = case["growth"]
    with tempfile.TemporaryDirectory() as temporary:
        base = checkpoints.make(Path(temporary, "base"), **case["base"])
        checkpoints.edit(base, odd(case["odd"]))
        expected, grown = files(base), Path(temporary, "grown")
        options = {key: getattr(growth, key) for key in ("factor", "width", "policy", "shares", "seed", "multiple_of")}
        grow(base, grown, **options)
        done = ckptgrow.fold(grown, Path(temporary, "folded"))
        assert done.exit_code == 0
        assert done.rounding.rounded == 0
        assert [answer.verdict for answer in done.answers] == ["yes", "yes"]
        folded = files(Path(temporary, "folded"))
        assert [name for name in expected | folded if expected.get(name) != folded.get(name)] == []


@st.composite
def states(draw: st.DrawFn) -> dict[str, Any]:
    """Rows and columns of a gated MLP drawn from few: equal, parallel, dead and mixed units come up of themselves."""
    units = draw(st.integers(2, 7))
    pick = st.lists(st.integers(0, 2), min_size=units, max_size=units)
    factor = st.lists(st.sampled_from([1.0, 1.0, -1.0, 0.5, 3.0, 0.0]), min_size=units, max_size=units)
    return {
        "gate": draw(pick),
        "up": (draw(pick), draw(factor)),
        "down": (draw(pick), draw(factor)),
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from(["F32", "BF16", "F64"])),
        "family": draw(st.sampled_from(["llama", "phi3", "phi"])),
    }


def built(folder: Path, state: dict[str, Any]) -> Path:
    """A checkpoint in that state; its weights are small whole numbers, so that no sum is rounded."""
    units, draw = len(state["gate"]), np.random.default_rng(5)
    make = {"width": units, "layers": 1, "dtype": state["dtype"], "bias": state["bias"], "hidden": 4, "shards": 1}
    checkpoints.make(folder, state["family"], **make)
    rows = {role: torch.tensor(draw.integers(-3, 4, (3, 5)), dtype=torch.float64) for role in ("gate", "up", "down")}
    for role in rows:
        rows[role][:, 0] += 5.0  # no row is zero of itself
    gate = rows["gate"][state["gate"]]
    up, down = (rows[r][state[r][0]] * torch.tensor(state[r][1], dtype=torch.float64)[:, None] for r in ("up", "down"))

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".mlp." in name]:
            place = slice(4, 5) if name.endswith("bias") else slice(0, 4)
            module = name.split(".")[-2]
            if module == "gate_up_proj":
                value = torch.cat([gate, up])[:, place]
            elif module in ("down_proj", "fc2"):
                value = down[:, :4].T if name.endswith("weight") else torch.zeros(4, 1)
            else:
                value = (gate if module == "gate_proj" else up)[:, place]
            tensors[name] = value.reshape(tensors[name].shape).to(tensors[name].dtype).contiguous()

    checkpoints.edit(folder, change)
    return folder


def least(folder: Path) -> int:
    """How many units the MLP needs at the least: for each gate the rank of the sum of its outer products."""
    weights = {name.partition(".mlp.")[2]: t.double().numpy() for name, t in checkpoints.load(folder).items()}
    if "fc1.weight" in weights:
        keys = np.concatenate([weights["fc1.weight"], weights["fc1.bias"][:, None]], axis=1)
        down, up = weights["fc2.weight"], np.ones((len(keys), 1))
    else:
        fused = weights.get("gate_up_proj.weight")
        keys, up = np.split(fused, 2) if fused is not None else (weights["gate_proj.weight"], weights["up_proj.weight"])
        for role in ("gate_proj", "up_proj", "gate_up_proj"):
            if f"{role}.bias" in weights:
                lanes = np.split(weights[f"{role}.bias"], 1 + (role == "gate_up_proj"))
                if role != "up_proj":
                    keys = np.concatenate([keys, lanes[0][:, None]], axis=1)
                if role != "gate_proj":
                    up = np.concatenate([up, lanes[-1][:, None]], axis=1)
        down = weights["down_proj.weight"]
    total = 0
    for key in np.unique(keys, axis=0):
        mine = (keys == key).all(axis=1)
        total += int(np.linalg.matrix_rank(down[:, mine] @ up[mine]))
    return total


@LAW
@given(states())
def test_fold_never_changes_the_function(state: dict[str, Any]) -> None:
    """Any state: what --partial writes answers the same, and is never narrower than can be."""
    with tempfile.TemporaryDirectory() as temporary:
        trained, out = built(Path(temporary, "trained"), state), Path(temporary, "out")
        done = ckptgrow.fold(trained, out, partial=True)
        assert out.exists() == (done.exit_code == 0)
        assert done.groups[0].smallest >= max(1, least(trained))
        if done.exit_code:
            assert done.groups[0].smallest == done.groups[0].old_width
            return
        assert done.width == done.groups[0].smallest == ckptgrow.inspect(out).blocks[0].width
        assert same_outputs(trained, out, 1e-2 if done.rounding.rounded else 1e-12)
        assert all(answer.verdict == "yes" for answer in done.answers)


def test_one_unit_is_kept_where_all_are_dead(base: Path, tmp_path: Path) -> None:
    """An MLP without units is no MLP."""
    checkpoints.edit(base, lambda tensors: [t.zero_() for name, t in tensors.items() if "down_proj" in name])
    assert ckptgrow.fold(base, tmp_path / "out").width == 1
    assert same_outputs(base, tmp_path / "out")


def test_layers_that_were_filled_up_fold(base: Path, tmp_path: Path) -> None:
    """What --layers filled with zero columns is dropped again."""
    grown = grow(base, tmp_path / "grown", layers=[1])
    ckptgrow.fold(grown, tmp_path / "out")
    assert files(tmp_path / "out") == files(base)


def test_the_function_check_can_fail(base: Path, tmp_path: Path) -> None:
    """same_outputs sees a sum that lacks one term."""
    grown = grow(base, tmp_path / "grown")
    ckptgrow.fold(grown, tmp_path / "out")
    assert same_outputs(grown, tmp_path / "out")
    checkpoints.edit(tmp_path / "out", lambda tensors: tensors[DOWN][:, 3].mul_(0.5))
    assert not same_outputs(grown, tmp_path / "out")


# ---------------------------------------------------------------- after real training


def train(grown: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Some steps of Adam on the frozen-and-trained model, saved as trainers do: the weights and config.json alone."""
    model = Toy(grown).float()
    handle = freeze(model, grown)
    optimizer = torch.optim.Adam(handle.trained().values(), lr=1e-2)
    tokens = torch.arange(2, 14).view(2, 6)
    for _ in range(24):
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.check(optimizer)
    handle.remove()
    out.mkdir()
    checkpoints.write_shards(out, {name: tensor.to(dtype).clone() for name, tensor in model.state_dict().items()}, 1)
    shutil.copyfile(grown / "config.json", out / "config.json")
    return out


TRAINED = [
    *itertools.product(["llama"], ["down", "up", "g-train"], [torch.float32, torch.bfloat16]),
    *itertools.product(["phi3"], ["up", "g-train"], [torch.float32]),
    ("phi", "down", torch.float32),
]


@pytest.mark.parametrize(("model_type", "policy", "dtype"), TRAINED)
def test_trained_states_fold_to_the_bases_width(
    model_type: str, policy: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """down, up and g-train with even shares fold after training; what is rounded is said, and float32 loses less.

    Equal copies stay equal where the kernels treat all rows alike, as they do in whole blocks of 16.
    """
    base = checkpoints.make(tmp_path / "base", model_type, bias=True, width=16)
    grown = grow(base, tmp_path / "grown", policy=policy, shares="even")
    trained = train(grown, tmp_path / "trained", dtype)
    assert not same_outputs(grown, trained, 1e-3)  # it has learned something
    done = ckptgrow.fold(trained, tmp_path / "out")
    assert (done.exit_code, done.width, done.groups[0].base_width) == (0, 16, 16)
    assert (done.rounding.rounded > 0) == (policy != "g-train")
    assert done.rounding.largest <= 2**-8
    assert same_outputs(trained, tmp_path / "out", 1e-6 if dtype == torch.float32 else 3e-2)
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((base / "config.json").read_text())
    wide = ckptgrow.fold(trained, tmp_path / "wide", dtype="float32")
    assert same_outputs(trained, tmp_path / "wide", 1e-6)
    assert wide.widened == (done.rounding.rounded > 0) * wide.widened
    assert all(answer.verdict == "yes" for answer in (*done.answers, *wide.answers))


def test_g_freeze_does_not_fold(tmp_path: Path) -> None:
    """Exit 1, nothing written, and for each layer how many units do not fold and why; the model folds before training.

    The other half of the law: no unit of it was lost on the way.
    """
    grown = grow(checkpoints.make(tmp_path / "base", "llama"), tmp_path / "grown")
    trained = train(grown, tmp_path / "trained")
    said = run(trained, tmp_path / "out", code=1)
    assert "model.layers.0-1.mlp: 12 of 12 new units do not fold: gate rows differ (units 12, 13, 14, 15, ...)" in said
    assert "smallest    24 units is the smallest exact width of all layers, not 12 (the base's)" in said
    assert said.endswith(f"{trained}: does not fold\n")
    assert run(trained, tmp_path / "out", "--partial", code=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "grown", "trained"]


@pytest.mark.parametrize(("shares", "factor"), [("random", 2), ("even", 3)])
def test_up_does_not_fold_where_the_columns_are_unlike(shares: str, factor: int, tmp_path: Path) -> None:
    """Random shares are not parallel, and of three even ones the last is off by a rounding."""
    base = checkpoints.make(tmp_path / "base", "llama")
    grown = grow(base, tmp_path / "grown", policy="up", shares=shares, factor=factor)
    trained = train(grown, tmp_path / "trained")
    done = ckptgrow.fold(trained, tmp_path / "out")
    assert done.exit_code == 1
    reasons = {left.why for block in done.blocks for left in block.left}
    assert reasons == {"gate rows are equal, but neither their up rows nor their down columns are parallel"}
    partly = ckptgrow.fold(trained, tmp_path / "out", partial=True)
    assert partly.exit_code == (0 if factor == 3 else 1)
    if factor == 3:  # the first two shares are equal, so two of the three copies are one
        assert partly.width == 24
        assert same_outputs(trained, tmp_path / "out", 1e-6)


# ---------------------------------------------------------------- what does not fold, and who says so


def nudge(tensor: torch.Tensor, unit: int) -> None:
    """One unit in the last place of one weight of that row."""
    tensor.view(torch.int16)[unit, 3] += 1


def test_one_ulp_in_a_gate_row(base: Path, tmp_path: Path) -> None:
    """That unit does not fold, and is named; --partial keeps it, and one more in every layer."""
    grown = grow(base, tmp_path / "grown")
    checkpoints.edit(grown, lambda tensors: nudge(tensors[GATE], 17))
    done = ckptgrow.fold(grown, tmp_path / "out")
    assert (done.exit_code, done.groups[0].smallest) == (1, 13)
    assert [(left.units, left.why, left.first) for b in done.blocks for left in b.left] == [
        (1, "gate rows differ", (17,))
    ]
    assert "1 of 12 new units do not fold: gate rows differ (units 17)" in run(grown, tmp_path / "out", code=1)
    assert ckptgrow.fold(grown, tmp_path / "out", partial=True).width == 13
    assert same_outputs(grown, tmp_path / "out")


def test_one_ulp_in_a_column_is_a_sum(base: Path, tmp_path: Path) -> None:
    """Columns may be anything: they are added up."""
    grown = grow(base, tmp_path / "grown")
    checkpoints.edit(grown, lambda tensors: nudge(tensors[DOWN], 5))
    assert ckptgrow.fold(grown, tmp_path / "out").exit_code == 0
    assert same_outputs(grown, tmp_path / "out", 1e-3)


def test_a_zero_row_with_a_bias_is_alive(tmp_path: Path) -> None:
    """A row of up of zeros is dead only where its bias is zero too."""
    base = checkpoints.make(tmp_path / "base", "llama", bias=True)

    def clear(tensors: Tensors) -> None:
        tensors[UP][4] = 0.0

    checkpoints.edit(base, clear)
    assert ckptgrow.fold(base, tmp_path / "out").exit_code == 1
    checkpoints.edit(base, lambda tensors: [tensors[f"model.layers.{i}.mlp.up_proj.bias"].zero_() for i in (0, 1)])
    checkpoints.edit(base, lambda tensors: tensors[UP.replace("0", "1")][7].zero_())
    done = ckptgrow.fold(base, tmp_path / "out")
    assert (done.width, [block.dead for block in done.blocks]) == (11, [1, 1])
    assert same_outputs(base, tmp_path / "out")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", [GATE, UP, DOWN])
def test_a_broken_unit_stays(name: str, value: float, base: Path, tmp_path: Path) -> None:
    """A unit with a weight that is infinite or NaN is not added to anything, and is named."""
    grown = grow(base, tmp_path / "grown")

    def spoil(tensors: Tensors) -> None:
        (tensors[name].T if name == DOWN else tensors[name])[15, 2] = value

    checkpoints.edit(grown, spoil)
    done = ckptgrow.plan_fold(grown, tmp_path / "out")
    assert [(left.why, left.first) for b in done.blocks for left in b.left] == [("weights are infinite or NaN", (15,))]


def test_a_sum_too_large_for_its_dtype(tmp_path: Path) -> None:
    """Refused with the way out, which works."""
    grown = grow(checkpoints.make(tmp_path / "base", "llama", dtype="F16"), tmp_path / "grown")
    checkpoints.edit(grown, lambda tensors: tensors[DOWN][0].fill_(60000.0))
    with pytest.raises(RequestError, match="too large for F16") as caught:
        ckptgrow.fold(grown, tmp_path / "out")
    assert (caught.value.tensor, "--dtype float32" in str(caught.value)) == (DOWN, True)
    assert ckptgrow.fold(grown, tmp_path / "out", dtype="float32").widened == 1
    assert same_outputs(grown, tmp_path / "out")


def test_without_a_gate_up_rows_are_not_added(tmp_path: Path) -> None:
    """Between up and down stands the activation: after `up` training an MLP without gate does not fold."""
    grown = grow(checkpoints.make(tmp_path / "base", "phi"), tmp_path / "grown", policy="up")
    done = ckptgrow.fold(train(grown, tmp_path / "trained"), tmp_path / "out")
    assert done.exit_code == 1
    assert {left.why for block in done.blocks for left in block.left} == {"up rows differ"}


# ---------------------------------------------------------------- widths and options


def test_widths(base: Path, tmp_path: Path) -> None:
    """Any width between the smallest exact one and the present one can be had; no other."""
    grown = grow(base, tmp_path / "grown")
    for width in (12, 13, 20, 23):
        out = tmp_path / f"to-{width}"
        assert ckptgrow.fold(grown, out, width=width).width == width
        assert same_outputs(grown, out)
        assert ckptgrow.verify(base, out).same
    assert ckptgrow.fold(grown, tmp_path / "out", width=11).exit_code == 1
    for width in (0, -3, 24, 25):
        with pytest.raises(RequestError, match="not below the present width 24"):
            ckptgrow.fold(grown, tmp_path / "out", width=width)
    with pytest.raises(RequestError, match="exclude each other"):
        ckptgrow.fold(grown, tmp_path / "out", width=12, partial=True)
    with pytest.raises(RequestError, match="--dtype int8"):
        ckptgrow.fold(grown, tmp_path / "out", dtype="int8")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_without_any_hint(base: Path, tmp_path: Path) -> None:
    """No manifest and no key in config.json: the smallest exact width; a stranger's checkpoint is told that it is."""
    grown = grow(base, tmp_path / "grown", factor=3)
    expected = files(base)
    (grown / MANIFEST).unlink()
    (grown / "config.json").write_text(without((grown / "config.json").read_text(), "ckptgrow"))
    assert ckptgrow.fold(grown, tmp_path / "out").width == 12
    assert files(tmp_path / "out") == expected
    assert "12 units, 12 at least (none)" in run(base, tmp_path / "nothing", code=1)


@pytest.mark.parametrize("lie", [5, 0, -1, 36, 99, "12", None, [12], {"intermediate_size": 7}])
def test_a_hint_that_lies(base: Path, tmp_path: Path, lie: object) -> None:
    """What config.json and the manifest say of the base is never believed against the weights."""
    grown = grow(base, tmp_path / "grown", factor=3)
    (grown / MANIFEST).write_text(json.dumps({"schema": 1, "history": [], "blocks": lie}))
    config = json.loads((grown / "config.json").read_text())
    config["ckptgrow"] = {"base_width": lie if isinstance(lie, dict) else {"intermediate_size": lie}}
    (grown / "config.json").write_text(json.dumps(config))
    done = ckptgrow.fold(grown, tmp_path / "out", partial=True)
    assert (done.width, done.groups[0].base_width) == (12, 5 if lie == 5 else 7 if isinstance(lie, dict) else None)
    assert same_outputs(grown, tmp_path / "out")


def test_twice_grown(base: Path, tmp_path: Path) -> None:
    """fold undoes the last growth, with the manifest of the one before; again, and it is the base."""
    once = grow(base, tmp_path / "once", width=17)
    twice = grow(once, tmp_path / "twice", shares="random", policy="down")
    ckptgrow.fold(twice, tmp_path / "back")
    assert files(tmp_path / "back") == files(once)
    ckptgrow.fold(tmp_path / "back", tmp_path / "home")
    assert files(tmp_path / "home") == files(base)
    ckptgrow.fold(twice, tmp_path / "at once", partial=True)
    assert checkpoints.load(tmp_path / "at once").keys() == checkpoints.load(base).keys()
    assert ckptgrow.verify(base, twice).same
    assert ckptgrow.verify(tmp_path / "at once", twice).same


def test_plan_writes_nothing(base: Path, tmp_path: Path) -> None:
    """--plan says what would be written; with --json the whole Plan."""
    grown = grow(base, tmp_path / "grown")
    before = sorted(tmp_path.iterdir())
    said = run(grown, tmp_path / "out", "--plan")
    assert "MLPs        model.layers.0-1.mlp: 24 -> 12 units (12 equal)" in said
    assert "sums        192 weights are sums, none of them is rounded" in said
    assert said.endswith(f"would write {tmp_path / 'out'}\n")
    described = json.loads(run(grown, tmp_path / "out", "--plan", "--json"))
    parts = {output["name"]: output["parts"] for output in described["plan"]["outputs"]}
    assert [term["units"] for term in parts[DOWN][0]["terms"]] == [[0, 12], [12, 24]]
    assert described["plan"]["config"] == {"intermediate_size": 12}
    assert sorted(tmp_path.iterdir()) == before
    assert run(grown, tmp_path / "out", "-q") == ""
    assert "plan" not in json.loads(run(grown, tmp_path / "out", "--force", "--json"))


def test_out_is_kept(base: Path, tmp_path: Path) -> None:
    """An OUT that exists is refused, unless --force replaces it; one inside the source always."""
    grown = grow(base, tmp_path / "grown")
    ckptgrow.fold(grown, tmp_path / "out")
    with pytest.raises(OutputError, match="it exists"):
        ckptgrow.fold(grown, tmp_path / "out")
    ckptgrow.fold(grown, tmp_path / "out", width=13, force=True)
    assert ckptgrow.inspect(tmp_path / "out").blocks[0].width == 13
    with pytest.raises(OutputError, match="inside the source"):
        ckptgrow.fold(grown, grown / "out")


def test_float32_is_said_in_the_config(base: Path, tmp_path: Path) -> None:
    """Loaders take their dtype from there: a config of bfloat16 would round the sums after all."""
    checkpoints.edit_config(base, dtype="bfloat16", torch_dtype="bfloat16")
    grown = grow(base, tmp_path / "grown")
    checkpoints.edit(grown, lambda tensors: nudge(tensors[DOWN], 5))
    done = ckptgrow.fold(grown, tmp_path / "out", dtype="float32")
    assert (done.widened, done.rounding.rounded) == (1, 0)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("float32", "float32")
    dtypes = {name: info.dtype for name, info in open_checkpoint(tmp_path / "out").infos.items()}
    assert {name for name, dtype in dtypes.items() if dtype == "F32"} == {DOWN}
    assert same_outputs(grown, tmp_path / "out")


def test_mixed_dtypes_and_a_training_folder(base: Path, tmp_path: Path) -> None:
    """What trainers save: some tensors in fp32, no manifest, an optimizer beside it, which stays behind."""
    grown = grow(base, tmp_path / "grown")

    def upcast(tensors: Tensors) -> None:
        for name in (GATE, DOWN):
            tensors[name] = tensors[name].float()

    checkpoints.edit(grown, upcast)
    (grown / "optimizer.pt").write_bytes(b"no model")
    done = ckptgrow.fold(grown, tmp_path / "out")
    assert (done.width, done.files_left_out) == (12, ("optimizer.pt",))
    assert not (tmp_path / "out/optimizer.pt").exists()
    assert same_outputs(grown, tmp_path / "out")


# ---------------------------------------------------------------- the check of what was written


@pytest.mark.parametrize("policy", ["down", "up"])
def test_what_was_written_is_checked(base: Path, tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Plan that forgets a term, or takes the wrong unit, is found in the bytes before OUT appears."""
    from ckptgrow import folding

    grown = grow(base, tmp_path / "grown", policy=policy)
    trained = train(grown, tmp_path / "trained") if policy == "up" else grown
    honest = folding._part

    def forgetful(name: str, run: list[Any]) -> Any:
        return honest(name, [recipe[:1] for recipe in run])

    monkeypatch.setattr(folding, "_part", forgetful)
    with pytest.raises(PlanError, match="what was written is not the same function"):
        ckptgrow.fold(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_sum_rounded_once_is_told_from_a_wrong_one(base: Path, tmp_path: Path) -> None:
    """The verifier's mode for folds takes the nearest value and no other."""
    grown = grow(base, tmp_path / "grown")
    checkpoints.edit(grown, lambda tensors: nudge(tensors[DOWN], 5))
    folded = Path(ckptgrow.fold(grown, tmp_path / "out").out)

    def verdict(**mode: bool) -> str:
        one, other = open_checkpoint(folded), open_checkpoint(grown)
        architecture = locate(one.config, one.infos)
        return equivalence.proved(one, other, architecture, lambda _: None, **mode).verdict

    assert (verdict(), verdict(rounded_once=True)) == ("no", "yes")
    checkpoints.edit(folded, lambda tensors: nudge(tensors[DOWN], 5))
    assert verdict(rounded_once=True) == "no"


@pytest.mark.parametrize("name", [UP, DOWN])
def test_one_unit_that_leads_elsewhere_is_seen(name: str, tmp_path: Path) -> None:
    """The check by gates sees one unit of twelve that lost half of itself, rounded sums or not, and names it."""
    grown = grow(checkpoints.make(tmp_path / "base", "llama"), tmp_path / "grown", policy="up")
    folded = Path(ckptgrow.fold(train(grown, tmp_path / "trained", torch.bfloat16), tmp_path / "out").out)

    def answer_of(rounded: bool) -> equivalence.Answer:
        one, other = open_checkpoint(folded), open_checkpoint(tmp_path / "trained")
        return regrouped(one, other, locate(one.config, one.infos), lambda _: None, rounded=rounded)

    assert (answer_of(True).verdict, answer_of(False).verdict) == ("yes", "no")
    checkpoints.edit(folded, lambda tensors: (tensors[name].T if name == DOWN else tensors[name])[5].mul_(0.5))
    answer = answer_of(True)
    assert (answer.verdict, answer.findings[0].tensor) == ("no", DOWN)
    assert "one gate leads to something else: units 5, 17 are off by" in answer.findings[0].problem


# ---------------------------------------------------------------- config.json


CONFIGS = ["{}", '{"a": 1}', '{\n  "a": {"b": 2},\n  "c": 3\n}\n', '{"a":1,"b":2}\r\n', '{\n\t"a": 1\n}']


@pytest.mark.parametrize("text", CONFIGS)
def test_a_key_that_was_added_goes_without_a_trace(text: str) -> None:
    """without(set_value(text)) = text; a key in front or in the middle goes with its comma."""
    assert without(set_value(text, "key", {"x": [1]}), "key") == text
    assert without(text, "key") == text
    first = next(iter(json.loads(text)), None)
    if first:
        assert json.loads(without(text, first)) == {k: v for k, v in json.loads(text).items() if k != first}


def test_a_broken_checkpoint_is_refused(base: Path, tmp_path: Path) -> None:
    """As everywhere: one message, and nothing written."""
    checkpoints.edit_config(base, model_type="mamba")
    with pytest.raises(CkptgrowError, match="it has no MLP"):
        ckptgrow.fold(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
