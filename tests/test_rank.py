"""Which layers changed most: figures against a direct computation with torch, the files that rank writes, refusals."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import Tensors
from click.testing import CliRunner

import ckptgrow
from ckptgrow.cli import main
from ckptgrow.errors import CkptgrowError, FormatError, OutputError, RequestError
from ckptgrow.layers import ranked
from ckptgrow.layout import INDEX, SINGLE
from ckptgrow.report import ranking as text

LAYERS = 5
GATE = "model.layers.1.mlp.gate_proj.weight"


def tuned(base: Path, change: Callable[[Tensors], None] | None = None, *, seed: int = 0) -> Path:
    """A copy with noise of another size in each tensor, and then whatever `change` does."""
    out = base.with_name("tuned")
    shutil.copytree(base, out)
    generator = torch.Generator().manual_seed(seed)

    def work(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            size = torch.rand((), generator=generator) * 0.1
            tensors[name] = (tensor.float() + size * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        if change:
            change(tensors)

    checkpoints.edit(out, work)
    return out


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Five layers."""
    return checkpoints.make(tmp_path / "base", layers=LAYERS)


def directly(
    base: Path, tuned: Tensors, split: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]
) -> list[dict[str, float]]:
    """The figures of each layer by torch, in float64: its Frobenius norms of whole projections."""
    before = checkpoints.load(base)
    figures = []
    for layer in range(LAYERS):
        was, now = {}, {}
        for name in before:
            if f"layers.{layer}.mlp." in name and before[name].dim() == 2:
                was |= split(name, before[name].double())
                now |= split(name, tuned[name].double())
        found: dict[str, float] = {
            n: float(torch.linalg.norm(now[n] - was[n]) / torch.linalg.norm(was[n])) for n in was
        }
        flat = [torch.cat([t.reshape(-1) for t in some.values()]) for some in (was, now)]
        found["block"] = float(torch.linalg.norm(flat[1] - flat[0]) / torch.linalg.norm(flat[0]))
        figures.append(found)
    return figures


def apart(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name.split("_proj")[0].rpartition(".")[2]: tensor}


def fused(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """phi3: the first half of gate_up is gate."""
    if "gate_up" not in name:
        return {"down": tensor}
    gate, up = tensor.chunk(2)
    return {"gate": gate, "up": up}


def plain(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """phi has no gate, and biases that do not count."""
    return {"up" if "fc1" in name else "down": tensor}


@pytest.mark.parametrize(
    ("model_type", "split"), [("gemma3_text", apart), ("phi3", fused), ("phi", plain)], ids=["gated", "fused", "plain"]
)
@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16"])
def test_equal_to_torch(
    tmp_path: Path, model_type: str, split: Callable[..., dict[str, torch.Tensor]], dtype: str
) -> None:
    """Every figure; the order; the same again."""
    base = checkpoints.make(tmp_path / "base", model_type, layers=LAYERS, dtype=dtype)
    folder = tuned(base)
    found = ckptgrow.rank(base, folder)
    expected = directly(base, checkpoints.load(folder), split)
    for change in found.changes:
        told = {**change.projections, "block": change.block}
        assert told == pytest.approx(expected[change.layer], rel=1e-12)
    assert list(found.layers) == sorted(range(LAYERS), key=lambda layer: -expected[layer]["block"])
    assert ckptgrow.rank(base, folder) == found
    assert found.top == 2  # 10 of 26


def test_other_sharding_dtype_and_names(base: Path) -> None:
    """One fp32 file of a compiled, wrapped model: the same figures but for the prefix's note."""
    folder = tuned(base)
    expected = ckptgrow.rank(base, folder)
    tensors = {"_orig_mod.net." + name: tensor.float() for name, tensor in checkpoints.load(folder).items()}
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    checkpoints.write_shards(folder, tensors, 1)
    assert (folder / SINGLE).is_file()
    found = ckptgrow.rank(base, folder)
    assert found.changes == expected.changes
    assert any("too much in front" in note for note in found.notes)


def test_a_distributed_checkpoint(base: Path) -> None:
    """A dump of model and optimizer, without config.json."""
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = tuned(base)
    state = {"model": checkpoints.load(folder), "optimizer": {"step": torch.ones(3)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(state, checkpoint_id=base.with_name("dump"), no_dist=True)
    assert ckptgrow.rank(base, base.with_name("dump")).changes == ckptgrow.rank(base, folder).changes


def test_a_wider_base_is_said(tmp_path: Path) -> None:
    """bf16 saved from fp32 moves every weight: the figures contain it, and it is as large as the note says."""
    base = checkpoints.make(tmp_path / "base", dtype="F32", width=64)

    def narrow(tensors: Tensors) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in checkpoints.load(base).items()})

    found = ckptgrow.rank(base, tuned(base, narrow))
    assert any("BF16 holds less than F32" in note and "0.002" in note for note in found.notes)
    assert all(1e-3 < change.block < 2.5e-3 for change in found.changes)


def test_what_lies_outside_the_mlps_does_not_matter(base: Path) -> None:
    """A vocabulary that grew, a head of another kind, attention that was left out."""
    folder = tuned(base)
    expected = ckptgrow.rank(base, folder)

    def change(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"] = torch.ones(20, 8)
        tensors["score.weight"] = torch.ones(2, 8)
        del tensors["model.layers.0.self_attn.q_proj.weight"]

    checkpoints.edit(folder, change)
    assert ckptgrow.rank(base, folder).changes == expected.changes


# ---------------------------------------------------------------- what it writes


def test_the_file_that_expand_reads(base: Path, tmp_path: Path) -> None:
    """layers best first, top, and the figures in the same order; expand grows just these."""
    out = tmp_path / "ranking.json"
    found = ckptgrow.rank(base, tuned(base), top=3, out=out)
    told = json.loads(out.read_text())
    assert told == json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (told["layers"], told["top"]) == (list(found.layers), 3)
    assert [figure["layer"] for figure in told["figures"]] == told["layers"]
    assert told["figures"][0].keys() == {"layer", "gate", "up", "down", "block"}
    assert ranked(out.read_bytes(), "ranking.json") == found.layers[:3]
    done = ckptgrow.expand(base, tmp_path / "grown", layers=f"@{out}")
    assert {block.layer for block in done.manifest.blocks if not block.filled} == set(found.layers[:3])


def test_the_command(base: Path, tmp_path: Path) -> None:
    """A line a layer, the best first with the longest bar, the choice as --layers takes it; JSON on stdout."""
    folder = tuned(base)
    done = CliRunner().invoke(main, ["rank", str(base), str(folder), "--top", "2"])
    assert done.exit_code == 0
    found = ckptgrow.rank(base, folder, top=2)
    lines = done.stdout.splitlines()
    assert done.stdout == text(found) + "\n"
    assert [line.split()[0] for line in lines[1:3]] == ["*", "*"]
    assert [int(line.replace("*", "").split()[0]) for line in lines[1 : LAYERS + 1]] == list(found.layers)
    bars = [line.count("#") for line in lines[1 : LAYERS + 1]]
    assert bars == sorted(bars, reverse=True)
    assert "states neither the norm nor the tensors" in done.stdout
    assert lines[-1].endswith("--layers " + ",".join(map(str, sorted(found.layers[:2]))))
    told = CliRunner().invoke(main, ["rank", str(base), str(folder), "--json"])
    assert json.loads(told.stdout)["layers"] == list(found.layers)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_plot(base: Path, tmp_path: Path, kind: str) -> None:
    """A picture of that kind, the same each time."""
    pytest.importorskip("matplotlib", reason="draws with the extra plot")
    folder, files = tuned(base), [tmp_path / f"{name}.{kind}" for name in ("one", "two")]
    for file in files:
        ckptgrow.rank(base, folder, plot=file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes().startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    if kind == "svg":
        assert "relative change" in files[0].read_text() or "<path" in files[0].read_text()


def test_no_matplotlib(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named, and nothing is written, the ranking neither."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RequestError, match=r"pip install 'ckptgrow\[plot\]'"):
        ckptgrow.rank(base, tuned(base), out=tmp_path / "ranking.json", plot=tmp_path / "ranking.png")
    assert not [*tmp_path.glob("ranking*")]


def test_nothing_is_overwritten(base: Path, tmp_path: Path) -> None:
    """Neither a ranking nor a picture; another ending is refused."""
    folder = tuned(base)
    for name in ("ranking.json", "ranking.png"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        ckptgrow.rank(base, folder, out=tmp_path / "ranking.json")
    with pytest.raises(OutputError, match="exists"):
        ckptgrow.rank(base, folder, out=tmp_path / "new.json", plot=tmp_path / "ranking.png")
    with pytest.raises(RequestError, match=r"ends in \.png or \.svg"):
        ckptgrow.rank(base, folder, plot=tmp_path / "ranking.pdf")
    assert (tmp_path / "ranking.json").read_text() == (tmp_path / "ranking.png").read_text() == "mine"
    assert not (tmp_path / "new.json").exists()


# ---------------------------------------------------------------- refused


def _missing(tensors: Tensors) -> None:
    del tensors[GATE]


def _wider(tensors: Tensors) -> None:
    tensors[GATE] = torch.ones(14, 8).bfloat16()


def _deeper(tensors: Tensors) -> None:
    tensors[GATE.replace("1", str(LAYERS))] = tensors[GATE].clone()


def _whole_numbers(tensors: Tensors) -> None:
    tensors[GATE] = tensors[GATE].to(torch.int8)


def _broken(tensors: Tensors) -> None:
    tensors[GATE][0, 0] = float("nan")


def _twice(tensors: Tensors) -> None:
    tensors["module." + GATE] = tensors[GATE].clone()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_missing, f"{GATE}: it is missing"),
        (_wider, rf"{GATE}: shape \[14, 8\], and \[12, 8\] in .*base"),
        (_deeper, r"layers\.5\.mlp\.gate_proj\.weight: .*base has no such tensor"),
        (_whole_numbers, f"{GATE}: I8, and BF16"),
        (_broken, f"{GATE}: it has weights that are infinite or NaN"),
        (_twice, "it is there twice"),
    ],
)
def test_another_architecture(base: Path, tmp_path: Path, change: Callable[[Tensors], None], said: str) -> None:
    """By tensor; no file is written."""
    with pytest.raises(CkptgrowError, match=said):
        ckptgrow.rank(base, tuned(base, change), out=tmp_path / "ranking.json")
    assert not [*tmp_path.glob("ranking*")]


def test_more_refusals(base: Path, tmp_path: Path) -> None:
    """Another model_type, a top that is none, nothing that changed, weights that are all zero."""
    folder = tuned(base)
    for top in (0, LAYERS + 1):
        with pytest.raises(RequestError, match="it has 5 layers"):
            ckptgrow.rank(base, folder, top=top)
    with pytest.raises(RequestError, match="nothing to rank"):
        ckptgrow.rank(base, base)
    checkpoints.edit_config(folder, model_type="llama")
    with pytest.raises(RequestError, match="model_type 'llama', and 'gemma3_text'"):
        ckptgrow.rank(base, folder)
    checkpoints.edit_config(folder, model_type="gemma3_text")
    checkpoints.edit(base, lambda tensors: tensors.update({GATE: torch.zeros(12, 8).bfloat16()}))
    with pytest.raises(FormatError, match="all zero"):
        ckptgrow.rank(base, folder)


# ---------------------------------------------------------------- the real one


@pytest.mark.real
@pytest.mark.transformers
def test_the_real_gemma(real_gemma: Path, tmp_path: Path) -> None:
    """Fine-tuned for 30 steps on one text in plain PyTorch: finite, ordered, reproducible, and what torch says of each
    layer; drawn both ways."""
    transformers = pytest.importorskip("transformers", reason="trains the model in real transformers")
    pytest.importorskip("matplotlib", reason="draws with the extra plot")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(real_gemma, dtype=torch.float32)
    words = (Path(__file__).parent.parent / "LICENSE").read_text("utf-8")
    tokens = transformers.AutoTokenizer.from_pretrained(real_gemma)(words, return_tensors="pt").input_ids
    trained = [tensor for name, tensor in model.named_parameters() if ".mlp." in name or ".self_attn." in name]
    optimizer = torch.optim.AdamW(trained, lr=2e-5)
    pieces = tokens.shape[1] // 64
    for step in range(30):
        some = tokens[:, step % pieces * 64 : (step % pieces + 1) * 64]
        model(input_ids=some, labels=some).loss.backward()
        optimizer.step()
        model.zero_grad()
    model.save_pretrained(tmp_path / "tuned")
    try:
        found = ckptgrow.rank(real_gemma, tmp_path / "tuned", out=tmp_path / "ranking.json")
        before, after = checkpoints.load(real_gemma), checkpoints.load(tmp_path / "tuned")
        for change in found.changes:
            stem = f"model.layers.{change.layer}.mlp."
            names = [f"{stem}{projection}_proj.weight" for projection in ("gate", "up", "down")]
            was, now = (torch.cat([t[name].reshape(-1) for name in names]).double() for t in (before, after))
            assert change.block == pytest.approx(float(torch.linalg.norm(now - was) / torch.linalg.norm(was)), rel=1e-9)
            for projection, figure in change.projections.items():
                name = f"{stem}{projection}_proj.weight"
                one, other = before[name].double(), after[name].double()
                assert figure == pytest.approx(float(torch.linalg.norm(other - one) / torch.linalg.norm(one)), rel=1e-9)
        blocks = [change.block for change in found.changes]
        assert blocks == sorted(blocks, reverse=True)
        assert min(blocks) > 0
        assert sorted(found.layers) == list(range(18))
        assert len(ranked((tmp_path / "ranking.json").read_bytes(), "ranking.json")) == 7
        again = ckptgrow.rank(real_gemma, tmp_path / "tuned", plot=tmp_path / "layers.svg")
        assert again.changes == found.changes
        ckptgrow.rank(real_gemma, tmp_path / "tuned", plot=tmp_path / "layers.png")
        assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (tmp_path / "layers.svg").read_bytes()
    finally:
        shutil.rmtree(tmp_path / "tuned")
