"""--layers: which words name layers, and what becomes of the layers that do not grow."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import checkpoints
import jsonschema
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from strategies import FREE, LAW, config_of, growths, infos_of, same_function, tiny

import ckptgrow
from ckptgrow.cli import main
from ckptgrow.families import locate
from ckptgrow.layers import chosen, named, ranked, spelled
from ckptgrow.manifest import load_manifest
from ckptgrow.plan import Edit, Output, Part, Plan, Share, Term, unchanged
from ckptgrow.policy import POLICIES
from ckptgrow.proof import prove, prove_marks
from ckptgrow.report.lines import joined
from ckptgrow.surgery import Growth, expand

SCHEMA = json.loads(files("ckptgrow").joinpath("manifest.schema.json").read_text())
LAYER = "model.layers.{}.mlp.{}_proj.weight"
WIDTH = 12


@pytest.fixture
def four(tmp_path: Path) -> Path:
    """A tiny checkpoint of four layers."""
    return checkpoints.make(tmp_path / "four", layers=4)


# ---------------------------------------------------------------- the words


@pytest.mark.parametrize(
    ("asked", "layers"),
    [("3-5,20", (3, 4, 5, 20)), (" 7 , 1 - 2,7", (1, 2, 7)), ("0", (0,)), ([4, 2, 4], (2, 4)), (range(2), (0, 1))],
)
def test_words_name_layers(asked: Any, layers: tuple[int, ...]) -> None:
    """Numbers and ranges in any order, or numbers from Python; ascending, each once."""
    assert chosen(asked) == layers


@pytest.mark.parametrize(
    "asked", ["", " ", "3,,4", "3-", "-3", "a", "4-2", "1.5", "3;4", "３", [], [-1], [True], ["1"]]
)
def test_words_that_name_none(asked: Any) -> None:
    """Refused with the words that would do."""
    with pytest.raises(ckptgrow.RequestError, match="layers"):
        chosen(asked)


@given(st.sets(st.integers(0, 40), min_size=1))
def test_spelled_is_the_inverse(layers: set[int]) -> None:
    """What is said of layers can be given back."""
    assert chosen(spelled(sorted(layers))) == tuple(sorted(layers))
    assert named(sorted(layers)) == f"layer{'s' * (len(layers) > 1)} {spelled(sorted(layers))}"


@pytest.mark.parametrize(
    ("ranking", "layers"),
    [({"layers": [5, 0, 3], "top": 2}, (5, 0)), ({"layers": [5, 0, 3]}, (5, 0, 3)), ([2, 1], (2, 1))],
)
def test_a_ranking_names_its_first(ranking: Any, layers: tuple[int, ...]) -> None:
    """The first `top` of `layers`, best first; all where there is no top; a bare list too."""
    assert ranked(json.dumps(ranking).encode(), "r.json") == layers


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "3",
        "{}",
        '{"layers": [1, 1]}',
        '{"layers": ["1"]}',
        '{"layers": [1], "top": 2}',
        '{"layers": [1], "top": 0}',
    ],
)
def test_something_else_than_a_ranking(text: str) -> None:
    """Refused by file name."""
    with pytest.raises(ckptgrow.FormatError, match=r"r\.json: "):
        ranked(text.encode(), "r.json")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("4", "--layers 4: there is no such layer"),
        ("0,9-12", "--layers 9-12: there is no such layer"),
        ("0-3", "names all 4 layers"),
        ("x", "neither a layer nor a range"),
        ("", "names no layer"),
        ("@absent.json", "absent.json: it cannot be read"),
        ("@ranking.json", "names all 4 layers"),
    ],
)
@pytest.mark.parametrize("plan", [False, True])
def test_refused_before_anything_is_written(
    four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, told: str, plan: bool
) -> None:
    """Layers that are not there, all of them, none: one message, exit status 2, nothing on disk."""
    monkeypatch.chdir(tmp_path)
    Path("ranking.json").write_text('{"layers": [3, 0, 1, 2]}')
    before = checkpoints.snapshot(tmp_path)
    result = CliRunner().invoke(main, ["expand", str(four), "out", "--layers", asked, *["--plan"] * plan])
    assert (result.exit_code, told in result.stderr, result.stdout) == (2, True, ""), result.output
    assert checkpoints.snapshot(tmp_path) == before


# ---------------------------------------------------------------- on the Plan


@LAW
@given(st.data())
def test_filling_is_proved_and_never_trains(data: st.DataObject) -> None:
    """Any family, any growth, some layers: the same function, and only marked where a layer grows."""
    base = tiny(data.draw(st.sampled_from(FREE)), layers=3, bias=data.draw(st.booleans()))
    layers = tuple(sorted(data.draw(st.sets(st.integers(0, 2), min_size=1, max_size=2))))
    growth = replace(data.draw(growths(base.architecture.width)), layers=layers)
    plan = expand(base.infos, base.architecture, growth)
    units = sum(mlp.width * mlp.experts for mlp in base.architecture.mlps)
    assert prove(plan, base.infos, base.architecture) == units
    prove_marks(plan, base.architecture, layers)
    assert same_function(plan, base)
    marked = {output.member.layer for output in plan.outputs if output.member and output.grown()}
    assert marked == set(layers)


def filled() -> Plan:
    """Layer 1 of two grows, layer 0 is filled; width 4, hidden size 3."""
    base = tiny()
    return expand(base.infos, base.architecture, Growth(layers=(1,)))


def broken(plan: Plan, layer: int, role: str, change: Callable[[Output], Output]) -> Plan:
    name = LAYER.format(layer, role)
    return replace(plan, outputs=tuple(change(o) if o.name == name else o for o in plan.outputs))


def second(part: Part) -> Callable[[Output], Output]:
    """The same output with another second part."""
    return lambda output: replace(output, parts=(output.parts[0], part))


DOWN = LAYER.format(0, "down")
COLUMNS = Term("base", DOWN, range(4))
ROWS = Part(4, (Term("base", LAYER.format(0, "up"), range(4)),), grown=True)


@pytest.mark.parametrize(
    ("layer", "role", "change", "told"),
    [
        (0, "down", second(Part(4, (COLUMNS,))), "do not add up"),
        (0, "down", second(Part(4, (replace(COLUMNS, share=Share(1, 2)),))), "do not add up"),
        (0, "gate", second(Part(4)), "must be a copy"),
        (0, "up", second(Part(4, (Term("base", LAYER.format(0, "up"), (1, 0, 2, 3)),))), "copy different units"),
        (1, "down", lambda output: unchanged(tiny().infos[output.name]), "does not stay what it is"),
    ],
    ids=["whole columns", "shares", "rows of zeros", "rows of other units", "one tensor not grown"],
)
def test_wrong_filling_is_not_proved(layer: int, role: str, change: Any, told: str) -> None:
    """Each fault by message; rows of filling must be some unit's although their columns are zero."""
    plan = broken(filled(), layer, role, change)
    assert same_function(plan, tiny()) == (role != "down")
    with pytest.raises(ckptgrow.PlanError, match=told):
        prove(plan, tiny().infos, tiny().architecture)


@pytest.mark.parametrize(
    ("layer", "role", "change", "told"),
    [
        (0, "up", second(ROWS), "marked as grown is"),
        (0, "down", second(Part(4, (), grown=True)), "marked as grown is"),
        (0, "down", lambda o: replace(o, parts=(Part(4), Part(4, (COLUMNS,)))), "columns that are not zero"),
        (0, "down", lambda o: replace(o, parts=(Part(8, (Term("base", DOWN, (*range(4),) * 2),)),)), "not zero"),
        (1, "gate", lambda o: replace(o, parts=tuple(replace(p, grown=False) for p in o.parts)), "marked as grown is"),
        (1, "down", lambda o: unchanged(tiny().infos[o.name]), "was to grow and does not"),
    ],
    ids=["rows that train", "columns that train", "the other half zero", "one part", "not marked", "not grown"],
)
def test_wrong_marks_are_refused(layer: int, role: str, change: Any, told: str) -> None:
    """What would train and what would not is exactly what --layers says."""
    with pytest.raises(ckptgrow.PlanError, match=told):
        prove_marks(broken(filled(), layer, role, change), tiny().architecture, (1,))


def test_another_selection_is_refused() -> None:
    """A Plan that grows layer 1 is not one that grows layer 0, or both."""
    prove_marks(filled(), tiny().architecture, (1,))
    for layers in [(0,), (0, 1), None]:
        with pytest.raises(ckptgrow.PlanError, match="marked as grown"):
            prove_marks(filled(), tiny().architecture, layers)


def test_the_width_in_the_config_is_proved() -> None:
    """One width for grown and filled layers alike."""
    with pytest.raises(ckptgrow.PlanError, match=r"config\.json would say 4"):
        prove(replace(filled(), config=(Edit("intermediate_size", 4),)), tiny().infos, tiny().architecture)


# ---------------------------------------------------------------- layers that keep their width


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A tiny checkpoint of four layers whose config has a list of widths."""
    return checkpoints.make(tmp_path / "listed", "gemma3n_text", layers=4, config={"intermediate_size": [WIDTH] * 4})


def test_native_grows_only_the_named(listed: Path, tmp_path: Path) -> None:
    """The others keep their bytes; the config says each width, and what was written is read back and proved."""
    done = ckptgrow.expand(listed, tmp_path / "out", layers="1,3", uneven="native")
    before, after = checkpoints.load(listed), checkpoints.load(tmp_path / "out")
    for layer in (0, 2):
        for role in ("gate", "up", "down"):
            assert torch.equal(after[LAYER.format(layer, role)], before[LAYER.format(layer, role)])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["intermediate_size"] == [12, 24, 12, 24]
    assert config["ckptgrow"]["grown_layers"] == [1, 3]
    manifest = json.loads((tmp_path / "out/ckptgrow.json").read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)
    assert ([block["layer"] for block in manifest["blocks"]], manifest["layers"]) == ([1, 3], [1, 3])
    assert load_manifest(tmp_path / "out") == done.manifest
    assert done.manifest.counts.filled == 0
    assert done.proposal.parameters_after == done.proposal.parameters_before + 2 * 3 * 8 * 12
    assert "with the MLPs of layers 1, 3 widened from 12 to 24 units" in (tmp_path / "out/README.md").read_text()
    result = ckptgrow.verify(listed, tmp_path / "out")
    assert result.exit_code == 0
    assert "72 units are 48 base units in 4 MLPs, largest error 0.0" in result.answers[1].figure
    assert ckptgrow.audit(tmp_path / "out", tmp_path / "out").exit_code == 0


def test_native_growths_are_reverted(listed: Path, tmp_path: Path) -> None:
    """One, and two on other layers: the base comes back byte for byte, its list of widths too."""
    one, two = tmp_path / "one", tmp_path / "two"
    ckptgrow.expand(listed, one, layers="1,3", uneven="native")
    ckptgrow.expand(one, two, layers="0,1", uneven="native", factor=3)
    ckptgrow.revert(one, tmp_path / "back")
    assert ckptgrow.revert(two, tmp_path / "whole", every=True).undone == 2
    ckptgrow.revert(two, tmp_path / "half")
    wanted = checkpoints.snapshot(listed)
    assert checkpoints.snapshot(tmp_path / "back") == checkpoints.snapshot(tmp_path / "whole") == wanted
    assert checkpoints.load(tmp_path / "half").keys() == checkpoints.load(one).keys()
    assert (tmp_path / "half/config.json").read_bytes() == (one / "config.json").read_bytes()


@pytest.mark.parametrize("says", [[12, 24, 24, 24], [24] * 4, [12, 24, 12], 24, [12, 24.0, 12, 24], None])
def test_verify_reads_each_width_in_the_config(listed: Path, tmp_path: Path, says: Any) -> None:
    """A list that is wrong in one place, too short, or no list any more."""
    ckptgrow.expand(listed, tmp_path / "out", layers="1,3", uneven="native")
    checkpoints.edit_config(tmp_path / "out", intermediate_size=says)
    result = ckptgrow.verify(listed, tmp_path / "out")
    assert result.exit_code == 1
    assert any(finding.tensor == "config.json" for finding in result.answers[1].findings)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layers": "1", "uneven": "native"}, "the config of 'gemma3_text' has one width"),
        ({"uneven": "native"}, "give --layers"),
        ({"layers": "1", "uneven": "both"}, "unknown uneven 'both'"),
    ],
)
def test_native_is_refused(four: Path, tmp_path: Path, options: dict[str, Any], told: str) -> None:
    """Where no stock loader builds it, and where the words say nothing."""
    with pytest.raises(ckptgrow.RequestError, match=told):
        ckptgrow.expand(four, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_several_widths_are_not_filled_up(listed: Path, tmp_path: Path) -> None:
    """A config with a list needs no filling."""
    ckptgrow.expand(listed, tmp_path / "one", layers="1", uneven="native")
    with pytest.raises(ckptgrow.RequestError, match="its layers have several widths"):
        ckptgrow.expand(tmp_path / "one", tmp_path / "two", layers="0")
    with pytest.raises(ckptgrow.RequestError, match=r"several widths \(intermediate_size 12 and 24"):
        ckptgrow.expand(tmp_path / "one", tmp_path / "two", layers="0,1", uneven="native", width=48)
    ckptgrow.expand(tmp_path / "one", tmp_path / "wide", layers="0,2", uneven="native", width=36)
    assert json.loads((tmp_path / "wide/config.json").read_text())["intermediate_size"] == [36, 24, 36, 12]
    ckptgrow.expand(tmp_path / "one", tmp_path / "two")
    config = json.loads((tmp_path / "two/config.json").read_text())
    assert config["intermediate_size"] == [24, 48, 24, 24]
    assert ckptgrow.verify(listed, tmp_path / "two").exit_code == 0
    for base, out in ((listed, tmp_path / "one"), (tmp_path / "one", tmp_path / "two")):
        assert ckptgrow.audit(base, out).exit_code == 0  # made again from the base


def test_statistics_over_the_width_need_whole_copies(listed: Path, tmp_path: Path) -> None:
    """Every unit must come equally often, or the mean and the deviation move: refused before writing."""
    with pytest.raises(ckptgrow.RequestError, match="takes statistics over them"):
        ckptgrow.expand(listed, tmp_path / "out", width=30)


def test_a_list_that_does_not_fit(listed: Path) -> None:
    """As many widths as layers, or nobody can read it; in other families a list means nothing."""
    checkpoints.edit_config(listed, intermediate_size=[12, 12])
    assert "lists 2 widths for 4 MLPs" in str(ckptgrow.inspect(listed).reason)
    checkpoints.edit_config(listed, intermediate_size=[12] * 4, model_type="gemma3_text")
    checkpoints.edit(
        listed, lambda t: t.update({LAYER.format(1, r): t[LAYER.format(1, r)][:6] for r in ("gate", "up")})
    )
    checkpoints.edit(
        listed, lambda t: t.update({LAYER.format(1, "down"): t[LAYER.format(1, "down")][:, :6].contiguous()})
    )
    assert "one config number cannot describe both" in str(ckptgrow.inspect(listed).reason)


def test_the_list_in_the_config_is_proved() -> None:
    """Each width of the list is held against its MLP, and a layer that was to grow must have grown."""
    infos = infos_of("gemma3n_text", layers=3)
    found = locate(config_of("gemma3n_text", layers=3) | {"intermediate_size": [4, 4, 4]}, infos)
    plan = expand(infos, found, Growth(layers=(1,), uneven="native"))
    assert [edit.value for edit in plan.config] == [[4, 8, 4]]
    assert prove(plan, infos, found) == 12
    prove_marks(plan, found, (1,))
    for value in ([4, 8, 8], [4, 4, 4], [4, 8], 8):
        with pytest.raises(ckptgrow.PlanError, match=r"config\.json would say"):
            prove(replace(plan, config=(Edit("intermediate_size", value),)), infos, found)
    for layers in ((0,), (0, 1)):
        with pytest.raises(ckptgrow.PlanError, match=r"was to grow and does not|marked as grown"):
            prove_marks(plan, found, layers)


# ---------------------------------------------------------------- on disk


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("options", [{}, {"width": 29}])
def test_a_partly_grown_checkpoint(four: Path, tmp_path: Path, policy: str, options: dict[str, Any]) -> None:
    """Filled layers: their own rows again, zero columns, no box; grown ones as ever; and the counts say so."""
    done = ckptgrow.expand(four, tmp_path / "out", layers="1,3", policy=policy, **options)
    before, after = checkpoints.load(four), checkpoints.load(tmp_path / "out")
    width = 29 if options else 24
    for layer in (0, 2):
        gate, down = (LAYER.format(layer, role) for role in ("gate", "down"))
        rows = [unit % WIDTH for unit in range(width)]
        assert torch.equal(after[gate], before[gate][rows])
        assert torch.equal(after[down][:, :WIDTH], before[down])
        assert not after[down][:, WIDTH:].any()
    manifest = json.loads((tmp_path / "out/ckptgrow.json").read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)
    assert [block["filled"] for block in manifest["blocks"]] == [True, False, True, False]
    assert {tensor["layer"] for tensor in manifest["trainable"]} == {1, 3}
    whole = ckptgrow.plan_expand(four, tmp_path / "all", policy=policy, **options)
    assert done.manifest.counts.trainable * 2 == whole.trainable
    assert done.proposal.parameters_after == whole.parameters_after
    assert done.manifest.counts.filled == 2 * 3 * 8 * (width - WIDTH)
    assert done.manifest.counts.filled_bytes == 2 * done.manifest.counts.filled
    assert json.loads((tmp_path / "out/config.json").read_text())["ckptgrow"]["grown_layers"] == [1, 3]
    assert ckptgrow.verify(four, tmp_path / "out").exit_code == 0


def test_a_manifest_without_the_new_fields_is_read(four: Path, tmp_path: Path) -> None:
    """Manifests of growths of all layers, as they were written before, stay valid and mean the same."""
    done = ckptgrow.expand(four, tmp_path / "out")
    old = json.loads((tmp_path / "out/ckptgrow.json").read_text())
    for block in old["blocks"]:
        del block["filled"]
    del old["counts"]["filled"], old["counts"]["filled_bytes"], old["layers"]
    jsonschema.Draft202012Validator(SCHEMA).validate(old)
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert load_manifest(tmp_path / "old.json") == done.manifest
    assert "grown_layers" not in (tmp_path / "out/config.json").read_text()


def test_what_is_said(four: Path, tmp_path: Path) -> None:
    """The plan, the report, the card and verify say which layers grow and what the filling costs."""
    (tmp_path / "ranking.json").write_text('{"layers": [3, 1, 0, 2], "top": 2}')
    arguments = ["expand", str(four), str(tmp_path / "out"), "--layers", f"@{tmp_path}/ranking.json"]
    plan = CliRunner().invoke(main, [*arguments, "--plan"]).stdout
    done = CliRunner().invoke(main, arguments).stdout
    for text in (plan, done):
        assert "MLPs        model.layers.1.mlp: 12 -> 24 units\n" in text
        assert "MLPs        model.layers.2.mlp: 12 -> 24 units, filled with zero columns\n" in text
        assert "12 units in layers 1, 3 come in 2 copies" in text
        assert "filling     576 parameters, 1.2 kB: of layers 0, 2, which only become" in text
    assert "72 units and 24 units with a zero column are 48 base units in 4 MLPs, largest error 0.0" in done
    card = (tmp_path / "out/README.md").read_text()
    assert "with the MLPs of layers 1, 3 widened from 12 to 24 units" in card
    assert "filling: 576 parameters, 1,152 bytes" in card
    shown = json.loads(CliRunner().invoke(main, [*arguments, "--plan", "--json"]).stdout)
    assert (shown["layers_filled"], shown["parameters_filled"], shown["bytes_filled"]) == ([0, 2], 576, 1152)
    assert shown["trainable"] == 576


@pytest.mark.parametrize(
    ("role", "told"), [("down", "do not get their column back"), ("gate", "unit 15")], ids=["column", "row"]
)
def test_verify_sees_filling_that_is_none(four: Path, tmp_path: Path, role: str, told: str) -> None:
    """A filled unit that carries weight is no filling; one without weight may have any finite rows."""
    ckptgrow.expand(four, tmp_path / "out", layers=[1])

    def change(tensors: checkpoints.Tensors) -> None:
        if role == "gate":
            tensors[LAYER.format(0, "gate")][15] = torch.inf
        else:
            tensors[LAYER.format(0, "down")][3, 15] = 2.0**-20

    checkpoints.edit(tmp_path / "out", change)
    result = ckptgrow.verify(four, tmp_path / "out")
    assert result.exit_code == 1
    assert any(told in finding.problem for finding in result.answers[1].findings)


def test_verify_reads_the_width_in_the_config(four: Path, tmp_path: Path) -> None:
    """A config that says the width of the layers that did not grow is wrong."""
    ckptgrow.expand(four, tmp_path / "out", layers=[1])
    checkpoints.edit_config(tmp_path / "out", intermediate_size=WIDTH)
    assert ckptgrow.verify(four, tmp_path / "out").exit_code == 1


@pytest.mark.parametrize("layers", [None, [0, 1], [2]])
def test_growing_a_filled_one_again(four: Path, tmp_path: Path, layers: list[int] | None) -> None:
    """The filling counts as base: the same function again, all that was there frozen, the history kept."""
    ckptgrow.expand(four, tmp_path / "one", layers="1,3")
    done = ckptgrow.expand(tmp_path / "one", tmp_path / "two", width=60, layers=layers)
    assert ckptgrow.verify(four, tmp_path / "two").exit_code == 0
    assert ckptgrow.verify(tmp_path / "one", tmp_path / "two").exit_code == 0
    assert {block.old_width for block in done.manifest.blocks} == {24}
    assert [past["blocks"][0]["filled"] for past in done.manifest.history] == [True]
    for tensor in done.manifest.trainable:
        assert all(span[0] >= 24 for box in tensor.boxes for span in box if span != (0, 8))


def test_lines_stand_for_what_reads_the_same() -> None:
    """Neighbouring layers; of experts all that do, in every layer in which they do; and names without a number."""
    assert [*joined([("a.0.mlp", 0, "x"), ("a.1.mlp", 1, "y"), ("a.2.mlp", 2, "y"), ("a.3.mlp", 3, "x")])] == [
        "a.0.mlp: x",
        "a.1-2.mlp: y",
        "a.3.mlp: x",
    ]
    experts = [(f"m.{i}.e.{j}", i, "grown" if j in (0, 2) and i < 3 else "filled") for i in range(4) for j in range(4)]
    assert [*joined([*experts, ("shared", 0, "as it is")])] == [
        "m.0-2.e.0, 2: grown",
        "m.0-2.e.1, 3: filled",
        "m.3.e.0-3: filled",
        "shared: as it is",
    ]
