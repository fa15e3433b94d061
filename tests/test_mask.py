"""ckptgrow mask: each format says the boxes, or says what it loses; held against trainers' own rules."""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import pytest
import stacks
import torch
from click.testing import CliRunner
from hub_server import HubServer, Repository
from hypothesis import given
from hypothesis import strategies as st
from strategies import LAW, LAYOUTS
from torch import nn

import ckptgrow
from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.cli import main
from ckptgrow.cli.masking import FORMATS
from ckptgrow.dialects import DIALECTS
from ckptgrow.dialects.axolotl import PLUGIN
from ckptgrow.dialects.llamafactory import LAUNCHER
from ckptgrow.dialects.patterns import patterns, products
from ckptgrow.dialects.subject import quoted
from ckptgrow.errors import FormatError, OutputError, RequestError
from ckptgrow.families import FAMILIES
from ckptgrow.hub import PROBE_BYTES
from ckptgrow.manifest import Manifest, load_manifest
from ckptgrow.policy import POLICIES

Ones = dict[str, torch.Tensor]
Grow = Callable[..., Path]
Freeze = Callable[[nn.Module, list[str]], None]


@pytest.fixture
def grow(tmp_path: Path) -> Grow:
    """A grown tiny checkpoint; options of `expand` and of tests/checkpoints.py."""

    def make(model_type: str = "llama", policy: str = "g-freeze", width: int | None = None, **made: Any) -> Path:
        made = {"prefix": "language_model.model."} | made if model_type == "gemma3" else made
        base = checkpoints.make(tmp_path / "base", model_type, **made)
        return Path(ckptgrow.expand(base, tmp_path / "grown", width=width, policy=policy).folder)

    return make


def ones(manifest: Manifest, folder: Path) -> Ones:
    """The mask of every tensor on disk, from the boxes, with torch."""
    masks = {name: torch.zeros(tensor.shape) for name, tensor in checkpoints.load(folder).items()}
    for tensor in manifest.trainable:
        for box in tensor.boxes:
            masks[tensor.name][tuple(slice(a, b) for a, b in box)] = 1
    return masks


# ---------------------------------------------------------------- all formats


def test_the_command_line_offers_what_there_is() -> None:
    """Its choices, the library's dialects, and the refusal of anything else name the same formats."""
    assert {*FORMATS} == {*DIALECTS, "safetensors"}


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_every_layout_speaks_every_dialect(model_type: str, grow: Grow) -> None:
    """No layout is left without words, and each text has its comment or note."""
    grown = grow(model_type, bias=FAMILIES[model_type].sites[0].template.gated)
    if model_type in ("dbrx", "gpt_oss", "jetmoe"):  # nothing but stacks: no Linear that a LoRA could adapt
        with pytest.raises(ckptgrow.RequestError, match="what trains here is none"):
            ckptgrow.mask(grown, "peft")
    for wording in DIALECTS:
        if wording == "peft" and model_type in ("dbrx", "gpt_oss", "jetmoe"):
            continue
        text = ckptgrow.mask(grown, wording).text
        assert text is not None
        assert text.endswith("\n")
        assert '"notes"' in text if wording == "json" else text.startswith("# ")


@pytest.mark.parametrize("wording", DIALECTS)
def test_text_goes_to_stdout_or_into_a_new_file(wording: str, grow: Grow, tmp_path: Path) -> None:
    """The same text either way; what exists is never written over."""
    grown, out = grow(), tmp_path / "deep" / "mask.txt"
    shown = CliRunner().invoke(main, ["mask", str(grown), "--format", wording])
    assert shown.exit_code == 0
    assert shown.stdout == ckptgrow.mask(grown, wording).text
    written = CliRunner().invoke(main, ["mask", str(grown), "--format", wording, "--out", str(out)])
    assert (written.exit_code, written.stdout.splitlines()[-1]) == (0, f"wrote {out}")
    assert out.read_text() == shown.stdout
    again = CliRunner().invoke(main, ["mask", str(grown), "--format", wording, "--out", str(out)])
    assert again.exit_code == 2
    assert "it exists" in again.stderr
    assert [path.name for path in out.parent.iterdir()] == ["mask.txt"]


def test_json_on_request_and_quiet(grow: Grow, tmp_path: Path) -> None:
    """--json wraps any format; -q is silent where a file is written and never holds back what was asked for."""
    grown = grow()
    told = json.loads(CliRunner().invoke(main, ["mask", str(grown), "--format", "names", "--json"]).stdout)
    counts = load_manifest(grown).counts
    assert told["text"] == ckptgrow.mask(grown, "names").text
    assert (told["trainable"], told["frozen"], told["out"]) == (counts.trainable, counts.frozen, None)
    assert CliRunner().invoke(main, ["mask", str(grown), "--format", "names", "-q"]).stdout == told["text"]
    assert CliRunner().invoke(main, ["mask", str(grown), "--out", str(tmp_path / "out"), "-q"]).stdout == ""


def test_what_is_refused(grow: Grow, tmp_path: Path) -> None:
    """No manifest, another checkpoint's, an unknown format, a mask checkpoint without a place: exit 2, nothing left."""
    grown = grow()
    with pytest.raises(RequestError, match=r"no ckptgrow\.json"):
        ckptgrow.mask(tmp_path / "base")
    with pytest.raises(RequestError, match="unknown format 'yaml'"):
        ckptgrow.mask(grown, "yaml")
    with pytest.raises(RequestError, match="--out FOLDER"):
        ckptgrow.mask(grown, "safetensors")
    with pytest.raises(OutputError, match="it exists"):
        ckptgrow.mask(grown, "safetensors", out=grown)
    with pytest.raises(OutputError, match="inside the source"):
        ckptgrow.mask(grown, "safetensors", out=grown / "mask")
    text = (grown / "ckptgrow.json").read_text()
    (grown / "ckptgrow.json").write_text(text.replace("g-freeze", "g-train"))
    with pytest.raises(FormatError, match="digest"):
        ckptgrow.mask(grown)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "grown"]


# ---------------------------------------------------------------- json, names


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma3"])
def test_json_says_the_boxes(model_type: str, grow: Grow) -> None:
    """Boxes, shapes, names in memory and counts are the manifest's; tensors stand in the order of the layers."""
    grown = grow(model_type, layers=11)
    told, manifest = json.loads(ckptgrow.mask(grown).text or ""), load_manifest(grown)
    assert told["default"] == "frozen"
    assert told["elements"] == {"trainable": manifest.counts.trainable, "frozen": manifest.counts.frozen}
    assert told["training"]["weight_decay_on_these_tensors"] == 0
    assert told["tensors"].keys() == {tensor.name for tensor in manifest.trainable}
    for tensor in manifest.trainable:
        seen = told["tensors"][tensor.name]
        assert seen["boxes"] == json.loads(json.dumps(tensor.boxes))
        assert (tuple(seen["shape"]), seen["dtype"]) == (tensor.shape, tensor.dtype)
        assert seen.get("in_memory", tensor.name) == manifest.in_memory_names.get(tensor.name, tensor.name)
    assert [seen["layer"] for seen in told["tensors"].values()] == sorted(t.layer for t in manifest.trainable)
    assert any("weight decay" in note for note in told["notes"])


def test_names_say_what_they_lose(grow: Grow) -> None:
    """Names as in memory; the count of frozen elements that would train too is exact."""
    grown = grow("gemma3", width=31, hidden=8)
    lines = (ckptgrow.mask(grown, "names").text or "").splitlines()
    manifest = load_manifest(grown)
    listed = [line for line in lines if not line.startswith("#")]
    assert listed == sorted(manifest.in_memory_names.values())
    frozen = sum(torch.Size(tensor.shape).numel() - tensor.elements for tensor in manifest.trainable)
    assert f"their {frozen:,} frozen elements train too" in " ".join(line.removeprefix("# ") for line in lines)


def test_names_of_whole_tensors_lose_nothing(grow: Grow) -> None:
    """With g-train, gate and up train whole."""
    text = ckptgrow.mask(grow(policy="g-train"), "names").text or ""
    assert "Nothing is lost" in text
    assert "LOST" not in text


# ---------------------------------------------------------------- names in few patterns

parts = st.sampled_from(["a", "b", "0", "1", "2", "10"])
dotted = st.lists(parts, min_size=1, max_size=4).map(".".join)


@LAW
@given(st.sets(dotted, max_size=8), st.sets(dotted, max_size=8))
def test_patterns_match_exactly_the_names(names: set[str], others: set[str]) -> None:
    """All of the names, and none of the others, whatever they are; each name once."""
    others -= names
    regexes = [re.compile(regex) for regex in patterns(sorted(names), others)]
    for name in names:
        assert sum(bool(regex.fullmatch(name)) for regex in regexes) == 1
    assert not [other for other in others for regex in regexes if regex.fullmatch(other)]


def test_many_layers_are_one_pattern() -> None:
    """All layers read as any number; some of the layers are named one by one, in order."""
    names = [f"h.{i}.mlp.{p}.weight" for i in range(12) for p in ("gate", "up")]
    assert patterns(names, ["h.0.mlp.down.weight"]) == (r"h\.[0-9]+\.mlp\.(gate|up)\.weight",)
    assert patterns(names, ["h.12.mlp.up.weight"]) == (
        rf"h\.({'|'.join(map(str, range(12)))})\.mlp\.(gate|up)\.weight",
    )
    assert len(products(names)) == 1
    assert patterns(["a.+.b"], []) == (r"a\.\+\.b",)


@pytest.mark.parametrize(
    ("text", "expected"), [("out/grown-2", "out/grown-2"), ("it's", "'it''s'"), ("a: b", "'a: b'"), ("1e3", "'1e3'")]
)
def test_strings_of_yaml(text: str, expected: str) -> None:
    """Plain where it cannot be misread."""
    assert quoted(text) == expected


def yaml_of(text: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="reads YAML, and PyYAML is not installed")
    return dict(yaml.safe_load(text))


# ---------------------------------------------------------------- axolotl


def freeze_by_our_words(model: nn.Module, entries: list[str]) -> None:
    """Axolotl's unfrozen_parameters as its documentation and code have it, written down again."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = False
        spans = []
        for entry in entries:
            found = re.fullmatch(r"(.+)\[([0-9]*):([0-9]*)\]", entry)
            regex = re.sub(r"\.(?!\+)", r"\\.", found[1] if found else entry)
            if re.match(regex, name):
                parameter.requires_grad = True
                spans += [(int(found[2] or 0), int(found[3] or len(parameter)))] if found else []
        if spans:
            kept = torch.zeros_like(parameter)
            for start, stop in spans:
                assert 0 <= start < stop <= len(parameter), entries
                kept[start:stop] = 1
            parameter.register_hook(partial(torch.mul, kept))


def source_of(package: str, file: str) -> str:
    """A file of a trainer, read without importing the trainer; `pip install --no-deps` is enough for it."""
    found = importlib.util.find_spec(package)
    for place in (found.submodule_search_locations or []) if found else []:
        if Path(place, file).is_file():
            return Path(place, file).read_text()
    pytest.skip(f"runs {package}'s own {file}, and {package} is not installed (pip install --no-deps {package})")


def their_freeze() -> Freeze:
    """Axolotl's own function, from its own file; what that file imports of the rest only logs."""
    quiet: dict[str, Any] = {"is_main_process": bool, "get_logger": logging.getLogger}
    source = re.sub(r"^from axolotl\..*$", "", source_of("axolotl", "utils/freeze.py"), flags=re.MULTILINE)
    names = {"__name__": "freeze"} | quiet
    exec(compile(source, "freeze", "exec"), names)
    theirs: Freeze = names["freeze_layers_except"]
    return theirs


class Named(nn.Module):
    """A model of these parameters, whatever their names."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            owner: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, nn.Parameter(tensor.float()))


def unfrozen(grown: Path, entries: list[str], freeze: Freeze) -> Ones:
    """Where gradients arrive, by name on disk, after a trainer froze by these entries."""
    manifest = load_manifest(grown)
    names = {disk: manifest.in_memory_names.get(disk, disk) for disk in checkpoints.load(grown)}
    model = Named({names[disk]: tensor for disk, tensor in checkpoints.load(grown).items()})
    freeze(model, entries)
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums = [(parameter * torch.ones_like(parameter)).sum() for parameter in trains]
    sum(sums, torch.zeros((), requires_grad=True)).backward()
    held = dict(model.named_parameters())
    grads = {disk: held[memory].grad for disk, memory in names.items()}
    return {disk: torch.zeros_like(held[names[disk]]) if g is None else g for disk, g in grads.items()}


def entries_in(text: str) -> list[str]:
    """unfrozen_parameters of the text, commented out or not."""
    return re.findall(r"^(?:# )?  - '(\^.*)'$", text, re.MULTILINE)


AXOLOTL = [freeze_by_our_words, None]


@pytest.mark.parametrize("freeze", AXOLOTL, ids=["rules", "axolotl"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model_type", ["llama", "phi3", "phi", "gemma3", "gpt_neo"])
def test_axolotl_ranges_are_the_boxes(model_type: str, policy: str, freeze: Freeze | None, grow: Grow) -> None:
    """By Axolotl's rules, gradients arrive in the boxes of gate, up and biases, and nowhere else."""
    freeze = freeze or their_freeze()
    grown = grow(model_type, policy, width=31, layers=11, hidden=2, bias=model_type == "llama")
    text = ckptgrow.mask(grown, "axolotl").text or ""
    expected = ones(load_manifest(grown), grown)
    down = [name for name in expected if re.search(r"(down_proj|fc2|c_proj)\.weight", name)]
    complete = not any(expected[name].any() for name in down)
    for name in down:
        expected[name].zero_()
    entries = entries_in(text)
    assert len(entries) <= 2
    seen = unfrozen(grown, entries, freeze)
    assert all(torch.equal(seen[name], expected[name]) for name in expected)
    assert (PLUGIN in re.sub(r"^#.*$", "", text, flags=re.MULTILINE)) != complete


def test_axolotl_in_layers_that_disagree(grow: Grow) -> None:
    """Where only some layers train, they are named; a wrong range is seen by the comparison above."""
    grown = grow(width=24, layers=3)
    entries = entries_in(ckptgrow.mask(grown, "axolotl").text or "")
    assert entries == ["^model.layers.[0-9]+.mlp.(gate_proj|up_proj).weight$[12:24]"]
    expected = ones(load_manifest(grown), grown)
    seen = unfrozen(grown, ["^model.layers.[0-9]+.mlp.(gate_proj|up_proj).weight$[13:24]"], freeze_by_our_words)
    assert not torch.equal(seen["model.layers.0.mlp.up_proj.weight"], expected["model.layers.0.mlp.up_proj.weight"])
    assert not unfrozen(grown, ["mlp.gate_proj"], freeze_by_our_words)["model.layers.0.mlp.gate_proj.weight"].any()


def test_axolotl_yaml(grow: Grow) -> None:
    """g-freeze takes the plugin and no ranges; up takes ranges, no decay and no plugin."""
    grown = grow()
    told = yaml_of(ckptgrow.mask(grown, "axolotl").text or "")
    assert told == {"base_model": str(grown), "plugins": [PLUGIN], "ckptgrow_manifest": str(grown)}


def test_axolotl_yaml_of_rows(grow: Grow) -> None:
    """up trains rows only."""
    grown = grow(policy="up")
    told = yaml_of(ckptgrow.mask(grown, "axolotl").text or "")
    ranges = ["^model.layers.[0-9]+.mlp.up_proj.weight$[12:24]"]
    assert told == {"base_model": str(grown), "unfrozen_parameters": ranges, "weight_decay": 0.0}


# ---------------------------------------------------------------- llamafactory


def test_llamafactory_yaml(grow: Grow) -> None:
    """Whole modules of all layers, the launcher in a comment, and what would be lost without it, counted."""
    grown = grow(layers=3, bias=True)
    text = ckptgrow.mask(grown, "llamafactory").text or ""
    assert yaml_of(text) == {
        "model_name_or_path": str(grown),
        "stage": "sft",
        "finetuning_type": "freeze",
        "freeze_trainable_modules": "mlp",
        "freeze_trainable_layers": 3,
    }
    assert f"{LAUNCHER} train.yaml" in text
    manifest = load_manifest(grown)
    partly = sum(torch.Size(tensor.shape).numel() - tensor.elements for tensor in manifest.trainable)
    assert f"{partly:,} elements that are frozen in 15 tensors and 3 tensors that are frozen whole" in text


@pytest.mark.parametrize(("layers", "span"), [("2-4", 3), ("0-1", -2), ("1,3", 4), ("1-2", -3)])
def test_llamafactory_takes_the_fewest_layers(layers: str, span: int, tmp_path: Path) -> None:
    """From the end, or as a negative number from the start, whichever unfreezes less."""
    base = checkpoints.make(tmp_path / "base", "llama", layers=5)
    grown = ckptgrow.expand(base, tmp_path / "grown", layers=layers).folder
    assert yaml_of(ckptgrow.mask(grown, "llamafactory").text or "")["freeze_trainable_layers"] == span


def tuned_by_our_words(model: nn.Module, layers: int, modules: list[str]) -> None:
    """LLaMA-Factory's freeze tuning, written down again: the last or first layers, by a part of the name."""
    chosen = range(DEPTH)[-layers:] if layers > 0 else range(-layers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(f".{layer}.{module}" in name for layer in chosen for module in modules))


def their_tuning() -> Callable[[nn.Module, int, list[str]], None]:
    """LLaMA-Factory's own function, cut out of its file, which imports far more than it needs."""
    source = source_of("llamafactory", "model/adapter.py")
    found = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "_setup_freeze_tuning")
    silent = SimpleNamespace(info_rank0=lambda text: None)
    names: dict[str, Any] = {"re": re, "torch": torch, "logger": silent, "COMPOSITE_MODELS": {}}
    names["get_forbidden_modules"] = lambda config, arguments: set()
    exec(compile(f"from __future__ import annotations\n{ast.unparse(found)}", "adapter", "exec"), names)

    def tune(model: nn.Module, layers: int, modules: list[str]) -> None:
        asked = {"freeze_trainable_layers": layers, "freeze_trainable_modules": modules, "use_llama_pro": False}
        arguments = SimpleNamespace(**asked, freeze_extra_modules=None, freeze_multi_modal_projector=True)
        model.config = SimpleNamespace(num_hidden_layers=DEPTH)  # type: ignore[assignment]
        names["_setup_freeze_tuning"](model, arguments, True, False)

    return tune


DEPTH = 12


@pytest.mark.parametrize("tune", [tuned_by_our_words, None], ids=["rules", "llamafactory"])
@pytest.mark.parametrize("layers", [None, "1,3", "9-11"])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "phi", "gemma3", "gpt_neo"])
def test_llamafactory_unfreezes_what_is_said(
    model_type: str, layers: str | None, tune: Callable[[nn.Module, int, list[str]], None] | None, tmp_path: Path
) -> None:
    """All that trains, and beside it exactly as many tensors and elements as the comment says."""
    tune = tune or their_tuning()
    more = {"prefix": "language_model.model."} if model_type == "gemma3" else {}
    base = checkpoints.make(tmp_path / "base", model_type, layers=DEPTH, hidden=2, bias=model_type == "llama", **more)
    grown = Path(ckptgrow.expand(base, tmp_path / "grown", width=31, layers=layers).folder)
    text, manifest = ckptgrow.mask(grown, "llamafactory").text or "", load_manifest(grown)
    told = yaml_of(text)
    model = Named(checkpoints.load(grown))
    tune(model, told["freeze_trainable_layers"], told["freeze_trainable_modules"].split(","))
    seen = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = {tensor.name for tensor in manifest.trainable}
    assert trained <= seen
    partly = sum(torch.Size(tensor.shape).numel() - tensor.elements for tensor in manifest.trainable)
    said = f"{partly:,} elements that are frozen in {len(trained)} tensors"
    said += f" and {len(seen - trained)} tensors that are frozen whole" if seen - trained else ""
    assert f"{said} train too" in text


# ---------------------------------------------------------------- only some layers, experts, the Hub


@pytest.mark.parametrize("freeze", AXOLOTL, ids=["rules", "axolotl"])
def test_layers_that_did_not_grow_stay_frozen(freeze: Freeze | None, tmp_path: Path) -> None:
    """Their filling is frozen: the patterns name the layers that grew, and Axolotl's rules agree."""
    freeze = freeze or their_freeze()
    base = checkpoints.make(tmp_path / "base", "phi3", layers=12)
    grown = Path(ckptgrow.expand(base, tmp_path / "grown", layers="1,10-11").folder)
    entries = entries_in(ckptgrow.mask(grown, "axolotl").text or "")
    assert entries == [f"^model.layers.(1|10|11).mlp.gate_up_proj.weight${span}" for span in ("[12:24]", "[36:48]")]
    expected = {n: m for n, m in ones(load_manifest(grown), grown).items() if "down_proj" not in n}
    seen = unfrozen(grown, entries, freeze)
    assert all(torch.equal(seen[name], expected[name]) for name in expected)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model_type", stacks.SPELLINGS)
def test_experts_are_named_as_a_model_holds_them(model_type: str, policy: str, tmp_path: Path) -> None:
    """In stacks, which no text may leave out; json has each expert's boxes in its stack beside those on disk."""
    base = checkpoints.make(tmp_path / "base", model_type)
    grown = Path(ckptgrow.expand(base, tmp_path / "grown", policy=policy).folder)
    where = {name: mask for name, mask in stacks.where(grown, model_type).items() if mask.any()}
    names = (ckptgrow.mask(grown, "names").text or "").splitlines()
    assert {line for line in names if not line.startswith("#")} == where.keys()
    assert any("as transformers 5 holds them" in line for line in names)
    told = json.loads(ckptgrow.mask(grown, "json").text or "")
    assert told["tensors"].keys() == {tensor.name for tensor in load_manifest(grown).trainable}
    seen = {name: torch.zeros_like(mask) for name, mask in where.items()}
    for name, tensor in told["tensors"].items():
        for box in tensor.get("in_memory_boxes", tensor["boxes"]):
            seen[tensor.get("in_memory", name)][tuple(slice(*span) for span in box)] += 1
    assert all(torch.equal(mask, where[name]) for name, mask in seen.items())
    assert "ckptgrow_how: mask" in (ckptgrow.mask(grown, "axolotl").text or "")
    assert "ckptgrow_how: mask" in (ckptgrow.mask(grown, "llamafactory").text or "")


def test_a_lora_of_experts(tmp_path: Path) -> None:
    """Beside stacks the shared expert is adapted; where there is none, nothing can be."""
    for model_type in ("qwen2_moe", "mixtral"):
        checkpoints.make(tmp_path / model_type, model_type)
        ckptgrow.expand(tmp_path / model_type, tmp_path / f"{model_type}-grown")
    text = ckptgrow.mask(tmp_path / "qwen2_moe-grown", "peft").text or ""
    assert "The 4 stacks of experts that may train stay as they are." in text
    assert "shared_expert" in text
    with pytest.raises(RequestError, match="what trains here are stacks of experts"):
        ckptgrow.mask(tmp_path / "mixtral-grown", "peft")


def test_of_a_hub_repository_no_weights_are_fetched(grow: Grow, tmp_path: Path) -> None:
    """Text names the repository and its commit; the mask checkpoint is made from headers."""
    grown = grow(hidden=256, width=512)
    with HubServer({"org/grown": Repository({"main": checkpoints.snapshot(grown)})}) as server:
        env = server.environment(tmp_path / "hf")
        command = [sys.executable, "-m", "ckptgrow", "mask", "org/grown", "--format"]
        told = subprocess.run([*command, "axolotl"], env=env, capture_output=True, text=True, check=True)
        subprocess.run([*command, "safetensors", "--out", str(tmp_path / "mask")], env=env, check=True)
        sent = sum(server.sent(file.name) for file in grown.glob("*.safetensors"))
    assert 0 < sent <= 2 * 2 * PROBE_BYTES  # two commands, two shards: their first bytes, which hold the headers
    ckptgrow.mask(grown, "safetensors", out=tmp_path / "same")
    assert checkpoints.snapshot(tmp_path / "mask") == checkpoints.snapshot(tmp_path / "same")
    yaml = yaml_of(told.stdout)
    assert yaml["base_model"] == "org/grown"
    assert Path(yaml["ckptgrow_manifest"]).name == yaml["revision_of_model"]
    assert (Path(yaml["ckptgrow_manifest"]) / "ckptgrow.json").is_file()


# ---------------------------------------------------------------- a checkpoint of 0 and 1


CASES = [*((dtype, "g-freeze") for dtype in checkpoints.DTYPES), *(("BF16", policy) for policy in POLICIES)]


@pytest.mark.parametrize(("dtype", "policy"), CASES)
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma3"])
def test_the_mask_as_a_checkpoint(model_type: str, dtype: str, policy: str, grow: Grow, tmp_path: Path) -> None:
    """Ones in the boxes and zeros elsewhere; files, names, shapes, dtypes and small files are the grown model's."""
    grown, out = grow(model_type, policy, dtype=dtype, width=31, bias=True), tmp_path / "mask"
    made = ckptgrow.mask(grown, "safetensors", out=out)
    expected, seen = ones(load_manifest(grown), grown), checkpoints.load(out)
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name].float(), expected[name]) for name in expected)
    assert sum(int(tensor.float().sum()) for tensor in seen.values()) == made.trainable
    assert made.trainable == load_manifest(grown).counts.trainable
    one, other = open_checkpoint(grown), open_checkpoint(out)
    assert {n: (i.dtype, i.shape) for n, i in one.infos.items()} == {
        n: (i.dtype, i.shape) for n, i in other.infos.items()
    }
    assert [*one.shards] == [*other.shards]
    before, after = checkpoints.snapshot(grown), checkpoints.snapshot(out)
    assert after.keys() == before.keys() - {"ckptgrow.json"}
    same = {file for file in after if file.endswith(".json")}
    assert {file for file in same if before[file] == after[file]} == same
    assert b"not a model" in after["README.md"]


def test_the_mask_is_the_same_however_it_is_cut(grow: Grow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One place at a time gives the same bytes as whole tensors."""
    from ckptgrow import execute

    grown = grow(width=31)
    ckptgrow.mask(grown, "safetensors", out=tmp_path / "one")
    monkeypatch.setattr(execute.blocks, "__defaults__", (1,))
    ckptgrow.mask(grown, "safetensors", out=tmp_path / "two")
    assert checkpoints.snapshot(tmp_path / "one") == checkpoints.snapshot(tmp_path / "two")


def test_a_mask_that_fails_leaves_nothing(grow: Grow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt in the middle: no OUT, no OUT.partial."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    grown = grow()
    with pytest.raises(KeyboardInterrupt):
        ckptgrow.mask(grown, "safetensors", out=tmp_path / "mask", progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "grown"]


def test_no_weight_is_read(grow: Grow, tmp_path: Path) -> None:
    """Headers are all it needs: a grown checkpoint whose weights are gone to NaN gives the same mask."""
    grown = grow()
    ckptgrow.mask(grown, "safetensors", out=tmp_path / "one")
    for file in grown.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        data[start:] = b"\xff" * (len(data) - start)
        file.write_bytes(data)
    ckptgrow.mask(grown, "safetensors", out=tmp_path / "two")
    assert checkpoints.snapshot(tmp_path / "one") == checkpoints.snapshot(tmp_path / "two")
