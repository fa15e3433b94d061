"""Fixtures: tiny checkpoints, and the real one where it is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parent.parent / "examples"))  # tiny.py, which the training examples share

import checkpoints


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny Gemma-shaped checkpoint in two shards, bf16, tied head."""
    return checkpoints.make(tmp_path / "base")


@pytest.fixture(scope="session")
def real_gemma() -> Path:
    """The real Gemma 3 270M; tests that ask for it are skipped where it is not."""
    folder = os.environ.get("CKPTGROW_GEMMA")
    if not folder or not Path(folder, "config.json").is_file():
        pytest.skip("set CKPTGROW_GEMMA to the folder of a real Gemma 3 270M")
    return Path(folder)


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """Tiny matrices gain nothing from threads; bars of loading are of no use here."""
    import torch
    import transformers

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    yield
    torch.set_num_threads(before)
    transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
