"""ckptgrow fold."""

from __future__ import annotations

from typing import Any

import click

from ckptgrow.cli.group import as_json, bars, from_file, json_of, main, quiet


@main.command()
@click.argument("trained")
@click.argument("out")
@click.option(
    "--width",
    multiple=True,
    metavar="[KEY=]N",
    help="Fold to N units, if that is exact; of one of several config keys, KEY.  [default: the base's widths]",
)
@click.option("--partial", is_flag=True, help="Fold to the smallest exact widths, even if they are not the base's.")
@click.option(
    "--dtype",
    type=click.Choice(["float32"]),
    help="Keep in float32 the tensors in which a sum would be rounded; without it each sum is rounded once.",
)
@click.option("--atol", type=float, default=0.0, metavar="A", help="Let rows that differ by no more count as equal.")
@click.option("--lossy", is_flag=True, help="Not exact: make the nearest one of each unit and its copies.")
@click.option("--max-error", type=float, metavar="E", help="With --lossy: write nothing where an MLP is off by more.")
@click.option("--plan", is_flag=True, help="Say what would happen and write nothing; with --json the whole Plan.")
@click.option("--force", is_flag=True, help="Replace an existing OUT, only after the new one is complete.")
@from_file
@as_json
@quiet
def fold(
    trained: str, out: str, width: tuple[str, ...], plan: bool, force: bool, as_json: bool, quiet: bool, **wish: Any
) -> None:
    """Fold the MLPs of TRAINED back to a standard shape in the new folder OUT, where that is the same function.

    Units with equal gate and up rows are one unit: their columns of down are added. Units with equal gate rows fold
    too where their up rows or their columns of down are parallel, or one of a few is an exact combination of the
    others, since a unit is linear in both. Experts fold one by one; all MLPs of one config key get one width, and of
    units that a norm or a cutoff takes statistics over only whole copies go. What was trained with `down`, `up` (even
    shares) or `g-train` (even shares, two copies) folds. What was trained with `g-freeze` does not: its gate rows
    moved, and two units with unequal gates are two different functions that no one unit can be.
    --lossy makes the nearest narrow model instead, and says how far off each MLP is.

    Exit status: 0 written, 1 it does not fold to the width asked for (nothing is written), 2 could not tell.
    """
    from ckptgrow import operations, report

    with bars(quiet) as progress:
        wish |= {"width": _widths(width), "progress": progress, "bars": progress is not None}
        if plan:
            done = operations.plan_fold(trained, out, **wish)
        else:
            done = operations.fold(trained, out, **wish, force=force)
    if as_json or not quiet:
        click.echo(json_of(done) if as_json else report.folding(done))
    raise click.exceptions.Exit(done.exit_code)


def _widths(given: tuple[str, ...]) -> int | dict[str, int] | None:
    """The one number, or a number for each key."""
    told = {}
    for one in given:
        key, _, number = one.rpartition("=")
        if not number.removeprefix("-").isdecimal() or key in told or (not key and len(given) > 1):
            raise click.BadParameter(f"{' '.join(given)}: give one N, or KEY=N for each key", param_hint="--width")
        told[key] = int(number)
    return told.get("", told or None)
