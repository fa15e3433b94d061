"""A ranking as a picture, PNG or SVG; the only importer of matplotlib, which the extra `plot` installs.

One bar a layer for its block, those to be grown in another colour, and a mark for each projection. The same ranking
gives the same file.
"""

from __future__ import annotations

import io
from pathlib import Path

from ckptgrow.errors import RequestError
from ckptgrow.ranking import Ranking

KINDS = (".png", ".svg")
_CHOSEN, _OTHER = "#c44e52", "#b8c0cc"
_MARKS = "^vosDP"


def check_plot(path: Path) -> None:
    """Raise RequestError where no picture can be drawn, before anything is computed."""
    if path.suffix.lower() not in KINDS:
        raise RequestError(f"--plot {path}: give a file that ends in {' or '.join(KINDS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RequestError("--plot needs matplotlib", hint="pip install 'ckptgrow[plot]'") from None


def drawn(ranking: Ranking, kind: str) -> bytes:
    """The picture's file, of a kind in KINDS."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    chosen, changes = set(ranking.layers[: ranking.top]), sorted(ranking.changes, key=lambda change: change.layer)
    layers = [change.layer for change in changes]
    with rc_context({"svg.hashsalt": "ckptgrow"}):
        figure = Figure(figsize=(max(6.0, 1.5 + 0.32 * len(layers)), 4.0), layout="constrained")
        axes = figure.subplots()
        for grows, colour in ((True, _CHOSEN), (False, _OTHER)):
            some = [change for change in changes if (change.layer in chosen) is grows]
            label = f"block, the {ranking.top} to grow" if grows else "block"
            axes.bar([c.layer for c in some], [c.block for c in some], color=colour, label=label)
        for name, mark in zip(changes[0].projections, _MARKS, strict=False):
            known = [change for change in changes if name in change.projections]
            places, heights = [c.layer for c in known], [c.projections[name] for c in known]
            axes.plot(places, heights, mark, color="#333333", markersize=4, fillstyle="none", label=name)
        axes.set_xticks(layers)
        axes.tick_params(axis="x", labelsize=8, rotation=90 if max(layers) > 99 else 0)
        axes.set(xlabel="layer", ylabel="relative change (Frobenius)", title="Change of the MLPs in fine-tuning")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        picture = io.BytesIO()
        figure.savefig(
            picture, format=kind.removeprefix("."), dpi=150, metadata={"Date": None} if kind == ".svg" else None
        )
    return picture.getvalue()
