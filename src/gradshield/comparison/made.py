"""How a comparison was made, as (name, value), for its page and its Markdown."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from pathlib import PurePath

from gradshield.comparison.grid import Config
from gradshield.comparison.results import CellResult, Comparison
from gradshield.manifests import judges_of
from gradshield.report.made import DEFAULTS, LONG, WHOLE, Pairs, adapter_words, option_words, span
from gradshield.report.text import one_line

LAB = "lab"  # the bundled model in a config


def pairs(whole: Comparison) -> Pairs:
    """What every arm shares."""
    config, cells = whole.config, whole.cells
    own = config.model == LAB
    found: Pairs = [("Model", "the bundled lab's" if own else _path(config.model))]
    if config.base:
        found.append(("Model before its alignment", _path(config.base)))
    found += _recipes(whole)
    adapter = whole.adapter or config.lora
    found.append(("Adapter", adapter_words(adapter) if adapter else "the lab's own LoRA" if own else WHOLE))
    found.append(("Judges", ", ".join(judges_of(cell.judges for cell in cells) or config.judges) or "none"))
    found += [] if own else _measured(config)
    found.append(("Seeds", ", ".join(map(str, sorted({cell.seed for cell in cells}))) or "none"))
    found += _sizes(cells)
    return [(name, one_line(value, LONG)) for name, value in found]


def _recipes(whole: Comparison) -> Pairs:
    """Training options: per task if known, else from the config."""
    if whole.recipes:
        texts = {task: option_words(found) or DEFAULTS for task, found in whole.recipes.items()}
        if len(set(texts.values())) == 1:
            return [("Training", next(iter(texts.values())))]
        return [(f"Training on {task}", text) for task, text in texts.items()]
    config, common = whole.config, option_words(whole.config.training)
    default = "the lab's own recipe for each task" if config.model == LAB else DEFAULTS
    found = [("Training", (f"{default}, with {common}" if config.model == LAB else common) if common else default)]
    own = [(f"Training on {dataset.name}", option_words(dataset.training)) for dataset in config.datasets]
    return found + [(name, options) for name, options in own if options]


def _measured(config: Config) -> Pairs:
    """Requests, answers and the task's metrics of a user's own datasets."""
    files = ", ".join(f"{split} from {_path(path)}" for split, path in config.requests.items())
    found = [("Requests", files or "the built-in ones"), ("Longest answer", f"{config.answer_tokens} tokens")]
    metrics = [f"{own.name} by {own.metric or 'the metric of its rows'}" for own in config.datasets if own.task]
    if metrics:
        found.append(("Utility", f"{', '.join(metrics)}; at most {config.task_rows} rows of each"))
    return found


def _sizes(cells: Sequence[CellResult]) -> Pairs:
    rows = [(cell.rows, cell.removed) for cell in cells if cell.rows is not None]
    found = [
        ("Rows of a dataset", span([count for count, _ in rows])),
        ("Rows trained on", span([count - removed for count, removed in rows])),
    ]
    return [(name, value) for name, value in found if value]


def _path(value: str) -> str:
    """A normalised path or a name: ``configs/../../model`` is ``../model``."""
    return os.path.normpath(value) if ".." in PurePath(value).parts else value
