"""families.py: every declared family is found in a tiny checkpoint; what contradicts its declaration is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from checkpoints import blocks_of, shape_of, sites_of
from strategies import LAYOUTS, Infos, config_of, infos_of

from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.errors import FamilyError
from ckptgrow.families import (
    FAMILIES,
    REFUSED,
    Family,
    Site,
    Slot,
    family_of,
    in_memory_name,
    linear,
    locate,
    ties,
    value_at,
)
from ckptgrow.proof import prove
from ckptgrow.surgery import Growth, expand
from ckptgrow.tensors import TensorInfo

Config = dict[str, Any]
PREFIXES = ("model.", "", "language_model.model.", "transformer.")


# ---------------------------------------------------------------- what is found


@pytest.mark.parametrize("model_type", checkpoints.USUAL)
def test_a_family_is_found(model_type: str) -> None:
    """Width and hidden size from the shapes, every block once, every tensor in its role, whatever the config says."""
    family = FAMILIES[model_type]
    infos = infos_of(family, layers=3, hidden=3, width=6)
    found = locate(config_of(family, layers=3, hidden=3, width=99), infos)
    assert found.family is family
    assert found.width == 6
    wanted = {
        block: layer for site in sites_of(family) for layer in range(3) for block in blocks_of(site, "model.", layer)
    }
    assert {mlp.block: mlp.layer for mlp in found.mlps} == wanted
    for mlp in found.mlps:
        assert (mlp.width, mlp.hidden) == (6, 3)
        assert {mlp.member(name).role for name in mlp.tensors} >= {"down"}
        assert all(infos[name].shape == shape_of(declared(slot), 3, 6) for name, slot in mlp.tensors.items())


def declared(slot: Slot) -> Slot:
    """A slot as its template has it: with one lane for all flat experts."""
    return replace(slot, lanes=slot.lanes[:1]) if slot.flat else slot


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("model_type", ["llama", "gemma3", "bart", "mixtral", "bert", "gpt2", "llava", "vit"])
def test_a_family_is_found_under_any_prefix(model_type: str, prefix: str) -> None:
    """Blocks come in the order of their layers, of which 10 follows 9."""
    found = locate(config_of(model_type, layers=11), infos_of(model_type, layers=11, prefix=prefix))
    per_layer = len(found.groups[0].mlps) // 11
    assert [mlp.layer for mlp in found.groups[0].mlps] == [i for i in range(11) for _ in range(per_layer)]
    assert all(mlp.block.startswith(prefix) for mlp in found.mlps)


@pytest.mark.parametrize("model_type", checkpoints.USUAL)
def test_biases_are_found(model_type: str) -> None:
    """Biases of gate and up grow; the bias of down has no units and stays."""
    found = locate(config_of(model_type, layers=1), infos_of(model_type, layers=1, bias=True))
    for mlp in found.mlps:
        wanted = {slot.name for slot in mlp.site.template.slots if slot.lanes != ("norm",) or not slot.bias}
        assert {slot.name for slot in mlp.tensors.values()} == wanted
        assert not {f"{mlp.block}.{name}" for name in mlp.site.template.still} & mlp.tensors.keys()


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_a_family_is_found_in_files(model_type: str, tmp_path: Path) -> None:
    """The same from a folder that the safetensors library wrote."""
    folder = checkpoints.make(tmp_path / "base", model_type, hidden=8, width=12)
    base = open_checkpoint(folder)
    found = locate(base.config, base.infos)
    assert (found.width, found.mlps[0].hidden) == (12, 8)


def test_the_tensors_of_an_mlp_are_in_the_order_of_the_template() -> None:
    """Gate, up, down, whatever the order in the file."""
    infos = dict(reversed(infos_of("llama").items()))
    roles = [slot.lanes for slot in locate(config_of("llama"), infos).mlps[0].tensors.values()]
    assert roles == [("gate",), ("up",), ("down",)]


def test_the_width_is_never_read_from_the_config() -> None:
    """A width that is missing, None or wrong in the config does not matter."""
    for wrong in ({"intermediate_size": None}, {"intermediate_size": 7}, {}):
        config = {"model_type": "llama"} | wrong
        assert locate(config, infos_of("llama", width=4)).width == 4


@pytest.mark.parametrize("model_type", checkpoints.USUAL)
def test_the_path_of_the_width(model_type: str) -> None:
    """Each dotted key is there in the family's config, and says the width by its rule."""
    config = config_of(model_type)
    for group in locate(config, infos_of(model_type)).groups:
        assert value_at(config, group.path) == group.says
        assert [group.told({group.path: group.says}, mlp) for mlp in group.mlps] == [4] * len(group.mlps)


def test_a_vision_tower_is_left_alone() -> None:
    """Gemma 3's vision MLPs are named alike, but have other projections: not part of the family, and no trouble."""
    infos = infos_of("gemma3", prefix="language_model.model.")
    tower = "vision_tower.vision_model.encoder.layers.{}.mlp.{}"
    for layer in range(3):
        for name, shape in [("fc1.weight", (9, 6)), ("fc1.bias", (9,)), ("fc2.weight", (6, 9)), ("fc2.bias", (6,))]:
            infos |= {t.name: t for t in [TensorInfo(tower.format(layer, name), "BF16", shape)]}
    found = locate(config_of("gemma3"), infos)
    assert all(mlp.block.startswith("language_model.") for mlp in found.mlps)
    plan = expand(infos, found, Growth())
    assert all(output.is_copy_of(infos[output.name]) for output in plan.outputs if "vision" in output.name)


def test_a_family_is_one_declaration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new architecture with its own names, keys and a fused bias needs nothing but this."""
    template = linear(gate_up="w13", down="w2")
    site = Site(template, "blocks.{layer}.ffn", "ffn_dim", scope="llm", depth="n_layers", hidden="dim")
    monkeypatch.setitem(FAMILIES, "newcomer", Family("newcomer", (site,)))
    infos = infos_of("newcomer", bias=True, prefix="net.")
    found = locate(config_of("newcomer"), infos)
    assert found.mlps[1].tensors == {
        "net.blocks.1.ffn.w13.weight": Slot("w13.weight", ("gate", "up"), 0),
        "net.blocks.1.ffn.w13.bias": Slot("w13.bias", ("gate", "up"), 0, bias=True),
        "net.blocks.1.ffn.w2.weight": Slot("w2.weight", ("down",), 1),
    }
    plan = expand(infos, found, Growth(factor=3))
    assert plan.config[0].path == "llm.ffn_dim"
    assert prove(plan, infos, found) == 8


def test_templates() -> None:
    """What linear() declares: one weight and maybe a bias each, down across, and whether there is a gate."""
    template = linear(gate="g", up="u", down="d")
    assert template.gated
    assert template.still == ("d.bias",)
    assert [(slot.name, slot.lanes, slot.axis, slot.bias) for slot in template.slots] == [
        ("g.weight", ("gate",), 0, False),
        ("g.bias", ("gate",), 0, True),
        ("u.weight", ("up",), 0, False),
        ("u.bias", ("up",), 0, True),
        ("d.weight", ("down",), 1, False),
    ]
    assert not linear(up="fc1", down="fc2").gated
    assert linear(gate_up="gu", down="d").gated


def test_the_table_contradicts_itself_nowhere() -> None:
    """Each family under its own name, nothing both known and refused, one down in every template, no site twice."""
    assert all(family.model_type == name for name, family in FAMILIES.items())
    assert not FAMILIES.keys() & REFUSED.keys()
    for family in FAMILIES.values():
        assert len(set(family.sites)) == len(family.sites)
        assert all(site.stem.count("{layer}") <= 1 for site in family.sites)
        assert all(sum(slot.shared for slot in site.template.slots) == 1 for site in family.sites)
        assert all(site.template.slots[0].required for site in family.sites)
        assert not {name for name, _ in family.refuses} & set(family.towers)


# ---------------------------------------------------------------- names in memory, tied tensors


def test_names_in_memory() -> None:
    """Gemma 3's prefix differs between disk and memory; other names are the same."""
    renamed = in_memory_name(FAMILIES["gemma3"], "language_model.model.layers.0.mlp.up_proj.weight")
    assert renamed == "model.language_model.layers.0.mlp.up_proj.weight"
    assert in_memory_name(FAMILIES["gemma3"], "vision_tower.x") == "vision_tower.x"
    assert in_memory_name(FAMILIES["llama"], "model.layers.0.x") == "model.layers.0.x"


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_missing_head_is_the_embedding(prefix: str) -> None:
    """Tied models have no lm_head on disk."""
    family = FAMILIES["llama"]
    assert ties({}, family, infos_of(family, prefix=prefix)) == {"lm_head.weight": prefix + "embed_tokens.weight"}
    assert ties({}, family, infos_of(family, prefix=prefix, tied=False)) == {}
    assert ties({}, family, {"x": TensorInfo("x", "F32", ())}) == {}


# ---------------------------------------------------------------- what is refused

BLOCK = "model.layers.{}.mlp."
GATE, UP, DOWN = (BLOCK.format(0) + f"{name}_proj.weight" for name in ("gate", "up", "down"))
GATE1, UP1, DOWN1 = (BLOCK.format(1) + f"{name}_proj.weight" for name in ("gate", "up", "down"))


def refusal(change: Callable[[Config, Infos], Any], model_type: str = "llama", layers: int = 2) -> FamilyError:
    """What locate says of a checkpoint after this change of its config or tensors."""
    config, infos = config_of(model_type, layers=layers), infos_of(model_type, layers=layers)
    locate(config, infos)
    change(config, infos)
    with pytest.raises(FamilyError) as caught:
        locate(config, infos)
    return caught.value


def shaped(infos: Infos, *shape: int, names: tuple[str, ...]) -> Infos:
    for name in names:
        infos[name] = replace(infos.get(name, TensorInfo(name, "BF16", ())), shape=shape)
    return infos


def without(infos: Infos, *beginnings: str) -> Infos:
    for name in [name for name in infos if name.startswith(beginnings)]:
        del infos[name]
    return infos


@pytest.mark.parametrize("model_type", [None, 3, ["llama"]])
def test_no_model_type(model_type: Any) -> None:
    """Without a model_type nothing is guessed."""
    for config in ({}, {"model_type": model_type}):
        with pytest.raises(FamilyError, match=r"config\.json: it has no model_type"):
            family_of(config)


def test_an_unknown_model_type_is_refused_with_the_known_ones() -> None:
    """The message lists what would have been understood."""
    with pytest.raises(FamilyError) as caught:
        family_of({"model_type": "llama99"})
    assert "'llama99'" in caught.value.problem
    assert all(name in str(caught.value) for name in FAMILIES)


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_refused_model_type_says_why(model_type: str) -> None:
    """Known and impossible is another answer than unknown."""
    with pytest.raises(FamilyError) as caught:
        family_of({"model_type": model_type})
    assert REFUSED[model_type] in str(caught.value)


@pytest.mark.parametrize(
    ("change", "tensor", "says"),
    [
        (lambda c, i: i.pop(UP), UP, "missing, but other tensors of its MLP"),
        (lambda c, i: i.pop(DOWN1), DOWN1, "missing, but other tensors of its MLP"),
        (lambda c, i: without(i, "model.layers.1."), GATE1, "num_hidden_layers is 2"),
        (lambda c, i: without(i, "model.layers.0."), GATE, "num_hidden_layers is 2"),
        (lambda c, i: c.pop("num_hidden_layers") and without(i, "model.layers.0."), GATE, "later layers"),
        (lambda c, i: c.update(num_hidden_layers=3), GATE.replace("0", "2"), "num_hidden_layers is 3"),
        (lambda c, i: shaped(i, 1, names=(GATE + "_scale",)), GATE + "_scale", "a tensor of a quantised layer"),
        (
            lambda c, i: shaped(i, 4, names=(BLOCK.format(1) + "norm.weight",)),
            BLOCK.format(1) + "norm.weight",
            "no such",
        ),
        (lambda c, i: shaped(i, 4, names=(BLOCK.format(1) + "act",)), BLOCK.format(1) + "act", "no such"),
        (lambda c, i: shaped(i, 4, names=(BLOCK.format(1) + "\n",)), BLOCK.format(1) + "\n", "no such"),
        (lambda c, i: shaped(i, 4, names=(UP1[:-6] + "bias",)), UP[:-6] + "bias", "other layers have it"),
        (lambda c, i: shaped(i, 4, names=(UP[:-6] + "bias",)), UP1[:-6] + "bias", "other layers have it"),
        (lambda c, i: shaped(i, 5, 3, names=(UP,)), UP, "contradicts the width 4"),
        (lambda c, i: shaped(i, 4, 2, names=(UP1,)), UP1, "hidden size 3"),
        (lambda c, i: shaped(i, 4, 3, names=(DOWN,)), DOWN, "contradicts"),
        (lambda c, i: shaped(shaped(i, 0, 3, names=(GATE, UP)), 3, 0, names=(DOWN,)), GATE, "no units"),
        (lambda c, i: shaped(i, 4, 3, 1, names=(GATE,)), GATE, "not that of a gate projection"),
        (lambda c, i: shaped(i, 12, names=(DOWN,)), DOWN, "not that of a down projection"),
        (
            lambda c, i: shaped(shaped(i, 5, 3, names=(GATE1, UP1)), 3, 5, names=(DOWN1,)),
            BLOCK.format(1)[:-1],
            "width 5",
        ),
        (lambda c, i: c.update(hidden_size=4), DOWN, "config.json says 4"),
        (lambda c, i: i.update({GATE1: replace(i[GATE1], dtype="I8")}), GATE1, "I8 weights cannot be shared out"),
        (lambda c, i: i.update({DOWN: replace(i[DOWN], dtype="F8_E8M0")}), DOWN, "F8_E8M0 weights cannot be"),
    ],
    ids=[
        "missing up",
        "missing down",
        "last layer missing",
        "first layer missing",
        "hole, depth unknown",
        "fewer layers than the config says",
        "scale beside a weight",
        "unknown norm",
        "unknown tensor",
        "unknown tensor with a line break",
        "bias in the last layer only",
        "bias in the first layer only",
        "up wider than gate",
        "up of another hidden size",
        "down the wrong way round",
        "no units at all",
        "three axes",
        "one axis",
        "layers of two widths",
        "hidden size not the config's",
        "integers",
        "floats without shares",
    ],
)
def test_a_contradiction_is_refused_by_the_name_of_a_tensor(
    change: Callable[[Config, Infos], Any], tensor: str, says: str
) -> None:
    """Each way in which a checkpoint may differ from its family's declaration."""
    error = refusal(change)
    assert error.tensor == tensor
    assert says in error.problem


def test_more_layers_than_the_config_says_are_refused() -> None:
    """A layer that no loader would run is a tensor nobody declared: growing it would be a guess."""
    error = refusal(lambda c, i: c.update(num_hidden_layers=1))
    assert (error.tensor or "").startswith("model.layers.1.")


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)], ids=["no rows", "no columns"])
def test_an_empty_projection_beside_full_ones_is_refused(shape: tuple[int, ...]) -> None:
    """A size of 0 is a size that contradicts the others, not one that is still to be found out."""
    error = refusal(lambda c, i: shaped(i, *shape, names=(GATE,)))
    assert error.tensor in (GATE, UP)


def test_a_fused_projection_of_odd_size_is_refused() -> None:
    """gate_up must have two equal halves."""
    name = "model.layers.0.mlp.gate_up_proj.weight"
    error = refusal(lambda c, i: shaped(i, 9, 3, names=(name,)), "phi3")
    assert (error.tensor, "gate_up" in error.problem) == (name, True)


def test_a_bias_of_another_width_is_refused() -> None:
    """Biases have the width too."""
    name = "model.layers.1.mlp.fc1.bias"
    error = refusal(lambda c, i: shaped(i, 5, names=(name,)), "phi")
    assert (error.tensor, "contradicts the width 4" in error.problem) == (name, True)


@pytest.mark.parametrize("scale", [{"quant_method": "fp8"}, "gptq", {"bits": 4}])
def test_quantised_weights_are_refused(scale: Any) -> None:
    """A quantization_config, at the top or in the text model's config."""
    for model_type, inner in [("llama", None), ("gemma3", None), ("gemma3", "text_config")]:

        def quantise(config: Config, infos: Infos, inner: str | None = inner) -> None:
            (config[inner] if inner else config)["quantization_config"] = scale

        error = refusal(quantise, model_type)
        assert "quantised" in error.problem
        assert "Grow the unquantised" in str(error)


def test_two_stacks_are_refused() -> None:
    """Layers of one kind under two prefixes: one config number could not describe both."""
    error = refusal(lambda c, i: i.update(infos_of("llama", prefix="draft.")))
    assert "draft." in error.problem
    assert "model." in error.problem


def test_no_mlp_at_all_is_refused() -> None:
    """The message says what name was looked for."""
    error = refusal(lambda c, i: without(i, "model.layers."))
    assert "[...]layers.N.mlp.down_proj.weight" in error.problem


def test_a_missing_text_config_is_refused() -> None:
    """Where the family nests its keys, they must be there."""
    error = refusal(lambda c, i: c.pop("text_config"), "gemma3")
    assert "text_config" in error.problem


def test_what_is_not_in_a_block_is_not_looked_at() -> None:
    """Integer buffers and odd shapes elsewhere are no reason to refuse."""
    infos = infos_of("llama")
    infos |= {name: TensorInfo(name, "I64", (2, 0)) for name in ("position_ids", "model.layers.0.mlp", "mlp.x")}
    assert locate(config_of("llama"), infos).width == 4
