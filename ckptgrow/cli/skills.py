"""ckptgrow extract, apply."""

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
