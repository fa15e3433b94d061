"""--experts LIST: the listed experts grow, the others are filled up, in tensors of their own, stacked or flat."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path

import checkpoints
import jsonschema
import pytest
import stacks
import torch
import trainings
from checkpoints import Tensors
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from strategies import FREE, LAW, Tiny, config_of, growths, infos_of, same_function

import ckptgrow
from ckptgrow.cli import main
from ckptgrow.errors import FormatError, PlanError
from ckptgrow.families import FAMILIES, locate
from ckptgrow.layers import listed
from ckptgrow.manifest import load_manifest
from ckptgrow.plan import Output, Part, Plan, Term, in_slices
from ckptgrow.proof import prove, prove_marks
from ckptgrow.regions import Division, boxed, divided
from ckptgrow.surgery import architecture_for, expand

SCHEMA = json.loads(files("ckptgrow").joinpath("manifest.schema.json").read_text())
MIXTURES = [name for name in FREE if any(s.part == "expert" for s in checkpoints.sites_of(FAMILIES[name]))]
LAYOUTS = ("separate", "shared beside", "stacked", "turned", "woven", "flat")
LISTED, COUNT = (0, 2), 4


@pytest.fixture(autouse=True, scope="module")
def four_experts() -> Iterator[None]:
    """Tiny checkpoints of four experts instead of two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "EXPERTS", COUNT)
        yield


def make(folder: Path, layout: str) -> Path:
    """A mixture of four experts in two layers, its experts laid out in that way."""
    if layout in ("stacked", "turned"):
        base = checkpoints.make(folder, "mixtral")
        return stacks.rewrite(base, lambda tensors: stacks.stacked(tensors, "mixtral", turned=layout == "turned"))
    kind = {"separate": "mixtral", "shared beside": "qwen2_moe", "woven": "gpt_oss", "flat": "dbrx"}[layout]
    return checkpoints.make(folder, kind, bias=layout == "woven")


@pytest.fixture(params=LAYOUTS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make(tmp_path / "base", request.param)


def parts_of(grown: Path, tensors: Tensors) -> Iterator[tuple[int, int, str, torch.Tensor]]:
    """(layer, expert, tensor, a view of what of it is that expert's) of all experts of a checkpoint."""
    infos = ckptgrow.checkpoint.open_checkpoint(grown)
    for mlp in locate(infos.config, infos.infos).mlps:
        for name, slot in mlp.tensors.items() if mlp.site.part == "expert" else ():
            for number in range(mlp.experts):
                view = tensors[name].view(mlp.experts, -1) if slot.stacked or slot.flat else tensors[name].view(1, -1)
                yield mlp.layer, number if mlp.expert is None else mlp.expert, name, view[number]


# ---------------------------------------------------------------- the words


@pytest.mark.parametrize(("asked", "experts"), [("2, 0", (0, 2)), ("0-1,1", (0, 1)), ("all", None), ("shared", None)])
def test_words_name_experts(asked: str, experts: tuple[int, ...] | None) -> None:
    """Numbers and ranges, ascending, each once."""
    assert listed(asked) == experts


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("5", "there are 4 experts, numbered from 0"),
        ("0,4", "there are 4 experts"),
        ("2-1", "2-1 runs backwards"),
        ("", "names no expert"),
        ("0,", "neither an expert nor a range"),
        ("-1", "neither an expert nor a range"),
        ("shared,0", "neither an expert nor a range"),
    ],
)
@pytest.mark.parametrize("plan", [False, True])
def test_refused_before_anything_is_written(tmp_path: Path, asked: str, told: str, plan: bool) -> None:
    """Experts that are not there, none, a wrong word: one message, exit status 2, nothing on disk."""
    make(tmp_path / "base", "separate")
    before = checkpoints.snapshot(tmp_path)
    words = ["expand", str(tmp_path / "base"), str(tmp_path / "out"), f"--experts={asked}", *["--plan"] * plan]
    result = CliRunner().invoke(main, words)
    assert (result.exit_code, told in result.stderr, result.stdout) == (2, True, ""), result.output
    assert checkpoints.snapshot(tmp_path) == before


@pytest.mark.parametrize("layout", ["separate", "shared beside", "stacked", "flat"])
def test_a_list_of_all_is_all(layout: str, tmp_path: Path) -> None:
    """The same tensors and boxes, nothing filled, and what has other keys grows too."""
    base = make(tmp_path / "base", layout)
    one, other = (trainings.grow(base, tmp_path / words, experts=words) for words in ("all", "0-3"))
    assert load_manifest(one).trainable == load_manifest(other).trainable
    assert load_manifest(one).blocks == load_manifest(other).blocks
    assert load_manifest(other).experts is None
    assert "grown_experts" not in json.loads((other / "config.json").read_text())["ckptgrow"]
    tensors = checkpoints.load(other)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in checkpoints.load(one).items())


# ---------------------------------------------------------------- on the Plan


@cache
def tiny(model_type: str) -> Tiny:
    """As strategies.tiny, of four experts."""
    infos = infos_of(model_type, layers=2)
    return Tiny(infos, locate(config_of(model_type, layers=2), infos))


@LAW
@given(st.data())
def test_filling_is_proved_and_never_trains(data: st.DataObject) -> None:
    """Any mixture, any growth, some experts, all layers or one: the same function, and marked where one grows."""
    base = tiny(data.draw(st.sampled_from(MIXTURES)))
    experts = sorted(data.draw(st.sets(st.integers(0, 3), min_size=1, max_size=3)))
    layers = data.draw(st.sampled_from([None, (0,), (1,)]))
    present = {mlp.layer for mlp in base.architecture.mlps if mlp.site.part == "expert"}
    if layers and (not set(layers) <= present or len(present) == 1):
        layers = None
    growth = replace(data.draw(growths(4)), experts=",".join(map(str, experts)), layers=layers)
    architecture = base.architecture.only(growth.experts)
    plan = expand(base.infos, architecture, growth)
    prove(plan, base.infos, architecture)
    prove_marks(plan, architecture, layers)
    assert same_function(plan, base)
    other = replace(architecture, listed=tuple({0, 1, 2, 3} - {*experts}))
    with pytest.raises(PlanError, match=r"marked as grown|was to grow"):
        prove_marks(plan, other, layers)


def planned(layout: str, tmp_path: Path) -> tuple[Plan, Tiny]:
    opened = ckptgrow.checkpoint.open_checkpoint(make(tmp_path / "base", layout))
    growth = ckptgrow.surgery.Growth(experts="0,2")
    architecture = architecture_for(growth, opened.config, opened.infos)
    return expand(opened.infos, architecture, growth), Tiny(dict(opened.infos), architecture)


def changed(plan: Plan, ending: str, change: Callable[[Output], tuple[Part, ...]]) -> Plan:
    made = (replace(o, parts=change(o)) if o.name.endswith(ending) else o for o in plan.outputs)
    return Plan(tuple(made), plan.config)


def shifted(output: Output) -> tuple[Part, ...]:
    """Runs of slices that end within an expert: the first one a slice too early."""
    (first, own), (second, other), *rest = output.sections()
    assert first is not None
    assert second is not None
    torn = [(range(first.stop - 1), own.parts), (range(first.stop - 1, second.stop), other.parts)]
    return in_slices([*torn, *((rows, section.parts) for rows, section in rest)], output.steps[0])


def without(kind: str) -> Callable[[Output], tuple[Part, ...]]:
    """The parts that are of that kind changed: `filling` is given columns, `growth` loses its marks."""

    def change(output: Output) -> tuple[Part, ...]:
        term = Term("base", output.name, range(output.extent // 2))
        if kind == "filling":
            return tuple(part if part.terms else replace(part, terms=(term,)) for part in output.parts)
        return tuple(replace(part, grown=False) for part in output.parts)

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (shifted, "ends within an expert"),
        (without("filling"), "do not add up"),
        (without("growth"), "marked as grown"),
    ],
)
def test_wrong_stacks_are_not_proved(change: Callable[[Output], tuple[Part, ...]], told: str, tmp_path: Path) -> None:
    """Each by its message."""
    plan, base = planned("stacked", tmp_path)

    def check(plan: Plan) -> None:
        prove(plan, base.infos, base.architecture)
        prove_marks(plan, base.architecture)

    check(plan)
    with pytest.raises(PlanError, match=told):
        check(changed(plan, "layers.1.mlp.experts.down_proj", change))


@LAW
@given(st.data())
def test_boxes_of_a_stack_are_read_back(data: st.DataObject) -> None:
    """Whatever ranges each expert has: elements are counted once, and `boxed` is the inverse of `divided`."""
    shape, axis = (4, 3, 6), data.draw(st.sampled_from([1, 2]))
    mask = torch.zeros(shape, dtype=torch.bool)
    spans = st.lists(st.integers(0, shape[axis]), unique=True, max_size=4).map(sorted)
    boxes = []
    for expert in range(4):
        ends = data.draw(spans)
        for start, stop in zip(ends[::2], ends[1::2], strict=False):
            box = [(0, size) for size in shape]
            box[0], box[axis] = (expert, expert + 1), (start, stop)
            boxes.append(tuple(box))
            mask[tuple(slice(*span) for span in box)] = True
    division = divided(shape, tuple(boxes), axis)
    assert division.elements(division.trained) == int(mask.sum())
    assert division.elements(division.frozen) == int((~mask).sum())
    assert divided(shape, boxed(division), axis) == division
    again = torch.zeros(shape, dtype=torch.bool)
    for box in boxed(division):
        again[tuple(slice(*span) for span in box)] = True
    assert torch.equal(again, mask)


@pytest.mark.parametrize(
    "boxes",
    [
        (((0, 2), (0, 1), (0, 3)),),
        (((0, 3), (0, 3), (0, 3)), ((2, 4), (0, 3), (2, 4))),
        (((0, 5), (0, 3), (0, 3)),),
        (((1, 1), (0, 3), (0, 3)),),
    ],
    ids=["two axes", "overlap in one expert", "outside", "no expert"],
)
def test_boxes_of_a_stack_that_are_none(boxes: tuple[tuple[tuple[int, int], ...], ...]) -> None:
    """Refused, not guessed."""
    with pytest.raises(FormatError, match=r"not ranges along one axis|overlap"):
        divided((4, 3, 6), boxes)
    assert divided((4, 3, 6), (((0, 4), (0, 3), (0, 6)),)) == Division((4, 3, 6), 0, ((range(1), ((0, 4),)),))


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("options", [{}, {"policy": "g-train", "layers": "1"}, {"width": 31, "multiple_of": 2}])
def test_there_and_back(base: Path, tmp_path: Path, options: dict[str, object]) -> None:
    """Proved on the bytes with the filling counted; fold and revert give the base, audits hold, the skill too."""
    done = ckptgrow.expand(base, tmp_path / "grown", experts="0,2", **options)  # type: ignore[arg-type]
    grown, manifest = tmp_path / "grown", done.manifest
    jsonschema.validate(json.loads((grown / "ckptgrow.json").read_text()), SCHEMA)
    assert load_manifest(grown) == manifest
    assert json.loads((grown / "config.json").read_text())["ckptgrow"]["grown_experts"] == [0, 2]
    seen = ckptgrow.verify(base, grown)
    assert (seen.exit_code, "units with a zero column" in seen.answers[1].figure) == (0, True)
    before = checkpoints.snapshot(base)
    assert ckptgrow.fold(grown, tmp_path / "folded").exit_code == 0
    assert ckptgrow.revert(grown, tmp_path / "reverted").exit_code == 0
    for undone in ("folded", "reverted"):
        after = checkpoints.snapshot(tmp_path / undone)
        assert {name: data for name, data in after.items() if name != "README.md"} == before
    trained = trainings.trained(grown)
    for reference in (grown, base):
        audit = ckptgrow.audit(reference, trained, manifest=grown)
        assert (audit.exit_code, audit.total("trainable")) == (0, manifest.counts.trainable)
        assert audit.total("changed") > 0.95 * manifest.counts.trainable
    ckptgrow.extract(trained, tmp_path / "skill", base=base, manifest=grown)
    learned = sum(tensor.numel() for tensor in checkpoints.load(tmp_path / "skill").values())
    assert learned == manifest.counts.trainable
    ckptgrow.apply(base, tmp_path / "skill", tmp_path / "applied")
    applied, tensors = checkpoints.load(tmp_path / "applied"), checkpoints.load(trained)
    assert applied.keys() == tensors.keys()
    assert all(torch.equal(applied[name], tensors[name]) for name in tensors)
    if manifest.policy == "g-freeze":
        ckptgrow.revert(trained, tmp_path / "again", manifest=grown)
        assert checkpoints.snapshot(tmp_path / "again") == before


@pytest.mark.parametrize("policy", ["g-freeze", "g-train", "down"])
def test_only_listed_experts_train(base: Path, tmp_path: Path, policy: str) -> None:
    """Of the asked layers; MLPs with another key keep their bytes, and blocks say which grew."""
    grown = trainings.grow(base, tmp_path / "grown", experts="0,2", layers="1", policy=policy)
    masks = {n: torch.zeros(t.shape, dtype=torch.bool) for n, t in checkpoints.load(grown).items()}
    masks |= trainings.masks(grown)
    some = {(layer, expert) for layer, expert, _, view in parts_of(grown, masks) if view.any()}
    assert some == {(1, expert) for expert in LISTED}
    counted = sum(int(view.sum()) for _, _, _, view in parts_of(grown, masks))
    manifest = load_manifest(grown)
    assert counted == manifest.counts.trainable == sum(int(mask.sum()) for mask in masks.values())
    assert manifest.experts == LISTED
    for name, tensor in checkpoints.load(base).items():
        assert torch.equal(tensor, checkpoints.load(grown)[name]) or "expert" in name
    twelve = trainings.grow(base, tmp_path / "all", experts="0,2")
    assert load_manifest(twelve).counts.filled < manifest.counts.filled
    added = sum(t.numel() for t in checkpoints.load(twelve).values()) - manifest.counts.base
    assert load_manifest(twelve).counts.filled == added // 2  # two of four experts


def test_a_moved_element_of_filling_is_seen(base: Path, tmp_path: Path) -> None:
    """In an expert that was filled, by the tensor's name; and repair puts it back."""
    grown = trainings.grow(base, tmp_path / "grown", experts="0,2")

    def move(tensors: Tensors) -> None:
        name, view = next((n, v) for layer, expert, n, v in parts_of(grown, tensors) if (layer, expert) == (1, 3))
        view[-1] += 1.0
        moved.append(name)

    moved: list[str] = []
    trained = trainings.trained(grown, move)
    seen = ckptgrow.audit(grown, trained)
    assert (seen.exit_code, seen.total("moved"), trainings.moved(seen)) == (1, 1, {*moved})
    assert ckptgrow.extract(trained, tmp_path / "skill", base=base, manifest=grown).exit_code == 1
    assert ckptgrow.audit(grown, trained, repair=tmp_path / "repaired", force=True).repaired
    trainings.check_repaired(grown, trained, tmp_path / "repaired")


@pytest.mark.parametrize("undone", ["zero column", "row"])
def test_wrong_filling_is_not_the_same_function(base: Path, tmp_path: Path, undone: str) -> None:
    """A weight in a column that should be zero, or a row of another unit beside it: verify names the tensor."""
    grown = trainings.grow(base, tmp_path / "grown", experts="0,2")

    def spoil(tensors: Tensors) -> None:
        for layer, expert, name, view in parts_of(grown, tensors):
            if (layer, expert) == (1, 3) and ("down" in name or "w2" in name) == (undone == "zero column"):
                view[-1] = float("inf") if undone == "row" else 1.0
                spoilt.append(name)
                return

    spoilt: list[str] = []
    checkpoints.edit(grown, spoil)
    seen = ckptgrow.verify(base, grown)
    found = {finding.tensor for answer in seen.answers for finding in answer.findings}
    assert seen.exit_code == 1
    assert {*spoilt} <= found


def test_growing_again(base: Path, tmp_path: Path) -> None:
    """Other experts on top, trained in between: each growth is undone by itself, or all of them."""
    first = trainings.grow(base, tmp_path / "first", experts="0,2")
    checkpoints.edit(first, lambda tensors: trainings.learn(tensors, first, 0.5))
    second = trainings.grow(first, tmp_path / "second", experts="1-2")
    assert ckptgrow.verify(first, second).exit_code == 0
    checkpoints.edit(second, lambda tensors: trainings.learn(tensors, second, 0.5))
    ckptgrow.revert(second, tmp_path / "back")
    assert checkpoints.snapshot(tmp_path / "back") == checkpoints.snapshot(first)
    ckptgrow.revert(second, tmp_path / "base again", every=True)
    assert checkpoints.snapshot(tmp_path / "base again") == checkpoints.snapshot(base)


def skill(base: Path, name: str, experts: str, seed: int) -> Path:
    """A growth of these experts, trained."""
    grown = trainings.grow(base, base.with_name(name), experts=experts)
    checkpoints.edit(grown, lambda tensors: trainings.learn(tensors, grown, 0.1 * seed))
    ckptgrow.extract(grown, base.with_name(f"{name}-skill"))
    return base.with_name(f"{name}-skill")


def test_skills_of_other_experts_merge(base: Path, tmp_path: Path) -> None:
    """Of no common expert and of some: what was written is base and skills, weight by weight; one alone is itself."""
    one, other = skill(base, "one", "0,2", 1), skill(base, "other", "2-3", 2)
    third = skill(base, "third", "1", 3)
    ckptgrow.merge(base, [one, third], tmp_path / "apart")
    ckptgrow.merge(base, [one, other], tmp_path / "together")
    ckptgrow.merge(base, [one], tmp_path / "alone")
    for merged in ("apart", "together"):
        jsonschema.validate(json.loads((tmp_path / merged / "ckptgrow.json").read_text()), SCHEMA)
        assert ckptgrow.audit(tmp_path / merged, tmp_path / merged).exit_code == 0
    alone, grown = checkpoints.load(tmp_path / "alone"), checkpoints.load(tmp_path / "one")
    assert all(torch.equal(alone[name], grown[name]) for name in grown)
    masks = trainings.masks(tmp_path / "apart")
    blank = {n: torch.zeros(t.shape, dtype=torch.bool) for n, t in checkpoints.load(tmp_path / "apart").items()}
    some = {expert for _, expert, _, view in parts_of(tmp_path / "apart", blank | masks) if view.any()}
    assert some == {0, 1, 2}


def test_a_merge_of_unlike_experts_is_no_skill(tmp_path: Path) -> None:
    """In one stack an expert has units of one skill, another those of two: no tensor holds just these."""
    base = make(tmp_path / "base", "stacked")
    ckptgrow.merge(base, [skill(base, "one", "0,2", 1), skill(base, "other", "2-3", 2)], tmp_path / "merged")
    with pytest.raises(ckptgrow.RequestError, match="experts of its stack have different numbers of units that train"):
        ckptgrow.extract(tmp_path / "merged", tmp_path / "skill", base=base)
    assert not (tmp_path / "skill").exists()


# ---------------------------------------------------------------- the mask in other words, and what is said


@pytest.mark.parametrize("policy", ["g-freeze", "g-train"])
def test_the_mask_in_every_format(base: Path, tmp_path: Path, policy: str) -> None:
    """JSON has the boxes, on disk and in memory; the checkpoint of the mask has ones in them; names lose."""
    grown = trainings.grow(base, tmp_path / "grown", experts="0,2", policy=policy)
    masks = trainings.masks(grown)
    told = json.loads(ckptgrow.mask(grown, "json").text or "")["tensors"]
    for name, mask in masks.items():
        again = torch.zeros_like(mask)
        for box in told[name]["boxes"]:
            again[tuple(slice(*span) for span in box)] = True
        assert torch.equal(again, mask)
    ckptgrow.mask(grown, "safetensors", out=tmp_path / "mask")
    for name, tensor in checkpoints.load(tmp_path / "mask").items():
        assert torch.equal(tensor == 1, masks.get(name, torch.zeros(tensor.shape, dtype=torch.bool)))
    assert "LOST" in (ckptgrow.mask(grown, "names").text or "")
    assert "EXACT" in (ckptgrow.mask(grown, "axolotl").text or "")
    assert "EXACT" in (ckptgrow.mask(grown, "llamafactory").text or "")


@pytest.mark.parametrize("policy", ["g-freeze", "g-train"])
def test_the_mask_in_memory(tmp_path: Path, policy: str) -> None:
    """Experts apart on disk: the boxes in the stacks are those of the listed ones."""
    grown = trainings.grow(make(tmp_path / "base", "separate"), tmp_path / "grown", experts="0,2", policy=policy)
    where = {name: mask for name, mask in stacks.where(grown, "mixtral").items() if mask.any()}
    seen = {name: torch.zeros_like(mask) for name, mask in where.items()}
    for tensor in json.loads(ckptgrow.mask(grown, "json").text or "")["tensors"].values():
        for box in tensor["in_memory_boxes"]:
            seen[tensor["in_memory"]][tuple(slice(*span) for span in box)] += 1
    assert all(torch.equal(mask, where[name]) for name, mask in seen.items())


def test_what_is_said(base: Path, tmp_path: Path) -> None:
    """--plan and the card name the experts and what the filling costs."""
    words = ["expand", str(base), str(tmp_path / "out"), "--experts", "0,2"]
    plan = CliRunner().invoke(main, [*words, "--plan"])
    assert "of all but experts 0, 2" in plan.output, plan.output
    assert "units of experts 0, 2 come in 2 copies" in plan.output
    proposal = json.loads(CliRunner().invoke(main, [*words, "--plan", "--json"]).stdout)
    assert (proposal["experts_grown"], proposal["layers_filled"]) == ([0, 2], [])
    assert CliRunner().invoke(main, words).exit_code == 0
    card, manifest = (tmp_path / "out/README.md").read_text(), load_manifest(tmp_path / "out")
    assert "with the MLPs of experts 0, 2 of its 2 layers widened" in card
    assert f"filling: {proposal['parameters_filled']:,} parameters" in card
    assert manifest.counts.filled == proposal["parameters_filled"] > 0
