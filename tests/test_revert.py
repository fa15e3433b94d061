"""revert: the base back byte for byte, from grown and from trained checkpoints; what moved; what is refused."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import Tensors
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import LAW, LAYOUTS, fitting

import ckptgrow
from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.cli import main
from ckptgrow.errors import RequestError
from ckptgrow.inversion import compose, invert
from ckptgrow.lineage import recall
from ckptgrow.manifest import load_manifest
from ckptgrow.policy import POLICIES

GATE = "model.layers.0.mlp.gate_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"
WIDTHS = {"factor": 2}, {"factor": 3}, {"width": 17}, {"width": 29}, {"factor": 2, "layers": (1,)}


@pytest.fixture
def grown(base: Path, tmp_path: Path) -> Path:
    """The tiny Gemma of conftest, grown twofold with the default policy."""
    return grow(base, tmp_path / "grown")


def grow(base: Path, out: Path, **options: Any) -> Path:
    ckptgrow.expand(base, out, verify=False, **options)
    return out


def train(
    grown: Path,
    change: Callable[[Tensors], None] | None = None,
    *,
    shards: int = 1,
    wide: bool = False,
    seed: int = 3,
    name: str = "trained",
) -> Path:
    """What a trainer makes of it: all boxes moved, other shards, no manifest, and whatever `change` does."""
    out, tensors = grown.with_name(name), checkpoints.load(grown)
    generator = torch.Generator().manual_seed(seed)
    for tensor in load_manifest(grown).trainable:
        for box in tensor.boxes:
            place = tuple(slice(*span) for span in box)
            old = tensors[tensor.name][place].float()
            noise = torch.randn(old.shape, generator=generator)
            tensors[tensor.name][place] = (old + noise).clamp(-100, 100).to(tensors[tensor.name].dtype)
    if wide:
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if change:
        change(tensors)
    out.mkdir()
    checkpoints.write_shards(out, {name: tensor.contiguous() for name, tensor in tensors.items()}, shards)
    shutil.copy(grown / "config.json", out)
    return out


def same(one: Path, other: Path) -> bool:
    return checkpoints.snapshot(one) == checkpoints.snapshot(other)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["revert", *map(str, arguments)])


# ---------------------------------------------------------------- laws


@settings(LAW, max_examples=40)
@given(
    st.sampled_from(["gemma3_text", "gemma3", "phi3", "gemma3n_text", *LAYOUTS]),
    st.sampled_from(list(checkpoints.DTYPES)),
    st.sampled_from(WIDTHS),
    st.sampled_from(["auto", "even", "random"]),
    st.sampled_from(list(POLICIES)),
    st.integers(1, 3),
)
def test_revert_undoes_expand(
    family: str, dtype: str, width: dict[str, int], shares: Any, policy: str, shards: int
) -> None:
    """revert(expand(x)) is x, file by file and byte by byte, whatever was grown and how."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = checkpoints.make(folder / "base", family, dtype=dtype, shards=shards, bias=family == "phi3")
        (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# naïve\n", encoding="utf-8")
        grow(base, folder / "grown", **fitting(family, {**width, "shares": shares, "policy": policy, "seed": 7}))
        done = ckptgrow.revert(folder / "grown", folder / "out")
        assert (done.exit_code, done.taken_from, done.notes) == (0, "trained", ())
        assert same(base, folder / "out")


@settings(LAW, max_examples=15)
@given(st.sampled_from(["F32", "F16", "BF16"]), st.sampled_from(WIDTHS), st.sampled_from(["g-freeze", "down", "up"]))
def test_revert_undoes_training(dtype: str, width: dict[str, int], policy: str) -> None:
    """From any trained checkpoint whose frozen part stands still, where that part determines the base."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = checkpoints.make(folder / "base", dtype=dtype)
        grow(base, folder / "grown", **width, policy=policy)
        trained, manifest = train(folder / "grown"), load_manifest(folder / "grown")
        copies = -(-manifest.blocks[0].new_width // 12)
        if (manifest.inexact_halves and policy != "up") or (policy == "down" and copies > 2):
            with pytest.raises(RequestError, match=r"tensors are not the base's any more.*--base"):
                ckptgrow.revert(trained, folder / "out", manifest=folder / "grown")
        else:
            ckptgrow.revert(trained, folder / "out", manifest=folder / "grown")
            assert same(base, folder / "out")
        ckptgrow.revert(trained, folder / "out2", manifest=folder / "grown", base=base)
        assert same(base, folder / "out2")


@settings(LAW, max_examples=10)
@given(st.lists(st.sampled_from(WIDTHS[:4]), min_size=1, max_size=3), st.sampled_from(["BF16", "F32"]))
def test_revert_all_undoes_every_growth(widths: list[dict[str, int]], dtype: str) -> None:
    """Grown and trained several times: each growth is undone by itself, and all of them at once."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        states = [checkpoints.make(folder / "0", dtype=dtype, layers=1, shards=2)]
        for i, width in enumerate(widths):
            factor = {
                "width": open_checkpoint(states[-1]).infos[GATE].shape[0]
                + width.get("width", 5 * width.get("factor", 1))
            }
            states.append(grow(states[-1], folder / f"{i + 1}", **factor))
            trained = train(states[-1], shards=2)
            shutil.copy(states[-1] / "ckptgrow.json", trained)
            for file in ("tokenizer.json", "generation_config.json"):
                shutil.copy(states[-1] / file, trained)
            shutil.rmtree(states[-1])
            trained.rename(states[-1])
        if any(load_manifest(state).inexact_halves for state in states[1:]):
            return
        ckptgrow.revert(states[-1], folder / "last")
        assert same(states[-2], folder / "last")
        done = ckptgrow.revert(states[-1], folder / "all", every=True)
        assert done.undone == len(widths)
        assert same(states[0], folder / "all")


# ---------------------------------------------------------------- what trainers give back


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("wide", [False, True])
def test_other_shards_and_fp32(grown: Path, base: Path, shards: int, wide: bool) -> None:
    """One file or three, bf16 or fp32: the base's own two bf16 shards come back."""
    trained = train(grown, shards=shards, wide=wide)
    assert ckptgrow.revert(trained, grown.with_name("out"), manifest=grown).exit_code == 0
    assert same(base, grown.with_name("out"))


def test_prefix_and_dropped_head(tmp_path: Path) -> None:
    """Names with a wrapper in front; a head that equals the embedding left out: both are found again."""
    base = checkpoints.make(tmp_path / "base", "llama", tied=False)
    checkpoints.edit(base, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    checkpoints.edit_config(base, tie_word_embeddings=True)

    def change(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]
        for name in list(tensors):
            tensors["_orig_mod." + name] = tensors.pop(name)

    trained = train(grow(base, tmp_path / "grown"), change)
    assert ckptgrow.revert(trained, tmp_path / "out", manifest=tmp_path / "grown").exit_code == 0
    assert same(base, tmp_path / "out")


def test_manifest_alone_is_enough_for_the_weights(grown: Path, base: Path, tmp_path: Path) -> None:
    """ckptgrow.json instead of its folder: shards, config, index come back; the tokenizer is said to be missing."""
    trained, alone = train(grown), tmp_path / "mine.json"
    shutil.copy(grown / "ckptgrow.json", alone)
    done = ckptgrow.revert(trained, tmp_path / "out", manifest=alone)
    assert [note.split(":")[0] for note in done.notes] == [
        "generation_config.json is missing",
        "tokenizer.json is missing",
    ]
    back, was = checkpoints.snapshot(tmp_path / "out"), checkpoints.snapshot(base)
    assert {name: was[name] for name in back} == back
    assert was.keys() - back.keys() == {"generation_config.json", "tokenizer.json"}


def test_shards_that_no_library_wrote(base: Path, tmp_path: Path) -> None:
    """A header in another order with spaces comes back as it was, and so does the order of the bytes behind it."""
    file = next(iter(sorted(base.glob("*.safetensors"))))
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = json.dumps(dict(reversed(header.items())), indent=1).encode() + b"   "
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    grow(base, tmp_path / "grown")
    ckptgrow.revert(tmp_path / "grown", tmp_path / "out")
    assert same(base, tmp_path / "out")


# ---------------------------------------------------------------- what moved, and what is refused


def one_ulp(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(torch.int16).view(-1)[0] += 1

    return change


@pytest.mark.parametrize("name", [GATE, DOWN, NORM])
def test_a_moved_row_is_named(grown: Path, base: Path, name: str) -> None:
    """One ulp in one frozen element: exit 1, that tensor and how far, nothing written; with BASE its bytes."""
    trained, out = train(grown, one_ulp(name)), grown.with_name("out")
    result = run(trained, out, "--manifest", grown)
    assert result.exit_code == 1
    assert f"  {name}: 1 of " in result.stdout
    assert "frozen elements moved by up to " in result.stdout
    assert result.stdout.splitlines()[-1].endswith("the frozen part MOVED, so nothing was written")
    assert not out.exists()
    assert not list(out.parent.glob("*.partial*"))
    alone = shutil.copy(grown / "ckptgrow.json", out.with_name("mine.json"))
    shown = json.loads(run(trained, out, "--manifest", alone, "--json").stdout)
    assert [moved["tensor"] for moved in shown["moved"]] == [name]
    assert "--manifest GROWN or audit says how far" in shown["moved"][0]["problem"]
    assert run(trained, out, "--manifest", grown, "--base", base, "-q").output == ""
    assert same(base, out)


def test_base_must_be_the_one(grown: Path, tmp_path: Path) -> None:
    """Another checkpoint of the same shape is refused, by the tensor that differs."""
    other = checkpoints.make(tmp_path / "other", seed=1)
    result = run(train(grown), tmp_path / "out", "--manifest", grown, "--base", other)
    assert (result.exit_code, (tmp_path / "out").exists()) == (2, False)
    assert "model.embed_tokens.weight: its weights are not base's. Give the checkpoint that was grown" in result.stderr


@pytest.mark.parametrize(("policy", "shares"), [("g-train", "auto"), ("g-freeze", "random")])
def test_what_is_not_determined_needs_the_base(base: Path, tmp_path: Path, policy: str, shares: str) -> None:
    """Training moved the base's own rows, or half a random share is all that stands: exit 2 and the way out."""
    grown = grow(base, tmp_path / "grown", policy=policy, shares=shares)
    result = run(train(grown), tmp_path / "out", "--manifest", grown)
    assert (result.exit_code, (tmp_path / "out").exists()) == (2, False)
    count = 2 if shares == "random" else 4
    assert f"{count} tensors are not the base's any more, and what policy {policy} freezes does not" in result.stderr
    assert "Give --base BASE." in result.stderr
    assert run(tmp_path / "trained", tmp_path / "out", "--manifest", grown, "--base", base).exit_code == 0
    assert same(base, tmp_path / "out")


def test_inexact_halves_are_counted(base: Path, tmp_path: Path) -> None:
    """Odd subnormals: the untrained growth reverts, the trained one needs the base and says how many there are."""
    checkpoints.edit(base, lambda t: t[DOWN].view(-1)[:3].fill_(2.0**-133))
    grown = grow(base, tmp_path / "grown")
    assert ckptgrow.revert(grown, tmp_path / "one").exit_code == 0
    assert same(base, tmp_path / "one")
    with pytest.raises(RequestError, match="3 of their weights have no exact half"):
        ckptgrow.revert(train(grown), tmp_path / "two", manifest=grown)
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("policy", ["up", "g-freeze"])
def test_minus_zero_is_not_zero(base: Path, tmp_path: Path, policy: str) -> None:
    """Its shares are -0.0 and 0.0: twice the first, or their sum, is the bit pattern that it was."""
    checkpoints.edit(
        base, lambda t: t[DOWN].view(-1)[:5].copy_(torch.tensor([-0.0, 0.0, -0.0, 2.0**-133, -(2.0**-133)]))
    )
    grown = grow(base, tmp_path / "grown", policy=policy)
    assert ckptgrow.revert(grown, tmp_path / "out").exit_code == 0
    assert same(base, tmp_path / "out")


def test_no_manifest_another_manifest_no_growth(grown: Path, base: Path, tmp_path: Path) -> None:
    """Each says what to give; nothing is written."""
    trained, out = train(grown), tmp_path / "out"
    assert "Name the grown folder, or its ckptgrow.json, with --manifest" in run(trained, out).stderr
    other = grow(base, tmp_path / "other", factor=3)
    assert "its config.json names another ckptgrow.json" in run(trained, out, "--manifest", other).stderr
    assert run(base, out).exit_code == 2
    assert not out.exists()


def test_a_manifest_that_contradicts_itself(grown: Path, tmp_path: Path) -> None:
    """Its options make another growth than its boxes tell, or its header is not the one of its digest."""
    manifest = json.loads((grown / "ckptgrow.json").read_text())
    config = json.loads((grown / "config.json").read_text())
    del config["ckptgrow"]
    (grown / "config.json").write_text(json.dumps(config))
    for change, said in (
        (lambda m: m["growth"].update(factor=3), "growing the base again does not give what it describes"),
        (lambda m: m["growth"].update(policy="none"), "unknown policy"),
        (lambda m: m["growth"].clear() or m["growth"].update(size=3), "options that are not known: ['size']"),
        (lambda m: next(iter(m["base"]["shards"].values())).update(text="{}"), "not the one its digest is of"),
    ):
        broken = json.loads(json.dumps(manifest))
        change(broken)
        (grown / "ckptgrow.json").write_text(json.dumps(broken))
        result = run(grown, tmp_path / "out")
        assert (result.exit_code, (tmp_path / "out").exists()) == (2, False)
        assert said in result.stderr


def test_a_wrong_shape_and_a_missing_tensor(grown: Path, tmp_path: Path) -> None:
    """What does not belong to the growth is refused by name."""
    trained = train(grown, lambda t: t.update({NORM: t[NORM][:4]}))
    assert (
        f"{NORM}: shape [4], in the grown checkpoint [8]" in run(trained, tmp_path / "out", "--manifest", grown).stderr
    )
    shutil.rmtree(trained)
    trained = train(grown, lambda t: t.__delitem__(NORM))
    assert f"{NORM}: it is missing" in run(trained, tmp_path / "out", "--manifest", grown).stderr


def test_files_of_the_trainer_do_not_come_back(grown: Path, base: Path, tmp_path: Path) -> None:
    """A tokenizer that the trainer rewrote is not taken where the base's is at hand; what the base had not is left."""
    trained = train(grown)
    (trained / "tokenizer.json").write_text("{}")
    (trained / "training.log").write_text("loss")
    ckptgrow.revert(trained, tmp_path / "out", manifest=grown)
    assert same(base, tmp_path / "out")
    shutil.copy(grown / "ckptgrow.json", trained)
    done = ckptgrow.revert(trained, tmp_path / "two")
    assert "tokenizer.json is not the one that the base had: give --manifest GROWN" in done.notes


# ---------------------------------------------------------------- on Plans alone


def test_inverse_of_the_plan(grown: Path) -> None:
    """Twice the frozen half where halves are exact, else the sum of all shares, which is doubtful when one trains."""
    past = recall(load_manifest(grown), "ckptgrow.json")
    halves = invert(past.plan, past.base.infos, past.trained, exact_halves=True, source="trained")
    down = next(output for output in halves.plan.outputs if output.name == DOWN)
    assert [(t.units, t.scale) for part in down.parts for t in part.terms] == [(range(12), 2.0)]
    assert halves.doubtful == ()
    sums = invert(past.plan, past.base.infos, past.trained, exact_halves=False, source="trained")
    down = next(output for output in sums.plan.outputs if output.name == DOWN)
    assert [t.units for part in down.parts for t in part.terms] == [range(12), range(12, 24)]
    assert len(sums.doubtful) == 2
    identity = compose(halves.plan, past.plan, "trained")
    gate = next(output for output in identity.outputs if output.name == GATE)
    assert gate.is_copy_of(past.base.infos[GATE])
