"""Some layers of the real Gemma 3 270M, and back: uniform growth, real training, fold, revert, merge, two growths."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_fold import files
from test_real_gemma import logits, two_threads
from test_real_skills import TEXTS, learn, same_files
from test_skills import alike
from test_weighed import asked

import ckptgrow
from ckptgrow.checkpoint import open_checkpoint

pytestmark = [pytest.mark.real, pytest.mark.transformers, pytest.mark.usefixtures("two_threads")]
__all__ = ["two_threads"]

LAYERS = "3-7,12"
GROWN = {3, 4, 5, 6, 7, 12}
STEPS = 8


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where some gigabytes are written; gone after the test."""
    yield tmp_path / "here"
    shutil.rmtree(tmp_path / "here", ignore_errors=True)


def with_manifest(trained: Path, grown: Path) -> Path:
    """A trained checkpoint with what no trainer copies: the manifest, and the files beside the weights."""
    for file in grown.iterdir():
        if file.is_file() and not (trained / file.name).exists() and ".safetensors" not in file.name:
            shutil.copy(file, trained)
    return trained


def moved(folder: Path, name: str, element: int, by: int = 1) -> None:
    """One bf16 weight of a checkpoint some units in the last place further, in its file."""
    path, offset, _ = open_checkpoint(folder).span(name)
    with path.open("r+b") as file:
        file.seek(offset + 2 * element)
        (bits,) = struct.unpack("<H", file.read(2))
        file.seek(offset + 2 * element)
        file.write(struct.pack("<H", bits + by))


def test_filling_goes_and_what_trained_stays(real_gemma: Path, folder: Path) -> None:
    """Untouched, fold and revert give the base; after training revert does, and fold says which layers hold it up."""
    grown = folder / "grown"
    ckptgrow.expand(real_gemma, grown, layers=LAYERS, verify=False)
    done = ckptgrow.fold(grown, folder / "folded")
    assert (done.exit_code, done.width) == (0, 2048)
    assert files(folder / "folded") == files(real_gemma)
    ckptgrow.revert(grown, folder / "reverted")
    assert same_files(real_gemma, folder / "reverted")
    trained = learn(grown, TEXTS["licence"], folder / "trained", STEPS, decay=0.01)
    assert not alike(grown, trained)
    assert ckptgrow.revert(trained, folder / "back", manifest=grown).exit_code == 0
    assert same_files(real_gemma, folder / "back")
    done = ckptgrow.fold(trained, folder / "no")
    assert (done.exit_code, done.groups[0].smallest, (folder / "no").exists()) == (1, 4096, False)
    for block in done.blocks:
        told = [(left.units, left.why) for left in block.left]
        assert told == ([(2048, "gate rows differ")] if block.layer in GROWN else [])
        assert block.smallest == (4096 if block.layer in GROWN else 2048)
    print({block.layer: block.smallest for block in done.blocks})


def test_two_skills_on_different_layers(real_gemma: Path, folder: Path) -> None:
    """One trained up, one down, so that their merge folds: to the base's width, the same function."""
    skills = []
    for name, layers, policy in (("licence", LAYERS, "up"), ("code", "0-2,13", "down")):
        grown = folder / name / "grown"
        ckptgrow.expand(real_gemma, grown, layers=layers, policy=policy, verify=False)
        trained = learn(grown, TEXTS[name], folder / name / "trained", STEPS)
        done = ckptgrow.extract(trained, folder / name / "skill", manifest=grown)
        print(name, layers, policy, done.elements, "elements")
        skills.append(folder / name / "skill")
        shutil.rmtree(grown)
    for weights in (None, ["2", "0.5"]):
        merging = ckptgrow.merge(real_gemma, skills, folder / "merged", weights=weights)
        assert [answer.verdict for answer in merging.answers] == ["yes"] * 3
        assert {block.new_width for block in merging.blocks} == {4096}
        print(weights, merging.rounding, *(answer.figure for answer in merging.answers), sep="\n  ")
        if weights:  # 1 - 2/2 of the base is left where the first skill grew
            with pytest.raises(ckptgrow.RequestError, match=r"6 tensors .* the weights \(2, 0.5\) cancel its columns"):
                ckptgrow.revert(folder / "merged", folder / "no")
        else:
            ckptgrow.revert(folder / "merged", folder / "back")
            assert same_files(real_gemma, folder / "back")
        expected = logits(folder / "merged", _float32())
        for dtype, bound in (("float32", 1e-3), (None, 0.5)):
            done = ckptgrow.fold(folder / "merged", folder / "folded", dtype=dtype, force=True)
            assert (done.exit_code, done.width) == (0, 2048)
            largest = float((logits(folder / "folded", _float32()) - expected).abs().max())
            print(f"  folded, {dtype}: {done.rounding}, largest float32 logit difference {largest:.3g}")
            assert largest <= bound
        names = [name for name in open_checkpoint(folder / "merged").infos if name.endswith("mlp.down_proj.weight")]
        for name in (names[0], names[-1]):
            moved(folder / "merged", name, 4096 * 7 + 2000)
            answer = asked(real_gemma, skills, weights or ["1", "1"], folder / "merged")
            assert (answer.verdict, answer.findings[0].tensor) == ("no", name)
            print("  one weight moved by one unit in the last place:", answer.findings[0].problem)
            moved(folder / "merged", name, 4096 * 7 + 2000, -1)
        assert asked(real_gemma, skills, weights or ["1", "1"], folder / "merged").verdict == "yes"
        shutil.rmtree(folder / "merged")


def test_two_growths_and_all_the_way_back(real_gemma: Path, folder: Path) -> None:
    """Grown, trained, grown again on other layers, trained again: one step back, and both."""
    ckptgrow.expand(real_gemma, folder / "first", layers=LAYERS, verify=False)
    first = with_manifest(learn(folder / "first", TEXTS["licence"], folder / "one", STEPS), folder / "first")
    ckptgrow.expand(first, folder / "second", layers="0-1", width=5120, verify=False)
    second = learn(folder / "second", TEXTS["code"], folder / "two", STEPS)
    done = ckptgrow.revert(second, folder / "last", manifest=folder / "second")
    assert done.undone == 1
    assert same_files(first, folder / "last")
    done = ckptgrow.revert(second, folder / "all", manifest=folder / "second", every=True)
    assert (done.undone, done.taken_from) == (2, "trained")
    print(done.notes)
    back = {file.name for file in (folder / "all").iterdir()}
    assert alike(real_gemma, folder / "all")
    assert back <= {file.name for file in real_gemma.iterdir()}


def _float32() -> object:
    import torch

    return torch.float32
