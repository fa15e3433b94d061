"""The command line: options -> one library call -> output. Errors and exit codes are mapped here, once.

Data goes to stdout (text, or JSON with --json); talk, progress bars and errors go to stderr. Exit status: 0 yes or
done, 1 the answer is no, 2 could not do or tell.
"""

from __future__ import annotations

import errno
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ckptgrow.errors import CkptgrowError
from ckptgrow.policy import POLICIES, SHARE_CHOICES
from ckptgrow.version import __version__


class Group(click.Group):
    """Turns ckptgrow's errors, and the system's, into one message and exit status 2; a bug shows its trace first."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CkptgrowError as error:
            self._fail(ctx, str(error))
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has left: click's business
                raise
            where = f"{error.filename}: " if error.filename else ""
            self._fail(ctx, f"{where}{error.strerror or error}")
        except (KeyboardInterrupt, EOFError):
            click.echo("Interrupted.", err=True)
            ctx.exit(130)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception:
            traceback.print_exc()
            self._fail(ctx, "this is a bug in ckptgrow: please report it with the lines above.")

    @staticmethod
    def _fail(ctx: click.Context, message: str) -> None:
        click.echo(f"Error: {message}", err=True)
        ctx.exit(2)


as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
quiet = click.option("-q", "--quiet", is_flag=True, help="No progress, and no text but errors.")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ckptgrow")
def main() -> None:
    """Grow the MLPs of a Hugging Face checkpoint without changing the function it computes, and prove it.

    SRC is a checkpoint folder or a Hub id: org/name or org/name@revision.
    """


@main.command()
@click.argument("src")
@as_json
def inspect(src: str, as_json: bool) -> None:
    """Say what SRC is: its MLPs and their widths, dtypes, size, what can grow and why not.

    Reads headers only; a Hub id is not downloaded.
    """
    from ckptgrow import operations, report

    seen = operations.inspect(src)
    click.echo(_json(seen) if as_json else report.inspection(seen))


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
    """Grow every MLP of SRC into the new folder OUT, the same function.

    OUT opens in stock loaders. ckptgrow.json in it says what was done and which elements should train.
    """
    from ckptgrow import operations, report

    if plan:
        proposal = operations.plan_expand(src, out, **growth)
        return click.echo(_json(proposal) if as_json else report.proposal(proposal))
    with _bars(quiet) as progress:
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
        click.echo(_json(done) if as_json else report.expansion(done))
    return None


@main.command()
@click.argument("base")
@click.argument("out")
@click.option("--logits", metavar="TEXTFILE", help="Also run both models on this text (needs transformers).")
@as_json
@quiet
def verify(base: str, out: str, logits: str | None, as_json: bool, quiet: bool) -> None:
    """Say whether OUT is the same function as BASE, from the bytes of both.

    untouched: every tensor outside the MLPs is byte-identical. proved: each new unit copies a base unit bit for bit
    and the shares of each column add up to it exactly. probed: one forward of each MLP on random inputs.

    Exit status: 0 the same function, 1 not, 2 cannot tell.
    """
    from ckptgrow import operations, report

    with _bars(quiet) as progress:
        result = operations.verify(base, out, logits=logits, progress=progress, bars=progress is not None)
    if as_json or not quiet:
        click.echo(_json(result) if as_json else report.verification(result))
    raise click.exceptions.Exit(result.exit_code)


@main.command()
@click.argument("grown")
@click.argument("trained")
@click.option(
    "--repair", metavar="OUT", help="Write TRAINED with its frozen elements put back into the new folder OUT."
)
@click.option("--force", is_flag=True, help="Repair even what was trained, and lose what it learned.")
@as_json
@quiet
def audit(grown: str, trained: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Say whether training left the frozen part of GROWN alone in TRAINED, and if not, what moved it.

    TRAINED is what any trainer saved: safetensors or a torch.distributed.checkpoint. No trainer and no model is needed.

    Exit status: 0 untouched, or repaired; 1 moved; 2 cannot tell.
    """
    from ckptgrow import operations, report

    with _bars(quiet) as progress:
        result = operations.audit(grown, trained, **options, progress=progress, bars=progress is not None)
    if as_json or not quiet:
        click.echo(_json(result) if as_json else report.audit(result))
    raise click.exceptions.Exit(result.exit_code)


def _json(result: Any) -> str:
    return json.dumps(result.to_json(), indent=2, default=str)


@contextmanager
def _bars(quiet: bool) -> Iterator[Any]:
    """A progress callable that draws one bar a stage on stderr; None where nobody looks."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            bars[stage] = tqdm(total=total, desc=stage, unit="B", unit_scale=True, file=sys.stderr, leave=False)
        bars[stage].update(done - bars[stage].n)
        if done >= total:
            bars[stage].close()

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()
