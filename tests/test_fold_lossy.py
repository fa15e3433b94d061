"""Folds that are not exact: how near they come, that the error said is the error, and that nothing is hidden."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from checkpoints import Tensors
from test_fold import DOWN, GATE, UP, files, grow, run, same_outputs, train

import ckptgrow
from ckptgrow.checkpoint import CARD, open_checkpoint
from ckptgrow.errors import RequestError
from ckptgrow.families import locate
from ckptgrow.lossy import measured


def shaken(folder: Path, size: float, *names: str) -> Path:
    """Noise of that size on the new half of these tensors."""
    generator = torch.Generator().manual_seed(3)

    def change(tensors: Tensors) -> None:
        for name in names:
            new = (tensors[name].T if name == DOWN else tensors[name])[12:]
            new += torch.randn(new.shape, generator=generator).to(new.dtype) * size

    checkpoints.edit(folder, change)
    return folder


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    return grow(checkpoints.make(tmp_path / "base", "llama", dtype="F32", bias=True), tmp_path / "grown")


def best_error(folder: Path) -> float:
    """The Frobenius norm of what no rank-1 map can give, over all gates, and of the whole, by numpy's SVD."""
    tensors = {name: tensor.double().numpy() for name, tensor in checkpoints.load(folder).items()}
    up = np.concatenate([tensors[UP], tensors[UP.replace("weight", "bias")][:, None]], axis=1)
    lost = 0.0
    for unit in range(12):
        pair = [unit, unit + 12]
        lost += float((np.linalg.svd(tensors[DOWN][:, pair] @ up[pair], compute_uv=False)[1:] ** 2).sum())
    return lost


def map_error(trained: Path, folded: Path) -> float:
    """The same norm of what a folded checkpoint lacks."""
    total, maps = 0.0, []
    for folder in (trained, folded):
        tensors = {name: tensor.double().numpy() for name, tensor in checkpoints.load(folder).items()}
        up = np.concatenate([tensors[UP], tensors[UP.replace("weight", "bias")][:, None]], axis=1)
        units = tensors[DOWN].shape[1]
        maps.append([tensors[DOWN][:, u::12] @ up[u::12] for u in range(12)] if units > 12 else None)
        if units == 12:
            maps[-1] = [np.outer(tensors[DOWN][:, u], up[u]) for u in range(12)]
    for one, other in zip(*maps, strict=True):
        total += float(((one - other) ** 2).sum())
    return total


def test_equal_gates_give_the_best_rank_one_map(grown: Path, tmp_path: Path) -> None:
    """Up and down moved, gates did not: what is lost is what the SVD says must be."""
    shaken(grown, 0.3, UP, DOWN)
    done = ckptgrow.fold(grown, tmp_path / "out", lossy=True, max_error=1.0)
    assert (done.exit_code, done.width) == (0, 12)
    best = best_error(grown)
    assert best > 0.1
    assert map_error(grown, tmp_path / "out") == pytest.approx(best, rel=1e-4)
    assert torch.equal(checkpoints.load(tmp_path / "out")[GATE], checkpoints.load(grown)[GATE][:12])


def test_layers_that_fold_exactly_do(grown: Path, tmp_path: Path) -> None:
    """Only the layer that does not fold is fitted; the other's tensors are the base's."""
    shaken(grown, 0.1, GATE)
    done = ckptgrow.fold(grown, tmp_path / "out", lossy=True, max_error=0.5)
    assert [off.error < 1e-6 for off in done.errors] == [False, True]
    base, out = checkpoints.load(tmp_path / "base"), checkpoints.load(tmp_path / "out")
    assert {name for name in base if not torch.equal(base[name], out[name])} <= {n for n in base if ".0.mlp." in n}


@pytest.mark.parametrize("model_type", ["llama", "phi3", "phi"])
@pytest.mark.parametrize("size", [1e-3, 3e-2])
def test_gates_that_moved_a_little(model_type: str, size: float, tmp_path: Path) -> None:
    """The error is of the size of the move, and smaller than that of adding the columns up as if nothing had moved."""
    base = checkpoints.make(tmp_path / "base", model_type, dtype="F32", hidden=16)
    grown = grow(base, tmp_path / "grown")
    rows = [n for n in checkpoints.load(grown) if ".mlp." in n and "weight" in n and ("gate" in n or "fc1" in n)]

    def move(tensors: Tensors) -> None:
        for name in rows:
            tensors[name] += torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1)) * size

    ckptgrow.fold(grown, tmp_path / "naive")
    checkpoints.edit(grown, move)
    done = ckptgrow.fold(grown, tmp_path / "out", lossy=True, max_error=1.0)
    errors = [off.error for off in done.errors]
    one, other = open_checkpoint(tmp_path / "naive"), open_checkpoint(grown)
    narrow, wide = (locate(opened.config, opened.infos) for opened in (one, other))
    naive = [off.error for off in measured(one, other, narrow, wide, lambda _: None)]
    assert all(0 < mine < theirs for mine, theirs in zip(errors, naive, strict=True))
    assert max(errors) < 5 * size


def test_the_error_said_is_the_error(grown: Path, tmp_path: Path) -> None:
    """Measured on what lies in the files: a column changed afterwards shows."""
    ckptgrow.fold(shaken(grown, 0.1, GATE), tmp_path / "out", lossy=True, max_error=0.5)

    def errors() -> list[float]:
        one, other = open_checkpoint(tmp_path / "out"), open_checkpoint(grown)
        narrow, wide = (locate(opened.config, opened.infos) for opened in (one, other))
        return [off.error for off in measured(one, other, narrow, wide, lambda _: None)]

    before = errors()
    checkpoints.edit(tmp_path / "out", lambda tensors: tensors[DOWN].mul_(2.0))
    assert errors()[0] > before[0] + 0.5
    assert errors()[1] == before[1]


def test_too_much_is_refused(grown: Path, tmp_path: Path) -> None:
    """Above --max-error nothing is written, and each layer's error is told."""
    shaken(grown, 0.5, GATE, UP)
    said = run(grown, tmp_path / "out", "--lossy", "--max-error", "0.001", code=1)
    assert "error       model.layers.0.mlp: off by 0." in said
    assert "of its output on random inputs, too much" in said
    assert "does not fold within 0.001" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "grown"]


def test_lossy_is_marked(grown: Path, tmp_path: Path) -> None:
    """config.json and the model card say that it is another function; an exact fold says nothing."""
    said = run(shaken(grown, 0.1, GATE), tmp_path / "out", "--lossy", "--max-error", "0.5")
    assert "this is NOT the same function" in said
    entry = json.loads((tmp_path / "out/config.json").read_text())["ckptgrow"]
    assert 0 < entry["lossy"]["largest_error"] < 0.5
    card = (tmp_path / "out" / CARD).read_text()
    assert "- lossy\n" in card
    assert "It is not the same function" in card
    described = json.loads(run(grown, tmp_path / "again", "--lossy", "--max-error", "0.5", "--json"))
    assert [off["name"] for off in described["errors"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert ckptgrow.expand(tmp_path / "out", tmp_path / "next").verification is not None


def test_lossy_of_what_folds_is_exact(grown: Path, tmp_path: Path) -> None:
    """Where every layer folds there is nothing to lose."""
    done = ckptgrow.fold(grown, tmp_path / "out", lossy=True, max_error=0.5)
    assert (done.errors, [answer.name for answer in done.answers]) == ((), ["untouched", "proved"])
    assert files(tmp_path / "out") == files(tmp_path / "base")


def test_lossy_without_hints_finds_the_copies(grown: Path, tmp_path: Path) -> None:
    """No manifest and no base's width: each new unit goes to the one with the nearest gate row."""
    shaken(grown, 1e-2, GATE)
    with_hints = ckptgrow.fold(grown, tmp_path / "out", lossy=True, max_error=0.5)
    (grown / "ckptgrow.json").unlink()
    checkpoints.edit_config(grown, ckptgrow=None)
    with pytest.raises(RequestError, match="does not say how wide the base was"):
        ckptgrow.fold(grown, tmp_path / "alone", lossy=True, max_error=0.5)
    done = ckptgrow.fold(grown, tmp_path / "alone", width=12, lossy=True, max_error=0.5)
    assert done.errors == with_hints.errors


BAD: list[dict[str, Any]] = [
    {"lossy": True},
    {"max_error": 0.1},
    {"lossy": True, "max_error": 0.0},
    {"lossy": True, "max_error": math.nan},
    {"lossy": True, "max_error": 0.1, "partial": True},
    {"lossy": True, "max_error": 0.1, "atol": 1e-3},
    {"atol": -1.0},
    {"atol": math.nan},
]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_options_that_do_not_go_together(options: dict[str, Any], grown: Path, tmp_path: Path) -> None:
    """One message, nothing written."""
    with pytest.raises(RequestError):
        ckptgrow.fold(grown, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_lossy_has_no_plan(grown: Path, tmp_path: Path) -> None:
    """Its error is measured on what was written."""
    with pytest.raises(RequestError, match="it has no --plan"):
        ckptgrow.plan_fold(grown, tmp_path / "out", lossy=True, max_error=0.1)


@pytest.mark.parametrize("name", [GATE, UP, DOWN])
def test_what_is_not_finite_is_not_fitted(name: str, grown: Path, tmp_path: Path) -> None:
    """Refused by its block."""

    def spoil(tensors: Tensors) -> None:
        shaken_gate = tensors[GATE]
        shaken_gate[12:] += 0.1
        tensors[name][0, 3] = math.inf

    checkpoints.edit(grown, spoil)
    with pytest.raises(RequestError, match="infinite or NaN"):
        ckptgrow.fold(grown, tmp_path / "out", lossy=True, max_error=0.5)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- atol


def test_atol(grown: Path, tmp_path: Path) -> None:
    """Rows within it count as equal; the largest difference met is told; below it they do not."""
    base = files(tmp_path / "base")
    shaken(grown, 1e-6, GATE, UP)
    assert ckptgrow.plan_fold(grown, tmp_path / "out").exit_code == 1
    done = ckptgrow.fold(grown, tmp_path / "out", atol=1e-5)
    tensors = checkpoints.load(grown)
    met = max(float((t[12:].double() - t[:12].double()).abs().max()) for t in (tensors[GATE], tensors[UP]))
    assert done.apart == met
    assert ckptgrow.plan_fold(grown, tmp_path / "no", atol=met * 0.99).exit_code == 1
    assert same_outputs(grown, tmp_path / "out", 1e-4)
    assert not same_outputs(grown, tmp_path / "out", 1e-12)
    assert max(off.error for off in done.errors) < 1e-5
    assert "ckptgrow" in json.loads((tmp_path / "out/config.json").read_text())
    assert files(tmp_path / "out").keys() == base.keys()
    assert f"{met:.3g}: rows that counted as equal" in run(grown, tmp_path / "out", "--atol", "1e-5", "--force")


def test_atol_without_hints(grown: Path, tmp_path: Path) -> None:
    """Neighbours are found among all units, in any order."""
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))

    def mix(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if ".mlp." in name and "down_proj.bias" not in name:
                tensors[name] = (tensor[:, order] if "down_proj" in name else tensor[order]).contiguous()

    checkpoints.edit(shaken(grown, 1e-6, GATE, UP), mix)
    (grown / "ckptgrow.json").unlink()
    checkpoints.edit_config(grown, ckptgrow=None)
    done = ckptgrow.fold(grown, tmp_path / "out", atol=1e-5)
    assert done.width == 12
    assert same_outputs(grown, tmp_path / "out", 1e-4)


def test_atol_of_exact_copies_is_exact(grown: Path, tmp_path: Path) -> None:
    """Nothing is given up that need not be."""
    done = ckptgrow.fold(grown, tmp_path / "out", atol=1e-3)
    assert (done.apart, done.errors) == (0.0, ())
    assert files(tmp_path / "out") == files(tmp_path / "base")


def test_copies_that_kernels_drove_apart(tmp_path: Path) -> None:
    """g-train on a fused projection of 12 units: the kernel's blocks cut across the copies, so rows differ by noise."""
    base = checkpoints.make(tmp_path / "base", "phi3", dtype="F32")
    trained = train(grow(base, tmp_path / "grown", policy="g-train", shares="even"), tmp_path / "trained")
    done = ckptgrow.fold(trained, tmp_path / "out", atol=1e-3)
    assert (done.exit_code, done.width) == (0, 12)
    assert same_outputs(trained, tmp_path / "out", 1e-2)
