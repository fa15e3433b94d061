"""ckptgrow audit."""

from __future__ import annotations

from typing import Any

import click

from ckptgrow.cli.group import as_json, bars, json_of, main, quiet


@main.command()
@click.argument("grown", metavar="GROWN_OR_BASE")
@click.argument("trained")
@click.option("--manifest", metavar="PATH", help="The growth's ckptgrow.json, or a folder that has it.")
@click.option(
    "--repair", metavar="OUT", help="Write TRAINED with its frozen elements put back into the new folder OUT."
)
@click.option("--force", is_flag=True, help="Repair even what was trained, and lose what it learned.")
@as_json
@quiet
def audit(grown: str, trained: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Say whether training left the frozen part alone in TRAINED, and if not, what moved it.

    GROWN_OR_BASE is the checkpoint that training started from, or the base that it grew from: then the growth is made
    again, tensor by tensor, by --manifest or by TRAINED's own ckptgrow.json. TRAINED is what any trainer saved:
    safetensors or a torch.distributed.checkpoint. No trainer and no model is needed.

    Exit status: 0 untouched, or repaired; 1 moved; 2 cannot tell.
    """
    from ckptgrow import operations, report

    with bars(quiet) as progress:
        result = operations.audit(grown, trained, **options, progress=progress, bars=progress is not None)
    if as_json or not quiet:
        click.echo(json_of(result) if as_json else report.audit(result))
    raise click.exceptions.Exit(result.exit_code)
