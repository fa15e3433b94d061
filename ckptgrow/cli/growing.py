"""ckptgrow inspect, expand, verify."""

from __future__ import annotations

from typing import Any

import click

from ckptgrow.cli.group import as_json, bars, from_file, json_of, main, quiet
from ckptgrow.policy import POLICIES, SHARE_CHOICES
from ckptgrow.surgery import UNEVEN_CHOICES

in_tower = click.option(
    "--tower", metavar="NAME", help="Which part of a model of several: vision, audio, ...  [default: the text model]"
)


@main.command()
@click.argument("src")
@in_tower
@from_file
@click.option("--propose", is_flag=True, help="Print a declaration for --family, guessed from names and shapes.")
@as_json
def inspect(src: str, tower: str | None, family: str | None, propose: bool, as_json: bool) -> None:
    """Say what SRC is: its MLPs and their widths, dtypes, size, what can grow and why not.

    Reads headers only; a Hub id is not downloaded.
    """
    from ckptgrow import operations, report

    if propose:
        guess = operations.propose(src)
        click.echo(report.declaration(guess), err=True)
        return click.echo(json_of(guess) if as_json else report.declared(guess))
    seen = operations.inspect(src, tower=tower, family=family)
    click.echo(json_of(seen) if as_json else report.inspection(seen))
    return None


@main.command()
@click.argument("src")
@click.argument("out")
@click.option("--factor", type=int, help="Grow to K times the width.  [default: 2]", metavar="K")
@click.option("--width", type=int, help="Grow to N units: the first N - p are copied, in rounds above 2p.", metavar="N")
@click.option("--multiple-of", type=int, default=1, help="Round the new width up to a multiple of M.", metavar="M")
@click.option(
    "--policy",
    type=click.Choice(list(POLICIES)),
    default="g-freeze",
    show_default=True,
    help="What will train: the new units; all of gate and up; new columns of down; new rows of up.",
)
@click.option(
    "--shares",
    type=click.Choice(SHARE_CHOICES),
    default="auto",
    show_default=True,
    help="How columns of down are shared out. auto: random where two trainable copies would stay equal, else even.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of random shares.")
@click.option(
    "--layers",
    metavar="LIST",
    help="Grow only these layers, such as 3-11,20, or @ranking.json.",
)
@click.option(
    "--uneven",
    type=click.Choice(UNEVEN_CHOICES),
    default="uniform",
    show_default=True,
    help="The layers that --layers leaves out: filled up to one width, or as they are where the config can say so.",
)
@in_tower
@click.option(
    "--experts",
    default="all",
    show_default=True,
    metavar="all|shared|LIST",
    help="Which experts grow, such as 0,4-7, the others being filled up; shared: only what every token passes.",
)
@from_file
@click.option("--plan", is_flag=True, help="Say what would happen and write nothing; with --json the whole Plan.")
@click.option("--force", is_flag=True, help="Replace an existing OUT, only after the new one is complete.")
@click.option("--resume", is_flag=True, help="Go on from the finished shards of a killed run.")
@click.option("--no-verify", is_flag=True, help="Do not prove the result before OUT appears.")
@as_json
@quiet
def expand(
    src: str,
    out: str,
    plan: bool,
    force: bool,
    resume: bool,
    no_verify: bool,
    as_json: bool,
    quiet: bool,
    **growth: Any,
) -> None:
    """Grow the MLPs of SRC into the new folder OUT, the same function.

    OUT opens in stock loaders. ckptgrow.json in it says what was done and which elements should train.
    """
    from ckptgrow import operations, report

    if plan:
        proposal = operations.plan_expand(src, out, **growth)
        return click.echo(json_of(proposal) if as_json else report.proposal(proposal))
    with bars(quiet) as progress:
        done = operations.expand(
            src,
            out,
            **growth,
            force=force,
            resume=resume,
            verify=not no_verify,
            progress=progress,
            bars=progress is not None,
        )
    if as_json or not quiet:
        click.echo(json_of(done) if as_json else report.expansion(done))
    return None


@main.command()
@click.argument("base")
@click.argument("out")
@from_file
@click.option("--logits", metavar="TEXTFILE", help="Also run both models on this text (needs transformers).")
@as_json
@quiet
def verify(base: str, out: str, logits: str | None, family: str | None, as_json: bool, quiet: bool) -> None:
    """Say whether OUT is the same function as BASE, from the bytes of both.

    untouched: every tensor outside the MLPs is byte-identical. proved: each new unit copies a base unit bit for bit
    and the shares of each column add up to it exactly. probed: one forward of each MLP on random inputs.

    Exit status: 0 the same function, 1 not, 2 cannot tell.
    """
    from ckptgrow import operations, report

    with bars(quiet) as progress:
        result = operations.verify(
            base, out, logits=logits, family=family, progress=progress, bars=progress is not None
        )
    if as_json or not quiet:
        click.echo(json_of(result) if as_json else report.verification(result))
    raise click.exceptions.Exit(result.exit_code)
