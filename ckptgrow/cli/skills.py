"""ckptgrow extract, apply, merge."""

from __future__ import annotations

from typing import Any

import click

from ckptgrow.cli.group import as_json, bars, json_of, main, quiet


@main.command()
@click.argument("trained")
@click.argument("skill")
@click.option("--manifest", metavar="GROWN", help="The grown folder, or its ckptgrow.json, where TRAINED has none.")
@click.option("--base", metavar="BASE", help="Compare the frozen part with BASE, or with the grown folder.")
@as_json
@quiet
def extract(trained: str, skill: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write what TRAINED learned, and nothing else, into the new folder SKILL: a small file for `ckptgrow apply`.

    Everything outside the boxes of ckptgrow.json must be as the growth made it, since it is left out.

    Exit status: 0 written, 1 the frozen part moved in training, 2 could not tell.
    """
    from ckptgrow import operations, report

    with bars(quiet) as progress:
        result = operations.extract(trained, skill, **options, progress=progress, bars=progress is not None)
    if as_json or not quiet:
        click.echo(json_of(result) if as_json else report.extraction(result))
    raise click.exceptions.Exit(result.exit_code)


@main.command()
@click.argument("base")
@click.argument("skill")
@click.argument("out")
@as_json
@quiet
def apply(base: str, skill: str, out: str, as_json: bool, quiet: bool) -> None:
    """Write the checkpoint that SKILL was extracted from into the new folder OUT: each tensor's bytes are its own.

    BASE must be the checkpoint that was grown, to the bit.
    """
    from ckptgrow import operations, report

    with bars(quiet) as progress:
        result = operations.apply(base, skill, out, progress=progress, bars=progress is not None)
    if as_json or not quiet:
        click.echo(json_of(result) if as_json else report.application(result))


@main.command()
@click.argument("base")
@click.argument("skills", nargs=-1, required=True)
@click.argument("out")
@click.option("--weights", metavar="W,...", help="The λ of each skill, in their order.  [default: 1 for each]")
@click.option(
    "--dtype",
    type=click.Choice(["float32"]),
    help="Keep in float32 the tensors in which a sum would be rounded; without it each sum is rounded once.",
)
@as_json
@quiet
def merge(
    base: str, skills: tuple[str, ...], out: str, weights: str | None, as_json: bool, quiet: bool, **wish: Any
) -> None:
    """Write BASE with all SKILLS in it into the new folder OUT: each MLP is base + Σ λ·(skill - base).

    SKILLS are what extract wrote, or grown checkpoints with their ckptgrow.json; all must have grown from BASE, in any
    layers, towers and experts. The base's half that cancels is left out, so two skills with λ = 1 are no wider than
    one.

    Exit status: 0 written, 2 could not.
    """
    from ckptgrow import operations, report

    with bars(quiet) as progress:
        wish |= {"progress": progress, "bars": progress is not None}
        done = operations.merge(base, skills, out, weights=weights.split(",") if weights else None, **wish)
    if as_json or not quiet:
        click.echo(json_of(done) if as_json else report.merging(done))
