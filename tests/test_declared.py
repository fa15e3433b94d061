"""Declarations from outside the table: read, checked, proposed, carried in the manifest, and used by every verb."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import sites_of
from click.testing import CliRunner, Result
from strategies import PLAIN, config_of, infos_of

import ckptgrow
from ckptgrow.cli import main
from ckptgrow.errors import FamilyError
from ckptgrow.families import FAMILIES, Family, Site, linear, locate
from ckptgrow.families.declared import check, from_json, to_json
from ckptgrow.families.propose import propose
from ckptgrow.tensors import TensorInfo

NEWCOMER = Family(
    "newcomer",
    (Site(linear(gate="w1", up="w3", down="w2"), "blocks.{layer}.ffn", "ffn_dim", depth="n_layers", hidden="dim"),),
)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of an architecture that the table does not have."""
    with monkeypatch.context() as patch:
        patch.setitem(FAMILIES, "newcomer", NEWCOMER)
        return checkpoints.make(tmp_path / "base", "newcomer")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Its declaration."""
    path = tmp_path / "newcomer.json"
    path.write_text(json.dumps(to_json(NEWCOMER)))
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


# ---------------------------------------------------------------- as JSON


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_can_be_written_and_read(model_type: str) -> None:
    """The form of the file is the form of the table, and the table passes the check of files."""
    family = FAMILIES[model_type]
    check(family)
    assert from_json(json.loads(json.dumps(to_json(family)))) == family


def test_defaults_are_left_out() -> None:
    """A few lines declare a family."""
    told = to_json(Family("x", (Site(linear(up="fc1", down="fc2")),)))
    names = [slot["name"] for slot in told["sites"][0]["slots"]]
    assert (set(told), set(told["sites"][0]), names) == (
        {"model_type", "sites"},
        {"slots", "still"},
        ["fc1.weight", "fc1.bias", "fc2.weight"],
    )


SLOTS = to_json(NEWCOMER)["sites"][0]["slots"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sites": []}, "sites must be a list"),
        ({"recast": "nobody"}, "recast of 'newcomer' names no family"),
        ({"recast": "gemma3n_text"}, "recast of 'newcomer' names no family"),
        ({"model_type": 3}, "model_type is 3"),
        ({"note": "x"}, "unknown keys"),
        ({"sparse": "no"}, "sparse is 'no'"),
        ({"sites": [{"slots": []}]}, "must be an object with slots"),
        ({"sites": [{"slots": SLOTS, "width": 4}]}, "width is 4"),
        ({"sites": [{"slots": SLOTS, "rule": "thrice"}]}, "rule is one of"),
        ({"sites": [{"slots": SLOTS, "stem": "a.{layer}.{layer}"}]}, "stem"),
        ({"sites": [{"slots": SLOTS, "stem": "a.{floor}"}]}, "stem"),
        ({"sites": [{"slots": SLOTS, "width": "a b"}]}, "no dotted name"),
        ({"sites": [{"slots": SLOTS[:3]}]}, "one down and an up"),
        ({"sites": [{"slots": SLOTS + SLOTS[:1]}]}, "no name may come twice"),
        ({"sites": [{"slots": SLOTS}, {"slots": SLOTS}]}, "a site twice"),
        ({"sites": [{"slots": [SLOTS[0] | {"axis": 2}, *SLOTS[1:]]}]}, "axis 2 is not one that has units"),
        ({"sites": [{"slots": [SLOTS[0] | {"axis": True}, *SLOTS[1:]]}]}, "axis is True"),
        ({"sites": [{"slots": [SLOTS[0] | {"lanes": ["left"]}, *SLOTS[1:]]}]}, "lanes are some of"),
        ({"sites": [{"slots": [{"name": "w1.weight", "axis": 0}, *SLOTS[1:]]}]}, "lacks lanes"),
    ],
)
def test_what_is_no_declaration(change: dict[str, Any], told: str) -> None:
    """Strict: wrong kinds, unknown keys, and what contradicts itself whatever the checkpoint."""
    with pytest.raises(FamilyError, match=told):
        from_json(to_json(NEWCOMER) | change)


# ---------------------------------------------------------------- in use


def test_every_verb_takes_it(base: Path, file: Path, tmp_path: Path) -> None:
    """inspect, expand, verify and fold by the file; audit, mask and revert by the manifest, which carries it."""
    out = tmp_path / "out"
    assert "can grow    the 2 MLPs above" in run("inspect", base, "--family", file).stdout
    assert run("expand", base, out, "--policy", "down", "--family", file).exit_code == 0
    assert json.loads((out / "ckptgrow.json").read_text())["declaration"] == to_json(NEWCOMER)
    assert run("verify", base, out, "--family", file).exit_code == 0
    assert run("audit", out, out).exit_code == 0
    assert run("mask", out).exit_code == 0
    assert run("audit", base, out).exit_code == 0
    assert run("fold", out, tmp_path / "folded", "--family", file).exit_code == 0
    assert run("revert", out, tmp_path / "again").exit_code == 0
    before, after = checkpoints.snapshot(base), checkpoints.snapshot(tmp_path / "again")
    assert {name: after[name] for name in before} == before


def test_without_it_the_way_out_is_told(base: Path, tmp_path: Path) -> None:
    """An unknown model_type is refused with what to do about it."""
    result = run("expand", base, tmp_path / "out")
    assert (result.exit_code, "unknown model_type 'newcomer'" in result.stderr) == (2, True)
    assert "inspect --propose" in result.stderr
    assert "--family FILE" in result.stderr


@pytest.mark.parametrize("role", [0, 4])
def test_a_wrong_axis_is_refused_by_the_tensor(base: Path, tmp_path: Path, role: int) -> None:
    """The declaration says the other axis of gate, or of down."""
    told = to_json(NEWCOMER)
    slot = told["sites"][0]["slots"][role]
    slot["axis"] = 1 - slot["axis"]
    (tmp_path / "wrong.json").write_text(json.dumps(told))
    result = run("expand", base, tmp_path / "out", "--family", tmp_path / "wrong.json")
    assert (result.exit_code, "contradicts the width" in result.stderr) == (2, True), result.stderr
    assert ".ffn.w" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "told"),
    [("ffn_dimm", "config.json: it has no ffn_dimm"), ("dim", "dim is 8, which does not say its width")],
)
def test_a_wrong_key_is_refused(base: Path, tmp_path: Path, key: str, told: str) -> None:
    """The config would keep the old width under the right key, and no loader would learn of the new one."""
    declared = to_json(NEWCOMER)
    declared["sites"][0]["width"] = key
    (tmp_path / "wrong.json").write_text(json.dumps(declared))
    result = run("expand", base, tmp_path / "out", "--family", tmp_path / "wrong.json")
    assert (result.exit_code, told in result.stderr) == (2, True), result.stderr
    assert told in run("inspect", base, "--family", tmp_path / "wrong.json").stdout
    assert not (tmp_path / "out").exists()


def _widen(tensors: checkpoints.Tensors) -> None:
    for name in [name for name in tensors if ".1.ffn." in name]:
        tensors[name] = torch.cat([tensors[name]] * 2, int("w2" in name))


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        (_widen, "model.blocks.1.ffn: width 24"),
        (lambda t: t.update({"model.blocks.1.ffn.scale": torch.ones(12).bfloat16()}), "model.blocks.1.ffn.scale"),
        (lambda t: t.pop("model.blocks.1.ffn.w3.weight"), "model.blocks.1.ffn.w3.weight: it is missing"),
        (lambda t: t.pop("model.blocks.0.ffn.w2.weight"), "model.blocks.0.ffn.w2.weight: it is missing"),
    ],
)
def test_a_checkpoint_that_contradicts_it(base: Path, file: Path, tmp_path: Path, change: Any, tensor: str) -> None:
    """Another width in one layer, an unknown tensor of the width, half an MLP: as with the built-in ones."""
    checkpoints.edit(base, change)
    result = run("expand", base, tmp_path / "out", "--family", file)
    assert (result.exit_code, tensor in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [None, "{", "[]", '{"model_type": "x"}'])
def test_a_file_that_is_none(base: Path, tmp_path: Path, text: str | None) -> None:
    """Missing, no JSON, no object, half of one: the file is named."""
    path = tmp_path / "it.json"
    if text is not None:
        path.write_text(text)
    result = run("inspect", base, "--family", path)
    assert (result.exit_code, "it.json" in result.stderr) == (2, True), result.output


# ---------------------------------------------------------------- proposed


def test_a_proposal_grows_what_it_was_made_for(base: Path, tmp_path: Path) -> None:
    """stdout of --propose is the file for --family; what it was guessed from goes to stderr."""
    result = run("inspect", base, "--propose")
    assert result.exit_code == 0
    assert "width 12, ffn_dim says it" in result.stderr
    assert "holds       yes" in result.stderr
    (tmp_path / "it.json").write_text(result.stdout)
    assert run("expand", base, tmp_path / "out", "--family", tmp_path / "it.json").exit_code == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["ffn_dim"] == 24
    assert ckptgrow.propose(base).problem is None


SIMPLE = [name for name in PLAIN if [site.stem for site in sites_of(FAMILIES[name])] == ["layers.{layer}.mlp"]]


@pytest.mark.parametrize("model_type", SIMPLE)
def test_proposals_of_known_families(model_type: str) -> None:
    """One MLP a layer in a block of its own: names and shapes lead to the table's own tensors and axes."""
    infos, said = infos_of(model_type, hidden=6, width=10, tied=False), config_of(model_type, hidden=6, width=10)
    family, _ = propose(said, infos)
    guessed, known = locate(said, infos, family=family), locate(said, infos)
    assert tensors_of(guessed) == tensors_of(known)
    assert guessed.width == known.width


def tensors_of(found: Any) -> dict[str, tuple[tuple[str, ...], int]]:
    return {name: (slot.lanes, slot.axis) for mlp in found.mlps for name, slot in mlp.tensors.items()}


@pytest.mark.parametrize("model_type", ["mixtral", "jetmoe", "qwen3_moe"])
def test_proposals_of_experts(model_type: str) -> None:
    """Each with tensors of its own, or in stacks."""
    infos, said = infos_of(model_type, hidden=6, width=10), config_of(model_type, hidden=6, width=10)
    family, _ = propose(said, infos)
    assert "expert" in {site.part for site in family.sites} or model_type == "jetmoe"
    assert tensors_of(locate(said, infos, family=family)) == tensors_of(locate(said, infos))


def test_a_proposal_that_does_not_hold_says_why(base: Path) -> None:
    """A norm over the units is not guessed: the proposal is printed all the same, with the tensor."""

    def add(tensors: checkpoints.Tensors) -> None:
        for layer in range(2):
            tensors[f"model.blocks.{layer}.ffn.w2.weight_scale"] = tensors["model.norm.weight"].clone()

    checkpoints.edit(base, add)
    done = ckptgrow.propose(base)
    assert done.problem is not None
    assert "weight_scale" in done.problem
    assert "not yet" in run("inspect", base, "--propose").stderr


def test_a_proposal_names_what_else_has_the_size(base: Path) -> None:
    """A tensor of the width that lies in the layer, not in the block: not guessed, but pointed at."""
    checkpoints.edit(base, lambda t: t.update({"model.blocks.0.gain": torch.ones(12).bfloat16()}))
    assert "model.blocks.0.gain [12] has an axis of 12 too" in run("inspect", base, "--propose").stderr


def test_a_key_that_is_null_or_not_there(base: Path) -> None:
    """gpt2's n_inner is null where the width is the default; without any key the proposal does not hold yet."""
    checkpoints.edit_config(base, ffn_dim=None)
    done = ckptgrow.propose(base)
    assert "intermediate_size is a guess" in " ".join(done.notes)
    assert "it has no intermediate_size" in str(done.problem)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"n_inner": None}))
    done = ckptgrow.propose(base)
    assert done.declaration["sites"][0]["width"] == "n_inner"
    assert done.problem is None


def test_a_proposal_keeps_to_what_the_config_says(base: Path) -> None:
    """Two more tensors that pair up, of a size that no key says, are no MLP beside those of a known width."""

    def add(tensors: checkpoints.Tensors) -> None:
        for layer in range(2):
            tensors[f"model.blocks.{layer}.gating.in_proj.weight"] = torch.ones(5, 8).bfloat16()
            tensors[f"model.blocks.{layer}.gating.out_proj.weight"] = torch.ones(8, 5).bfloat16()

    checkpoints.edit(base, add)
    done = ckptgrow.propose(base)
    assert [site["stem"] for site in done.declaration["sites"]] == ["blocks.{layer}.ffn"]
    assert any("left out" in note for note in done.notes)


def test_nothing_to_propose() -> None:
    """No two tensors pair up."""
    infos = {n: TensorInfo(n, "F32", (4, 4)) for n in ("layers.0.attn.q.weight", "layers.0.mlp.x.weight")}
    with pytest.raises(FamilyError, match="no MLP was recognised"):
        propose({"model_type": "x", "hidden_size": 4}, infos)
    with pytest.raises(FamilyError, match="has no model_type"):
        propose({}, infos)


def test_the_readme_shows_a_declaration() -> None:
    """The example in the README is the newcomer of these tests, but for the biases."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    (shown,) = re.findall(r'```json\n(\{"model_type".*?)\n```', text, re.DOTALL)
    site = from_json(json.loads(shown)).sites[0]
    known = NEWCOMER.sites[0]
    assert (site.stem, site.path, site.depth, site.hidden) == (known.stem, known.path, known.depth, known.hidden)
    assert site.template.slots == tuple(slot for slot in known.template.slots if not slot.bias)
