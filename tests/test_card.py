"""The model card of a grown checkpoint: its front matter, its licence, and its training code run as it stands."""

from __future__ import annotations

import gc
import json
import math
import re
import warnings
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import checkpoints
import jsonschema
import pytest
import torch
import yaml

import ckptgrow
from ckptgrow.card import SNIPPET, card, licence
from ckptgrow.checkpoint import CARD, MANIFEST
from ckptgrow.policy import POLICIES

REVISION = "0123456789abcdef0123456789abcdef01234567"


def front(text: str) -> dict[str, Any]:
    """The front matter of a card, read as YAML."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match
    return yaml.safe_load(match[1])


def grown_card(base: Path, out: Path, **options: Any) -> str:
    """The card that expand writes."""
    ckptgrow.expand(base, out, **options)
    return (out / CARD).read_text(encoding="utf-8")


def snapshot(tmp_path: Path) -> Path:
    """A tiny checkpoint that lies as in the Hub's cache, so that its id and revision are known."""
    return checkpoints.make(tmp_path / "hub" / "models--some--model-1.5_b" / "snapshots" / REVISION)


# ---------------------------------------------------------------- front matter


@pytest.mark.parametrize("policy", POLICIES)
def test_front_matter_is_yaml(base: Path, tmp_path: Path, policy: str) -> None:
    """It parses, and names the library and the policy."""
    matter = front(grown_card(base, tmp_path / "out", policy=policy))
    assert matter == {"library_name": "transformers", "tags": ["ckptgrow", "grown", policy]}


def test_a_folder_is_no_base_model(base: Path, tmp_path: Path) -> None:
    """The Hub would look for a model of a local folder's name."""
    assert "base_model" not in grown_card(base, tmp_path / "out")


def test_a_hub_id_is_the_base_model(tmp_path: Path) -> None:
    """A checkpoint from the Hub is named with its revision, and the relation is a finetune of it."""
    text = grown_card(snapshot(tmp_path), tmp_path / "out")
    assert front(text)["base_model"] == "some/model-1.5_b"
    assert front(text)["base_model_relation"] == "finetune"
    assert f"`some/model-1.5_b` (revision `{REVISION}`)" in text


def test_the_hub_library_reads_it(tmp_path: Path) -> None:
    """huggingface_hub's own reader of cards finds the same."""
    from huggingface_hub import ModelCard

    data = ModelCard(grown_card(snapshot(tmp_path), tmp_path / "out")).data
    assert data.base_model == "some/model-1.5_b"
    assert data.library_name == "transformers"
    assert data.tags == ["ckptgrow", "grown", "g-freeze"]


@pytest.mark.parametrize(
    "lines",
    [
        "license: apache-2.0",
        "license: other\nlicense_name: gemma-terms\nlicense_link: https://ai.google.dev/gemma/terms",
        "license: 'mit'  # as upstream",
        "license: [mit, apache-2.0]",
        "license:\n- mit\n- apache-2.0",
        "license: other\nlicense_name: >-\n  a long\n  name\nlicense_link: LICENSE",
        "license: other\nlicense_name: 'a: b'",
    ],
    ids=["plain", "gemma", "quoted", "flow", "list", "folded", "colon"],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_licence_is_carried_over(base: Path, tmp_path: Path, lines: str, newline: str) -> None:
    """Whatever the base's card says of its licence means the same in the grown one's, and nothing else of it does."""
    readme = f"---\nlanguage: en\n{lines}\ntags:\n- theirs\n---\n\n# Base\n\nlicense: not-this-one\n"
    (base / CARD).write_bytes(readme.replace("\n", newline).encode())
    matter = front(grown_card(base, tmp_path / "out"))
    expected = {key: value for key, value in yaml.safe_load(lines).items() if key.startswith("license")}
    assert {key: value for key, value in matter.items() if key.startswith("license")} == expected
    assert matter["tags"] == ["ckptgrow", "grown", "g-freeze"]
    assert "language" not in matter


@pytest.mark.parametrize(
    "readme",
    [b"", b"# No front matter\nlicense: mit\n", b"---\nlicense:\n---\n", b"---\nlicense: mit", b"---\n\xff\xfe\n---\n"],
    ids=["empty", "none", "no value", "never closed", "not utf-8"],
)
def test_no_licence_is_no_error(base: Path, tmp_path: Path, readme: bytes) -> None:
    """A base without a readable licence gives a card without one."""
    (base / CARD).write_bytes(readme)
    assert "license" not in front(grown_card(base, tmp_path / "out"))


def test_no_card_is_no_error(tmp_path: Path) -> None:
    """A base without a card has no licence lines."""
    assert licence(tmp_path / CARD) == ()


def test_a_byte_order_mark_hides_no_licence(base: Path, tmp_path: Path) -> None:
    """Some editors on Windows put one before the front matter."""
    (base / CARD).write_text("---\nlicense: mit\n---\n", encoding="utf-8-sig")
    assert front(grown_card(base, tmp_path / "out"))["license"] == "mit"


# ---------------------------------------------------------------- the text


def test_card_says_what_was_done(base: Path, tmp_path: Path) -> None:
    """Widths, parameters, policy and shares, from the manifest and nothing else."""
    done = ckptgrow.expand(base, tmp_path / "out", factor=3, policy="g-train")
    text, counts = (tmp_path / "out" / CARD).read_text(encoding="utf-8"), done.manifest.counts
    assert text == card(done.manifest, ())
    for said in (
        "its 2 layers widened from 12 to 36 units",
        f"{counts.base:,} before, {counts.base + 2 * 2 * 3 * 8 * 12:,} now",
        f"{counts.trainable:,} parameters train",
        f"`g-train`: {POLICIES['g-train'].about}",
        "shares: random",
    ):
        assert said in text
    assert SNIPPET.strip() in text


@pytest.mark.parametrize(("model_type", "told"), [("mixtral", True), ("llama", False)])
def test_the_card_of_a_mixture_says_what_its_code_cannot(tmp_path: Path, model_type: str, told: bool) -> None:
    """transformers 5 has no parameters of those names."""
    checkpoints.make(tmp_path / "base", model_type)
    ckptgrow.expand(tmp_path / "base", tmp_path / "grown")
    assert ('how="mask"' in (tmp_path / "grown" / "README.md").read_text()) == told


def test_the_bases_card_is_not_copied(base: Path, tmp_path: Path) -> None:
    """What the base's card claims of itself is not claimed of the grown one."""
    (base / CARD).write_text("---\nlicense: mit\n---\n# Base\nIt scores 99 points.\n")
    assert "99 points" not in grown_card(base, tmp_path / "out")


# ---------------------------------------------------------------- the training code, run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(folder: Path, model_type: str, dtype: torch.dtype) -> Path:
    """A real tiny model with random weights, some of them zero, of either sign, in several shards."""
    transformers = pytest.importorskip("transformers", reason="trains a model in real transformers")
    inner = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    nested = {"text_config": inner, "vision_config": vision, "mm_tokens_per_image": 4, "image_token_index": 63}
    options = nested if model_type == "gemma3" else inner | ({"mlp_bias": True} if model_type == "llama" else {})
    config = transformers.AutoConfig.for_model(model_type, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(dtype)
            parameter.copy_(0.15 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
            if parameter.dim() > 1:
                chance = torch.rand(parameter.shape, generator=generator)
                parameter[chance < 0.05] = -0.0
                parameter[chance > 0.95] = 0.0
    model.save_pretrained(folder, max_shard_size="24KB")
    return folder


def prepared(folder: Path) -> dict[str, Any]:
    """What the card's code leaves behind, run literally with `folder` set."""
    names: dict[str, Any] = {"folder": str(folder)}
    exec(compile(SNIPPET, "the card", "exec"), names)
    return names


def trained(names: dict[str, Any], steps: int) -> None:
    """A few ordinary steps on random tokens."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        tokens = torch.randint(3, 60, (2, 24), generator=generator)
        names["model"](input_ids=tokens, labels=tokens).loss.backward()
        names["optimizer"].step()
        names["optimizer"].zero_grad()


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer as the integers that it is stored in."""
    kinds = {4: torch.int32, 2: torch.int16, 8: torch.int64, 1: torch.int8}
    return {
        name: tensor.detach().clone().contiguous().view(kinds[tensor.element_size()])
        for name, tensor in model.state_dict(keep_vars=True).items()
    }


def mask(shape: torch.Size, boxes: list[list[list[int]]]) -> torch.Tensor:
    """True where an element trains."""
    trains = torch.zeros(shape, dtype=torch.bool)
    for box in boxes:
        trains[tuple(slice(start, stop) for start, stop in box)] = True
    return trains


@pytest.mark.transformers
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma3"])
def test_only_the_boxes_train(tmp_path: Path, model_type: str, policy: str, dtype: torch.dtype) -> None:
    """After some steps every box has moved, and everything outside the boxes has the bits it had."""
    ckptgrow.expand(tiny(tmp_path / "base", model_type, dtype), tmp_path / "grown", width=99, policy=policy)
    names = prepared(tmp_path / "grown")
    manifest = json.loads((tmp_path / "grown" / MANIFEST).read_text())
    before = bits(names["model"])
    trained(names, 4)
    after, moved = bits(names["model"]), 0
    assert before.keys() == after.keys()
    assert names["boxes"].keys() <= before.keys()
    assert len(names["boxes"]) == len(manifest["trainable"])
    for name, was in before.items():
        trains, differs = mask(was.shape, names["boxes"].get(name, [])), was != after[name]
        assert not differs[~trains].any(), name
        for box in names["boxes"].get(name, []):
            inside = differs[tuple(slice(start, stop) for start, stop in box)]
            if dtype == torch.float32:  # a step of 1e-4 is lost in most bfloat16 weights
                assert inside.float().mean() > 0.9, (name, box)
        moved += int(trains.sum())
        assert bool(differs.any()) == (name in names["boxes"]), name
    assert moved == manifest["counts"]["trainable"]


@pytest.mark.transformers
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("policy", POLICIES)
def test_the_frozen_part_is_still_the_bases_on_disk(tmp_path: Path, policy: str) -> None:
    """Saved by transformers after training, what no box names has the bytes of the grown checkpoint."""
    grown, saved = tmp_path / "grown", tmp_path / "saved"
    ckptgrow.expand(tiny(tmp_path / "base", "llama", torch.float32), grown, policy=policy)
    names = prepared(grown)
    trained(names, 3)
    names["model"].save_pretrained(saved, max_shard_size="24KB")
    manifest = json.loads((grown / MANIFEST).read_text())
    boxes = {tensor["name"]: tensor["boxes"] for tensor in manifest["trainable"]}
    before, after = checkpoints.load(grown), checkpoints.load(saved)
    assert before.keys() == after.keys()
    for name, was in before.items():
        trains = mask(was.shape, boxes.get(name, []))
        assert torch.equal(was.view(torch.int32)[~trains], after[name].view(torch.int32)[~trains]), name
        assert torch.equal(was, after[name]) == (name not in boxes), name
    assert ckptgrow.verify(grown, saved).exit_code == 1


@pytest.mark.transformers
@pytest.mark.usefixtures("one_thread")
def test_the_loss_goes_down(tmp_path: Path) -> None:
    """The boxes are enough to learn something: the loss on one fixed text falls."""
    ckptgrow.expand(tiny(tmp_path / "base", "llama", torch.float32), tmp_path / "grown")
    names = prepared(tmp_path / "grown")
    tokens = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(30):
        loss = names["model"](input_ids=tokens, labels=tokens).loss
        loss.backward()
        names["optimizer"].step()
        names["optimizer"].zero_grad()
        losses.append(loss.item())
    assert math.isfinite(losses[-1])
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.transformers
def test_a_save_without_head_is_not_trained_in_silence(tmp_path: Path) -> None:
    """A base model saved alone lacks the outer prefix: the code must not go on with boxes that fit no parameter."""
    transformers = pytest.importorskip("transformers", reason="trains a model in real transformers")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tiny(tmp_path / "whole", "llama", torch.float32))
    whole.model.save_pretrained(tmp_path / "base")
    ckptgrow.expand(tmp_path / "base", tmp_path / "grown")
    with pytest.raises((ValueError, KeyError, AssertionError)):
        prepared(tmp_path / "grown")


@pytest.mark.transformers
def test_the_code_leaves_no_file_open(tmp_path: Path) -> None:
    """Python warns of a file that nobody closed."""
    ckptgrow.expand(tiny(tmp_path / "base", "llama", torch.float32), tmp_path / "grown")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(SNIPPET, "the card", "exec"), {"folder": str(tmp_path / "grown")})
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


# ---------------------------------------------------------------- the manifest beside it


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model_type", ["gemma3", "phi", "phi3"])
def test_manifest_fits_its_schema(tmp_path: Path, model_type: str, policy: str) -> None:
    """ckptgrow.json is what the schema in the package says, grown once and grown twice."""
    schema = json.loads(resources.files(ckptgrow).joinpath("manifest.schema.json").read_text("utf-8"))
    ckptgrow.expand(checkpoints.make(tmp_path / "base", model_type), tmp_path / "one", width=31, policy=policy)
    ckptgrow.expand(tmp_path / "one", tmp_path / "two", factor=3, policy=policy)
    for folder in ("one", "two"):
        jsonschema.Draft202012Validator(schema).validate(json.loads((tmp_path / folder / MANIFEST).read_text("utf-8")))
