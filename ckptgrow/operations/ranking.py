"""rank: which layers an ordinary fine-tuning changed most, as a ranking that expand --layers reads."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ckptgrow.checkpoint import open_checkpoint
from ckptgrow.errors import OutputError
from ckptgrow.families import locate
from ckptgrow.hub import fetch
from ckptgrow.operations.declaring import declaration
from ckptgrow.plot import check_plot, drawn
from ckptgrow.progress import Meter, Progress, silent
from ckptgrow.ranking import Ranking, comparison, ranking
from ckptgrow.trained import open_trained

Source = str | Path


def rank(
    base: Source,
    tuned: Source,
    *,
    top: int | None = None,
    out: Source | None = None,
    plot: Source | None = None,
    family: Source | None = None,
    progress: Progress | None = None,
    bars: bool = False,
) -> Ranking:
    """The layers of `tuned`, an ordinary fine-tuning of `base`, the most changed first.

    `tuned` is whatever a trainer saved, as for `audit`. `top` says how many to grow (10 of 26 where it does not); `out`
    is a new file for `expand --layers @FILE`, `plot` a new .png or .svg. Raises CkptgrowError for what is not the same
    architecture, and then no file is written.
    """
    files = [Path(file) for file in (out, plot) if file is not None]
    for file in files:
        if file.exists():
            raise OutputError("it exists", file=str(file), hint="Give a new file.")
    if plot is not None:
        check_plot(Path(plot))
    one = open_checkpoint(fetch(base, progress=bars).folder)
    architecture = locate(one.config, one.infos, family=declaration(family))
    job = comparison(one, architecture, open_trained(fetch(tuned, progress=bars).folder))
    found = ranking(job, top, Meter(progress or silent, "ranking", job.nbytes))
    data = [json.dumps(found.to_json(), indent=2).encode() + b"\n"] if out is not None else []
    data += [drawn(found, Path(plot).suffix.lower())] if plot is not None else []
    _write(dict(zip(files, data, strict=True)))
    return found


def _write(files: dict[Path, bytes]) -> None:
    """Each file under a temporary name first, so that none is seen half written."""
    temporary = {path: path.with_name(path.name + ".partial") for path in files}
    try:
        for path, data in files.items():
            with temporary[path].open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            temporary[path].rename(path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
