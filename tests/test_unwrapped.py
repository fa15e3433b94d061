"""fold of what trainers give back: wrapped names, prefixes, float32 copies; and what is refused, with the way out."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import save_file
from test_fold import files, grow, same_outputs

import ckptgrow
from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.errors import CkptgrowError


def rewritten(folder: Path, out: Path, named: Callable[[str], str], *, manifest: bool = False, shards: int = 2) -> Path:
    """A copy whose tensors have other names."""
    shutil.copytree(folder, out)
    tensors = {named(name): tensor for name, tensor in checkpoints.load(folder).items()}
    for file in [*out.glob("*.safetensors*"), *([] if manifest else [out / "ckptgrow.json"])]:
        file.unlink()
    checkpoints.write_shards(out, tensors, shards)
    return out


WRAPPED = {
    "compile": lambda name: f"_orig_mod.{name}",
    "ddp": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "inside": lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp._orig_mod."),
}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_are_taken_off(wrapper: str, shards: int, base: Path, tmp_path: Path) -> None:
    """The base's tensors under the base's names, whatever shards they lay in: also in one in which nothing changed."""
    trained = rewritten(grow(base, tmp_path / "grown"), tmp_path / "trained", WRAPPED[wrapper], shards=shards)
    assert ckptgrow.fold(trained, tmp_path / "out").exit_code == 0
    mine, its = checkpoints.load(base), checkpoints.load(tmp_path / "out")
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) for name in mine)
    assert ckptgrow.verify(base, tmp_path / "out").exit_code == 0
    ckptgrow.plan_fold(trained, tmp_path / "planned")


def test_a_shard_in_which_nothing_changes(base: Path, tmp_path: Path) -> None:
    """Its header has the old names, so it is written anew."""
    grown = grow(base, tmp_path / "grown")
    trained = rewritten(grown, tmp_path / "trained", WRAPPED["ddp"], shards=1)
    tensors = checkpoints.load(trained)
    for file in trained.glob("*.safetensors*"):
        file.unlink()
    inside = {name: tensor for name, tensor in tensors.items() if ".mlp." in name}
    outside = {name: tensor for name, tensor in tensors.items() if ".mlp." not in name}
    for file, part in (("a.safetensors", inside), ("b.safetensors", outside)):
        save_file(part, trained / file, {"format": "pt"})
    homes = dict.fromkeys(inside, "a.safetensors") | dict.fromkeys(outside, "b.safetensors")
    (trained / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    ckptgrow.fold(trained, tmp_path / "out")
    assert checkpoints.load(tmp_path / "out").keys() == checkpoints.load(base).keys()
    assert open_checkpoint(tmp_path / "out").infos.keys() == checkpoints.load(base).keys()


@pytest.mark.parametrize("named", [lambda name: f"model.{name}", lambda name: name.removeprefix("model.")])
def test_a_prefix_is_known_by_the_manifest(named: Callable[[str], str], base: Path, tmp_path: Path) -> None:
    """Lightning's, or one that was lost: gone where ckptgrow.json lies beside; else the names stay as they are."""
    grown = grow(base, tmp_path / "grown")
    known = rewritten(grown, tmp_path / "known", named, manifest=True)
    ckptgrow.fold(known, tmp_path / "out")
    assert checkpoints.load(tmp_path / "out").keys() == checkpoints.load(base).keys()
    ckptgrow.fold(rewritten(grown, tmp_path / "unknown", named), tmp_path / "as it is")
    assert checkpoints.load(tmp_path / "as it is").keys() == {named(name) for name in checkpoints.load(base)}


def test_float32_copies_of_bf16_weights(base: Path, tmp_path: Path) -> None:
    """What a trainer saves in float32 folds in float32: to the base's values, to the last bit."""
    trained = grow(base, tmp_path / "grown", policy="up")
    checkpoints.edit(trained, lambda tensors: tensors.update({n: t.float() for n, t in tensors.items()}))
    done = ckptgrow.fold(trained, tmp_path / "out")
    assert (done.exit_code, done.rounding.rounded) == (0, 0)
    mine, its = checkpoints.load(base), checkpoints.load(tmp_path / "out")
    assert all(torch.equal(mine[name].float(), its[name]) for name in mine)
    assert same_outputs(base, tmp_path / "out")


def test_what_is_no_folder_of_whole_tensors(base: Path, tmp_path: Path) -> None:
    """Each with the commands that make it one, and they do."""
    from torch.distributed.checkpoint.state_dict_saver import save

    grown = grow(base, tmp_path / "grown")
    bare = shutil.copytree(grown, tmp_path / "bare")
    (bare / "config.json").unlink()
    with pytest.raises(CkptgrowError, match=r"it has no config\.json") as caught:
        ckptgrow.fold(bare, tmp_path / "out")
    assert "Copy the grown checkpoint's to it" in str(caught.value)
    dump = tmp_path / "dump"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        save(dict(checkpoints.load(grown)), checkpoint_id=dump, no_dist=True)
    with pytest.raises(CkptgrowError, match="in pieces") as caught:
        ckptgrow.fold(dump, tmp_path / "out")
    assert "extract TRAINED SKILL --manifest GROWN` and `ckptgrow apply BASE SKILL OUT`" in str(caught.value)
    ckptgrow.extract(dump, tmp_path / "skill", manifest=grown)
    ckptgrow.apply(base, tmp_path / "skill", tmp_path / "whole")
    ckptgrow.fold(tmp_path / "whole", tmp_path / "out")
    assert files(tmp_path / "out") == files(base)
    twice = rewritten(grown, tmp_path / "twice", lambda name: name)
    checkpoints.edit(twice, lambda t: t.update({f"module.{name}": tensor.clone() for name, tensor in t.items()}))
    with pytest.raises(CkptgrowError, match="once wrappers are taken off"):
        ckptgrow.fold(twice, tmp_path / "more")
