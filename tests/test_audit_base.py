"""audit against the base: the growth made again from the manifest, in memory; whose base and manifest it must be."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import torch
from trainings import check_repaired, frozen, grow, masks, moved, neighbour, trained

import ckptgrow
from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.errors import CkptgrowError, FormatError, RequestError
from ckptgrow.operations import audit
from ckptgrow.reference import open_reference
from ckptgrow.trained import open_trained

NORM = "model.norm.weight"


@pytest.fixture
def grown(base: Path, tmp_path: Path) -> Path:
    """The tiny Gemma of conftest, grown twofold."""
    return grow(base, tmp_path / "grown")


GROWTHS: list[dict[str, object]] = [
    {"factor": 2},
    {"width": 17, "shares": "random", "seed": 3},
    {"factor": 4, "policy": "g-train"},
    {"factor": 3, "policy": "down", "shares": "even"},
    {"factor": 2, "layers": "1"},
]


@pytest.mark.parametrize("options", GROWTHS)
@pytest.mark.parametrize("model_type", ["gemma3_text", "phi3", "phi"])
def test_made_again_to_the_bit(tmp_path: Path, model_type: str, options: dict[str, object]) -> None:
    """Every tensor, and config.json, as expand wrote them."""
    base = checkpoints.make(tmp_path / "base", model_type)
    grown = grow(base, tmp_path / "grown", **options)
    written = open_checkpoint(grown)
    again = open_reference(base, open_trained(grown))
    assert again.config_text == written.config_text
    assert {name: (i.dtype, i.shape) for name, i in again.tensors.infos.items()} == {
        name: (i.dtype, i.shape) for name, i in written.infos.items()
    }
    for name in written.infos:
        assert (again.tensors.bits(name) == written.bits(name)).all(), name


@pytest.mark.parametrize("how", ["beside", "file", "folder"])
def test_the_same_answer_as_from_the_grown_one(base: Path, grown: Path, how: str) -> None:
    """With the manifest in TRAINED, or given as a file or a folder: the same figures, and the same repair."""
    folder = trained(grown, frozen(grown, neighbour))
    expected = audit(grown, folder)
    manifest = {"beside": None, "file": grown / "ckptgrow.json", "folder": grown}[how]
    if how == "beside":
        shutil.copy(grown / "ckptgrow.json", folder)
    seen = audit(base, folder, manifest=manifest)
    assert (seen.exit_code, seen.cause, seen.tensors) == (1, "averaging", expected.tensors)
    assert any("made anew" in note for note in seen.notes)
    one, other = grown.with_name("one"), grown.with_name("other")
    audit(grown, folder, repair=one)
    audit(base, folder, manifest=manifest, repair=other)
    assert checkpoints.snapshot(one) == checkpoints.snapshot(other)
    check_repaired(grown, folder, other)


def test_no_grown_folder_is_needed(base: Path, grown: Path) -> None:
    """Clean, repaired and exported without config or tokenizer: the grown one's config comes from the base."""
    manifest = grown.with_name("kept.json")
    shutil.copy(grown / "ckptgrow.json", manifest)
    folder = trained(grown, frozen(grown, neighbour))
    config = (grown / "config.json").read_bytes()
    (folder / "config.json").unlink()
    shutil.rmtree(grown)
    out = grown.with_name("out")
    audit(base, folder, manifest=manifest, repair=out)
    assert (out / "config.json").read_bytes() == config
    assert audit(base, out).exit_code == 0  # its own manifest, which its config names


def test_a_dump_against_the_base(base: Path, grown: Path) -> None:
    """A torch.distributed.checkpoint of a run, its files beside it, becomes a checkpoint with the grown names."""
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = trained(grown, frozen(grown, neighbour))
    tensors = {"module." + name: tensor for name, tensor in checkpoints.load(folder).items()}
    tensors["module.lm_head.weight"] = tensors["module.model.embed_tokens.weight"].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(tensors, checkpoint_id=grown.with_name("run") / "dump", no_dist=True)
    for name in ("config.json", "ckptgrow.json"):
        shutil.copy(grown / name, grown.with_name("run"))
    out = grown.with_name("out")
    audit(base, grown.with_name("run"), repair=out)
    check_repaired(grown, folder, out)
    assert open_checkpoint(out).index == open_checkpoint(grown).index
    assert {"tokenizer.json", "generation_config.json", "ckptgrow.json"} <= {file.name for file in out.iterdir()}


def test_a_lost_manifest(grown: Path) -> None:
    """--manifest where the grown folder lost its ckptgrow.json; its config.json still has to name that one."""
    folder, kept = trained(grown), grown.with_name("kept.json")
    (grown / "ckptgrow.json").rename(kept)
    with pytest.raises(RequestError, match=r"no ckptgrow\.json, and neither has .*--manifest"):
        audit(grown, folder)
    shutil.copy(kept, folder / "ckptgrow.json")
    assert audit(grown, folder).exit_code == 0
    (folder / "ckptgrow.json").unlink()
    assert audit(grown, folder, manifest=kept).exit_code == 0
    checkpoints.edit_config(grown, ckptgrow=None)
    with pytest.raises(RequestError, match="neither the grown checkpoint"):
        audit(grown, folder, manifest=kept)


def test_a_second_growth(base: Path, grown: Path) -> None:
    """From the checkpoint that it grew from, which has a manifest of its own; not from the base of all."""
    first = trained(grown)
    shutil.copy(grown / "ckptgrow.json", first)
    second = grow(first, grown / "again" / "grown", policy="down")
    folder = trained(second, frozen(second, neighbour))
    shutil.copy(second / "ckptgrow.json", folder)
    seen = audit(first, folder)
    assert (seen.cause, moved(seen)) == ("averaging", set(masks(second)))
    with pytest.raises(
        RequestError, match=r"base of an earlier one, and what was trained in between is only in trained"
    ):
        audit(base, folder)


# ---------------------------------------------------------------- refused


def _other_shape(base: Path) -> None:
    checkpoints.edit(base, lambda tensors: tensors.update({"model.norm.weight": torch.ones(9).bfloat16()}))


def _other_sharding(base: Path) -> None:
    tensors = checkpoints.load(base)
    for file in base.glob("model*"):
        file.unlink()
    checkpoints.write_shards(base, tensors, 1)


def _other_config(base: Path) -> None:
    checkpoints.edit_config(base, rms_norm_eps=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_other_shape, r"model-0000\d-of-00002.safetensors: it is not base's"),
        (_other_sharding, "it is not base's"),
        (_other_config, "config.json: it is not base's"),
    ],
)
def test_another_base(base: Path, grown: Path, change: Callable[[Path], None], said: str) -> None:
    """Shards or config.json other than those of the base in the manifest."""
    folder = trained(grown)
    change(base)
    with pytest.raises(RequestError, match=said):
        audit(base, folder, manifest=grown)


def test_the_same_layout_with_other_weights(base: Path, grown: Path) -> None:
    """The manifest's digests know: the tensor that differs is named."""
    folder = trained(grown)
    checkpoints.edit(base, lambda tensors: tensors.update({NORM: tensors[NORM] + 1}))
    with pytest.raises(RequestError, match=rf"base of that growth: {NORM}: its weights are not base's"):
        audit(base, folder, manifest=grown)


def test_manifests_that_do_not_belong(base: Path, grown: Path) -> None:
    """Another growth's, one that TRAINED's config.json does not name, an edited one."""
    folder = trained(grown)
    other = grow(base, base.with_name("other"), policy="down")
    with pytest.raises(RequestError, match=r"names another ckptgrow\.json"):
        audit(base, folder, manifest=other)
    shutil.copy(other / "ckptgrow.json", folder)
    with pytest.raises(RequestError, match=r"does not name it, so it may belong to another growth.*--manifest"):
        audit(base, folder)
    checkpoints.edit_config(folder, ckptgrow=None)
    described = json.loads((grown / "ckptgrow.json").read_text())
    described["trainable"][0]["boxes"][0][0][1] -= 1
    (folder / "ckptgrow.json").write_text(json.dumps(described))
    with pytest.raises(FormatError, match="was edited"):
        audit(base, folder, manifest=folder)
    with pytest.raises(CkptgrowError, match="cannot be read"):
        audit(base, folder, manifest=folder / "nothing.json")


def test_the_base_and_no_manifest(base: Path, grown: Path) -> None:
    """The way out is said."""
    with pytest.raises(
        RequestError, match=r"no ckptgrow\.json, and neither has .*ckptgrow expand wrote, or --manifest"
    ):
        ckptgrow.audit(base, trained(grown))
