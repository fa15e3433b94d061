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


from_file = click.option(
    "--family", metavar="FILE", help="Take the architecture from this declaration in JSON; see inspect --propose."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
quiet = click.option("-q", "--quiet", is_flag=True, help="No progress, and no text but errors.")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ckptgrow")
def main() -> None:
    """Grow the MLPs of a Hugging Face checkpoint without changing the function it computes, and prove it.

    SRC is a checkpoint folder or a Hub id: org/name or org/name@revision.
    """


def json_of(result: Any) -> str:
    return json.dumps(result.to_json(), indent=2, default=str)


@contextmanager
def bars(quiet: bool) -> Iterator[Any]:
    """A progress callable that draws one bar a stage on stderr; None where nobody looks."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    drawn: dict[str, Any] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in drawn:
            drawn[stage] = tqdm(total=total, desc=stage, unit="B", unit_scale=True, file=sys.stderr, leave=False)
        drawn[stage].update(done - drawn[stage].n)
        if done >= total:
            drawn[stage].close()

    try:
        yield show
    finally:
        for bar in drawn.values():
            bar.close()
