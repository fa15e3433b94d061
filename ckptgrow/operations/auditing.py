"""audit: did training leave the frozen part alone, and putting it back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckptgrow.drift import Audit, compare_names, examine
from ckptgrow.hub import fetch
from ckptgrow.progress import Meter, Progress, silent
from ckptgrow.reference import open_reference
from ckptgrow.repair import check_repairable
from ckptgrow.repair import repair as put_back
from ckptgrow.staging import check_apart, check_target
from ckptgrow.trained import open_trained

Source = str | Path


def audit(
    grown: Source,
    trained: Source,
    *,
    manifest: Source | None = None,
    repair: Source | None = None,
    force: bool = False,
    progress: Progress | None = None,
    bars: bool = False,
) -> Audit:
    """Whether training left the frozen elements of `grown` alone in `trained`, and if not, what moved them.

    `grown` is the checkpoint that training started from, or the base that it grew from: then the growth is made again,
    tensor by tensor, by the manifest. That is `manifest` (a file, or a folder that has it), else the one beside
    `trained` that its config.json names. `repair` names a new folder for the trained checkpoint with its frozen
    elements put back; `force` does so even where they were trained, which destroys what they learned. Where nothing
    moved, nothing is written. Raises CkptgrowError for what cannot be compared, and then nothing is left on disk.
    """
    mine, its = fetch(grown, progress=bars).folder, Path(trained)
    out, report = Path(repair).resolve() if repair is not None else None, progress or silent
    if out is not None:
        check_target(out, force=False)
        check_apart(out, mine)
        check_apart(out, its)
    found = open_trained(its)
    job = compare_names(open_reference(mine, found, Path(manifest) if manifest is not None else None), found)
    seen, drifted = examine(job, Meter(report, "auditing", job.elements))
    if out is None or (seen.cause == "nothing" and not seen.findings):
        return seen
    check_repairable(job, seen, force)
    put_back(job, seen, drifted, out, Meter(report, "repairing", job.trained_bytes))
    return replace(seen, repaired=str(repair))
