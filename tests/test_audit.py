"""What moved in training, by how much and by what cause, on tiny checkpoints; what comes back; what is refused."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import Tensors
from safetensors.torch import save_file
from trainings import check_repaired, frozen, grow, masks, moved, neighbour, shrink, to_float, trained

import ckptgrow
from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.errors import CkptgrowError, FormatError, RequestError
from ckptgrow.layout import INDEX, SINGLE
from ckptgrow.manifest import load_manifest
from ckptgrow.operations import audit
from ckptgrow.report import audit as text

DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"


@pytest.fixture
def grown(base: Path, tmp_path: Path) -> Path:
    """The tiny Gemma of conftest, grown twofold."""
    return grow(base, tmp_path / "grown")


# ---------------------------------------------------------------- what happened


def test_clean(grown: Path) -> None:
    """Only trainable elements moved: exit 0, and nothing is said about any tensor."""
    seen = audit(grown, trained(grown))
    assert (seen.exit_code, seen.cause, seen.clean, seen.findings) == (0, "nothing", True, ())
    counts = load_manifest(grown).counts
    assert (seen.total("frozen"), seen.total("trainable")) == (counts.frozen, counts.trainable)
    assert seen.total("changed") > 0.9 * counts.trainable
    assert "untouched" in text(seen)


def test_nothing_trained_is_said_and_is_no_fault(grown: Path) -> None:
    """The grown checkpoint itself."""
    seen = audit(grown, trained(grown, new=0.0))
    assert (seen.exit_code, seen.total("changed")) == (0, 0)
    assert "nothing was trained" in text(seen)


@pytest.mark.parametrize("name", [DOWN, NORM, EMBED])
def test_one_element_by_one_unit(grown: Path, name: str) -> None:
    """In a tensor with boxes and in those without: found, counted, named."""

    def change(tensors: Tensors) -> None:
        tensors[name].view(torch.int16).view(-1)[0] += 1

    seen = audit(grown, trained(grown, change))
    assert (seen.exit_code, seen.cause, moved(seen), seen.total("moved")) == (1, "averaging", {name}, 1)
    drift = next(drift for drift in seen.tensors if drift.tensor == name)
    was = checkpoints.load(grown)[name].view(-1)[0].float()
    assert drift.largest == pytest.approx(abs(was) * drift.largest_relative)
    assert 2.0**-8 <= drift.largest_relative <= 2.0**-7
    assert name in text(seen)


def test_the_last_frozen_and_the_first_trainable_element(grown: Path) -> None:
    """The edge of the box is where the manifest says."""
    mask = masks(grown)[DOWN]
    edge = int(mask[0].int().argmax())
    for column, moves in ((edge - 1, 1), (edge, 0)):

        def change(tensors: Tensors, column: int = column) -> None:
            tensors[DOWN][0, column] += 1

        folder = trained(grown, change, new=0.0)
        seen = audit(grown, folder)
        assert (seen.total("moved"), seen.total("changed")) == (moves, 1 - moves)
        shutil.rmtree(folder)


@pytest.mark.parametrize("factor", [0.9955, 0.956, 0.5])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_decay(grown: Path, factor: float, dtype: str) -> None:
    """One factor, once rounded through bf16 and once as an fp32 copy; undone to the bit."""

    def change(tensors: Tensors) -> None:
        if dtype == "F32":
            to_float(tensors)
        frozen(grown, lambda t: (t.float() * factor).to(t.dtype))(tensors)

    folder = trained(grown, change)
    seen = audit(grown, folder)
    assert (seen.exit_code, seen.cause, moved(seen)) == (1, "decay", set(masks(grown)))
    assert seen.factor is not None
    low, high = seen.factor
    assert low <= factor * (1 + 1e-7)
    assert factor * (1 - 1e-7) <= high
    assert high - low < (4e-3 if dtype == "BF16" else 1e-6)
    assert "weight decay" in text(seen)
    out = grown.with_name("out")
    assert audit(grown, folder, repair=out).exit_code == 0
    check_repaired(grown, folder, out)


@pytest.mark.parametrize(("dtype", "rate", "steps"), [("F32", 1e-4, 300), ("F32", 1e-6, 500), ("BF16", 4e-3, 20)])
def test_decay_rounded_at_every_step(grown: Path, dtype: str, rate: float, steps: int) -> None:
    """What an optimizer does: many small factors, each rounded."""

    def decayed(tensor: torch.Tensor) -> torch.Tensor:
        for _ in range(steps):
            tensor = tensor * torch.tensor(1 - rate, dtype=torch.float32).to(tensor.dtype)
        return tensor

    def change(tensors: Tensors) -> None:
        if dtype == "F32":
            to_float(tensors)
        frozen(grown, decayed)(tensors)

    assert audit(grown, trained(grown, change)).cause == "decay"


def test_averaging(grown: Path) -> None:
    """One unit up or down here and there is not decay; undone to the bit."""
    folder = trained(grown, frozen(grown, neighbour))
    seen = audit(grown, folder)
    assert (seen.exit_code, seen.cause, seen.factor) == (1, "averaging", None)
    out = grown.with_name("out")
    assert audit(grown, folder, repair=out).repaired == str(out)
    check_repaired(grown, folder, out)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_mean_of_equal_values(tmp_path: Path, dtype: str) -> None:
    """(a + b + c) / 3 of three runs whose frozen parts are equal does not give them back."""
    grown = grow(checkpoints.make(tmp_path / "base", dtype=dtype), tmp_path / "grown")
    seen = audit(grown, trained(grown, frozen(grown, lambda t: (t + t + t) / 3)))
    assert (seen.exit_code, seen.cause) == (1, "averaging")


@pytest.mark.parametrize("size", [1e-3, 1e-1])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_noise_is_called_training(grown: Path, size: float, dtype: str) -> None:
    """Steps that do not depend on the weight: no factor, no rounding. Repair is refused, and obeys --force."""

    def change(tensors: Tensors) -> None:
        if dtype == "F32":
            to_float(tensors)
        generator = torch.Generator().manual_seed(3)
        frozen(grown, lambda t: (t + size * torch.randn(t.shape, generator=generator)).to(t.dtype))(tensors)

    folder, out = trained(grown, change), grown.with_name("out")
    seen = audit(grown, folder)
    assert (seen.cause, seen.factor) == ("trained", None)
    with pytest.raises(RequestError, match="destroys what they learned"):
        audit(grown, folder, repair=out)
    assert not out.exists()
    assert not out.with_name("out.partial").exists()
    audit(grown, folder, repair=out, force=True)
    check_repaired(grown, folder, out)


def _unevenly(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * (0.5 + 0.49 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(4)))


def _one_by_ten_units(tensor: torch.Tensor) -> torch.Tensor:
    return torch.where(tensor == tensor.max(), tensor * (1 - 10 * 2.0**-23), tensor)


@pytest.mark.parametrize("change", [_unevenly, _one_by_ten_units])
def test_shrinking_is_not_yet_decay(grown: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Each by a factor of its own, or one element only: no common factor, so not decay."""

    def both(tensors: Tensors) -> None:
        to_float(tensors)
        tensors[EMBED] = change(tensors[EMBED])

    assert audit(grown, trained(grown, both)).cause == "trained"


def test_drift_that_only_the_wider_dtype_shows(grown: Path) -> None:
    """An fp32 master that decayed by 1e-5: clean in bf16, reported, and repaired to the exact value."""

    def change(tensors: Tensors) -> None:
        to_float(tensors)
        frozen(grown, lambda t: t * (1 - 1e-5))(tensors)

    folder = trained(grown, change)
    seen = audit(grown, folder)
    assert (seen.exit_code, seen.cause, seen.total("moved")) == (0, "decay", 0)
    assert seen.total("moved_before_cast") == sum(int((~mask).sum()) for mask in masks(grown).values())
    assert "none of it in BF16" in text(seen)
    audit(grown, folder, repair=grown.with_name("out"))
    check_repaired(grown, folder, grown.with_name("out"))


def test_a_narrower_dtype_is_named(base: Path, tmp_path: Path) -> None:
    """fp32 grown, saved in bf16: moved, but by nothing else than the dtype, and repair cannot help."""
    wide = grow(checkpoints.make(tmp_path / "wide", dtype="F32"), tmp_path / "grown")

    def change(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()

    folder = trained(wide, change)
    seen = audit(wide, folder)
    assert (seen.exit_code, seen.cause, seen.total("moved_before_cast")) == (1, "narrowed", 0)
    with pytest.raises(RequestError, match="cannot hold"):
        audit(wide, folder, repair=tmp_path / "out")


def test_weights_that_became_nan(grown: Path) -> None:
    """A diverged run is training, not averaging."""

    def change(tensors: Tensors) -> None:
        tensors[NORM][0] = float("nan")

    seen = audit(grown, trained(grown, change))
    assert (seen.exit_code, seen.cause) == (1, "trained")
    json.dumps(seen.to_json(), allow_nan=False)


@pytest.mark.parametrize("policy", ["g-train", "down", "up"])
def test_other_policies_and_biases(tmp_path: Path, policy: str) -> None:
    """Tensors that train whole, or not at all; one factor in what is left."""
    grown = grow(
        checkpoints.make(tmp_path / "base", "phi", width=16),
        tmp_path / "grown",
        policy=policy if policy != "up" else "g-freeze",
    )
    folder = trained(grown)
    assert audit(grown, folder).exit_code == 0
    checkpoints.edit(folder, lambda tensors: shrink(tensors["model.layers.1.mlp.fc2.weight"]))
    seen = audit(grown, folder)
    assert moved(seen) == {"model.layers.1.mlp.fc2.weight"}
    audit(grown, folder, repair=tmp_path / "out", force=True)
    check_repaired(grown, folder, tmp_path / "out")


def test_fused_gate_up(tmp_path: Path) -> None:
    """Two boxes in one tensor: four parts, cut at the right rows."""
    grown = grow(checkpoints.make(tmp_path / "base", "phi3"), tmp_path / "grown")
    folder = trained(grown, frozen(grown, lambda t: (t.float() * 0.97).to(t.dtype)))
    assert audit(grown, folder, repair=tmp_path / "out").cause == "decay"
    check_repaired(grown, folder, tmp_path / "out")


def test_between_two_boxes(tmp_path: Path) -> None:
    """The old up rows of a fused projection lie between the new gate rows and the new up rows."""
    grown = grow(checkpoints.make(tmp_path / "base", "phi3"), tmp_path / "grown")
    name = "model.layers.0.mlp.gate_up_proj.weight"
    boxes = next(tensor.boxes for tensor in load_manifest(grown).trainable if tensor.name == name)
    (_, gate_end), (up_start, _) = (box[0] for box in boxes)

    def change(tensors: Tensors) -> None:
        tensors[name][gate_end] += 1
        tensors[name][up_start - 1] += 1

    seen = audit(grown, trained(grown, change))
    assert (moved(seen), seen.total("moved")) == ({name}, 2 * 8)


# ---------------------------------------------------------------- what trainers give back


def test_other_sharding_and_what_repair_copies(grown: Path) -> None:
    """One file instead of two; the trainer's files stay, its optimizer does not."""
    folder = trained(grown, frozen(grown, neighbour))
    tensors = checkpoints.load(folder)
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    save_file(tensors, folder / SINGLE)
    (folder / "chat_template.jinja").write_text("hi")
    (folder / "optimizer.pt").write_bytes(b"drifted masters")
    out = grown.with_name("out")
    audit(grown, folder, repair=out)
    check_repaired(grown, folder, out)
    names = {file.name for file in out.iterdir()}
    assert {"chat_template.jinja", "README.md", "tokenizer.json", "ckptgrow.json", SINGLE} <= names
    assert not {"optimizer.pt", INDEX} & names
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    ckptgrow.inspect(out)


RENAMINGS: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: "_orig_mod." + name,
    "parallel": lambda name: "module." + name,
    "wrapped within": lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module._orig_mod."),
    "lightning": lambda name: "net." + name,
    "an attribute called model": lambda name: "model." + name,
    "peft, merged": lambda name: "base_model.model." + name,
    "without its head": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("how", RENAMINGS)
def test_names_with_prefixes(grown: Path, how: str) -> None:
    """Whatever stands in front or between: the same tensors, repaired under the names they have."""

    def change(tensors: Tensors) -> None:
        frozen(grown, neighbour)(tensors)
        for name in list(tensors):
            tensors[RENAMINGS[how](name)] = tensors.pop(name)

    folder, out = trained(grown, change), grown.with_name("out")
    seen = audit(grown, folder)
    assert (seen.findings, moved(seen)) == ((), set(masks(grown)))
    audit(grown, folder, repair=out)
    assert checkpoints.load(out).keys() == checkpoints.load(folder).keys()
    assert audit(grown, out).exit_code == 0


def test_names_of_a_model_in_memory(tmp_path: Path) -> None:
    """Gemma 3 with a vision tower: language_model.model. on disk, model.language_model. in transformers."""
    base = checkpoints.make(tmp_path / "base", "gemma3", prefix="language_model.model.")
    grown = grow(base, tmp_path / "grown")

    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            memory = name.replace("language_model.model.", "model.language_model.")
            tensors["_orig_mod." + memory] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["_orig_mod.model.language_model.embed_tokens.weight"].clone()

    seen = audit(grown, trained(grown, change))
    assert (seen.exit_code, seen.findings, seen.cause) == (0, (), "nothing")
    assert all(drift.found_as.startswith(("_orig_mod.model.language", "lm_head")) for drift in seen.tensors)


def test_a_head_that_was_added(grown: Path) -> None:
    """Tied: a copy of the embedding is looked at like it, and may not differ."""
    folder = trained(grown, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBED].clone()}))
    seen = audit(grown, folder)
    assert (seen.exit_code, seen.findings) == (0, ())
    assert any("lm_head.weight was added" in note for note in seen.notes)
    checkpoints.edit(folder, lambda tensors: shrink(tensors["lm_head.weight"]))
    seen = audit(grown, folder, repair=grown.with_name("out"))
    assert [drift.found_as for drift in seen.tensors if drift.moved] == ["lm_head.weight"]
    assert torch.equal(checkpoints.load(grown.with_name("out"))["lm_head.weight"], checkpoints.load(grown)[EMBED])


def test_only_the_head_of_two_tied_tensors(grown: Path) -> None:
    """It stands for the embedding."""
    folder = trained(grown, lambda tensors: tensors.update({"lm_head.weight": tensors.pop(EMBED)}))
    assert audit(grown, folder).exit_code == 0


def _headless(tensors: Tensors) -> None:
    del tensors["lm_head.weight"]


@pytest.mark.parametrize(("tied", "equal", "code"), [(True, True, 0), (False, True, 2), (True, False, 2)])
def test_a_head_that_was_dropped(tmp_path: Path, tied: bool, equal: bool, code: int) -> None:
    """Fine where the config ties it and it is the embedding's bytes; missing otherwise."""
    base = checkpoints.make(tmp_path / "base", tied=False, config={"tie_word_embeddings": tied})
    if equal:
        checkpoints.edit(base, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBED].clone()}))
    grown = grow(base, tmp_path / "grown")
    assert audit(grown, trained(grown, _headless)).exit_code == code


def test_mixed_dtypes(grown: Path) -> None:
    """accelerate's FSDP2: trained tensors in fp32, the rest in bf16."""

    def change(tensors: Tensors) -> None:
        for name in masks(grown):
            tensors[name] = tensors[name].float()
        frozen(grown, lambda t: t * 0.99)(tensors)

    folder = trained(grown, change)
    assert audit(grown, folder, repair=grown.with_name("out")).cause == "decay"
    check_repaired(grown, folder, grown.with_name("out"))


def test_deepspeeds_export_has_no_config(grown: Path) -> None:
    """fp32 safetensors and an index, nothing else; the repaired one gets the grown config."""

    def change(tensors: Tensors) -> None:
        to_float(tensors)
        frozen(grown, lambda t: t * 0.999)(tensors)

    folder = trained(grown, change)
    for file in folder.iterdir():
        if not file.name.startswith("model"):
            file.unlink()
    seen = audit(grown, folder)
    assert seen.cause == "decay"
    assert any("does not say" in note for note in seen.notes)
    audit(grown, folder, repair=grown.with_name("out"))
    check_repaired(grown, folder, grown.with_name("out"))
    assert (grown.with_name("out") / "config.json").read_bytes() == (grown / "config.json").read_bytes()


@pytest.fixture
def dump(grown: Path) -> Callable[[Callable[[Tensors], None] | None], Path]:
    """Write a torch.distributed.checkpoint of a model and its optimizer, as a trainer does."""
    from torch.distributed.checkpoint.state_dict_saver import save

    def write(change: Callable[[Tensors], None] | None) -> Path:
        model = {"model." + name: tensor for name, tensor in checkpoints.load(trained(grown, change)).items()}
        state = {"model": model, "optimizer": {"state": {"step": torch.ones(3)}, "lr": 0.1}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(state, checkpoint_id=grown.with_name("dump") / "pytorch_model_fsdp_0", no_dist=True)
        return grown.with_name("dump")

    return write


def test_a_distributed_checkpoint(grown: Path, dump: Callable[[Callable[[Tensors], None] | None], Path]) -> None:
    """The dump itself or the folder it lies in; one unit is seen; repair writes safetensors, laid out as the grown."""
    folder = dump(frozen(grown, neighbour))
    for place in (folder, folder / "pytorch_model_fsdp_0"):
        seen = audit(grown, place)
        assert (seen.exit_code, seen.cause, seen.findings, moved(seen)) == (1, "averaging", (), set(masks(grown)))
    out = grown.with_name("out")
    assert audit(grown, folder, repair=out).exit_code == 0
    check_repaired(grown, grown.with_name("trained"), out)
    assert {file.name for file in out.iterdir()} == {file.name for file in grown.iterdir()} - {"README.md"}
    assert open_checkpoint(out).index == open_checkpoint(grown).index
    assert (out / "config.json").read_bytes() == (grown / "config.json").read_bytes()


def test_a_clean_distributed_checkpoint(grown: Path, dump: Callable[[Callable[[Tensors], None] | None], Path]) -> None:
    """Nothing moved, and the optimizer beside the model is not taken for it."""
    seen = audit(grown, dump(None))
    assert (seen.exit_code, seen.cause) == (0, "nothing")
    assert any("optimizer state" in note for note in seen.notes)


class _Bomb:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("inside", [_Bomb(), {"state_dict_metadata": {}}, 3])
def test_a_metadata_file_runs_no_code(
    grown: Path, tmp_path: Path, inside: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a pickle: whatever is not a description of tensors is refused, not made."""
    import pickle

    monkeypatch.chdir(tmp_path)
    (tmp_path / "dump").mkdir()
    (tmp_path / "dump" / ".metadata").write_bytes(pickle.dumps(inside))
    with pytest.raises(FormatError, match=r"not opened|not a torch\.distributed"):
        audit(grown, tmp_path / "dump")
    assert not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------- cannot tell


def _drop(tensors: Tensors) -> None:
    del tensors[NORM]


def _stranger(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.router.weight"] = torch.ones(3)


def _shape(tensors: Tensors) -> None:
    tensors[EMBED] = torch.cat([tensors[EMBED], tensors[EMBED][:2]])


def _parametrized(tensors: Tensors) -> None:
    tensors[DOWN.replace("weight", "parametrizations.weight.original")] = tensors.pop(DOWN)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop, f"{NORM}: it is missing"),
        (_stranger, "router.weight: the grown checkpoint has no such tensor"),
        (_shape, f"{EMBED}: shape [18, 8], in the grown checkpoint [16, 8]"),
        (_parametrized, "remove_parametrizations"),
        (lambda t: t.update({"module." + NORM: t[NORM].clone()}), "are both"),
        (lambda t: t.update({NORM: t[NORM].to(torch.int16)}), "cannot be compared"),
    ],
)
def test_cannot_tell(grown: Path, change: Callable[[Tensors], None], said: str) -> None:
    """Exit 2 with the tensor named; nothing is repaired on such ground."""
    folder = trained(grown, change)
    seen = audit(grown, folder)
    assert (seen.exit_code, seen.clean) == (2, None)
    assert said in text(seen)
    assert text(seen).endswith("cannot tell")
    with pytest.raises(RequestError, match="cannot be repaired"):
        audit(grown, folder, repair=grown.with_name("out"))


def test_a_manifest_of_another_growth(grown: Path, base: Path) -> None:
    """The trained config names its manifest; a manifest beside the wrong grown checkpoint is found as well."""
    folder = trained(grown)
    other = grow(base, base.with_name("other"), policy="down")
    with pytest.raises(RequestError, match=r"another ckptgrow\.json"):
        audit(other, folder)
    shutil.copy(other / "ckptgrow.json", grown / "ckptgrow.json")
    with pytest.raises(FormatError, match="belongs to another checkpoint"):
        audit(grown, folder)


REFUSALS = [
    ("adapter_config.json", "LoRA", "merge_and_unload"),
    ("global_step5", "pieces", "zero_to_fp32"),
    ("mp_rank_00_model_states.pt", "pieces", "zero_to_fp32"),
    ("model_world_size_2_rank_0.pt", "pieces", "Put them together"),
    ("shard-00001-model-00001-of-00001.safetensors", "pieces", "Put them together"),
    ("pytorch_model.bin", "pickle", "--safe_serialization"),
    ("last.ckpt", "pickle", "save_pretrained"),
    ("notes.txt", "neither", "as the trainer saved it"),
]


@pytest.mark.parametrize(("file", "problem", "hint"), REFUSALS)
def test_refused_with_the_way_out(grown: Path, tmp_path: Path, file: str, problem: str, hint: str) -> None:
    """Adapters, pieces and pickles."""
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / file).write_bytes(b"")
    with pytest.raises(RequestError, match=problem) as caught:
        audit(grown, folder)
    assert hint in str(caught.value)


def test_pieces_inside_safetensors(grown: Path) -> None:
    """torch's own safetensors writer marks its pieces in the header; LoRA shows in the names."""
    folder = trained(grown)
    file = next(folder.glob("*.safetensors"))
    from safetensors.torch import load_file

    tensors = load_file(file)
    save_file(tensors, file, {"format": "pt", "DCP_SHARDING_INFO": "{}"})
    with pytest.raises(RequestError, match="pieces"):
        audit(grown, folder)
    save_file(tensors, file, {"format": "pt"})
    checkpoints.edit(folder, lambda t: t.update({DOWN.replace("weight", "lora_A.weight"): torch.ones(2, 2)}))
    with pytest.raises(RequestError, match="LoRA"):
        audit(grown, folder)


def test_repair_overwrites_nothing(grown: Path) -> None:
    """Neither what is there nor what it reads."""
    folder = trained(grown, frozen(grown, neighbour))
    before = checkpoints.snapshot(folder) | checkpoints.snapshot(grown)
    for out in (folder, grown, folder / "inside"):
        with pytest.raises(CkptgrowError):
            audit(grown, folder, repair=out)
    assert checkpoints.snapshot(folder) | checkpoints.snapshot(grown) == before


def test_nothing_to_repair_writes_nothing(grown: Path) -> None:
    """A clean checkpoint stays where it is."""
    seen = audit(grown, trained(grown), repair=grown.with_name("out"))
    assert (seen.exit_code, seen.repaired) == (0, None)
    assert not grown.with_name("out").exists()


def test_json(grown: Path) -> None:
    """All figures, plain values."""
    seen = audit(grown, trained(grown, frozen(grown, neighbour)))
    told = json.loads(json.dumps(seen.to_json(), allow_nan=False))
    assert (told["cause"], told["exit_code"], told["clean"]) == ("averaging", 1, False)
    assert told["totals"]["moved"] == sum(drift["moved"] for drift in told["tensors"]) > 0
