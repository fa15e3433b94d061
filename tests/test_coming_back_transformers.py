"""Every family of the table, saved by transformers: two skills of it extracted, applied, reverted, and merged.

What trains is moved by noise, of one skill the new units (g-freeze), of the other all rows of gate and up (g-train,
whose base only BASE gives back). The merge is checked by `merge` itself, weight by weight, and each MLP by this test's
own forward.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="takes real transformers' tiny models, which is not installed")

import checkpoints
import torch
from test_families_transformers import CASES, THINNED, build, load
from test_merge_families import adds_up
from test_revert import grow, same, train
from test_skills import alike

import ckptgrow
from ckptgrow.errors import RequestError
from ckptgrow.families import FAMILIES
from ckptgrow.manifest import load_manifest

pytestmark = [pytest.mark.transformers, pytest.mark.filterwarnings("ignore")]

# MLPs that are no sum over their units: each can be one skill's, not two's.
NO_SUM = {"bitnet", "gemma3n_text"}


@pytest.mark.parametrize(("name", "tower"), THINNED)
def test_there_and_back(name: str, tower: str, tmp_path: Path) -> None:
    """extract and apply give the trained bytes, revert the base's, and the two skills add up."""
    base = build(CASES[name], tmp_path / "base")
    (base / "README.md").write_text("# tiny\n")
    skills = []
    for seed, policy in ((1, "g-freeze"), (2, "g-train")):
        folder = tmp_path / policy
        grown = grow(base, folder / "grown", tower=tower, policy=policy, seed=seed)
        trained = train(grown, seed=seed)
        needed = None if policy == "g-freeze" else base
        assert ckptgrow.extract(trained, folder / "skill", manifest=grown, base=needed).exit_code == 0
        ckptgrow.apply(base, folder / "skill", folder / "again")
        assert alike(trained, folder / "again")
        ckptgrow.revert(trained, folder / "back", manifest=grown, base=needed)
        assert same(base, folder / "back")
        ckptgrow.revert(grown, folder / "untrained")
        assert same(base, folder / "untrained")
        skills.append(folder / "skill")
    if CASES[name]["model_type"] in NO_SUM:
        with pytest.raises(RequestError, match="no sum that could be merged"):
            ckptgrow.merge(base, skills, tmp_path / "both")
        ckptgrow.merge(base, skills[:1], tmp_path / "one")
        assert alike(skills[0].parent / "trained", tmp_path / "one")
        return
    done = ckptgrow.merge(base, skills, tmp_path / "both", weights=[1, 0.5])
    assert [answer.verdict for answer in done.answers][:2] == ["yes", "yes"]
    assert done.answers[2].verdict == ("not run" if "xielu" in str(done) else "yes")
    adds_up(base, skills, [1, 0.5], tmp_path / "both")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(FAMILIES[case["model_type"]].towers) > 1])
def test_towers_merge(name: str, tmp_path: Path) -> None:
    """A skill of each tower: they meet nowhere, so each tower is its skill's, bit for bit, and the base comes back."""
    base = build(CASES[name], tmp_path / "base")
    skills, expected = [], checkpoints.load(base)
    for i, tower in enumerate(FAMILIES[CASES[name]["model_type"]].towers):
        grown = grow(base, tmp_path / tower / "grown", tower=tower)
        trained = train(grown, seed=i)
        ckptgrow.extract(trained, tmp_path / tower / "skill", manifest=grown)
        skills.append(tmp_path / tower / "skill")
        its = checkpoints.load(trained)
        expected |= {tensor.name: its[tensor.name] for tensor in load_manifest(grown).trainable}
    done = ckptgrow.merge(base, skills, tmp_path / "both")
    assert [answer.verdict for answer in done.answers] == ["yes"] * 3
    got = checkpoints.load(tmp_path / "both")
    assert all(torch.equal(tensor, got[key]) for key, tensor in expected.items())
    load(CASES[name], tmp_path / "both")
    ckptgrow.revert(tmp_path / "both", tmp_path / "back")
    assert alike(base, tmp_path / "back")
