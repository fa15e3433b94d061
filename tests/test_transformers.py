"""Grown checkpoints in real transformers: every family of the table, built from its own config class.

What is held here is the promise from outside: a stock loader opens the grown folder without a word, and the model it
makes is the same function. The table itself (config keys, activation, norm after the MLP) is held against the model
code as well, by what that code does.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="holds ckptgrow against real transformers, which is not installed")

import jsonschema
import torch
import transformers
from torch import nn

import ckptgrow
from ckptgrow.checkpoint import MANIFEST, open_checkpoint
from ckptgrow.families import FAMILIES, Family, Site, in_memory_name, locate, scoped
from ckptgrow.probe import ACTIVATIONS, activation_name, forward, probed
from ckptgrow.results import Expansion

pytestmark = pytest.mark.transformers

HIDDEN, WIDTH, LAYERS, VOCABULARY = 32, 44, 2, 64
EPSILON = 2e-5  # float32 sums in another order; logits here are of size 1

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA = COMMON | {"query_pre_attn_scalar": 8, "sliding_window": 8}


@dataclass(frozen=True)
class Case:
    """One tiny model: its config's arguments, and how many shards it should be saved in."""

    model_type: str
    options: dict[str, Any]
    single: bool = False

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def site(self) -> Site:
        return self.family.sites[0]


def plain(model_type: str, **more: Any) -> Case:
    """A case with the common arguments."""
    return Case(model_type, COMMON | more)


CASES: dict[str, Case] = {
    "cohere": plain("cohere", use_qk_norm=True, logit_scale=1.0),
    "cohere2": plain("cohere2", sliding_window=8, logit_scale=1.0),
    "gemma": plain("gemma"),
    "gemma2": Case("gemma2", GEMMA),
    "gemma3_text": Case("gemma3_text", GEMMA),
    "gemma3": Case(
        "gemma3",
        {
            "text_config": GEMMA,
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 60,
            "boi_token_index": 61,
            "eoi_token_index": 62,
        },
    ),
    "gpt_neo": Case(
        "gpt_neo",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": WIDTH,
            "num_layers": LAYERS,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "granite": plain("granite", mlp_bias=True, residual_multiplier=0.5, logits_scaling=2.0, embedding_multiplier=3.0),
    "llama": plain("llama"),
    "llama-bias": plain("llama", mlp_bias=True, tie_word_embeddings=True),
    "mistral": Case("mistral", COMMON, single=True),
    "olmo2": plain("olmo2"),
    "phi": plain("phi", num_key_value_heads=4),
    "phi3": plain("phi3"),
    "qwen2": plain("qwen2", tie_word_embeddings=True),
    "qwen3": plain("qwen3"),
    "smollm3": plain("smollm3", mlp_bias=True),
}
GROWTHS = {"twice": {"factor": 2}, "thrice": {"factor": 3}, "between": {"width": 57}}


# ---------------------------------------------------------------- making, loading, running


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and bars of loading are of no use here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)
    transformers.logging.enable_progress_bar()


@pytest.fixture(autouse=True)
def silence(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """transformers warns in its log, not by `warnings`: nothing may stand there after a test, nor on stderr."""
    transformers.logging.enable_propagation()
    yield
    transformers.logging.disable_propagation()
    said = [record.getMessage() for record in caplog.get_records("call") if record.levelname in ("WARNING", "ERROR")]
    assert said == []
    assert capfd.readouterr().err == ""


@pytest.fixture(autouse=True)
def manifests_fit_their_schema(tmp_path: Path) -> Iterator[None]:
    """Every manifest that a test leaves behind is one by the schema in the package."""
    yield
    schema = json.loads(resources.files(ckptgrow).joinpath("manifest.schema.json").read_text("utf-8"))
    for manifest in tmp_path.rglob(MANIFEST):
        jsonschema.Draft202012Validator(schema).validate(json.loads(manifest.read_text("utf-8")))


def build(case: Case, **changes: Any) -> nn.Module:
    """The tiny model in float32, every weight random: norms near 1, biases not 0."""
    config = transformers.AutoConfig.for_model(case.model_type, **copy.deepcopy(case.options | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    return randomised(model)


def randomised(model: nn.Module) -> nn.Module:
    """The model with every weight random: norms near 1, biases not 0."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.2 * noise if parameter.dim() == 1 else 0.15 * noise)
    return model


def save(model: nn.Module, folder: Path, single: bool = False) -> Path:
    """In several shards, or in one file."""
    model.save_pretrained(folder, max_shard_size="1GB" if single else "24KB")
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The saved base of a case, made once."""
    root, made = tmp_path_factory.mktemp("bases"), {}

    def base(name: str) -> Path:
        if name not in made:
            made[name] = save(build(CASES[name]), root / name, CASES[name].single)
        return made[name]

    return base


def load(folder: Path) -> nn.Module:
    """What from_pretrained makes of a folder, in float32, after a look at what it complained about."""
    model, said = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert {key: found for key, found in said.items() if found} == {}
    return model.eval()


def tokens() -> torch.Tensor:
    """Two rows of ordinary tokens (the last ones of the vocabulary are gemma3's image tokens)."""
    return torch.randint(3, VOCABULARY - 4, (2, 24), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> torch.Tensor:
    """The model on those tokens."""
    with torch.no_grad():
        return model(tokens()).logits


def names(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor on disk with its dtype and shape."""
    return {name: (info.dtype, info.shape) for name, info in open_checkpoint(folder).infos.items()}


def settings(folder: Path) -> dict[str, Any]:
    """config.json."""
    return json.loads((folder / "config.json").read_text())


def mlps(model: nn.Module, family: Family) -> list[nn.Module]:
    """The modules that the family's stem names, layer by layer."""
    stem = family.sites[0].stem
    last = stem.replace("{layer}", str(LAYERS - 1)).rpartition(".")[0]
    stack = next(m for n, m in model.named_modules() if n.endswith(last.rpartition(".")[0]) and "vision" not in n)
    return [layer.get_submodule(stem.rpartition(".")[2]) for layer in stack]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference; outputs that are all zero would agree too easily."""
    assert one.abs().max() > 0.05
    return float((one - other).abs().max())


def assert_same_function(base: Path, grown: Path, family: Family) -> None:
    """Equal logits, and equal outputs of every MLP: a norm after it would hide a wrong scale of down."""
    one, other = load(base), load(grown)
    assert apart(logits(one), logits(other)) <= EPSILON
    inputs = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for mine, its in zip(mlps(one, family), mlps(other, family), strict=True):
            assert apart(mine(inputs), its(inputs)) <= EPSILON


# ---------------------------------------------------------------- grown models are the same function


@pytest.mark.parametrize("growth", GROWTHS.values(), ids=GROWTHS.keys())
@pytest.mark.parametrize("name", CASES)
def test_grown_loads_and_is_the_same_function(
    name: str, growth: dict[str, int], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """Stock transformers opens it without a word, and finds the base's logits and MLP outputs."""
    base, grown, case = bases(name), tmp_path / "grown", CASES[name]
    ckptgrow.expand(base, grown, **growth)
    verification = ckptgrow.verify(base, grown)
    assert [answer.verdict for answer in verification.answers] == ["yes", "yes", "yes"], verification
    assert verification.exit_code == 0
    assert_same_function(base, grown, case.family)


@pytest.mark.parametrize("policy", ["g-freeze", "g-train", "down", "up"])
@pytest.mark.parametrize("shares", ["even", "random"])
@pytest.mark.parametrize("name", ["gemma3_text", "phi3", "llama-bias"])
def test_every_policy_is_the_same_function(
    name: str, policy: str, shares: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """Whatever will train and however the columns are shared out."""
    grown = tmp_path / "grown"
    ckptgrow.expand(bases(name), grown, width=2 * WIDTH + 9, policy=policy, shares=shares, seed=3)
    assert ckptgrow.verify(bases(name), grown).exit_code == 0
    assert_same_function(bases(name), grown, CASES[name].family)


@pytest.mark.parametrize("name", CASES)
def test_disk_has_the_tensors_of_the_base(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """The same names and files; only axes of units are longer; config.json says the width and nothing else."""
    base, grown, case = bases(name), tmp_path / "grown", CASES[name]
    ckptgrow.expand(base, grown)
    before, after = names(base), names(grown)
    files = sorted(path.name for path in base.glob("*.safetensors*"))
    assert sorted(path.name for path in grown.glob("*.safetensors*")) == files
    assert len(files) == 1 if case.single else len(files) > 3
    assert list(before) == list(after)
    found = locate(settings(base), open_checkpoint(base).infos)
    widened = {tensor: slot.axis for mlp in found.mlps for tensor, slot in mlp.tensors.items()}
    for tensor, (dtype, shape) in before.items():
        doubled = tuple(n * 2 if axis == widened.get(tensor) else n for axis, n in enumerate(shape))
        assert after[tensor] == (dtype, doubled)
    expected, got = settings(base), settings(grown)
    (expected[case.site.scope] if case.site.scope else expected)[case.site.width] = 2 * WIDTH
    assert got.pop("ckptgrow")["base_width"] == {found.groups[0].path: WIDTH}
    assert got == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen3", "gpt_neo"])
def test_half_precision_is_the_same_function(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The stored halves add up exactly, so loaded in float32 the models agree as closely."""
    base = save(build(CASES[name]).to(dtype), tmp_path / "base")
    ckptgrow.expand(base, tmp_path / "grown", factor=3)
    assert ckptgrow.verify(base, tmp_path / "grown").exit_code == 0
    assert_same_function(base, tmp_path / "grown", CASES[name].family)


def test_width_that_the_config_leaves_open(tmp_path: Path) -> None:
    """GPT-Neo's intermediate_size None means 4 x hidden_size; the grown config says the number."""
    base = save(build(CASES["gpt_neo"], intermediate_size=None), tmp_path / "base")
    ckptgrow.expand(base, tmp_path / "grown")
    assert settings(tmp_path / "grown")["intermediate_size"] == 8 * HIDDEN
    assert ckptgrow.verify(base, tmp_path / "grown").exit_code == 0
    assert_same_function(base, tmp_path / "grown", FAMILIES["gpt_neo"])


def test_gemma3_still_sees(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """The vision tower, whose MLPs have the same width key and width, is left alone: an image gives equal logits."""
    base, grown = bases("gemma3"), tmp_path / "grown"
    ckptgrow.expand(base, grown)
    assert settings(grown)["vision_config"] == settings(base)["vision_config"]
    seen = torch.cat([tokens()[:1, :4], torch.tensor([[61, 60, 60, 60, 60, 62]]), tokens()[:1, 4:9]], 1)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(4))
    kinds = (seen == 60).long()
    with torch.no_grad():
        one, other, blind = (
            load(folder)(input_ids=seen, pixel_values=image, token_type_ids=kinds).logits
            for folder, image in ((base, pixels), (grown, pixels), (base, -pixels))
        )
    assert apart(one, other) <= EPSILON
    assert apart(one, blind) > 100 * EPSILON


def test_a_forgotten_share_is_seen(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """The comparison of MLP outputs has teeth where logits have none: down copied, not halved."""
    from safetensors.torch import load_file, save_file

    base, grown = bases("gemma3_text"), tmp_path / "grown"
    ckptgrow.expand(base, grown, verify=False)
    for file in grown.glob("*.safetensors"):
        tensors = load_file(file)
        downs = {name: 2 * tensor for name, tensor in tensors.items() if "down_proj" in name}
        save_file(tensors | downs, file, {"format": "pt"})
    assert ckptgrow.verify(base, grown).exit_code == 1
    with pytest.raises(AssertionError):
        assert_same_function(base, grown, FAMILIES["gemma3_text"])


# ---------------------------------------------------------------- saved by a trainer, grown again


def trained(model: nn.Module) -> nn.Module:
    """The model with other weights, as a trainer would leave it."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", CASES)
def test_saved_again_is_still_the_base(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Load and save_pretrained elsewhere: the config's key stays, the names stay, and verify still says yes."""
    ckptgrow.expand(bases(name), tmp_path / "grown")
    save(load(tmp_path / "grown"), tmp_path / "saved", CASES[name].single)
    assert settings(tmp_path / "saved")["ckptgrow"] == settings(tmp_path / "grown")["ckptgrow"]
    assert names(tmp_path / "saved").keys() == names(bases(name)).keys()
    verification = ckptgrow.verify(bases(name), tmp_path / "saved")
    assert verification.exit_code == 0, verification


@pytest.mark.parametrize("name", ["gemma3", "llama", "phi"])
def test_trained_and_saved_grows_again(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """A trainer's save has no ckptgrow.json: the digest in its config.json is the history that is left."""
    first = ckptgrow.expand(bases(name), tmp_path / "grown")
    saved = save(trained(load(tmp_path / "grown")), tmp_path / "saved")
    assert not (saved / MANIFEST).exists()
    assert ckptgrow.inspect(saved).grown_before == 1
    second = ckptgrow.expand(saved, tmp_path / "again", width=3 * WIDTH)
    assert second.manifest.history == ({"manifest": first.manifest.digest},)
    assert second.manifest.blocks[0].old_width == 2 * WIDTH
    assert settings(tmp_path / "again")["ckptgrow"]["manifest"] == second.manifest.digest
    assert ckptgrow.verify(saved, tmp_path / "again").exit_code == 0
    assert ckptgrow.verify(bases(name), tmp_path / "again").exit_code == 1  # it was trained
    assert_same_function(saved, tmp_path / "again", CASES[name].family)


@pytest.mark.parametrize("name", ["gemma3", "llama-bias", "gpt_neo"])
def test_grown_twice_is_still_the_base(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """A grown folder grown again: its manifest is the history, and the second is still the first one's base."""
    first = ckptgrow.expand(bases(name), tmp_path / "one")
    second = ckptgrow.expand(tmp_path / "one", tmp_path / "two", width=3 * WIDTH, policy="g-train")
    expected = json.loads(first.manifest.text())
    del expected["history"]
    assert json.loads((tmp_path / "two" / MANIFEST).read_text())["history"] == [expected]
    assert second.manifest.base.id == "one"
    assert ckptgrow.verify(bases(name), tmp_path / "two").exit_code == 0
    assert_same_function(bases(name), tmp_path / "two", CASES[name].family)


# ---------------------------------------------------------------- the manifest names what transformers holds


def expanded(name: str, bases: Callable[[str], Path], out: Path, policy: str = "g-freeze") -> Expansion:
    """The base of that case, grown."""
    return ckptgrow.expand(bases(name), out, policy=policy)


@pytest.mark.parametrize("policy", ["g-freeze", "g-train", "down", "up"])
@pytest.mark.parametrize("name", CASES)
def test_trainable_tensors_are_parameters(name: str, policy: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Each is a parameter of the loaded model, under the name and with the shape that the manifest says."""
    manifest = expanded(name, bases, tmp_path / "grown", policy).manifest
    parameters = {key: tuple(value.shape) for key, value in load(tmp_path / "grown").named_parameters()}
    assert len(manifest.trainable) >= LAYERS
    for tensor in manifest.trainable:
        assert parameters[manifest.in_memory_names.get(tensor.name, tensor.name)] == tensor.shape
    renamed = {tensor.name for tensor in manifest.trainable} if name == "gemma3" else set()
    assert set(manifest.in_memory_names) == renamed


def test_gemma3_spelled_as_in_memory(tmp_path: Path) -> None:
    """Saved under transformers' own names, no trainable tensor has another name in memory."""
    base = tmp_path / "base"
    build(CASES["gemma3"]).save_pretrained(base, max_shard_size="24KB", save_original_format=False)
    manifest = ckptgrow.expand(base, tmp_path / "grown").manifest
    parameters = {key: tuple(value.shape) for key, value in load(tmp_path / "grown").named_parameters()}
    assert manifest.in_memory_names == {}
    assert all(parameters[tensor.name] == tensor.shape for tensor in manifest.trainable)
    assert_same_function(base, tmp_path / "grown", FAMILIES["gemma3"])


def test_gemma3_spelled_as_on_the_hub(tmp_path: Path) -> None:
    """Files on the Hub say vision_tower.vision_model where transformers 5 writes vision_tower."""
    from safetensors.torch import load_file, save_file

    base = save(build(CASES["gemma3"]), tmp_path / "base", single=True)
    tensors = load_file(base / "model.safetensors")
    hub = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors.items()}
    assert hub.keys() != tensors.keys()
    save_file(hub, base / "model.safetensors", {"format": "pt"})
    manifest = ckptgrow.expand(base, tmp_path / "grown").manifest
    parameters = {key: tuple(value.shape) for key, value in load(tmp_path / "grown").named_parameters()}
    assert names(tmp_path / "grown").keys() == hub.keys()
    assert all(parameters[manifest.in_memory_names[tensor.name]] == tensor.shape for tensor in manifest.trainable)
    assert_same_function(base, tmp_path / "grown", FAMILIES["gemma3"])


def test_silence_would_be_broken(
    bases: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The checks of `load` and `silence` have teeth: a stray tensor is a complaint, and it is in the log."""
    from safetensors.torch import load_file, save_file

    base = save(build(CASES["mistral"]), tmp_path / "base", single=True)
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"stray.weight": torch.zeros(2)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(AssertionError, match="unexpected_keys"):
        load(base)
    assert "stray.weight" in caplog.text
    caplog.clear()


@pytest.mark.parametrize("name", CASES)
def test_ties_are_those_of_the_model(name: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Where lm_head is the embedding, it is not on disk and the manifest says so; else it is on disk."""
    manifest, model = expanded(name, bases, tmp_path / "grown").manifest, load(tmp_path / "grown")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == bool(model.config.tie_word_embeddings)
    assert ("lm_head.weight" in names(tmp_path / "grown")) is not tied
    if tied:
        (embedding,) = manifest.ties.values()
        assert list(manifest.ties) == ["lm_head.weight"]
        assert embedding in names(tmp_path / "grown")
        held = dict(model.named_parameters())[in_memory_name(CASES[name].family, embedding)]
        assert held is model.get_input_embeddings().weight
    else:
        assert manifest.ties == {}


def test_cases_are_both_tied_and_not(bases: Callable[[str], Path]) -> None:
    """Both kinds of head are among the cases."""
    heads = {name: "lm_head.weight" in names(bases(name)) for name in CASES}
    assert heads["llama"]
    assert not heads["llama-bias"]
    assert {True, False} == set(heads.values())


def test_a_save_without_head_has_no_tie(tmp_path: Path) -> None:
    """LlamaModel saved alone has no lm_head and ties nothing: config.json says so."""
    base = save(build(CASES["llama"]).model, tmp_path / "base")
    assert settings(base)["tie_word_embeddings"] is False
    assert ckptgrow.inspect(base).ties == {}


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "gemma3"])
def test_a_save_without_head_grows(name: str, tmp_path: Path) -> None:
    """A base model saved alone has no outer prefix; it grows, and the base model loads it."""
    model = build(CASES[name])
    base = save(model.base_model, tmp_path / "base")
    ckptgrow.expand(base, tmp_path / "grown")
    assert ckptgrow.verify(base, tmp_path / "grown").exit_code == 0
    with torch.no_grad():
        one, other = (
            transformers.AutoModel.from_pretrained(folder).eval()(tokens()).last_hidden_state
            for folder in (base, tmp_path / "grown")
        )
    assert apart(one, other) <= EPSILON


# ---------------------------------------------------------------- the table against the model code


@pytest.mark.parametrize("name", CASES)
def test_keys_of_the_table_are_the_configs(name: str, bases: Callable[[str], Path]) -> None:
    """Width, depth and hidden size stand under the family's keys, and the embedding has the family's name."""
    family, site, config = CASES[name].family, CASES[name].site, settings(bases(name))
    scope = scoped(config, site.scope, family)
    assert (scope[site.width], scope[site.depth], scope[site.hidden]) == (WIDTH, LAYERS, HIDDEN)
    model = load(bases(name))
    embedding = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    assert embedding.endswith("." + family.embedding)


@pytest.mark.parametrize("name", CASES)
def test_activation_is_the_models(name: str, bases: Callable[[str], Path]) -> None:
    """The key that the table reads is the one that the model code reads: another value there is another function."""
    base, family = open_checkpoint(bases(name)), CASES[name].family
    architecture = locate(base.config, base.infos)
    said = activation_name(base.config, architecture.mlps[0])
    assert said in ACTIVATIONS
    key = CASES[name].site.activation
    config = transformers.AutoConfig.from_pretrained(bases(name))
    scope = config.get_text_config()
    other = "relu" if said != "relu" else "silu"
    setattr(scope, key, other)
    module = mlps(transformers.AutoModelForCausalLM.from_config(config), family)[0]
    acts = [child for child in module.children() if not isinstance(child, nn.Linear | nn.Dropout)]
    assert [type(act) for act in acts] == [type(transformers.activations.ACT2FN[other])]


@pytest.mark.parametrize("name", CASES)
def test_defaults_have_a_known_activation(name: str) -> None:
    """The activation that the config class writes by default is the table's, and one the probe can run."""
    family, site = CASES[name].family, CASES[name].site
    scope = scoped(transformers.AutoConfig.for_model(family.model_type).to_dict(), site.scope, family)
    assert scope[site.activation] == site.default_activation
    assert site.default_activation in ACTIVATIONS


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_transformers_own(name: str) -> None:
    """Each activation of the probe computes what transformers computes under that name."""
    inputs = torch.linspace(-6, 6, 401)
    theirs = transformers.activations.ACT2FN[{"gated-gelu": "gelu_new", "gated-silu": "silu"}.get(name, name)]
    assert torch.allclose(ACTIVATIONS[name](inputs), theirs(inputs), atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_probe_runs_the_models_mlp(name: str, bases: Callable[[str], Path]) -> None:
    """The probe's forward of an MLP is transformers' own, but for the bias of down."""
    base = open_checkpoint(bases(name))
    architecture = locate(base.config, base.infos)
    act = ACTIVATIONS[activation_name(base.config, architecture.mlps[0])]
    inputs = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(5))
    modules = mlps(load(bases(name)), architecture.family)
    for mlp, module in zip(architecture.mlps, modules, strict=True):
        bias = module.get_submodule(mlp.down.split(".")[-2]).bias
        with torch.no_grad():
            expected = module(inputs) - (0 if bias is None else bias)
        assert apart(expected, forward(base, mlp, act, inputs, lambda nbytes: None)) <= EPSILON


@pytest.mark.parametrize("name", CASES)
def test_norm_after_is_what_the_model_does(name: str, bases: Callable[[str], Path]) -> None:
    """Doubling every down changes the logits exactly where no norm follows the MLP."""
    model, family = load(bases(name)), CASES[name].family
    before = logits(model)
    with torch.no_grad():
        for module in mlps(model, family):
            down = module.get_submodule(family.sites[0].template.still[0].removesuffix(".bias"))
            for parameter in down.parameters():
                parameter.mul_(2)
    moved = apart(before, logits(model))
    assert moved < 1e-3 if family.norm_after else moved > 1e-2


def test_an_activation_that_the_config_omits(tmp_path: Path) -> None:
    """Gemma 3's Hub configs leave hidden_activation out: the probe still has to run."""
    base = save(build(CASES["gemma3"]), tmp_path / "base")
    config = settings(base)
    del config["text_config"]["hidden_activation"]
    (base / "config.json").write_text(json.dumps(config, indent=2))
    ckptgrow.expand(base, tmp_path / "grown")
    answer = ckptgrow.verify(base, tmp_path / "grown").answers[2]
    assert answer.verdict == "yes", answer


def test_the_probe_alone_sees_a_forgotten_share(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """The third answer is no where down was copied, not halved, also in a family with a norm after the MLP."""
    from safetensors.torch import load_file, save_file

    ckptgrow.expand(bases("olmo2"), tmp_path / "grown", verify=False)
    for file in (tmp_path / "grown").glob("*.safetensors"):
        tensors = load_file(file)
        downs = {name: 2 * tensor for name, tensor in tensors.items() if "1.mlp.down_proj" in name}
        save_file(tensors | downs, file, {"format": "pt"})
    one, other = open_checkpoint(bases("olmo2")), open_checkpoint(tmp_path / "grown")
    answer = probed(one, other, locate(one.config, one.infos), lambda nbytes: None)
    assert answer.verdict == "no"
    assert [finding.tensor for finding in answer.findings] == ["model.layers.1.mlp"]
