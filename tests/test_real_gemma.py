"""The real Gemma 3 270M (bf16, three shards), grown every way: set CKPTGROW_GEMMA to its folder.

Outputs are half a gigabyte and more, so each is removed as soon as its test is done.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ckptgrow
from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.policy import POLICIES

pytestmark = pytest.mark.real

TEXT = Path(__file__).parent.parent / "LICENSE"  # some thousand tokens of English
TOKENS = 512
WIDTH = 2048
GROWTHS: dict[str, dict[str, Any]] = {"twice": {"factor": 2}, "thrice": {"factor": 3}, "between": {"width": 2560}}
LOADED = [("twice", "even", "g-freeze"), ("thrice", "random", "g-freeze"), ("between", "even", "g-freeze")]
LOADED += [("some", "even", "g-freeze")]
SOME = "3-7,12"
LOADS = GROWTHS | {"some": {"layers": SOME}}
BLOCK = 3 * 640 * WIDTH  # what one MLP gets
FORBIDDEN = ("torch", "transformers", "safetensors.torch", "huggingface_hub", "tqdm")


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where to grow; gone after the test."""
    yield tmp_path / "out"
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """No more cores than a small machine has; no bars."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", reason="runs the model in real transformers")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    transformers.logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)
    transformers.logging.enable_progress_bar()


def names(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor on disk with its dtype and shape."""
    return {name: (info.dtype, info.shape) for name, info in open_checkpoint(folder).infos.items()}


def widened(name: str, shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    """The shape that a tensor of the base has after growth."""
    axis = 1 if "mlp.down_proj" in name else 0 if "mlp." in name else None
    return tuple(width if i == axis else size for i, size in enumerate(shape))


# ---------------------------------------------------------------- on the weights


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shares", ["even", "random"])
@pytest.mark.parametrize("growth", GROWTHS)
def test_grown_is_the_same_function(real_gemma: Path, out: Path, growth: str, shares: str, policy: str) -> None:
    """Whatever the width, the shares and the policy: the base's names, and not one weight off by one bit."""
    done = ckptgrow.expand(real_gemma, out, **GROWTHS[growth], shares=shares, policy=policy, seed=5, verify=False)
    assert done.manifest.shares["used"] == [shares]
    width = done.manifest.blocks[0].new_width
    expected = {name: (dtype, widened(name, shape, width)) for name, (dtype, shape) in names(real_gemma).items()}
    assert names(out) == expected
    verification = ckptgrow.verify(real_gemma, out)
    assert [answer.verdict for answer in verification.answers] == ["yes", "yes", "yes"], verification
    assert verification.exit_code == 0
    untouched, proved, probed = (answer.figure for answer in verification.answers)
    assert untouched == "182 of 182 tensors outside the MLPs are byte-identical"
    assert proved == f"{18 * width:,} units are {18 * WIDTH:,} base units in 18 MLPs, largest error 0.0"
    print(f"{growth} {shares} {policy}: {probed}")


def test_one_bit_is_seen(real_gemma: Path, out: Path) -> None:
    """The lowest bit of one of 6 million shares flipped: no, and in which tensor."""
    ckptgrow.expand(real_gemma, out, verify=False)
    grown, name = open_checkpoint(out), "model.layers.9.mlp.down_proj.weight"
    path, offset, _ = grown.span(name)
    with path.open("r+b") as file:
        file.seek(offset + 2 * 1234)
        byte = file.read(1)[0]
        file.seek(offset + 2 * 1234)
        file.write(bytes([byte ^ 1]))
    verification = ckptgrow.verify(real_gemma, out)
    assert verification.exit_code == 1
    assert [finding.tensor for answer in verification.answers for finding in answer.findings] == [name]


def test_grown_twice_is_still_gemma(real_gemma: Path, out: Path, tmp_path: Path) -> None:
    """A grown one grown again is the base's function still, and remembers."""
    second = tmp_path / "second"
    try:
        first = ckptgrow.expand(real_gemma, out, width=2560)
        again = ckptgrow.expand(out, second, factor=2, policy="g-train")
        assert [entry["base"]["config"] for entry in again.manifest.history] == [first.manifest.base.config]
        assert ckptgrow.verify(real_gemma, second).exit_code == 0
    finally:
        shutil.rmtree(second, ignore_errors=True)


def test_some_layers(real_gemma: Path, out: Path) -> None:
    """Layers 3-7 and 12 grow, twelve are filled: the figures of --plan, the mask, the proof."""
    what = ckptgrow.plan_expand(real_gemma, out, layers=SOME)
    done = ckptgrow.expand(real_gemma, out, layers=SOME)
    assert (
        what.parameters_after
        == 268_098_176 + 18 * BLOCK
        == done.manifest.counts.trainable + done.manifest.counts.frozen
    )
    assert (what.trainable, what.parameters_filled, what.bytes_filled) == (6 * BLOCK, 12 * BLOCK, 2 * 12 * BLOCK)
    assert done.manifest.counts.trainable_share_of_base == round(6 * BLOCK / 268_098_176, 6)
    written = sum(file.stat().st_size for file in out.iterdir())
    assert abs(what.bytes_to_write - written) < 100_000
    assert {tensor.layer for tensor in done.manifest.trainable} == {3, 4, 5, 6, 7, 12}
    verification = ckptgrow.verify(real_gemma, out)
    assert verification.exit_code == 0
    expected = "49,152 units and 24,576 units with a zero column are 36,864 base units in 18 MLPs, largest error 0.0"
    assert verification.answers[1].figure == expected


# ---------------------------------------------------------------- in transformers


def logits(folder: Path, dtype: Any) -> Any:
    """[tokens, vocabulary] on the text, after a look at what from_pretrained complained about."""
    import torch
    import transformers

    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXT.read_text("utf-8"), return_tensors="pt")
    model, said = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert {key: found for key, found in said.items() if found} == {}
    with torch.no_grad():
        found = model.eval()(tokens.input_ids[:, :TOKENS]).logits[0].float()
    assert found.shape == (TOKENS, 262144)
    return found


@pytest.fixture(scope="module")
def expected(real_gemma: Path) -> Any:
    """The base's float32 logits, computed once."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers", reason="runs the model in real transformers")
    return logits(real_gemma, torch.float32)


@pytest.mark.transformers
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("growth", "shares", "policy"), LOADED)
def test_logits_agree(real_gemma: Path, out: Path, expected: Any, growth: str, shares: str, policy: str) -> None:
    """Stock transformers opens it without a word: float32 logits within 1e-3, every first token the same."""
    import torch

    ckptgrow.expand(real_gemma, out, **LOADS[growth], shares=shares, policy=policy)
    got = logits(out, torch.float32)
    largest = float((got - expected).abs().max())
    print(f"{growth} {shares} {policy}: largest float32 logit difference {largest:.3g}")
    assert expected.abs().max() > 1
    assert largest <= 1e-3
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.transformers
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("growth", "shares", "policy"), LOADED)
def test_verify_with_logits(real_gemma: Path, out: Path, growth: str, shares: str, policy: str) -> None:
    """verify's own fourth answer on the same text is yes, with bfloat16 beside the base's own distance to float32."""
    ckptgrow.expand(real_gemma, out, **LOADS[growth], shares=shares, policy=policy)
    verification = ckptgrow.verify(real_gemma, out, logits=TEXT)
    answer = verification.answers[-1]
    print(f"{growth} {shares} {policy}: {answer.figure}")
    assert (answer.name, answer.verdict, verification.exit_code) == ("logits", "yes", 0)
    assert answer.figure.startswith("float32 on 512 tokens: largest difference ")
    assert "top-1 agreement 100.00%; bfloat16: largest difference " in answer.figure
    assert "(the base's own distance to float32: largest difference " in answer.figure


@pytest.mark.transformers
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("layers", [None, SOME])
def test_the_cards_code_trains_only_the_boxes(real_gemma: Path, out: Path, layers: str | None) -> None:
    """Two steps with the model card's own code: every box moves, and every other element keeps its bits."""
    import torch

    from ckptgrow.card import SNIPPET

    done, names = ckptgrow.expand(real_gemma, out, layers=layers), {"folder": str(out)}
    exec(compile(SNIPPET, "the card", "exec"), names)
    model: Any = names["model"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for seed in range(2):
        tokens = torch.randint(1000, 50000, (1, 48), generator=torch.Generator().manual_seed(seed))
        model(input_ids=tokens, labels=tokens).loss.backward()
        names["optimizer"].step()
        names["optimizer"].zero_grad()
    boxes = {tensor.name: tensor.boxes for tensor in done.manifest.trainable}
    assert len(boxes) == 3 * (6 if layers else 18)
    for name, after in model.state_dict().items():
        differs = before[name].view(torch.int32) != after.view(torch.int32)
        for box in boxes.get(name, ()):
            inside = differs[tuple(slice(start, stop) for start, stop in box)]
            assert inside.any(), name
            inside.zero_()
        assert not differs.any(), name


# ---------------------------------------------------------------- the quick commands


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["inspect", "{gemma}"],
        ["expand", "{gemma}", "{out}", "--plan"],
        ["expand", "{gemma}", "{out}", "--plan", "--json"],
    ],
    ids=["help", "inspect", "plan", "plan as json"],
)
def test_quick_commands_import_nothing_heavy(real_gemma: Path, out: Path, arguments: list[str]) -> None:
    """Headers are all they need: no torch, no transformers, no Hub; and nothing is written."""
    code = (
        "import sys, json\nfrom ckptgrow.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: assert not end.code, end.code\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    filled = [argument.format(gemma=real_gemma, out=out) for argument in arguments]
    done = subprocess.run([sys.executable, "-c", code, *filled], capture_output=True, text=True, check=True)
    assert done.stdout
    modules = set(json.loads(done.stderr))
    assert modules.isdisjoint(FORBIDDEN), modules & set(FORBIDDEN)
    assert not out.exists()


def test_the_mask_of_the_real_model(real_gemma: Path, out: Path, two_threads: None) -> None:
    """One line of Axolotl for 18 layers; stock transformers opens the checkpoint of 0 and 1."""
    import transformers

    manifest = ckptgrow.expand(real_gemma, out, verify=False).manifest
    axolotl = ckptgrow.mask(out, "axolotl").text or ""
    assert "#   - '^model.layers.[0-9]+.mlp.(gate_proj|up_proj).weight$[2048:4096]'\n" in axolotl
    ckptgrow.mask(out, "safetensors", out=out / "../mask")
    mask, said = transformers.AutoModelForCausalLM.from_pretrained(out / "../mask", output_loading_info=True)
    shutil.rmtree(out / "../mask")
    assert not any(said.values())
    held = {name: parameter.detach() for name, parameter in mask.named_parameters()}
    assert sum(int(parameter.float().sum()) for parameter in held.values()) == manifest.counts.trainable
    for tensor in manifest.trainable:
        for box in tensor.boxes:
            assert bool((held[tensor.name][tuple(slice(a, b) for a, b in box)] == 1).all())
