"""fold for every family of the table, on the tiny models that real transformers makes: the base again, byte for byte.

What is compared: shards and config.json as bytes, the index as JSON. A family that is not in REFUSED has to fold.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="holds fold against real transformers, which is not installed")

import checkpoints
import torch
from test_families_transformers import (
    CASES,
    EPSILON,
    THINNED,
    alone,
    apart,
    build,
    grown_modules,
    inputs,
    load,
    seen,
)
from test_fold import files, run
from test_fold_families import views
from trainings import taught

import ckptgrow
from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.families import FAMILIES, locate
from ckptgrow.training import freeze

pytestmark = [pytest.mark.transformers, pytest.mark.filterwarnings("ignore")]  # what transformers says of its own

# (name, tower) -> what the refusal says. Nothing that grows is refused.
REFUSED: dict[tuple[str, str], str] = {}


@pytest.mark.parametrize(("name", "tower"), THINNED)
def test_a_family_folds(name: str, tower: str, tmp_path: Path) -> None:
    """Grown, folded, and equal to what it was."""
    base = build(CASES[name], tmp_path / "base")
    ckptgrow.expand(base, tmp_path / "grown", factor=2, tower=tower, verify=False)
    if (name, tower) in REFUSED:
        with pytest.raises(ckptgrow.CkptgrowError, match=REFUSED[name, tower]):
            ckptgrow.fold(tmp_path / "grown", tmp_path / "folded")
        return
    done = ckptgrow.fold(tmp_path / "grown", tmp_path / "folded")
    assert done.exit_code == 0, done
    assert [answer.verdict for answer in done.answers] == ["yes", "yes"]
    expected, folded = files(base), files(tmp_path / "folded")
    assert [name for name in expected | folded if expected.get(name) != folded.get(name)] == []


# Where a row of up may not be added to another: without a gate, behind a norm, or where the product is clamped.
KEPT = {"up rows differ", "gate or up rows differ"}
KEPT |= {"statistics are taken over the units, and these would not go in proportion"}


@pytest.mark.parametrize(("name", "tower"), THINNED)
def test_up_rows_are_added_only_where_the_model_is_linear_in_them(name: str, tower: str, tmp_path: Path) -> None:
    """New rows of up at random, some of zeros: what folds is the same function in transformers, module by module."""
    case = CASES[name]
    ckptgrow.expand(build(case, tmp_path / "base"), tmp_path / "wide", factor=2, tower=tower, verify=False)
    opened, generator = open_checkpoint(tmp_path / "wide"), torch.Generator().manual_seed(4)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for mlp in locate(opened.config, opened.infos, tower).mlps:
            for expert in range(mlp.experts):
                for role, units in views(tensors, mlp, expert):
                    if role == "up":
                        new = units[mlp.width // 2 :]
                        new += 3 * torch.randn(new.shape, generator=generator)
                        if mlp.site.template.gated:
                            dead = 4 * (len(new) // 20)  # grouped matrix products want multiples of 16 bytes
                            units[:dead], new[:dead] = 0.0, 0.0

    checkpoints.edit(tmp_path / "wide", change)
    done = ckptgrow.fold(tmp_path / "wide", tmp_path / "narrow", partial=True)
    if done.exit_code:
        assert {left.why for block in done.blocks for left in block.left} <= KEPT
        return
    one, other = load(case, tmp_path / "narrow"), load(case, tmp_path / "wide")
    names, compared = grown_modules(one, other), 0
    if not case.get("alone") and tower == FAMILIES[case["model_type"]].towers[0]:
        mine, its = seen(one, inputs(one)), seen(other, inputs(one))
        for module, outputs in mine.items():
            for left, right in zip(outputs, its[module], strict=True):
                if left.shape == right.shape and left.numel():
                    assert apart(right, left) <= 10 * EPSILON, module
                    compared += module in names
    else:
        found = list(alone(one, other, names))
        compared = len(found)
        assert max(found, default=0.0) <= 10 * EPSILON
    assert compared


# ---------------------------------------------------------------- mixtures after real training


def trained(name: str, policy: str, root: Path) -> Path:
    """Some steps of Adam on a grown mixture under its mask, saved as transformers saves it."""
    ckptgrow.expand(build(CASES[name], root / "base"), root / "grown", policy=policy, shares="even", verify=False)
    model = load(CASES[name], root / "grown").train()
    handle = freeze(model, root / "grown", how="mask")
    tokens = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(5))
    optimizer = taught(model, handle.trained().values(), [tokens] * 8, 3e-3)
    handle.check(optimizer)
    handle.remove()
    model.save_pretrained(root / "trained")
    return root / "trained"


def logits(name: str, folder: Path) -> torch.Tensor:
    model = load(CASES[name], folder)
    tokens = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens).logits
    return found


@pytest.mark.parametrize("policy", ["down", "up"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_a_trained_mixture_folds(name: str, policy: str, tmp_path: Path) -> None:
    """Each expert by itself, to the base's width; in float32 it answers as the trained one does."""
    folder = trained(name, policy, tmp_path)
    done = ckptgrow.fold(folder, tmp_path / "folded")
    assert (done.exit_code, {block.to for block in done.blocks}) == (0, {group.base_width for group in done.groups})
    assert all(answer.verdict == "yes" for answer in done.answers)
    before, after = logits(name, folder), logits(name, tmp_path / "folded")
    assert apart(logits(name, tmp_path / "grown"), before) > 1e-3  # it has learned something
    assert apart(before, after) <= EPSILON


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_a_mixture_trained_with_g_freeze_does_not_fold(name: str, tmp_path: Path) -> None:
    """Exit 1, nothing written, and a line for each expert (neighbours that read the same are one)."""
    folder = trained(name, "g-freeze", tmp_path)
    said = run(folder, tmp_path / "folded", code=1)
    assert "new units do not fold: gate rows differ" in said
    assert said.endswith(f"{folder}: does not fold\n")
    assert not (tmp_path / "folded").exists()
    done = ckptgrow.plan_fold(folder, tmp_path / "folded")
    told = {(block.layer, block.expert) for block in done.blocks if block.expert is not None}
    assert told == {(layer, expert) for layer in ((0, 1) if name == "mixtral" else (1,)) for expert in range(4)}
