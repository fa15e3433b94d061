"""ckptgrow mask."""

from __future__ import annotations

import click

from ckptgrow.cli.group import as_json, bars, json_of, main, quiet

# Those of operations.mask, which a test holds: importing them here would make --help wait for numpy.
FORMATS = ("json", "names", "axolotl", "llamafactory", "peft", "safetensors")


@main.command()
@click.argument("grown")
@click.option(
    "--format", "wording", type=click.Choice(FORMATS), default="json", show_default=True, help="In whose words."
)
@click.option("--out", metavar="OUT", help="Write a new file; with safetensors, which needs it, a new folder.")
@as_json
@quiet
def mask(grown: str, wording: str, out: str | None, as_json: bool, quiet: bool) -> None:
    """Say which elements of GROWN train, in a trainer's own words; comments in it say what they cannot express.

    json: boxes by tensor name. names: whole tensors. axolotl, llamafactory, peft: what goes into their configuration.
    safetensors: a checkpoint of 0 and 1 with GROWN's own names and shapes.
    """
    from ckptgrow import operations, report

    with bars(quiet) as progress:
        made = operations.mask(grown, wording, out=out, progress=progress)
    if as_json or out is None or not quiet:
        click.echo(json_of(made) if as_json else report.mask(made), nl=as_json or out is not None)
