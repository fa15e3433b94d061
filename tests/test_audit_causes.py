"""The cause that audit names, on checkpoints made each way by real short training runs; and what rounding is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from checkpoints import Tensors
from trainings import check_repaired, frozen, grow, masks, moved, steps, to_float, trained

from ckptgrow.errors import RequestError
from ckptgrow.numeric import FLOATS, decode
from ckptgrow.operations import audit
from ckptgrow.report import audit as text
from ckptgrow.traces import LEAST_EVIDENCE, Fates


@pytest.fixture(params=["BF16", "F32"])
def grown(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny Gemma grown twofold, in each of the dtypes that are trained."""
    return grow(checkpoints.make(tmp_path / "base", dtype=request.param, width=48), tmp_path / "grown")


def run(grown: Path, work: Callable[[Tensors], None]) -> Path:
    """A checkpoint in float32 that `work` trained, as a trainer saves it."""

    def change(tensors: Tensors) -> None:
        to_float(tensors)
        work(tensors)

    return trained(grown, change, new=0.0)


def runs(grown: Path, tensors: Tensors, count: int) -> list[Tensors]:
    """So many runs from one start, each on data of its own, in float32 and saved in the dtype they came in."""
    made = []
    for seed in range(count):
        made.append({name: tensor.float() for name, tensor in tensors.items()})
        steps(made[-1], grown, seed=seed, count=20)
    return [{name: tensor.to(tensors[name].dtype) for name, tensor in one.items()} for one in made]


# ---------------------------------------------------------------- made each way


@pytest.mark.parametrize(
    ("masked", "decay", "cause"), [(True, 0.0, "nothing"), (True, 0.1, "decay"), (False, 0.0, "trained")]
)
def test_adamw(grown: Path, masked: bool, decay: float, cause: str) -> None:
    """Masked gradients, with and without decay, and no mask: told apart, exit 0 or 1, the trainable part moved."""
    folder = run(grown, lambda tensors: steps(tensors, grown, masked=masked, decay=decay))
    seen = audit(grown, folder)
    assert (seen.cause, seen.exit_code) == (cause, int(cause != "nothing"))
    assert 0 < seen.total("changed") == seen.total("trainable")
    assert moved(seen) == (set() if cause == "nothing" else set(masks(grown)))
    if cause == "decay":
        audit(grown, folder, repair=grown.with_name("out"))
        check_repaired(grown, folder, grown.with_name("out"))


def test_bf16_weights_and_decay_that_rounds_away(tmp_path: Path) -> None:
    """A learning rate at which decay moves no bf16 weight: clean, and the trainable part did move."""
    grown = grow(checkpoints.make(tmp_path / "base"), tmp_path / "grown")
    seen = audit(grown, trained(grown, lambda tensors: steps(tensors, grown, decay=0.1), new=0.0))
    assert (seen.cause, seen.exit_code) == ("nothing", 0)
    assert seen.total("changed") > 0.5 * seen.total("trainable")


def test_the_mean_of_three_runs(grown: Path) -> None:
    """Frozen parts that were equal in all of them, divided again: averaging, and repaired to the bit."""

    def mean(tensors: Tensors) -> None:
        one, two, three = runs(grown, tensors, 3)
        tensors.update({name: (one[name] + two[name] + three[name]) / 3 for name in tensors})

    folder = trained(grown, mean, new=0.0)
    seen = audit(grown, folder)
    assert (seen.cause, seen.exit_code) == ("averaging", 1)
    assert seen.total("changed") > 0.9 * seen.total("trainable")
    audit(grown, folder, repair=grown.with_name("out"))
    check_repaired(grown, folder, grown.with_name("out"))


def averaged(grown: Path) -> Path:
    """A hundred steps, and the exponential moving average of the weights."""

    def work(tensors: Tensors) -> None:
        average = {name: tensor.clone() for name, tensor in tensors.items()}

        def follow(weights: Tensors) -> None:
            for name, tensor in average.items():
                tensor.mul_(0.999).add_(weights.get(name, tensors[name]), alpha=1 - 0.999)

        steps(tensors, grown, count=100, after=follow)
        tensors.update(average)

    return run(grown, work)


def test_a_moving_average(tmp_path: Path) -> None:
    """It drifts by many units, but equal values drift equally: rounding, and repaired to the bit."""
    grown = grow(checkpoints.make(tmp_path / "base", width=48), tmp_path / "grown")
    folder = averaged(grown)
    seen = audit(grown, folder)
    assert (seen.cause, seen.exit_code) == ("rounding", 0)  # none of it in bf16
    assert 2.0**-20 < max(drift.largest_relative for drift in seen.tensors) < 1e-4
    assert "equal values moved equally" in text(seen)
    audit(grown, folder, repair=grown.with_name("out"))
    check_repaired(grown, folder, grown.with_name("out"))


def test_a_moving_average_of_too_few_equal_values(tmp_path: Path) -> None:
    """In a tiny fp32 checkpoint hardly any value is met twice: no evidence, so it may have been training."""
    grown = grow(checkpoints.make(tmp_path / "base", width=48, dtype="F32"), tmp_path / "grown")
    seen = audit(grown, averaged(grown))
    assert (seen.cause, seen.exit_code) == ("trained", 1)


# ---------------------------------------------------------------- what rounding is not


def _small_steps(tensor: torch.Tensor) -> torch.Tensor:
    """What an optimizer does to weights whose gradient it sees: as small as an average's drift, by place."""
    signs = torch.randint(0, 2, tensor.shape, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return tensor + signs * tensor.abs() * 2e-6


def _one_in_many(tensor: torch.Tensor) -> torch.Tensor:
    kept = tensor.clone()
    kept.view(-1)[3] *= 1 + 2e-6
    return kept


def _all_the_same_way(tensor: torch.Tensor) -> torch.Tensor:
    """One step of a sign-based optimizer all of whose gradients agree."""
    return tensor + 1e-5


@pytest.mark.parametrize("change", [_small_steps, _one_in_many, _all_the_same_way])
def test_tiny_training_is_training(tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """However small the steps: they depend on the place, not on the value alone. Not repaired without --force."""
    grown = grow(checkpoints.make(tmp_path / "base", width=48), tmp_path / "grown")

    def work(tensors: Tensors) -> None:
        to_float(tensors)
        frozen(grown, change)(tensors)

    folder = trained(grown, work)
    assert audit(grown, folder).cause == "trained"
    with pytest.raises(RequestError, match="destroys what they learned"):
        audit(grown, folder, repair=tmp_path / "out")


def test_a_few_steps_without_a_mask(tmp_path: Path) -> None:
    """Real steps at a tiny rate, one and three of them."""
    grown = grow(checkpoints.make(tmp_path / "base", width=48), tmp_path / "grown")
    for count in (1, 3):

        def work(tensors: Tensors, count: int = count) -> None:
            steps(tensors, grown, masked=False, count=count, rate=1e-7)

        folder = run(grown, work)
        assert audit(grown, folder).cause == "trained"
        shutil.rmtree(folder)


def _met(values: list[float], steps: list[int]) -> Fates:
    """Float32 values that moved by so many places."""
    was = np.array(values, np.float32)
    its = (was.view("<u4").astype(np.int64) + steps).astype("<u4")
    fates = Fates(FLOATS["F32"], "F32")
    for some in (slice(None, 70), slice(70, None)):
        fates.add(was[some].astype(np.float64), its[some], decode(its[some], "F32"))
    return fates


def test_fates() -> None:
    """Enough equal mantissas that moved equally, signs and powers of two aside, in whatever block; and each fault."""
    values, many = [1.5, -3.0, 0.75, 1.25], LEAST_EVIDENCE
    assert _met(values * many, [7, 7, 7, 0] * many).explained
    assert not _met(values * 3, [7, 7, 7, 0] * 3).explained  # too few
    assert not _met(values * many, [7, 7, 8, 0] * many).explained
    assert not _met(values * many, [7, 7, 7, 0] * (many - 1) + [7, 7, 7, 1]).explained
    assert _met([*values * many, 1.75], [*[7, 7, 7, 0] * many, 5]).explained
    assert not _met([*values * many, 1.75], [*[7, 7, 7, 0] * many, 9]).explained  # alone, and farther than the others
    assert not _met([*values * many, 0.0], [*[7, 7, 7, 0] * many, 1 << 24]).explained
