"""Every family of the table in real transformers: built tiny from its own config class, saved, grown, verified, loaded.

tiny_families.json has the classes and the options that make a model tiny. Loaded in float32, base and grown are run on
one input, and the output of every module that has the same shape in both is compared: that of an MLP too, which a norm
behind it would hide from the model's output. The MLPs of towers that this input does not reach are called alone.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="holds the table against real transformers, which is not installed")

import torch
import transformers
from safetensors.torch import load_file, save_file
from strategies import LAYOUTS
from test_transformers import randomised
from torch import nn

import ckptgrow
from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.families import FAMILIES, Family, Site, in_memory_name, linear, locate, value_at
from ckptgrow.probe import ACTIVATIONS, activation_name, forward
from ckptgrow.progress import uncounted

pytestmark = [pytest.mark.transformers, pytest.mark.filterwarnings("ignore")]  # what transformers says of its own

TINY = json.loads((Path(__file__).parent / "tiny_families.json").read_text())
COMMON: dict[str, Any] = TINY["common"]
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in TINY["families"]}
TOWERS = [(name, tower) for name, case in CASES.items() for tower in FAMILIES[case["model_type"]].towers]
# What comes after growing is done with one family a layout in CI, with the others by hand.
THINNED = [
    pytest.param(name, tower, marks=[] if CASES[name]["model_type"] in LAYOUTS else [pytest.mark.full])
    for name, tower in TOWERS
]
EPSILON = 2e-5  # of the size of an output, or of 1: float32 sums in another order


def options(config: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make a config tiny: the common ones it has, below it too, and those wanted for this family."""
    found, there = {}, config.to_dict()
    for key, value in COMMON.items():
        present = there.get(config.attribute_map.get(key, key))
        known = key in there or key in config.attribute_map
        if known and isinstance(present, list | tuple) == isinstance(value, list) and not isinstance(present, dict):
            found[key] = value
    for name in config.sub_configs or {}:
        inner = getattr(config, name, None)
        if inner is not None:
            found[name] = options(inner, wanted.get(name) or {}) | {"model_type": inner.model_type}
    nested = {key: found[key] | value for key, value in wanted.items() if isinstance(found.get(key), dict)}
    return found | wanted | nested


def build(case: dict[str, Any], folder: Path, **saving: Any) -> Path:
    """Save the tiny model in float32, every weight random: norms near 1, biases not 0."""
    kind = transformers.CONFIG_MAPPING[case["model_type"]]
    model = getattr(transformers, case["class"])(kind(**options(kind(), case["options"]))).float().eval()
    randomised(model)
    model.save_pretrained(folder, **saving)
    return folder


def load(case: dict[str, Any], folder: Path) -> nn.Module:
    """What from_pretrained makes of a folder, after a look at what it complained about."""
    model, said = getattr(transformers, case["class"]).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert {key: found for key, found in said.items() if found} == {}
    return model.eval()


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Something of the kind that the model takes."""
    generator = torch.Generator().manual_seed(1)
    config: Any = model.config
    name = model.main_input_name
    ids = torch.randint(3, 50, (2, 12), generator=generator)
    if name == "pixel_values":
        size = getattr(config, "image_size", 28)
        return {name: torch.randn(2, 3, size, size, generator=generator)}
    if name == "input_values":
        given = torch.randn(2, 4000, generator=generator)
        return {name: given} | ({"decoder_input_ids": ids[:, :7]} if config.is_encoder_decoder else {})
    if name == "input_features":
        given = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
        return {name: given, "decoder_input_ids": ids}
    if config.model_type in ("clip", "siglip"):
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 28, 28, generator=generator)}
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :7]} if config.is_encoder_decoder else {})


def seen(model: nn.Module, given: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Every tensor that a module returned, in order, by the module's name."""
    outputs: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor) and first.is_floating_point():
                outputs.setdefault(name, []).append(first.clone())

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    if "use_cache" in inspect.signature(model.forward).parameters:
        given = given | {"use_cache": False}
    with torch.no_grad():
        model(**given)
    for hook in hooks:
        hook.remove()
    return outputs


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, as a share of the size of the outputs where they are larger than 1."""
    return float((one - other).abs().max() / one.abs().max().clamp_min(1.0))


def grown_modules(base: nn.Module, grown: nn.Module) -> set[str]:
    """The names of the modules in which a parameter has become larger, and of what holds them."""
    before = {name: parameter.shape for name, parameter in base.named_parameters()}
    larger = {name for name, parameter in grown.named_parameters() if parameter.shape != before[name]}
    return {".".join(name.split(".")[:i]) for name in larger for i in range(1, name.count(".") + 1)}


def alone(base: nn.Module, grown: nn.Module, names: set[str]) -> Iterator[float]:
    """Each module that holds grown ones and takes one tensor, called alone on a random one."""
    holders = [name for name in names if any(other.rpartition(".")[0] == name for other in names)]
    for name in holders:
        one, other = base.get_submodule(name), grown.get_submodule(name)
        sizes = {m.in_features for m in one.modules() if isinstance(m, nn.Linear)}
        for size in sizes:
            given = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(2))
            try:
                with torch.no_grad():
                    mine, its = one(given), other(given)
            except (TypeError, RuntimeError, AttributeError, ValueError, IndexError):
                continue
            if isinstance(mine, torch.Tensor) and mine.shape == its.shape:
                yield apart(mine, its)


def assert_grows(case: dict[str, Any], base: Path, tower: str) -> None:
    """Verified, loaded without a word, and the same function module by module."""
    folder = base.parent / "grown"
    ckptgrow.expand(base, folder, factor=2, tower=tower)
    verification = ckptgrow.verify(base, folder)
    verdicts = [answer.verdict for answer in verification.answers]
    assert verdicts == ["yes", "yes", "not run" if "xielu" in str(verification) else "yes"], verification
    one, other = load(case, base), load(case, folder)
    names = grown_modules(one, other)
    assert names
    compared = 0
    if not case.get("alone") and tower == FAMILIES[case["model_type"]].towers[0]:
        mine, its = seen(one, inputs(one)), seen(other, inputs(one))
        for module, outputs in mine.items():
            for left, right in zip(outputs, its[module], strict=True):
                if left.shape == right.shape and left.numel():
                    assert apart(left, right) <= EPSILON, module
                    compared += module in names
    else:
        differences = list(alone(one, other, names))
        compared = len(differences)
        assert max(differences, default=0.0) <= EPSILON
    assert compared


def assert_keys(base: Path, tower: str) -> None:
    """Width, depth, hidden size and activation stand in config.json under the table's keys, with the class's values."""
    opened = open_checkpoint(base)
    default = transformers.CONFIG_MAPPING[opened.config["model_type"]]().to_dict()
    for group in locate(opened.config, opened.infos, tower).groups:
        site = group.site
        assert group.says is not None or value_at(default, site.under(site.width)) is None
        assert not site.hidden or isinstance(value_at(opened.config, site.under(site.hidden)), int), site.hidden
        said = value_at(default, site.under(site.activation))
        assert not isinstance(said, str) or ACTIVATIONS.get(said) is ACTIVATIONS.get(site.default_activation)


def test_every_family_has_a_case() -> None:
    """A family added to the table without a case here would go untested; transformers has no nemotron-nas."""
    assert {case["model_type"] for case in CASES.values()} == set(FAMILIES) - {"nemotron-nas"}


@pytest.mark.parametrize(("name", "tower"), TOWERS)
def test_a_family_grows(name: str, tower: str, tmp_path: Path) -> None:
    """As transformers saves it."""
    base = build(CASES[name], tmp_path / "base")
    assert_keys(base, tower)
    assert_grows(CASES[name], base, tower)


# Those whose tensors transformers 5 calls otherwise in memory than on disk, or holds fused.
RENAMED = (
    "afmoe aria_text beit deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 deit dinov2 dinov2:swiglu"
    " dinov2_with_registers dinov3_vit dots1 ernie4_5_moe esm flex_olmo fuyu gemma3 glm4_moe glm4_moe_lite"
    " gpt_neox granitemoe granitemoehybrid granitemoeshared gte hunyuan_v1_moe internvl jamba kimi_linear"
    " lfm2_moe llava llava_next mimo_v2_flash minimax minimax_m2 mistral3 mixtral mllama nemotron_h"
    " nomic_bert olmoe paligemma phimoe qwen2_5_vl qwen2_moe qwen2_vl qwen3_5_moe qwen3_5_moe_text"
    " qwen3_moe qwen3_next solar_open swin t5gemma2 vit"
)


@pytest.mark.parametrize("name", RENAMED.split())
def test_a_family_grows_under_its_names_in_memory(name: str, tmp_path: Path) -> None:
    """As transformers saves it when told not to go back to the Hub's names: experts in stacks, and others."""
    base = build(CASES[name], tmp_path / "base", save_original_format=False)
    assert_grows(CASES[name], base, "main")


def test_a_stack_with_more_rows_than_columns_is_refused(tmp_path: Path) -> None:
    """In memory longcat_flash's experts that answer nothing have rows and no columns: one number cannot be both's."""
    base = build(CASES["longcat_flash"], tmp_path / "base", save_original_format=False)
    assert "mlp.experts.down_proj: shape [4, 32, 20] is not that of a down" in str(ckptgrow.inspect(base).reason)


# Towers whose MLPs are no module of their own here: parts of a layer, stacks of experts, other names on disk. And those
# of which the probe leaves something out: gemma3n's cutoff, bitnet's epsilon, xIELU's scalars, adapters.
APART = {
    *("albert", "apertus", "bart", "beit", "bert", "biogpt", "bitnet", "blenderbot", "camembert", "dbrx", "deberta"),
    *("deberta-v2", "deepseek_v4", "deit", "dinov3_vit", "electra", "esm", "flex_olmo", "fuyu", "gemma3/vision"),
    *("gemma4/vision",),
    *("gemma3n_text", "gpt_oss", "granitemoe", "granitemoeshared", "gte", "internvl/vision", "jetmoe", "kimi_linear"),
    *("layoutlmv3", "llava/vision", "llava_next/vision", "m2m_100", "marian", "mbart", "minimax", "minimax_m2"),
    *("mistral3/vision", "mixtral", "mllama/vision", "mpnet", "nomic_bert", "olmoe", "opt", "paligemma/vision"),
    *("pegasus", "phi4_multimodal/audio", "phimoe", "qwen3_vl_moe", "roberta", "rwkv", "swin", "vit", "whisper"),
    *("xglm", "xlm-roberta", "xlnet", "zamba2"),
}


@pytest.mark.parametrize(("name", "tower"), TOWERS)
def test_an_mlp_computes_what_its_declaration_says(name: str, tower: str, tmp_path: Path) -> None:
    """Which half is the gate, which activation, which axis: by its declaration an MLP answers as its module does."""
    base = build(CASES[name], tmp_path / "base")
    model, opened = load(CASES[name], base), open_checkpoint(base)
    found = locate(opened.config, opened.infos, tower)
    weights = {n: t for file in base.glob("*.safetensors") for n, t in load_file(file).items()}
    compared = 0
    for mlp in (mlp for mlp in found.mlps if mlp.down and not mlp.site.open and mlp.experts == 1):
        modules = dict(model.named_modules())
        module = modules.get(mlp.block) or modules.get(in_memory_name(found.family, mlp.block))
        activation = ACTIVATIONS.get(activation_name(opened.config, mlp))
        if module is None or activation is None or module_is_apart(name, tower):
            continue
        given = torch.randn(1, 5, mlp.hidden, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            answer = module(given)
        answer = answer[0] if isinstance(answer, tuple) else answer
        bias = weights.get(f"{mlp.down.removesuffix('.weight')}.bias", 0.0)
        own = forward(opened, mlp, activation, given[0], uncounted) + bias
        assert apart(answer[0], own) <= EPSILON, mlp.block
        compared += 1
    assert (compared == 0) == module_is_apart(name, tower)


def test_a_gate_declared_as_up_is_seen(tmp_path: Path) -> None:
    """The same with the halves of phi3's fused projection the other way round."""
    base = build(CASES["phi3"], tmp_path / "base")
    model, opened = load(CASES["phi3"], base), open_checkpoint(base)
    wrong = Family("phi3", (Site(linear(up_gate="gate_up_proj", down="down_proj")),))
    mlp = locate(opened.config, opened.infos, family=wrong).mlps[0]
    given = torch.randn(1, 5, mlp.hidden, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        answer = model.get_submodule(mlp.block)(given)
    assert apart(answer[0], forward(opened, mlp, ACTIVATIONS["silu"], given[0], uncounted)) > EPSILON


def module_is_apart(name: str, tower: str) -> bool:
    return (name if tower == "main" else f"{name}/{tower}") in APART


def test_stacks_the_other_way_round(tmp_path: Path) -> None:
    """The Hub's Qwen3-VL-MoE has [E, H, 2F] and [E, F, H], the transpose of what transformers writes."""
    base = build(CASES["qwen3_vl_moe"], tmp_path / "base")
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        turned = {n: t.transpose(1, 2).contiguous() for n, t in tensors.items() if ".mlp.experts." in n}
        assert turned
        save_file(tensors | turned, file, {"format": "pt"})
    assert_grows(CASES["qwen3_vl_moe"], base, "main")
