"""ckptgrow revert."""

from __future__ import annotations

from typing import Any

import click

from ckptgrow.cli.group import as_json, bars, json_of, main, quiet


@main.command()
@click.argument("grown")
@click.argument("out")
@click.option("--base", metavar="BASE", help="Take the base's own bytes from BASE, checked against the manifest.")
@click.option("--manifest", metavar="GROWN", help="The grown folder, or its ckptgrow.json, where GROWN was trained.")
@click.option("--all", "every", is_flag=True, help="Undo every growth, not only the last.")
@as_json
@quiet
def revert(grown: str, out: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write the checkpoint that GROWN was grown from into the new folder OUT, byte for byte.

    GROWN is what expand wrote, or what a trainer made of it. The base is read back from the frozen part, and each
    tensor checked against its digest. After g-freeze, down and up that works without the base, after g-train only
    until it is trained, since it moves the base's own rows; of a merge where its weights leave a part of the base.

    Exit status: 0 reverted, 1 the frozen part moved in training, 2 it does not determine the base.
    """
    from ckptgrow import operations, report

    with bars(quiet) as progress:
        result = operations.revert(grown, out, **options, progress=progress, bars=progress is not None)
    if as_json or not quiet:
        click.echo(json_of(result) if as_json else report.reversion(result))
    raise click.exceptions.Exit(result.exit_code)
