"""The command-line app. To add a command, add a file to this folder and a name to ``COMMANDS``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from gradshield import __version__
from gradshield.cli.cache import cache
from gradshield.cli.certify import certify
from gradshield.cli.common import err, out, plain
from gradshield.cli.compare import compare
from gradshield.cli.cut import cut
from gradshield.cli.demo import demo
from gradshield.cli.evaluate import evaluate
from gradshield.cli.methods import methods
from gradshield.cli.review import review
from gradshield.cli.scan import estimate, scan
from gradshield.cli.serve import keys, serve
from gradshield.cli.show import show
from gradshield.cli.train import train
from gradshield.errors import GradShieldError
from gradshield.models.placement import keep_freed_memory

# In the order of the help.
COMMANDS: tuple[Callable[..., Any], ...] = (
    scan,
    train,
    evaluate,
    certify,
    compare,
    cut,
    review,
    show,
    estimate,
    methods,
    cache,
    demo,
    serve,
)

app = typer.Typer(
    name="gradshield",
    help="Keep a language model aligned while it is fine-tuned: find the rows of a fine-tuning set that would break its "
    "safety, and remove them.\n\nStart with `gradshield demo` (nothing is downloaded), then "
    "`gradshield scan data.jsonl --model MODEL --output screened/`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        out.print(f"gradshield {__version__}")
        raise typer.Exit


@app.callback()
def gradshield(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that come before a command."""


for command in COMMANDS:
    app.command()(command)
app.add_typer(keys)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; every error is one sentence and a documented exit code (docs/outputs.md).

    Typer's own parser reports unknown options and values of the wrong type, with exit code 2.
    """
    keep_freed_memory()
    warnings.showwarning = lambda message, *_args, **_kw: err.print(f"[yellow]warning:[/yellow] {plain(str(message))}")
    try:
        app(args=arguments, standalone_mode=True)
    except GradShieldError as error:
        err.print(f"[red]error:[/red] {plain(str(error))}")
        raise SystemExit(error.exit_code) from None
    except (KeyboardInterrupt, SystemExit) as stopped:
        # On Ctrl-C Typer exits with code 130 and prints nothing.
        if isinstance(stopped, SystemExit) and stopped.code != 130:
            raise
        err.print("[yellow]interrupted:[/yellow] finished work is kept; run the same command again to resume")
        raise SystemExit(130) from None
