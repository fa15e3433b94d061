"""Checkpoints that come back as transformers 5 holds them: experts in stacks, other names; and the reverse."""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import torch
import trainings
from checkpoints import Tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import SPELLINGS, come_back, rewrite, stacked

import ckptgrow
from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.errors import CkptgrowError
from ckptgrow.families import locate
from ckptgrow.matching import naming
from ckptgrow.operations import audit
from ckptgrow.respelled import Respelled, respelled


def halved(ending: str) -> Callable[[Tensors], None]:
    """Every tensor whose name has that in it, at half its size."""

    def change(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name] * (0.5 if ending in name else 1.0)

    return change


@pytest.mark.parametrize("model_type", SPELLINGS)
def test_stacks_are_audited(model_type: str, tmp_path: Path) -> None:
    """With the grown checkpoint and with its base: nothing moved, and what trained did move."""
    trained = come_back(tmp_path, model_type)
    assert any(tensor.ndim == 3 for tensor in checkpoints.load(trained).values())
    for seen in (
        audit(tmp_path / "grown", trained),
        audit(tmp_path / "base", trained, manifest=tmp_path / "grown"),
    ):
        assert (seen.exit_code, seen.cause, seen.findings) == (0, "nothing", ())
        assert seen.total("changed") > 0.9 * seen.total("trainable")
        assert seen.total("trainable") + seen.total("frozen") == sum(
            tensor.numel() for tensor in checkpoints.load(tmp_path / "grown").values()
        )


@pytest.mark.parametrize("model_type", SPELLINGS)
def test_what_moved_in_a_stack_is_named_and_put_back(model_type: str, tmp_path: Path) -> None:
    """By the name on disk and the place in the stack; repaired in the trainer's own names, to the bit."""
    trained = come_back(tmp_path, model_type, trainings.frozen(tmp_path / "grown", lambda tensor: tensor * 0.9))
    its = checkpoints.load(trained)
    seen = audit(tmp_path / "grown", trained)
    assert (seen.exit_code, seen.cause) == (1, "decay")
    assert trainings.moved(seen) == set(trainings.masks(tmp_path / "grown"))
    places = {drift.found_as for drift in seen.tensors if drift.moved and ".experts." in drift.tensor}
    assert all(
        re.search(r"\.experts\.(gate_up_proj\[[01], \d+:\d+|(up|down)_proj\[[01])\]$", place) for place in places
    )
    audit(tmp_path / "grown", trained, repair=tmp_path / "fixed")
    now = checkpoints.load(tmp_path / "fixed")
    was = stacked(checkpoints.load(tmp_path / "grown"), model_type)
    masks = {name: torch.zeros(t.shape) for name, t in checkpoints.load(tmp_path / "grown").items()}
    where = stacked(masks | {n: m.float() for n, m in trainings.masks(tmp_path / "grown").items()}, model_type)
    assert {n: (t.shape, t.dtype) for n, t in now.items()} == {n: (t.shape, t.dtype) for n, t in its.items()}
    assert all(torch.equal(now[name], torch.where(where[name] > 0, its[name], was[name])) for name in now)
    files = [
        {f.name: f.read_bytes()[:8] for f in sorted(d.glob("*.safetensors"))} for d in (trained, tmp_path / "fixed")
    ]
    assert files[0] == files[1]


def wrapped(tensors: Tensors) -> Tensors:
    """As FSDP and torch.compile name them, in fp32, the head of a base model's prefix."""
    return {
        f"_orig_mod.model.{n.replace('.mlp.', '._fsdp_wrapped_module.mlp.')}": t.float() for n, t in tensors.items()
    }


@pytest.mark.parametrize("change", [wrapped, lambda ts: {n.removeprefix("model."): t for n, t in ts.items()}])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_stacks_under_prefixes(model_type: str, change: Callable[[Tensors], Tensors], tmp_path: Path) -> None:
    """One prefix more or less, wrappers in the middle, another dtype and other shards at the same time."""
    trained = rewrite(come_back(tmp_path, model_type), change, shards=1)
    seen = audit(tmp_path / "grown", trained)
    assert (seen.exit_code, seen.findings) == (0, ())
    checkpoints.edit(trained, halved("experts.down_proj"))
    assert audit(tmp_path / "grown", trained).exit_code == 1
    names = set(checkpoints.load(trained))
    audit(tmp_path / "grown", trained, repair=tmp_path / "fixed", force=True)
    assert set(checkpoints.load(tmp_path / "fixed")) == names
    assert audit(tmp_path / "grown", tmp_path / "fixed").exit_code == 0


def test_stacks_in_a_dump(tmp_path: Path) -> None:
    """A torch.distributed.checkpoint with a prefix and optimizer state; repaired under the grown checkpoint's names."""
    from torch.distributed.checkpoint.state_dict_saver import save

    trained = come_back(tmp_path, "mixtral", trainings.frozen(tmp_path / "grown", lambda tensor: tensor * 0.9))
    state = {f"model.{name}": tensor for name, tensor in checkpoints.load(trained).items()}
    state["optimizer.state.model.model.layers.0.mlp.experts.down_proj.exp_avg"] = torch.zeros(2, 8, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(state, checkpoint_id=tmp_path / "dump", no_dist=True)
    seen = audit(tmp_path / "grown", tmp_path / "dump", repair=tmp_path / "fixed")
    assert (seen.cause, seen.findings) == ("decay", ())
    assert checkpoints.load(tmp_path / "fixed").keys() == checkpoints.load(tmp_path / "grown").keys()
    assert audit(tmp_path / "grown", tmp_path / "fixed").exit_code == 0


def test_the_base_and_a_skill_come_out_of_stacks(tmp_path: Path) -> None:
    """revert gives the base byte for byte, extract and apply what was trained, under the names on disk."""
    trained = come_back(tmp_path, "mixtral")
    ckptgrow.revert(trained, tmp_path / "back", manifest=tmp_path / "grown")
    assert checkpoints.snapshot(tmp_path / "back") == checkpoints.snapshot(tmp_path / "base")
    ckptgrow.extract(trained, tmp_path / "skill", manifest=tmp_path / "grown")
    ckptgrow.apply(tmp_path / "base", tmp_path / "skill", tmp_path / "again")
    again, its = stacked(checkpoints.load(tmp_path / "again"), "mixtral"), checkpoints.load(trained)
    assert all(torch.equal(again[name], its[name]) for name in its)


def test_a_tuning_in_stacks_is_ranked(tmp_path: Path) -> None:
    """rank reads the tuned checkpoint through the same view."""
    base = checkpoints.make(tmp_path / "base", "qwen3_moe")
    tuned = checkpoints.make(tmp_path / "tuned", "qwen3_moe", seed=1)
    before = ckptgrow.rank(base, tuned)
    rewrite(tuned, lambda tensors: stacked(tensors, "qwen2_moe"))
    after = ckptgrow.rank(base, tuned)
    assert after.changes == before.changes
    assert "lie in" in after.notes[0]


def test_the_other_way_round(tmp_path: Path) -> None:
    """Stacks on disk, given back expert by expert, and stacks given back in the other layout."""
    base = checkpoints.make(tmp_path / "base", "qwen3_moe")
    rewrite(base, lambda tensors: stacked(tensors, "qwen2_moe", turned=True))
    grown = trainings.grow(base, tmp_path / "grown")
    trained = trainings.trained(grown)
    turned = checkpoints.load(trained)

    def straight(tensors: Tensors) -> Tensors:
        return {n: t.transpose(1, 2) if t.ndim == 3 else t for n, t in tensors.items()}

    def apart(tensors: Tensors) -> Tensors:
        found = {}
        for name, tensor in tensors.items():
            block, _, role = name.rpartition(".")
            for e in range(2) if tensor.ndim == 3 else ():
                one = tensor[e].T
                parts = {"down": one} if role == "down_proj" else dict(zip(("gate", "up"), one.chunk(2), strict=True))
                found |= {f"{block}.{e}.{r}_proj.weight": part for r, part in parts.items()}
            if tensor.ndim < 3:
                found[name] = tensor
        return found

    for change in (straight, apart):
        rewrite(trained, lambda _, change=change: change(turned))  # type: ignore[misc]
        seen = audit(grown, trained)
        assert (seen.exit_code, seen.findings) == (0, ())
        assert seen.total("changed") > 0.9 * seen.total("trainable")
        checkpoints.edit(trained, halved("experts"))
        assert audit(grown, trained).exit_code == 1
        out = tmp_path / change.__name__
        audit(grown, trained, repair=out)
        assert audit(grown, out).exit_code == 0
        assert {n: t.shape for n, t in checkpoints.load(out).items()} == {n: t.shape for n, t in turned.items()}
        rewrite(trained, lambda _, change=change: change(turned))  # type: ignore[misc]
        back = tmp_path / f"{change.__name__}-back"
        ckptgrow.revert(trained, back, manifest=grown)
        assert checkpoints.snapshot(back) == checkpoints.snapshot(base)


# ---------------------------------------------------------------- refusals


def without(ending: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if not n.endswith(ending)}


def with_stacks(change: Callable[[torch.Tensor], torch.Tensor], ending: str = "gate_up_proj") -> Callable[..., Tensors]:
    return lambda tensors: {
        n: change(t) if n.endswith("layers.1.mlp.experts." + ending) else t for n, t in tensors.items()
    }


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "half": (without("layers.1.mlp.experts.down_proj"), "layers.1.mlp.experts.down_proj: it is missing, but .*gate_up"),
    "other half": (without("layers.0.mlp.experts.gate_up_proj"), "layers.0.mlp.experts.gate_up_proj: it is missing"),
    "one less": (with_stacks(lambda t: t[:1]), r"shape \[1, 48, 8\], where the experts .* make \[2, 48, 8\]"),
    "one more": (with_stacks(lambda t: torch.cat([t, t[:1]])), r"shape \[3, 48, 8\], where the experts"),
    "not grown": (with_stacks(lambda t: t[:, :24]), r"shape \[2, 24, 8\], where"),
    "no stack": (with_stacks(lambda t: t[0]), r"shape \[48, 8\], where"),
    "up first": (
        lambda ts: {n: t.roll(t.shape[1] // 2, 1) if n.endswith("gate_up_proj") else t for n, t in ts.items()},
        "gate_up_proj: gate and up stand in it the other way round",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_stacks_that_no_model_has(model_type: str, what: str, tmp_path: Path) -> None:
    """One message that names the trained tensor, and nothing is written."""
    change, told = REFUSED[what]
    trained = rewrite(come_back(tmp_path, model_type), change)
    with pytest.raises(CkptgrowError, match=told):
        audit(tmp_path / "grown", trained, repair=tmp_path / "fixed")
    assert not (tmp_path / "fixed").exists()


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    """Where stacks on disk are given back one by one, each of them must be there."""
    base = checkpoints.make(tmp_path / "base", "qwen3_moe")
    apart = checkpoints.load(trainings.grow(base, tmp_path / "apart"))
    rewrite(base, lambda tensors: stacked(tensors, "qwen2_moe"))
    grown = trainings.grow(base, tmp_path / "grown")
    trained = trainings.trained(grown)
    rewrite(trained, lambda _: apart)
    assert audit(grown, trained).exit_code == 0
    rewrite(trained, without("layers.1.mlp.experts.1.up_proj.weight"))
    with pytest.raises(CkptgrowError, match=r"experts\.1\.up_proj\.weight: it is missing"):
        audit(grown, trained)


# ---------------------------------------------------------------- names that nobody knows


def renamed(tensors: Tensors) -> Tensors:
    return {n.replace("self_attn.q_proj", "attention.query").replace("norm.", "ln."): t for n, t in tensors.items()}


def test_what_nothing_trained_is_known_by_its_bytes(tmp_path: Path) -> None:
    """Whatever it is called, in fp32 too, and for revert; where it moved it is missing."""
    grown = trainings.grow(checkpoints.make(tmp_path / "base"), tmp_path / "grown")
    trained = rewrite(trainings.trained(grown), renamed)
    ckptgrow.revert(trained, tmp_path / "back", manifest=grown)
    assert checkpoints.snapshot(tmp_path / "back") == checkpoints.snapshot(tmp_path / "base")
    rewrite(trained, lambda tensors: {n: t.float() for n, t in tensors.items()})
    seen = audit(grown, trained)
    assert (seen.exit_code, seen.findings) == (0, ())
    assert "tensors have other names" in " ".join(seen.notes)
    shutil.copytree(trained, tmp_path / "decayed")
    checkpoints.edit(tmp_path / "decayed", trainings.frozen(grown, lambda tensor: tensor * 0.9))
    audit(grown, tmp_path / "decayed", repair=tmp_path / "fixed")
    assert checkpoints.load(tmp_path / "fixed").keys() == checkpoints.load(trained).keys()
    assert audit(grown, tmp_path / "fixed").exit_code == 0
    checkpoints.edit(trained, halved("layers.0.attention.query"))
    seen = audit(grown, trained)
    assert seen.exit_code == 2
    assert {f.tensor for f in seen.findings} == {
        "model.layers.0.attention.query.weight",
        "model.layers.0.self_attn.q_proj.weight",
    }


# ---------------------------------------------------------------- the view by itself


@settings(max_examples=30)
@given(st.sampled_from(list(SPELLINGS)), st.integers(1, 5), st.integers(1, 4))
def test_the_view_is_the_checkpoint_on_disk(model_type: str, hidden: int, width: int) -> None:
    """Names, shapes and bits; and laid end to end in its order, the trained bytes again."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        disk = checkpoints.make(folder / "disk", model_type, hidden=hidden + 8, width=width, shards=1)
        memory = checkpoints.make(folder / "memory", model_type, hidden=hidden + 8, width=width, shards=1)
        rewrite(memory, lambda tensors: stacked(tensors, model_type), shards=1)
        mine, its = open_checkpoint(disk), open_checkpoint(memory)
        architecture = locate(mine.config, mine.infos)
        probe = architecture.mlps[0].down
        view = respelled(naming(mine, mine.config, architecture.family, {}, probe), its, architecture)
        assert isinstance(view, Respelled)
        assert view.infos.keys() == mine.infos.keys()
        assert all((view.bits(name) == mine.bits(name)).all() for name in mine.infos)
        assert view.laid is not None
        for holder, names in view.laid.items():
            assert b"".join(view.bits(name).tobytes() for name in names) == its.bits(holder).tobytes()
