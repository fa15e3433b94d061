"""fold for every family of the table, on the tiny models that real transformers makes: the base again, byte for byte.

What is compared: shards and config.json as bytes, the index as JSON. A family that is not in REFUSED has to fold.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="holds fold against real transformers, which is not installed")

from test_families_transformers import CASES, TOWERS, build
from test_fold import files

import ckptgrow

pytestmark = [pytest.mark.transformers, pytest.mark.filterwarnings("ignore")]  # what transformers says of its own

# (name, tower) -> what the refusal says. Nothing that grows is refused.
REFUSED: dict[tuple[str, str], str] = {}


@pytest.mark.parametrize(("name", "tower"), TOWERS)
def test_a_family_folds(name: str, tower: str, tmp_path: Path) -> None:
    """Grown, folded, and equal to what it was."""
    base = build(CASES[name], tmp_path / "base")
    ckptgrow.expand(base, tmp_path / "grown", factor=2, tower=tower, verify=False)
    if (name, tower) in REFUSED:
        with pytest.raises(ckptgrow.CkptgrowError, match=REFUSED[name, tower]):
            ckptgrow.fold(tmp_path / "grown", tmp_path / "folded")
        return
    done = ckptgrow.fold(tmp_path / "grown", tmp_path / "folded")
    assert done.exit_code == 0, done
    assert [answer.verdict for answer in done.answers] == ["yes", "yes"]
    expected, folded = files(base), files(tmp_path / "folded")
    assert [name for name in expected | folded if expected.get(name) != folded.get(name)] == []
