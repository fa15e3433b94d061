"""--uneven native for Llama's layers: told as nemotron-nas, whose config says a width a layer, there and back."""

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
from test_refusals import refused, run
from test_revert import train

import ckptgrow
from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.errors import FamilyError
from ckptgrow.families import FAMILIES, Family, Site, linear, locate, recast
from ckptgrow.families.declared import to_json
from ckptgrow.families.found import _VALUES, _WIDTHS
from ckptgrow.manifest import load_manifest
from ckptgrow.plan import Edit
from ckptgrow.proof import prove, prove_marks
from ckptgrow.surgery import Growth, architecture_for, expand

SCHEMA = json.loads(files("ckptgrow").joinpath("manifest.schema.json").read_text())
HIDDEN, WIDTH, LAYERS, HEADS, KEYS = 16, 256, 4, 4, 2
MLP = "model.layers.{}.mlp.{}_proj.weight"
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "max_position_embeddings": 64,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KEYS,
    "rms_norm_eps": 1e-05,
    "vocab_size": 24,
}


def llama(folder: Path, *, layers: int = LAYERS, width: int = WIDTH, **changes: Any) -> Path:
    """A whole tiny Llama in bfloat16, its head apart."""
    random = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).bfloat16()

    tensors = {f"{name}.weight": made(24, HIDDEN) for name in ("model.embed_tokens", "lm_head")}
    tensors["model.norm.weight"] = made(HIDDEN)
    narrow = HIDDEN // HEADS * KEYS
    for layer in (f"model.layers.{i}." for i in range(layers)):
        tensors |= {f"{layer}{norm}_layernorm.weight": made(HIDDEN) for norm in ("input", "post_attention")}
        tensors |= {f"{layer}self_attn.{role}_proj.weight": made(HIDDEN, HIDDEN) for role in "qo"}
        tensors |= {f"{layer}self_attn.{role}_proj.weight": made(narrow, HIDDEN) for role in "kv"}
        tensors |= {f"{layer}mlp.{role}_proj.weight": made(width, HIDDEN) for role in ("gate", "up")}
        tensors[f"{layer}mlp.down_proj.weight"] = made(HIDDEN, width)
    folder.mkdir()
    checkpoints.write_shards(folder, tensors, 2)
    config = LLAMA | {"num_hidden_layers": layers, "intermediate_size": width} | changes
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").write_text("# The base\n")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return llama(tmp_path / "base")


@pytest.fixture
def grown(base: Path, tmp_path: Path) -> Path:
    ckptgrow.expand(base, tmp_path / "grown", layers="1,3", uneven="native")
    return tmp_path / "grown"


def config_of(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return read


def said(folder: Path) -> list[int | None]:
    """The widths that the config says, by the formula of DeciLM's loaders, read here anew."""
    factors = [block["ffn"]["ffn_mult"] for block in config_of(folder)["block_configs"]]
    least = [None if factor is None else int(2 * factor * HIDDEN / 3) for factor in factors]
    return [None if n is None else n if n % 256 == 0 else n + 256 - n % 256 for n in least]


def widths(folder: Path, layers: int = LAYERS) -> list[int]:
    return [open_checkpoint(folder).infos[MLP.format(layer, "down")].shape[1] for layer in range(layers)]


# ---------------------------------------------------------------- what is written


def test_layers_have_widths_of_their_own(base: Path, grown: Path) -> None:
    """Only the named layers grow, nothing is filled, and the config says each width as DeciLM's loaders read it."""
    before, after = checkpoints.load(base), checkpoints.load(grown)
    for name, tensor in before.items():
        assert "layers.1.mlp" in name or "layers.3.mlp" in name or torch.equal(after[name], tensor), name
    assert widths(grown) == said(grown) == [WIDTH, 2 * WIDTH, WIDTH, 2 * WIDTH]
    config = config_of(grown)
    assert (config["architectures"], config["model_type"]) == (["DeciLMForCausalLM"], "nemotron-nas")
    assert config["block_configs"][1] == {
        "attention": {
            "n_heads_in_group": 2,
            "no_op": False,
            "num_sink_tokens": None,
            "replace_with_linear": False,
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
            "window_length": None,
        },
        "ffn": {"ffn_mult": 36.0, "no_op": False, "replace_with_linear": False, "sparsify": None},
    }
    changed = {
        key: config[key] for key in config.keys() - {"block_configs", "ckptgrow"} if config[key] != LLAMA.get(key)
    }
    assert changed == {
        "architectures": ["DeciLMForCausalLM"],
        "attention_bias": False,
        "head_dim": 4,
        "intermediate_size": None,
        "mlp_bias": False,
        "model_type": "nemotron-nas",
        "num_key_value_heads": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    assert config["rope_scaling"] is None
    assert [*config][: len(LLAMA)] == [*LLAMA]


def test_it_is_proved_told_and_remembered(base: Path, grown: Path) -> None:
    """verify from both folders; inspect, audit by the grown one and by its base; manifest, card and schema."""
    assert [answer.verdict for answer in ckptgrow.verify(base, grown).answers] == ["yes"] * 3
    assert [block.width for block in ckptgrow.inspect(grown).blocks] == widths(grown)
    assert ckptgrow.audit(grown, grown).exit_code == ckptgrow.audit(base, grown).exit_code == 0
    manifest = json.loads((grown / "ckptgrow.json").read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)
    assert manifest["family"] == "llama"
    assert manifest["recast"]["model_type"] == "nemotron-nas"
    assert [block["layer"] for block in manifest["blocks"]] == [1, 3]
    assert load_manifest(grown).counts.filled == 0
    card = (grown / "README.md").read_text()
    assert "with the MLPs of layers 1, 3 widened from 256 to 512 units" in card
    assert "configuration_decilm.DeciLMConfig" in card
    assert "trust_remote_code" in card


def test_the_plan_says_what_becomes_of_the_config(base: Path, tmp_path: Path) -> None:
    """On the command line, before anything is written."""
    code, text, _ = run("expand", base, tmp_path / "out", "--layers", "1", "--uneven", "native", "--plan")
    assert code == 0
    assert "model_type nemotron-nas in place of llama" in text
    assert not (tmp_path / "out").exists()


def test_the_config_is_proved(base: Path) -> None:
    """A key that is not as nemotron-nas needs it, a wrong width, a key too many: PlanError before writing."""
    opened, growth = open_checkpoint(base), Growth(layers=(1, 3), uneven="native")
    found = architecture_for(growth, opened.config, opened.infos)
    plan = expand(opened.infos, found, growth)
    assert prove(plan, opened.infos, found) == LAYERS * WIDTH
    prove_marks(plan, found, (1, 3))
    for wrong in (
        [edit for edit in plan.config if edit.path != "model_type"],
        [replace(edit, value=None) if edit.path == "rope_theta" else edit for edit in plan.config],
        [*plan.config, Edit("vocab_size", 3)],
        [edit if edit.path != "block_configs" else found.recast[-1] for edit in plan.config],
    ):
        with pytest.raises(ckptgrow.PlanError, match=r"config\.json would"):
            prove(replace(plan, config=tuple(wrong)), opened.infos, found)


def _block(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["block_configs"][2]["attention"].update(changes)


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (_block(n_heads_in_group=4), "block_configs says other things"),
        (_block(no_op=True), "block_configs says other things"),
        (lambda c: c["block_configs"][0]["ffn"].update(ffn_mult=36.0), "block_configs says [512, 512,"),
        (lambda c: c["block_configs"].pop(), "block_configs says other things"),
        (lambda c: c.update(rope_theta=5e5), "rope_theta is 500000.0"),
        (lambda c: c.update(rms_norm_eps=1e-06), "rms_norm_eps is 1e-06"),
        (lambda c: c.update(model_type="llama"), "architectures is ['DeciLMForCausalLM']"),
    ],
)
def test_verify_reads_the_new_config(
    base: Path, grown: Path, break_it: Callable[[dict[str, Any]], Any], told: str
) -> None:
    """What the grown config says beside the widths must be what the base's config says in the other words."""
    config = config_of(grown)
    break_it(config)
    (grown / "config.json").write_text(json.dumps(config))
    result = ckptgrow.verify(base, grown)
    findings = [finding.problem for answer in result.answers for finding in answer.findings]
    assert result.exit_code == 1
    assert any(told in problem for problem in findings), findings


# ---------------------------------------------------------------- back, and on


def test_revert_gives_the_base_back(base: Path, grown: Path, tmp_path: Path) -> None:
    """Every file, the config that said llama among them."""
    assert ckptgrow.revert(grown, tmp_path / "back").exit_code == 0
    assert checkpoints.snapshot(tmp_path / "back") == checkpoints.snapshot(base)


def trained(grown: Path) -> Path:
    """As a trainer leaves it that lets train what the manifest names: one file, the config, and nothing else."""
    return train(grown, name=f"{grown.name}-trained")


def test_trained_audited_reverted_shared(base: Path, grown: Path, tmp_path: Path) -> None:
    """Training moves the boxes only; the base comes back; a skill makes the trained one again."""
    after = trained(grown)
    result = ckptgrow.audit(grown, after)
    assert (result.exit_code, result.total("frozen")) == (0, load_manifest(grown).counts.frozen)
    assert ckptgrow.audit(base, after, manifest=grown).exit_code == 0
    assert ckptgrow.revert(after, tmp_path / "back", manifest=grown).exit_code == 0
    assert checkpoints.snapshot(tmp_path / "back") == checkpoints.snapshot(base)
    ckptgrow.extract(after, tmp_path / "skill", manifest=grown)
    ckptgrow.apply(base, tmp_path / "skill", tmp_path / "applied")
    mine, its = checkpoints.load(after), checkpoints.load(tmp_path / "applied")
    assert mine.keys() == its.keys()
    assert all(torch.equal(its[name], tensor) for name, tensor in mine.items())
    assert config_of(tmp_path / "applied") == config_of(grown)


def test_skills_merge(base: Path, grown: Path, tmp_path: Path) -> None:
    """Grown on other layers of one Llama: each width is what its layer needs, and the merge can be made again."""
    ckptgrow.expand(base, tmp_path / "other", layers="0", uneven="native", factor=3)
    skills = []
    for folder in (grown, tmp_path / "other"):
        skills.append(tmp_path / f"{folder.name}-skill")
        ckptgrow.extract(trained(folder), skills[-1], manifest=folder)
    done = ckptgrow.merge(base, skills, tmp_path / "merged")
    assert [answer.verdict for answer in done.answers] == ["yes"] * 3
    assert widths(tmp_path / "merged") == said(tmp_path / "merged") == [768, 512, 256, 512]
    manifest = json.loads((tmp_path / "merged/ckptgrow.json").read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)
    assert ckptgrow.revert(tmp_path / "merged", tmp_path / "back").exit_code == 0
    assert checkpoints.snapshot(tmp_path / "back") == checkpoints.snapshot(base)


def test_native_and_filled_skills_do_not_merge(base: Path, grown: Path, tmp_path: Path) -> None:
    """One config cannot be told in two families' words: refused before writing, with the way out."""
    ckptgrow.expand(base, tmp_path / "filled", layers="0")
    for folder in (grown, tmp_path / "filled"):
        ckptgrow.extract(trained(folder), tmp_path / f"{folder.name}-skill", manifest=folder)
    skills = [tmp_path / "filled-skill", tmp_path / "grown-skill"]
    code, _, message = run("merge", base, *skills, tmp_path / "out")
    assert code == 2
    assert "filled-skill: its layers have one width" in message
    assert not (tmp_path / "out").exists()


def test_it_grows_again(base: Path, grown: Path, tmp_path: Path) -> None:
    """As a nemotron-nas of its own: natively, and all layers at once; its whole history can be undone."""
    two, three = tmp_path / "two", tmp_path / "three"
    ckptgrow.expand(grown, two, layers="0,1", uneven="native", factor=3)
    assert widths(two) == said(two) == [3 * WIDTH, 6 * WIDTH, WIDTH, 2 * WIDTH]
    assert load_manifest(two).recast is None
    assert "trust_remote_code" in (two / "README.md").read_text()
    ckptgrow.expand(two, three)
    assert widths(three) == said(three) == [6 * WIDTH, 12 * WIDTH, 2 * WIDTH, 4 * WIDTH]
    for one, other in ((grown, two), (two, three), (base, three)):
        assert ckptgrow.verify(one, other).exit_code == 0
    assert ckptgrow.revert(three, tmp_path / "back", every=True).undone == 3
    assert checkpoints.snapshot(tmp_path / "back") == checkpoints.snapshot(base)


# ---------------------------------------------------------------- what cannot be told


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config.pop(key)


def _with(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config.update(changes)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_with(attention_bias=True), "its attention has biases"),
        (_with(head_dim=8), "its heads must have hidden_size / num_attention_heads = 4 places"),
        (_with(num_attention_heads=3), "its heads must have"),
        (_with(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (_with(sliding_window=32), "sliding window"),
        (_with(model_type="mistral"), "sliding window"),
        (_with(auto_map={"AutoConfig": "mine.Mine"}), "code of its own"),
        (_with(rope_scaling={"type": "yarn", "factor": 4.0}), "of the kind 'yarn'"),
        (_with(rope_parameters={"rope_type": "dynamic", "factor": 4.0}), "of the kind 'dynamic'"),
        (_with(rope_scaling={"rope_type": "llama3", "factor": 4.0}), "low_freq_factor, high_freq_factor"),
        (_with(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), "a part of each head"),
        (_without("rms_norm_eps"), "does not say rms_norm_eps"),
        (_without("max_position_embeddings"), "does not say max_position_embeddings"),
        (_with(model_type="qwen3"), "the config of 'qwen3' has one width"),
    ],
)
def test_what_decilm_computes_otherwise_is_refused(
    base: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], told: str
) -> None:
    """With the reason, exit status 2, and nothing written."""
    config = config_of(base)
    change(config)
    (base / "config.json").write_text(json.dumps(config))
    assert told in refused(base, tmp_path / "out", "--layers", "1", "--uneven", "native")


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("model.layers.2.self_attn.q_norm.weight", (4,), "it has no such tensor"),
        ("model.layers.2.self_attn.q_proj.bias", (HIDDEN,), "it has no such tensor"),
        ("model.layers.1.self_attn.rotary_emb.inv_freq", (2,), "it has no such tensor"),
        ("model.layers.3.self_attn.o_proj.weight", (HIDDEN, 8), "is no projection of Llama's attention"),
        ("model.layers.3.self_attn.q_proj.weight", (8, HIDDEN), "where [16, 16] belongs"),
        ("model.layers.0.input_layernorm.weight", None, "it is missing"),
    ],
)
def test_a_tensor_that_decilm_has_not_is_refused(
    base: Path, tmp_path: Path, name: str, shape: tuple[int, ...] | None, told: str
) -> None:
    """By its name: one too many, one too few, one of another shape."""

    def change(tensors: checkpoints.Tensors) -> None:
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.zeros(shape).bfloat16()

    checkpoints.edit(base, change)
    message = refused(base, tmp_path / "out", "--layers", "1", "--uneven", "native")
    assert told in message
    assert name in message


def test_biases_all_or_none(base: Path, tmp_path: Path) -> None:
    """DeciLM's MLPs have three biases or none; the config says which."""

    def add(*roles: str) -> None:
        sizes = {"gate": WIDTH, "up": WIDTH, "down": HIDDEN}
        names = {MLP.format(i, role).replace("weight", "bias"): sizes[role] for role in roles for i in range(LAYERS)}
        checkpoints.edit(base, lambda t: t.update({n: torch.ones(size).bfloat16() for n, size in names.items()}))

    add("up")
    message = refused(base, tmp_path / "out", "--layers", "1", "--uneven", "native")
    assert "model.layers.0.mlp.gate_proj.bias: it cannot be told as DeciLMForCausalLM" in message
    assert "it is missing, but its MLPs have biases" in message
    add("gate", "down")
    ckptgrow.expand(base, tmp_path / "out", layers="1", uneven="native")
    assert config_of(tmp_path / "out")["mlp_bias"] is True
    assert ckptgrow.verify(base, tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("linear", [{"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}])
def test_both_spellings_of_a_scaled_rope(tmp_path: Path, linear: dict[str, Any]) -> None:
    """Written in the keys that DeciLM's loaders read."""
    ckptgrow.expand(
        llama(tmp_path / "b", rope_scaling=linear, rope_theta=5e4), tmp_path / "o", layers="1", uneven="native"
    )
    config = config_of(tmp_path / "o")
    assert (config["rope_theta"], config["rope_scaling"]) == (5e4, {"rope_type": "linear", "factor": 2.0})


def test_widths_that_a_factor_cannot_say(base: Path, tmp_path: Path) -> None:
    """Multiples of 256 only, of the base and of the result; which one is next is said."""
    narrow = llama(tmp_path / "narrow", width=96)
    assert "multiples of 256, and this one is 96" in refused(
        narrow, tmp_path / "out", "--layers", "1", "--uneven", "native"
    )
    message = refused(base, tmp_path / "out", "--layers", "1", "--uneven", "native", "--width", 600)
    assert "model.layers.1.mlp: block_configs cannot say that its width is 600, only 512" in message
    ckptgrow.expand(base, tmp_path / "out", layers="1", uneven="native", width=600, multiple_of=256)
    assert widths(tmp_path / "out") == said(tmp_path / "out") == [256, 768, 256, 256]


@pytest.mark.parametrize("hidden", [576, 2048, 3072, 4096, 5120, 8192])
def test_a_factor_says_every_width(hidden: int) -> None:
    """Six decimals are enough: each multiple of 256 up to eight times the hidden size comes back, by the formula."""
    for width in range(256, 8 * hidden + 1, 256):
        factor = _VALUES["deci"](width, hidden, None)
        least = int(2 * factor * hidden / 3)
        assert least + (256 - least % 256) % 256 == _WIDTHS["deci"](factor, hidden) == width
        assert factor == round(factor, 6)


# ---------------------------------------------------------------- checkpoints that are nemotron-nas already


def test_layers_without_an_mlp(grown: Path, tmp_path: Path) -> None:
    """As NVIDIA's have: such a layer says no factor and stays without; of the others only those that grow change."""
    config = config_of(grown)
    config["block_configs"][2]["ffn"] |= {"no_op": True, "ffn_mult": None}
    config["block_configs"][0]["ffn"]["ffn_mult"] = 19.3  # also 256 units
    (grown / "config.json").write_text(json.dumps(config))
    checkpoints.edit(grown, lambda t: [t.pop(MLP.format(2, role)) for role in ("gate", "up", "down")])
    (grown / "ckptgrow.json").unlink()
    ckptgrow.expand(grown, tmp_path / "out", layers="1", uneven="native")
    assert said(tmp_path / "out") == [256, 1024, None, 512]
    assert config_of(tmp_path / "out")["block_configs"][0]["ffn"]["ffn_mult"] == 19.3
    assert ckptgrow.verify(grown, tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c["block_configs"].pop(), "block_configs has 3 entries for 4 layers"),
        (lambda c: c.pop("block_configs"), "block_configs must be a list"),
        (lambda c: c.update(block_configs=[3] * 4), "block_configs must be a list"),
        (lambda c: c["block_configs"][2]["ffn"].update(ffn_mult=36.0), "width 256, but block_configs[2] says 512"),
        (lambda c: c["block_configs"][2].update(ffn={"intermediate_size": 256}), "does not say ffn.ffn_mult"),
    ],
)
def test_a_config_that_contradicts_the_tensors(grown: Path, change: Callable[[dict[str, Any]], Any], told: str) -> None:
    """Refused, since no loader could read it either."""
    config = config_of(grown)
    change(config)
    (grown / "config.json").write_text(json.dumps(config))
    assert told in str(ckptgrow.inspect(grown).reason)


def test_a_declaration_may_say_the_width_itself(grown: Path, tmp_path: Path) -> None:
    """Newer tools of NVIDIA's write ffn.intermediate_size instead of the factor: one declaration of a few lines."""
    site = Site(linear(gate="gate_proj", up="up_proj", down="down_proj"), width="block_configs")
    declared = Family("nemotron-nas", (replace(site, entry="ffn.intermediate_size", listed=True),))
    config = config_of(grown)
    for block, width in zip(config["block_configs"], widths(grown), strict=True):
        block["ffn"] = {"intermediate_size": width, "no_op": False}
    (grown / "config.json").write_text(json.dumps(config))
    (grown / "ckptgrow.json").unlink()
    (tmp_path / "it.json").write_text(json.dumps(to_json(declared)))
    options = ("--family", tmp_path / "it.json")
    assert "does not say ffn.ffn_mult" in refused(grown, tmp_path / "out", "--layers", "0", "--uneven", "native")
    code, _, told = run(
        "expand", grown, tmp_path / "out", "--layers", "0", "--uneven", "native", "--width", 300, *options
    )
    assert code == 0, told
    entries = config_of(tmp_path / "out")["block_configs"]
    assert [entry["ffn"]["intermediate_size"] for entry in entries] == widths(tmp_path / "out") == [300, 512, 256, 512]
    assert run("verify", grown, tmp_path / "out", *options)[0] == 0
    assert run("fold", tmp_path / "out", tmp_path / "folded", *options)[0] == 0
    assert widths(tmp_path / "folded") == widths(grown)


def test_a_factor_without_an_mlp(grown: Path) -> None:
    """A layer that has lost its MLP."""
    checkpoints.edit(grown, lambda t: [t.pop(MLP.format(2, role)) for role in ("gate", "up", "down")])
    assert "block_configs[2] says a width, but the layer has no MLP" in str(ckptgrow.inspect(grown).reason)


def test_only_some_families_are_told_otherwise(base: Path) -> None:
    """recast leaves an architecture alone whose family names no relative, or whose config has a list."""
    opened = open_checkpoint(base)
    found = locate(opened.config | {"model_type": "qwen2"}, opened.infos)
    assert recast(found, opened.config, opened.infos) is found
    assert {name for name, family in FAMILIES.items() if family.recast} == {"llama", "mistral"}
    with pytest.raises(FamilyError, match="cannot be told as DeciLMForCausalLM"):
        recast(locate(opened.config, opened.infos), opened.config | {"hidden_act": "relu"}, opened.infos)
