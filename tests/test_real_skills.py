"""Coming back on the real Gemma 3 270M: trained for real, reverted, extracted, applied, merged. Set CKPTGROW_GEMMA."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_skills import alike

import ckptgrow

pytestmark = [pytest.mark.real, pytest.mark.transformers]

TEXTS = {
    "licence": (Path(__file__).parent.parent / "LICENSE").read_text("utf-8"),
    "code": Path(__file__).read_text("utf-8"),
}


def learn(grown: Path, text: str, out: Path, steps: int = 3, decay: float = 0.0) -> Path:
    """What plain PyTorch and ckptgrow.training.freeze make of it: a few steps of AdamW in fp32, saved in bfloat16."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", reason="trains the model in real transformers")
    from ckptgrow.training import freeze

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(grown, dtype=torch.float32)
    handle = freeze(model)
    optimizer = torch.optim.AdamW(handle.trained().values(), lr=1e-4, weight_decay=decay)
    tokens = transformers.AutoTokenizer.from_pretrained(grown)(text, return_tensors="pt").input_ids[0]
    for step in range(steps):
        batch = tokens[step * 64 : step * 64 + 64][None]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.check(optimizer)
    handle.remove()
    model.to(torch.bfloat16).save_pretrained(out)
    return out


def same_files(one: Path, other: Path) -> bool:
    """What `diff -r` says, without reading both into memory."""
    mine, its = (sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) for folder in (one, other))
    return mine == its and all(
        (one / name).stat().st_size == (other / name).stat().st_size
        and (one / name).read_bytes() == (other / name).read_bytes()
        for name in mine
    )


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where some gigabytes are written; gone after the test."""
    yield tmp_path / "here"
    shutil.rmtree(tmp_path / "here", ignore_errors=True)


def test_there_and_back(real_gemma: Path, folder: Path) -> None:
    """Two trainings of one growth: each gives the base back, each is its skill again, and both go into one model."""
    ckptgrow.expand(real_gemma, folder / "grown", verify=False)
    for name, text in TEXTS.items():
        trained = learn(folder / "grown", text, folder / name)
        assert ckptgrow.revert(trained, folder / "base", manifest=folder / "grown").exit_code == 0
        assert same_files(real_gemma, folder / "base")
        done = ckptgrow.extract(trained, folder / f"skill-{name}", manifest=folder / "grown")
        assert (done.exit_code, done.elements) == (0, 70_778_880)
        ckptgrow.apply(real_gemma, folder / f"skill-{name}", folder / "again")
        assert alike(trained, folder / "again")
        for gone in ("base", "again", name):
            shutil.rmtree(folder / gone)
    merging = ckptgrow.merge(real_gemma, [folder / f"skill-{name}" for name in TEXTS], folder / "both")
    assert [answer.verdict for answer in merging.answers] == ["yes"] * 3
    assert {block.new_width for block in merging.blocks} == {4096}
    print(*(answer.figure for answer in merging.answers), sep="\n")
