"""revert: the base checkpoint back from a grown one."""

from __future__ import annotations

from pathlib import Path

from ckptgrow.hub import fetch
from ckptgrow.progress import Meter, Progress, silent
from ckptgrow.reversal import Reversion, check_doubtful, prepare, write
from ckptgrow.staging import check_apart, check_target

Source = str | Path


def revert(
    grown: Source,
    out: Source,
    *,
    base: Source | None = None,
    manifest: Source | None = None,
    every: bool = False,
    progress: Progress | None = None,
    bars: bool = False,
) -> Reversion:
    """Write the checkpoint that `grown` was grown from, trained or not, into the new folder `out`, byte for byte.

    `manifest` names the grown folder (or its ckptgrow.json) where the trained one has none; `base` the base itself,
    whose bytes are then taken; `every` undoes all growths, not only the last. Each tensor is checked against its digest
    in the manifest. Raises CkptgrowError where the frozen part does not determine the base, and then nothing is left
    on disk; where it moved in training, the result says so and nothing is written.
    """
    folder, target, report = Path(grown), Path(out).resolve(), progress or silent
    origin = fetch(base, progress=bars).folder if base is not None else None
    given = Path(manifest) if manifest is not None else None
    check_target(target, force=False)
    for source in (folder, origin, given):
        if source is not None and source.is_dir():
            check_apart(target, source)
    job = prepare(folder, origin, given, every=every)
    check_doubtful(job)
    return write(job, folder, Path(out), Meter(report, "writing", job.layout.nbytes))
