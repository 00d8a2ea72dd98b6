"""``gradshield compare``: every defence on the same tasks, as one table and one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from gradshield.cli.common import command_line, out, progress, quiet_libraries
from gradshield.errors import DataError, GradShieldError


def compare(
    config: Annotated[
        Path, typer.Argument(help="YAML of tasks, mixes, defences and seeds (docs/compare.md).", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for cells, arms, the table and the page.")],
    workers: Annotated[int, typer.Option(help="Processes, one core each.", min=1)] = 1,
) -> None:
    """Fine-tune and measure a grid of defences; finished cells are never run again.

    Exit code 1 if a cell failed: the table says why, and the same command retries it.
    """
    if not config.is_file():
        raise DataError(f"there is no config file {str(config)!r}: give a YAML file (docs/compare.md)")
    quiet_libraries()
    from gradshield.comparison.compare import compare as run
    from gradshield.comparison.grid import read

    checked = read(config)
    with progress() as report:
        whole = run(checked, output, workers, command_line(), report)
    cost = whole.cost
    took = cost.cell_seconds
    shown = f"{took / 3600:.1f} hours" if took >= 3600 else f"{took / 60:.1f} minutes"
    out.print(
        f"{cost.cells} cells from {cost.arms} trained models (equal ones are shared), {shown} of work"
        + (f", [bold]{cost.failed} failed[/bold]" if cost.failed else "")
    )
    out.print(f"table   [bold]{escape(str(output / 'results.md'))}[/bold]")
    out.print(f"page    [bold]{escape(str(output / 'results.html'))}[/bold]")
    if cost.failed:
        first = next(cell.failed for cell in whole.cells if cell.failed is not None)
        raise GradShieldError(
            f"{cost.failed} of {cost.cells} cells failed, the first because {first}; the table lists them, and the same "
            "command retries them"
        )
