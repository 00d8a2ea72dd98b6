"""The command-line app, and the commands that need neither rows nor a model: ``methods`` and ``cache``."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gradshield import __version__
from gradshield import cache as kept
from gradshield.cli.common import err, out, plain, quiet_libraries
from gradshield.cli.evaluate import certify, evaluate
from gradshield.cli.scan import cut, estimate, review, scan, show
from gradshield.cli.serve import keys, serve
from gradshield.cli.train import compare, demo, train
from gradshield.errors import GradShieldError
from gradshield.models.loading import keep_freed_memory
from gradshield.report.text import duration


def methods() -> None:
    """List all defences, selectors, probes, engines, thresholds, judges, metrics, aggregates, subspaces and row shapes."""
    quiet_libraries()
    for kind, entries in catalogue().items():
        table = Table(
            title=kind, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2, 0, 0)
        )
        table.add_column(style="cyan", no_wrap=True)
        table.add_column()
        for name, text in entries.items():
            table.add_row(escape(name), escape(text))
        Console(highlight=False, emoji=False).print(table, "")


def catalogue() -> dict[str, dict[str, str]]:
    """Every registered method: kind -> name -> first line of its docstring."""
    from gradshield.data import SHAPES
    from gradshield.evaluation.metrics import METRICS, UNREGISTERED
    from gradshield.gradients import ENGINES, SUBSPACES
    from gradshield.judges import JUDGES
    from gradshield.probes import PROBES
    from gradshield.selectors import AGGREGATES, SELECTORS
    from gradshield.thresholds import THRESHOLDS, Verified
    from gradshield.training.defences import DEFENCES

    registries: tuple[Any, ...] = (DEFENCES, SELECTORS, PROBES, ENGINES, THRESHOLDS, JUDGES, METRICS)
    found = {f"{r.kind}s": {name: r.summary(name) for name in r} for r in registries}
    found["thresholds"][Verified.name] = (inspect.getdoc(Verified) or "").split("\n", 1)[0]
    found["metrics"] |= UNREGISTERED
    found["aggregates"] = dict(AGGREGATES)
    found["subspaces"] = dict(SUBSPACES)
    found["row shapes"] = {name: "keys " + ", ".join(SHAPES[name].keys) for name in SHAPES}
    return found


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete all entries.")] = False,
) -> None:
    """List what is kept of scanned models, so that the next scan of the same model starts sooner.

    An entry holds what a scan found on a model before its first row: its answers to the probes, the direction of its unsafety
    score, how it reads known requests. No row of a dataset is in it. GRADSHIELD_CACHE names another folder; if it is empty,
    nothing is kept.
    """
    folder = kept.folder()
    if folder is None:
        out.print("nothing is kept: GRADSHIELD_CACHE is empty")
        return
    if clear:
        out.print(f"{kept.clear()} entries deleted from {plain(str(folder))}")
        return
    found = kept.entries()
    for path, status in found:
        name, _, digest = path.stem.partition("-")
        used = duration(max(0.0, time.time() - status.st_mtime))
        out.print(f"{plain(name):10} {plain(digest[:12]):12} {status.st_size / 2**20:9.1f} MiB   used {used} ago")
    whole = sum(status.st_size for _, status in found) / 2**20
    out.print(f"{len(found)} entries, {whole:.1f} of {kept.MOST / 2**20:,.0f} MiB, in {plain(str(folder))}")


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


# In the order of the help.
for command in (scan, train, evaluate, certify, compare, cut, review, show, estimate, methods, cache, demo, serve):
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
