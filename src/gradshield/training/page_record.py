"""The record of a method's work in training: a table per method, with a label for every known key."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from gradshield.report.sheet import Entry, Section, Table
from gradshield.report.text import brief, number, one_line

LINES = 120  # of one method
FEW = 8  # values under one key; more are shown as a range, and in full among the settings

_WORDS = {
    "asft": {
        "weight": "weight of the penalty", "projector": "projector", "layers": "layers held", "changed": "what is held",
        "energy": "share of the alignment's energy held", "unchanged_by_alignment": "layers unchanged by alignment",
        "largest_eigenvalue.max": "largest eigenvalue, highest of any layer",
        "largest_eigenvalue.median": "largest eigenvalue, median layer", "layers_beyond_two": "layers with an eigenvalue above 2",
        "directions.min": "directions held, fewest of any layer", "directions.median": "directions held, median layer",
        "directions.max": "directions held, most of any layer", "value": "last value of the penalty",
    },
    "kl": {
        "weight": "weight of the penalty", "reference": "reference model", "value": "last value of the penalty",
    },
    "dualselect": {
        "name": "method", "warmup": "batches before it begins", "refresh": "batches between refreshes",
        "temperature": "temperature of the weights", "top": "references used at once",
        "weight": "weight of preservation against conflict",
        "drop": "largest share of a batch dropped", "correction": "gradient corrected", "engine": "engine",
        "references": "references in the pool", "batches": "batches seen", "rows": "rows seen", "dropped": "rows dropped",
        "refreshes": "refreshes", "steps": "steps", "corrections": "steps corrected",
        "conflict": "conflict of task and safety, mean", "preservation": "KL from the start in nats, mean",
    },
    "moderate": {
        "ratio": "share of a batch trained on", "batches": "batches seen", "rows_seen": "rows seen",
        "rows_trained": "rows trained on", "rows_outside_band": "rows outside the band of losses",
    },
    "safelora": {
        "threshold": "cosine below which a layer is projected", "layers": "most layers to project",
        "projected": "layers projected", "cosines": "cosines of the layers",
    },
}  # fmt: skip


def section(record: Mapping[str, Any]) -> Section:
    """A table per method of a record, ``{method: {key: value}}``, and one for values outside any method."""
    nested = {str(name): found for name, found in record.items() if isinstance(found, Mapping) and found}
    loose = {str(key): found for key, found in record.items() if not isinstance(found, Mapping)}
    parts = [*nested.items(), *([("", loose)] if loose else [])]
    tables = tuple(_table(name, found, len(parts) > 1) for name, found in parts)
    return Section("record", "What the method did in training", tables=tables, nav="Record")


def _table(name: str, found: Mapping[str, Any], several: bool) -> Table:
    words = _WORDS.get(name, {})
    lines = _lines(found)
    hint = f"{len(lines) - LINES:,} more are among the settings below." if len(lines) > LINES else ""
    shown = tuple((words.get(key, key), Entry(value, look="words")) for key, value in lines[:LINES])
    return Table(("Setting or count", "Value"), shown, title=name if several else "", hint=hint)


def _lines(found: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, value in found.items():
        name = one_line(f"{prefix}{key}", 120)
        if not isinstance(value, Mapping) or not value:
            lines.append((name, _value(value)))
        elif len(value) > FEW and all(isinstance(entry, int | float) for entry in value.values()):
            lines.append((name, _range([float(entry) for entry in value.values()])))
        else:
            lines += _lines(value, f"{name}.")
    return lines


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"{len(value)}: {', '.join(map(str, value))}" if len(value) <= FEW else f"{len(value)}"
    return number(value) if value is None or isinstance(value, bool | int | float) else brief(value)


def _range(values: list[float]) -> str:
    low, middle, high = (number(x, 3) for x in (min(values), median(values), max(values)))
    return f"{len(values)} values from {low} to {high}, median {middle}"
