"""``gradshield methods``: every method that can be chosen by name."""

from __future__ import annotations

import inspect
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gradshield.cli.common import quiet_libraries


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
