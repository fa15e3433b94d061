"""Every way in which an MLP can lie in a checkpoint: grown, proved, verified, and each checker shown to fail on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import Tensors, blocks_of, sites_of
from strategies import LAYOUTS, config_of, infos_of, tiny

import ckptgrow
from ckptgrow import surgery
from ckptgrow.errors import CkptgrowError, FamilyError, PlanError, RequestError
from ckptgrow.families import FAMILIES, Family, Site, linear, locate
from ckptgrow.plan import Output, Plan
from ckptgrow.policy import boxes
from ckptgrow.proof import prove
from ckptgrow.surgery import Growth, expand
from ckptgrow.tensors import TensorInfo

EXPERTS = "model.layers.1.mlp.experts"


def config(folder: Path) -> dict[str, Any]:
    """config.json."""
    read: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return read


# ---------------------------------------------------------------- every layout grows


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_a_layout_grows_and_is_verified(model_type: str, tmp_path: Path) -> None:
    """All three answers are yes on the bytes, and made again from the base the growth is the same."""
    base = checkpoints.make(tmp_path / "base", model_type, bias=True)
    done = ckptgrow.expand(base, tmp_path / "out", factor=3)
    verdicts = [answer.verdict for answer in ckptgrow.verify(base, tmp_path / "out").answers]
    assert verdicts == ["yes", "yes", "yes"]
    assert ckptgrow.audit(base, tmp_path / "out").exit_code == 0
    widths = {block.block: block.new_width for block in done.manifest.blocks}
    stems = [b for site in sites_of(FAMILIES[model_type]) for i in range(2) for b in blocks_of(site, "model.", i)]
    assert widths == dict.fromkeys(stems, 36)


@pytest.mark.parametrize("model_type", ["dbrx", "gpt2", "gpt_oss", "jetmoe", "mixtral", "phi3", "zamba2"])
def test_a_layout_is_reverted(model_type: str, tmp_path: Path) -> None:
    """The base comes back byte for byte."""
    base = checkpoints.make(tmp_path / "base", model_type)
    ckptgrow.expand(base, tmp_path / "out")
    ckptgrow.revert(tmp_path / "out", tmp_path / "again")
    before, after = checkpoints.snapshot(base), checkpoints.snapshot(tmp_path / "again")
    assert {name: after[name] for name in before} == before


# ---------------------------------------------------------------- the checkers can fail: on the Plan


def mangled(plan: Plan, ending: str, change: Callable[[Output], Output]) -> Plan:
    """The Plan with the first output of that name changed."""
    first = next(output for output in plan.outputs if output.name.endswith(ending))
    return replace(plan, outputs=tuple(change(o) if o is first else o for o in plan.outputs))


def tiled(output: Output) -> Output:
    """A fused tensor repeated whole: [g, u, g, u] where [g, g, u, u] belongs."""
    g, gg, u, uu = output.parts
    return replace(output, parts=(g, replace(u, grown=True), replace(gg, grown=False), uu))


def shifted(output: Output) -> Output:
    """The copies begin one place later, and end where they began."""
    kept, new = output.parts
    (term,) = new.terms
    units = (*term.units[1:], term.units[0])
    return replace(output, parts=(kept, replace(new, terms=(replace(term, units=units),))))


def exchanged(output: Output) -> Output:
    """The first two experts' lanes made of each other."""
    return replace(output, parts=(*output.parts[2:4], *output.parts[:2], *output.parts[4:]))


def unshared(output: Output) -> Output:
    """Each copy gets the whole column, or scale."""
    parts = tuple(replace(p, terms=tuple(replace(t, share=None) for t in p.terms)) for p in output.parts)
    return replace(output, parts=parts)


def emptied(output: Output) -> Output:
    """Nothing but zeros in the new places."""
    return replace(output, parts=tuple(replace(p, terms=()) if p.grown else p for p in output.parts))


MUTATIONS: list[tuple[str, str, Callable[[Output], Output]]] = [
    ("phi3", "gate_up_proj.weight", tiled),
    ("jetmoe", "input_linear.weight", tiled),
    ("gpt_oss", "gate_up_proj", shifted),
    ("gpt_oss", "gate_up_proj", emptied),
    ("gpt2", "c_fc.weight", shifted),
    ("gpt2", "c_proj.weight", unshared),
    ("mixtral", "experts.1.w1.weight", shifted),
    ("mixtral", "experts.1.w2.weight", unshared),
    ("jetmoe", "output_linear.weight", unshared),
    ("dbrx", "w1", exchanged),
    ("dbrx", "w2", exchanged),
    ("dbrx", "w2", unshared),
    ("bitnet", "ffn_sub_norm.weight", shifted),
    ("bitnet", "ffn_sub_norm.weight", emptied),
    ("zamba2", "adapter_list.0.1.weight", tiled),
]


@pytest.mark.parametrize(("model_type", "ending", "change"), MUTATIONS)
def test_the_proof_fails(model_type: str, ending: str, change: Callable[[Output], Output]) -> None:
    """One tensor of one layout made wrongly."""
    base = tiny(model_type, width=4)
    plan = expand(base.infos, base.architecture, Growth())
    prove(plan, base.infos, base.architecture)
    with pytest.raises(PlanError):
        prove(mangled(plan, ending, change), base.infos, base.architecture)


@pytest.mark.parametrize("model_type", ["bitnet", "gemma3n_text"])
def test_units_that_do_not_come_equally_often(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics over the width: refused by request, and by the proof where the request got through."""
    base = tiny(model_type, width=4)
    with pytest.raises(RequestError, match="takes statistics over them"):
        expand(base.infos, base.architecture, Growth(width=6))
    monkeypatch.setattr(surgery, "_check_copies", lambda *told: None)
    plan = expand(base.infos, base.architecture, Growth(width=6))
    with pytest.raises(PlanError, match="some come more often"):
        prove(plan, base.infos, base.architecture)


def test_an_interleaved_projection_cannot_train_alone() -> None:
    """Every second row is no range; both of them are."""
    base = tiny("gpt_oss")
    plan = expand(base.infos, base.architecture, Growth(policy="up"))
    fused = next(output for output in plan.outputs if output.name.endswith("gate_up_proj"))
    with pytest.raises(RequestError, match="alternate in it"):
        boxes(fused, Growth(policy="up").rules)
    assert boxes(fused, Growth().rules) == (((0, 2), (0, 3), (8, 16)),)


# ---------------------------------------------------------------- the checkers can fail: on the bytes


def new_half(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    return tensor.narrow(axis, tensor.shape[axis] // 2, tensor.shape[axis] // 2)


def breaks() -> dict[str, tuple[str, Callable[[Tensors], None]]]:
    """What a wrong tool would have written, by layout."""

    def halves(tensors: Tensors) -> None:
        name = "model.layers.0.mlp.gate_up_proj.weight"
        g, gg, u, uu = tensors[name].chunk(4)
        tensors[name] = torch.cat([g, u, gg, uu])

    def norm(tensors: Tensors) -> None:
        new_half(tensors["model.layers.0.mlp.ffn_sub_norm.weight"], 0).fill_(1.0)

    def expert(tensors: Tensors) -> None:
        one, other = (f"model.layers.0.block_sparse_moe.experts.{i}.w1.weight" for i in (0, 1))
        new_half(tensors[one], 0).copy_(new_half(tensors[other], 0))

    def slice_of_a_stack(tensors: Tensors) -> None:
        name = "model.layers.0.mlp.input_linear.weight"
        new_half(tensors[name][0], 0).copy_(new_half(tensors[name][1], 0))

    def flat(tensors: Tensors) -> None:
        name = "model.blocks.0.ffn.experts.mlp.v1"
        one, other = tensors[name].chunk(2)
        tensors[name] = torch.cat([one, other.roll(1, 0)])

    def woven(tensors: Tensors) -> None:
        name = "model.layers.0.mlp.experts.gate_up_proj"
        new_half(tensors[name], 2).copy_(new_half(tensors[name], 2).roll(1, 2).clone())

    def column(tensors: Tensors) -> None:
        tensors["model.h.0.mlp.c_proj.weight"].mul_(2)

    def adapter(tensors: Tensors) -> None:
        name = "model.layers.0.shared_transformer.feed_forward.gate_up_proj_adapter_list.0.1.weight"
        tensors[name].chunk(2)[0].chunk(2)[1].zero_()

    return {
        "phi3": ("gate_up_proj", halves),
        "bitnet": ("ffn_sub_norm", norm),
        "mixtral": ("experts.0", expert),
        "jetmoe": ("input_linear", slice_of_a_stack),
        "dbrx": ("experts.mlp", flat),
        "gpt_oss": ("gate_up_proj", woven),
        "gpt2": ("c_proj", column),
        "zamba2": ("adapter_list", adapter),
    }


@pytest.mark.parametrize("model_type", breaks())
def test_verify_fails(model_type: str, tmp_path: Path) -> None:
    """By the name of the tensor."""
    base = checkpoints.make(tmp_path / "base", model_type)
    ckptgrow.expand(base, tmp_path / "out")
    assert ckptgrow.verify(base, tmp_path / "out").exit_code == 0
    wanted, change = breaks()[model_type]
    checkpoints.edit(tmp_path / "out", change)
    answer = ckptgrow.verify(base, tmp_path / "out").answers[1]
    assert answer.verdict == "no"
    assert any(wanted in finding.tensor for finding in answer.findings), answer


def test_verify_wants_each_unit_equally_often(tmp_path: Path) -> None:
    """In gemma3n's MLP the mean over the width would move, though every sum of columns is right."""
    base = checkpoints.make(tmp_path / "base", "llama", config={"intermediate_size": 12})
    ckptgrow.expand(base, tmp_path / "out", width=18)
    for folder in (base, tmp_path / "out"):
        checkpoints.edit_config(folder, model_type="gemma3n_text")
    answer = ckptgrow.verify(base, tmp_path / "out").answers[1]
    assert answer.verdict == "no"
    assert "some come more often" in answer.findings[0].problem


# ---------------------------------------------------------------- one key, several widths


def test_coupled_widths_grow_by_one_factor(tmp_path: Path) -> None:
    """Two shared experts in one MLP of twice the width: one key says both, and a width refers to it."""

    def widen(tensors: Tensors) -> None:
        for name in [name for name in tensors if "shared_experts" in name]:
            axis = 1 if "down" in name else 0
            tensors[name] = torch.cat([tensors[name], -tensors[name]], axis)

    base = checkpoints.make(tmp_path / "base", "solar_open")
    checkpoints.edit(base, widen)
    checkpoints.edit(base, lambda t: [t.pop(n) for n in [*t] if ".mlp.gate_proj" in n or ".mlp.up_proj" in n])
    checkpoints.edit(base, lambda t: [t.pop(n) for n in [*t] if ".mlp.down_proj" in n])
    done = ckptgrow.expand(base, tmp_path / "out", width=18)
    found = {block.block.rpartition(".")[2]: (block.old_width, block.new_width) for block in done.manifest.blocks}
    assert found["shared_experts"] == (24, 36)
    assert found["0"] == (12, 18)
    assert config(tmp_path / "out")["moe_intermediate_size"] == 18
    assert ckptgrow.verify(base, tmp_path / "out").exit_code == 0


def test_a_ratio_that_one_stage_cannot_follow() -> None:
    """Swin's stages have one ratio and several widths: 8 and 12 units become 9 and no whole number."""
    infos = infos_of("swin", hidden=4, width=8)
    stage = {name: i for name, i in infos.items() if name.startswith("model.layers.1.blocks")}
    infos |= {n: replace(i, shape=tuple({4: 6, 8: 12}[size] for size in i.shape)) for n, i in stage.items()}
    found = locate(config_of("swin", hidden=4, width=8), infos)
    assert [mlp.width for mlp in found.mlps] == [8, 12]
    assert expand(infos, found, Growth()).config[0].value == 4.0
    with pytest.raises(RequestError, match=r"9 / 8 times its 12 units is no whole number"):
        expand(infos, found, Growth(width=9))


def test_a_width_for_several_keys_is_refused(tmp_path: Path) -> None:
    """Which of them would it be?"""
    base = checkpoints.make(tmp_path / "base", "qwen3_moe")

    def widen(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".mlp.experts" not in name and "_proj" in name and "mlp" in name]:
            tensors[name] = torch.cat([tensors[name]] * 2, 1 if "down" in name else 0)

    checkpoints.edit(base, widen)
    with pytest.raises(RequestError, match=r"several widths \(intermediate_size 12, moe_intermediate_size 12\)"):
        ckptgrow.expand(base, tmp_path / "out", width=48)
    ckptgrow.expand(base, tmp_path / "out")
    assert [config(tmp_path / "out")[k] for k in ("intermediate_size", "moe_intermediate_size")] == [48, 24]
    assert ckptgrow.audit(base, tmp_path / "out").exit_code == 0  # made again from the base, by the factor


@pytest.mark.parametrize(
    ("model_type", "options", "told"),
    [
        ("recurrent_gemma", {"width": 18}, {"intermediate_size": 36}),
        ("lfm2", {"width": 18}, {"intermediate_size": 18, "block_auto_adjust_ff_dim": False}),
        ("gpt2", {}, {"n_inner": 24}),
        ("falcon", {}, {"ffn_hidden_size": 24}),
        ("dinov2", {"width": 18}, {"mlp_ratio": 2.25}),
        ("dbrx", {}, {"ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 2, "ffn_act_fn": None}}),
    ],
)
def test_what_the_config_must_say(model_type: str, options: Any, told: Any, tmp_path: Path) -> None:
    """Twice the width, a switch beside it, a key that was None or not there, a ratio, a nested one."""
    base = checkpoints.make(tmp_path / "base", model_type)
    if model_type in ("gpt2", "falcon"):
        checkpoints.edit_config(base, **dict.fromkeys(told))
    ckptgrow.expand(base, tmp_path / "out", **options)
    for key, value in told.items():
        if isinstance(value, dict):
            assert config(tmp_path / "out")[key]["ffn_hidden_size"] == value["ffn_hidden_size"]
        else:
            assert config(tmp_path / "out")[key] == value
    assert ckptgrow.verify(base, tmp_path / "out").exit_code == 0
    checkpoints.edit_config(tmp_path / "out", **{next(iter(told)): 7})
    assert ckptgrow.verify(base, tmp_path / "out").exit_code == 1


def test_a_ratio_of_whole_numbers_stays_one(tmp_path: Path) -> None:
    """Where the config has an int and the new ratio is one; a loader may take no other type."""
    base = checkpoints.make(tmp_path / "base", "dinov2", width=16, config={"mlp_ratio": 2})
    ckptgrow.expand(base, tmp_path / "out")
    assert repr(config(tmp_path / "out")["mlp_ratio"]) == "4"
    with pytest.raises(FamilyError, match="mlp_ratio cannot say that its width is 20"):
        ckptgrow.expand(base, tmp_path / "odd", width=20)


def test_a_formula_that_cannot_say_it() -> None:
    """DINOv2's SwiGLU width is a multiple of 8."""
    family = FAMILIES["dinov2"]
    swiglu = replace(family, sites=family.sites[1:2])
    infos = infos_of(swiglu, hidden=12, width=8)
    found = locate(config_of(swiglu, hidden=12, width=1), infos, family=swiglu)
    assert expand(infos, found, Growth()).config[0].value == 2
    with pytest.raises(FamilyError, match="mlp_ratio cannot say that its width is 12"):
        expand(infos, found, Growth(width=12))


# ---------------------------------------------------------------- experts and towers


def test_shared_experts_alone(tmp_path: Path) -> None:
    """What every token passes grows, the routed experts stay."""
    base = checkpoints.make(tmp_path / "base", "qwen2_moe")
    done = ckptgrow.expand(base, tmp_path / "out", experts="shared")
    assert not any(".experts." in block.block for block in done.manifest.blocks)
    grown = config(tmp_path / "out")
    assert (grown["moe_intermediate_size"], grown["shared_expert_intermediate_size"]) == (12, 24)
    assert ckptgrow.verify(base, tmp_path / "out").exit_code == 0
    assert ckptgrow.audit(base, tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(
    ("model_type", "experts", "told"),
    [
        ("qwen2_moe", "0,7", "there are 2 experts"),
        ("qwen2_moe", "most", "neither an expert nor a range. Give all, shared, or numbers"),
        ("qwen2_moe", "", "names no expert"),
        ("qwen2_moe", "1-0", "1-0 runs backwards"),
        ("mixtral", "shared", "intermediate_size says the width of the routed experts too"),
        ("llama", "shared", "has no experts"),
        ("llama", "0", "has no experts"),
    ],
)
def test_experts_that_cannot_grow_alone(model_type: str, experts: str, told: str, tmp_path: Path) -> None:
    """With the reason, before anything is written."""
    base = checkpoints.make(tmp_path / "base", model_type)
    with pytest.raises(RequestError, match=told):
        ckptgrow.expand(base, tmp_path / "out", experts=experts)
    assert not (tmp_path / "out").exists()


def test_all_experts_by_number(tmp_path: Path) -> None:
    """A list that names them all is all of them."""
    base = checkpoints.make(tmp_path / "base", "mixtral")
    ckptgrow.expand(base, tmp_path / "out", experts="0-1")
    assert ckptgrow.verify(base, tmp_path / "out").exit_code == 0


def with_vision(folder: Path, prefix: str) -> Path:
    """A tiny Gemma 3 with a vision tower of two layers and width 10, named as on the Hub."""
    base = checkpoints.make(folder, "gemma3", prefix="language_model.model.")

    def add(tensors: Tensors) -> None:
        for layer in range(2):
            block = f"{prefix}encoder.layers.{layer}.mlp."
            tensors |= {block + "fc1.weight": torch.randn(10, 6), block + "fc1.bias": torch.randn(10)}
            tensors |= {block + "fc2.weight": torch.randn(6, 10), block + "fc2.bias": torch.randn(6)}

    checkpoints.edit(base, add)
    vision = {"hidden_size": 6, "intermediate_size": 10, "num_hidden_layers": 2, "hidden_act": "gelu"}
    checkpoints.edit_config(base, vision_config=vision)
    return base


@pytest.mark.parametrize("prefix", ["vision_tower.vision_model.", "model.vision_tower.", "vision_tower."])
def test_a_tower_by_name(prefix: str, tmp_path: Path) -> None:
    """The vision MLPs under the Hub's name and under transformers' own; the text stays; verify needs no word of it."""
    base = with_vision(tmp_path / "base", prefix)
    ckptgrow.expand(base, tmp_path / "out", tower="vision")
    assert config(tmp_path / "out")["vision_config"]["intermediate_size"] == 20
    assert config(tmp_path / "out")["text_config"] == config(base)["text_config"]
    assert ckptgrow.verify(base, tmp_path / "out").exit_code == 0
    assert ckptgrow.audit(base, tmp_path / "out").exit_code == 0
    assert ckptgrow.inspect(base, tower="vision").blocks[0].width == 10
    checkpoints.edit(tmp_path / "out", lambda t: t[f"{prefix}encoder.layers.0.mlp.fc2.weight"].mul_(2))
    assert ckptgrow.verify(base, tmp_path / "out").exit_code == 1


def test_towers_that_are_not_there() -> None:
    """Unknown, or known not to grow, each with its reason."""
    infos, said = infos_of("glmasr"), config_of("glmasr")
    with pytest.raises(FamilyError, match=r"audio tower .* cannot be grown: the projector behind it"):
        locate(said, infos, "audio")
    infos, said = infos_of("llama4"), config_of("llama4")
    with pytest.raises(FamilyError, match=r"vision tower .* cannot be grown: the adapter behind it"):
        locate(said, infos, "vision")
    for tower in ("audio", ""):
        with pytest.raises(RequestError, match=r"--tower .*: 'llama4' has main"):
            locate(said, infos, tower)


# ---------------------------------------------------------------- names that the Hub uses


def test_old_configs_do_not_nest_the_text(tmp_path: Path) -> None:
    """Qwen2-VL's config.json on the Hub has the text model's keys at the top, and its tensors are model.layers.N."""
    base = checkpoints.make(tmp_path / "base", "qwen2_vl")
    flat = config(base)
    flat |= flat.pop("text_config")
    (base / "config.json").write_text(json.dumps(flat))
    ckptgrow.expand(base, tmp_path / "out")
    assert config(tmp_path / "out")["intermediate_size"] == 24
    assert ckptgrow.verify(base, tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(
    ("model_type", "block", "depth"),
    [
        ("deepseek_v3", "model.layers.2.mlp", "num_hidden_layers"),
        ("qwen3_next", "mtp.layers.0.mlp", "num_hidden_layers"),
        ("glm4_moe", "model.layers.2.mlp", "num_hidden_layers"),
    ],
)
def test_layers_that_predict_further_tokens_grow_too(model_type: str, block: str, depth: str) -> None:
    """Behind the last layer, or in a stack of their own, which the config does not count."""
    infos = infos_of(model_type)
    infos |= {
        name.replace("model.layers.1.mlp", block): replace(info, name=name.replace("model.layers.1.mlp", block))
        for name, info in [*infos.items()]
        if name.startswith("model.layers.1.mlp")
    }
    found = locate(config_of(model_type), infos)
    assert any(mlp.block.startswith(block) for mlp in found.mlps)
    plan = expand(infos, found, Growth())
    grown = {output.name for output in plan.outputs if output.grown()}
    assert any(name.startswith(block) for name in grown)
    prove(plan, infos, found)
    with pytest.raises(FamilyError):  # another family does not have them
        locate(config_of("llama"), {n: i for n, i in infos.items() if "experts" not in n})


@pytest.mark.parametrize("names", ["gate_up_proj", "turned"])
def test_experts_stacked_in_either_orientation(names: str) -> None:
    """Mixtral as transformers holds it, and the transpose: shapes tell which axis has the units."""
    infos = {n: i for n, i in infos_of("mixtral").items() if "experts" not in n}
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts."
        up, down = ((2, 8, 3), (2, 3, 4)) if names == "gate_up_proj" else ((2, 3, 8), (2, 4, 3))
        infos |= {block + "gate_up_proj": TensorInfo(block + "gate_up_proj", "BF16", up)}
        infos |= {block + "down_proj": TensorInfo(block + "down_proj", "BF16", down)}
    found = locate(config_of("mixtral"), infos)
    assert [(mlp.width, mlp.hidden, mlp.experts) for mlp in found.mlps] == [(4, 3, 2)] * 2
    prove(expand(infos, found, Growth(width=7)), infos, found)


# ---------------------------------------------------------------- refused, by the name of a tensor


def without(ending: str) -> Callable[[dict[str, TensorInfo]], None]:
    def change(infos: dict[str, TensorInfo]) -> None:
        for name in [name for name in infos if ending in name]:
            del infos[name]

    return change


def added(name: str, *shape: int, dtype: str = "BF16") -> Callable[[dict[str, TensorInfo]], None]:
    return lambda infos: infos.update({name: TensorInfo(name, dtype, shape)})


@pytest.mark.parametrize(
    ("model_type", "change", "tensor", "told"),
    [
        ("mixtral", without("layers.1.block_sparse_moe.experts.1.w3"), "experts.1.w3.weight", "other tensors of its"),
        ("mixtral", without("layers.1.block_sparse_moe.experts.1."), "experts.1.w1.weight", "other experts are there"),
        ("qwen2_moe", without("layers.1.mlp.shared_expert."), "shared_expert.gate_proj.weight", "have shared experts"),
        ("mixtral", added(EXPERTS.replace("mlp", "block_sparse_moe") + ".0.norm.weight", 4), "norm.weight", "no such"),
        ("opt", added("model.layers.1.ffn_norm.weight", 4), "ffn_norm.weight", "no such"),
        ("opt", added("model.layers.1.fc1.scale", 1), "fc1.scale", "no such"),
        ("dbrx", added("model.blocks.1.ffn.experts.mlp.w1", 9, 3), "mlp.w1", "not that of a gate projection"),
        ("gpt_oss", added(EXPERTS + ".gate_up_proj", 2, 3, 9), "gate_up_proj", "not that of a gate_up projection"),
        ("jetmoe", added("model.layers.1.mlp.output_linear.weight", 3, 3, 4), "output_linear", "not that of a down"),
        ("bitnet", without("layers.1.mlp.ffn_sub_norm"), "ffn_sub_norm.weight", "other tensors of its MLP"),
        ("solar_open", added("model.layers.1.mlp.shared_experts.gate_proj.weight", 5, 3), "shared_exp", "contradicts"),
    ],
)
def test_what_contradicts_a_layout(model_type: str, change: Any, tensor: str, told: str) -> None:
    """Half an expert, a missing one, an unknown tensor of the width, an odd shape, a norm in some layers only."""
    infos, said = infos_of(model_type), config_of(model_type)
    locate(said, infos)
    change(infos)
    with pytest.raises(FamilyError, match=told) as caught:
        locate(said, infos)
    assert tensor in (caught.value.tensor or "")


def test_a_flat_stack_needs_the_number_of_experts() -> None:
    """Shapes do not say it."""
    said = config_of("dbrx")
    del said["ffn_config"]["moe_num_experts"]
    with pytest.raises(FamilyError, match="must say how many experts"):
        locate(said, infos_of("dbrx"))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("qzeros", "GPTQ or AWQ"),
        ("weight.absmax", "bitsandbytes"),
        ("weight.quant_map", "bitsandbytes"),
        ("SCB", "bitsandbytes int8"),
        ("weight_packed", "compressed-tensors"),
        ("weight_shape", "compressed-tensors"),
        ("weight_scale_2", "NVFP4"),
        ("weight_global_scale", "NVFP4"),
        ("weight_scale", "one scale a tensor"),
        ("W_q", "HQQ"),
    ],
)
def test_quantised_layers_are_refused_by_name(name: str, told: str) -> None:
    """Also where config.json does not say so; the way out stands behind it."""
    infos = infos_of("llama")
    module = "model.layers.0.mlp.gate_proj."
    infos[module + name] = TensorInfo(module + name, "U8", (4, 3))
    with pytest.raises(FamilyError, match=told) as caught:
        locate(config_of("llama"), infos)
    assert caught.value.tensor == module + name
    assert "quantise the result" in str(caught.value)


@pytest.mark.parametrize("name", ["gate_up_proj_blocks", "down_proj_blocks"])
def test_mxfp4_is_refused_by_name(name: str) -> None:
    """gpt_oss as it is on the Hub: blocks and scales where the plain model has one tensor."""
    infos = {n: i for n, i in infos_of("gpt_oss").items() if not n.endswith(name.removesuffix("_blocks"))}
    for layer in range(2):
        blocks = f"model.layers.{layer}.mlp.experts.{name}"
        infos[blocks] = TensorInfo(blocks, "U8", (2, 8, 1, 16))
    with pytest.raises(FamilyError, match="mxfp4") as caught:
        locate(config_of("gpt_oss"), infos)
    assert (caught.value.tensor or "").endswith(name)
    assert "quantise the result" in str(caught.value)


def test_shapes_that_fit_both_ways_are_refused() -> None:
    """As wide as the hidden size, nothing says which axis is that of the units: Conv1D's or Linear's."""
    templates = (linear(up="c_fc", down="c_proj"), linear(turned=True, up="c_fc", down="c_proj"))
    either = Family("either", tuple(Site(template) for template in templates))
    for width, turned in ((4, 0), (4, 1)):
        infos = infos_of(replace(either, sites=either.sites[turned:][:1]), hidden=3, width=width)
        assert locate(config_of(either, hidden=3, width=width), infos, family=either).width == 4
    with pytest.raises(FamilyError, match="fit in both orientations") as caught:
        locate(config_of(either, hidden=4), infos_of(either, hidden=4), family=either)
    assert caught.value.tensor == "model.layers.0.mlp.c_proj.weight"


def test_every_error_is_a_ckptgrow_error() -> None:
    """The one base class."""
    assert issubclass(FamilyError, CkptgrowError)
