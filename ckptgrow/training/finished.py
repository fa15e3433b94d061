"""The audit at the end of a run, for launchers and plugins that are called when a trainer has saved its model."""

from __future__ import annotations

from pathlib import Path

from ckptgrow import report
from ckptgrow.errors import FreezeError
from ckptgrow.operations import audit


def audit_saved(grown: Path | str, trained: Path | str) -> None:
    """Print what `ckptgrow audit grown trained` prints. Raises FreezeError where its answer is not a clean yes.

    `grown` may be the path of its ckptgrow.json, as everywhere in training.
    """
    grown = Path(grown).parent if Path(grown).is_file() else grown
    seen = audit(grown, trained)
    print(report.audit(seen))
    if not seen.clean:
        raise FreezeError(
            "the saved model's frozen part is not that of the grown one",
            file=str(trained),
            hint=f"See `ckptgrow audit {grown} {trained}`; --repair may put it back.",
        )
