"""ckptgrow rank."""

from __future__ import annotations

from typing import Any

import click

from ckptgrow.cli.group import as_json, bars, from_file, json_of, main, quiet


@main.command()
@click.argument("base")
@click.argument("tuned")
@click.option("--top", type=int, metavar="N", help="How many layers to grow.  [default: 10 of 26, as the paper]")
@click.option("--out", metavar="FILE", help="Write the ranking as JSON for expand --layers @FILE.")
@click.option("--plot", metavar="FILE", help="Draw it as .png or .svg (needs the extra plot: matplotlib).")
@from_file
@as_json
@quiet
def rank(base: str, tuned: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Say which layers to grow: those that an ordinary fine-tuning of BASE, TUNED, changed most.

    For each layer the relative Frobenius norm of the change of gate, up and down, and of the whole MLP. No model is
    built. TUNED is what any trainer saved, in any sharding and dtype.
    """
    from ckptgrow import operations, report

    with bars(quiet) as progress:
        found = operations.rank(base, tuned, **options, progress=progress, bars=progress is not None)
    if as_json or not quiet:
        click.echo(json_of(found) if as_json else report.ranking(found))
