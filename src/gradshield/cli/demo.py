"""``gradshield demo``: scan, train and compare with the bundled lab."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gradshield.cli import options
from gradshield.cli.common import command_line, out, progress, quiet_libraries


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything the demo writes.")] = Path(
        "gradshield-demo"
    ),
    task: Annotated[str, typer.Option(help="Utility task of the bundled lab.")] = "choice",
    harm: Annotated[str, typer.Option(help="Kind of harm mixed in.")] = "explicit",
    ratio: Annotated[str, typer.Option(help="Share of harmful rows.")] = "10%",
    seed: Annotated[int, typer.Option(help="Seed of the mix, the scan and the training.")] = 0,
) -> None:
    """Scan a poisoned set with the bundled lab model, fine-tune with and without the filter, and compare."""
    amount = options.share("--ratio", ratio) or 0.0
    quiet_libraries()
    import torch

    from gradshield.comparison.demo import run

    torch.set_num_threads(
        1
    )  # a second one saves nothing on so small a model, and on a busy machine the two wait for each other
    out.print("[dim]one scan, two trainings, three measurements: about a minute[/dim]")
    with progress() as report:
        result = run(output, task, harm, amount, seed, command_line(), report)
    table = Table(title="GradShield demo", title_justify="left", title_style="bold")
    table.add_column("")
    for name in result.columns:
        table.add_column(name, justify="right")
    for measure, cells in result.rows:
        table.add_row(measure, *cells)
    Console(highlight=False).print(table)
    out.print("[dim]rates with their 95 % Wilson interval and n[/dim]")
    out.print(f"report  [bold]{escape(str(output / 'report.html'))}[/bold]")
    out.print(
        "next    gradshield scan data.jsonl --model MODEL --output screened/   [dim]your rows and your model[/dim]"
    )
