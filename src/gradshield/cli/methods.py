"""``gradshield methods``: everything there is to choose."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gradshield.cli.common import quiet_libraries


def methods() -> None:
    """List all defences, selectors, probes, engines, thresholds, judges, metrics, aggregates, subspaces and row shapes."""
    quiet_libraries()
    from gradshield.pipeline.options import catalogue

    for kind, entries in catalogue().items():
        table = Table(
            title=kind, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2, 0, 0)
        )
        table.add_column(style="cyan", no_wrap=True)
        table.add_column()
        for name, text in entries.items():
            table.add_row(escape(name), escape(text))
        Console(highlight=False, emoji=False).print(table, "")
