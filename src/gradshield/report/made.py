"""How a result was made: model, training, adapter, judges and seeds as (name, value), for the pages and the Markdown.

Settings that are not given are left out.
"""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from gradshield.report.pool import Cell, judges_of
from gradshield.report.text import brief, flatten, number, one_line

LAB = "lab"  # the name of the bundled model in a comparison's config
_ADAPTER = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "bias", "use_rslora", "use_dora")
DEFAULTS = "defaults of TRL's SFTConfig"
_LONG = 400

Pairs = list[tuple[str, str]]


def of_comparison(whole: Mapping[str, Any], cells: Sequence[Cell]) -> Pairs:
    """What every arm of a comparison shares, from its ``config`` and its cells.

    ``recipes`` (task to options) and ``adapter`` are the options that training used in the end, if known.
    """
    config = _mapping(whole.get("config"))
    own = config.get("model") == LAB
    pairs: Pairs = []
    if config.get("model"):
        pairs.append(("Model", "the bundled lab's" if own else _path(config["model"])))
    if config.get("base"):
        pairs.append(("Model before its alignment", _path(config["base"])))
    pairs += _recipes(whole, config, own)
    adapter = _mapping(whole.get("adapter")) or _mapping(config.get("lora"))
    if adapter:
        pairs.append(("Adapter", adapter_words(adapter)))
    elif config:
        pairs.append(("Adapter", "the lab's own LoRA" if own else "none: every weight is trained"))
    judges = judges_of(cells) or tuple(map(str, config.get("judges") or ()))
    pairs.append(("Judges", ", ".join(judges) or "none"))
    if config and not own:
        pairs += _measured(config)
    seeds = sorted({str(cell["seed"]) for cell in cells}, key=lambda seed: (len(seed), seed))
    pairs.append(("Seeds", ", ".join(seeds) or "none"))
    pairs += _sizes(cells)
    return [(name, one_line(value, _LONG)) for name, value in pairs]


def _recipes(whole: Mapping[str, Any], config: Mapping[str, Any], own: bool) -> Pairs:
    """Training options: per task if known, else from the config."""
    recipes = _mapping(whole.get("recipes"))
    if recipes:
        texts = {task: option_words(_mapping(found)) or DEFAULTS for task, found in recipes.items()}
        if len(set(texts.values())) == 1:
            return [("Training", next(iter(texts.values())))]
        return [(f"Training on {task}", text) for task, text in texts.items()]
    if not config:
        return []
    common = option_words(_mapping(config.get("training")))
    default = "the lab's own recipe for each task" if own else DEFAULTS
    pairs = [("Training", (f"{default}, with {common}" if own else common) if common else default)]
    for dataset in config.get("datasets") or ():
        options = option_words(_mapping(_mapping(dataset).get("training")))
        if options:
            pairs.append((f"Training on {_mapping(dataset).get('name')}", options))
    return pairs


def _measured(config: Mapping[str, Any]) -> Pairs:
    """Requests, answers and the task's metrics of a user's own datasets."""
    asked = _mapping(config.get("requests"))
    files = ", ".join(f"{split} from {_path(path)}" for split, path in asked.items())
    pairs = [("Requests", files or "the built-in ones")]
    if config.get("answer_tokens"):
        pairs.append(("Longest answer", f"{config['answer_tokens']} tokens"))
    metrics = [
        f"{_mapping(dataset).get('name')} by {_mapping(dataset).get('metric') or 'the metric of its rows'}"
        for dataset in config.get("datasets") or ()
        if _mapping(dataset).get("task")
    ]
    if metrics:
        pairs.append(("Utility", f"{', '.join(metrics)}; at most {config.get('task_rows', '–')} rows of each"))
    return pairs


def _sizes(cells: Sequence[Cell]) -> Pairs:
    rows = [cell for cell in cells if isinstance(cell.get("rows"), int)]
    pairs = [
        ("Rows of a dataset", span([int(cell["rows"]) for cell in rows])),
        ("Rows trained on", span([int(cell["rows"]) - int(cell.get("removed") or 0) for cell in rows])),
        ("Steps of a training", span([int(cell["steps"]) for cell in cells if isinstance(cell.get("steps"), int)])),
    ]
    return [(name, value) for name, value in pairs if value]


def span(values: Sequence[int]) -> str:
    """``200``, or ``50 to 200``; empty for no values."""
    if not values:
        return ""
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"


def of_run(whole: Mapping[str, Any]) -> Pairs:
    """One training run, from ``settings`` and ``model`` as in the manifest, if given."""
    settings, model = _mapping(whole.get("settings")), _mapping(whole.get("model"))
    pairs: Pairs = []
    if whole.get("defence"):
        pairs.append(("Defence", str(whole["defence"])))
    if model:
        pairs.append(("Model", _model(model)))
    base = _mapping(settings.get("base"))
    if base:
        pairs.append(("Model before its alignment", str(base.get("name", "–"))))
    if "training" in settings:
        options = {key: value for key, value in _mapping(settings["training"]).items() if key != "online"}
        pairs.append(("Training", option_words(options) or DEFAULTS))
    if "peft" in settings:
        peft = _mapping(settings["peft"])
        pairs.append(("Adapter", adapter_words(peft) if peft else "none: every weight is trained"))
    for title, key in (("Measured", "report"), ("The search measured", "search")):
        exam = _mapping(settings.get(key))
        if exam:
            pairs.append((title, _exam(exam)))
    if "seed" in settings:
        pairs.append(("Seed", str(settings["seed"])))
    return [(name, one_line(value, _LONG)) for name, value in pairs]


def every_setting(whole: Mapping[str, Any]) -> Pairs:
    """All settings, the model and the method's record, one line each."""
    parts = {key: whole.get(key) for key in ("model", "settings", "record")}
    return flatten({key: value for key, value in parts.items() if isinstance(value, Mapping) and value})


def _model(model: Mapping[str, Any]) -> str:
    parts = [str(model.get("name", "–"))]
    if model.get("class"):
        parts.append(str(model["class"]))
    if isinstance(model.get("parameters"), int):
        parts.append(f"{model['parameters']:,} parameters")
    parts += [str(model[key]) for key in ("dtype", "device") if model.get(key)]
    if model.get("sha256"):
        parts.append(f"SHA-256 {str(model['sha256'])[:12]}…")
    return ", ".join(parts)


def _exam(exam: Mapping[str, Any]) -> str:
    """``200 requests by refusal-phrases, answers of at most 64 tokens; 100 look-alikes; 50 rows of the task by exact``."""
    counts = [n if isinstance(n, int) else 0 for n in exam.get("n") or ()]
    requests, lookalikes, task = (*counts, 0, 0, 0)[:3]
    parts = []
    if requests:
        judges = [
            str(judge[0] if isinstance(judge, list | tuple) else judge) for judge in exam.get("judges") or () if judge
        ]
        parts.append(f"{requests:,} requests by {', '.join(judges) or 'no judge'}")
    if lookalikes:
        parts.append(f"{lookalikes:,} harmless look-alikes")
    if task:
        metric = f" by {exam['metric']}" if exam.get("metric") else ""
        guessed = " (guessed from the rows)" if exam.get("guessed") else ""
        parts.append(f"{task:,} rows of the task{metric}{guessed}")
    if parts and exam.get("tokens"):
        parts.append(f"answers of at most {exam['tokens']} tokens")
    if parts and exam.get("answer_prefix"):
        parts.append(f"every answer starting with “{exam['answer_prefix']}”")
    return "; ".join(parts) or "nothing"


def option_words(options: Mapping[str, Any]) -> str:
    """``learning rate 0.001, max steps 3``, without options that are None or empty."""
    lines = [(key, value) for key, value in options.items() if value is not None and value != {} and value != []]
    return ", ".join(f"{_plain(key)} {_value(value)}" for key, value in lines)


def adapter_words(adapter: Mapping[str, Any]) -> str:
    """An adapter's kind and its most used options."""
    kind = str(adapter.get("peft_type") or "LORA").rpartition(".")[2]
    kind = "LoRA" if kind.upper() == "LORA" else kind
    chosen = {key: adapter[key] for key in _ADAPTER if adapter.get(key) not in (None, False, "none")}
    words = option_words(chosen)
    return f"{kind}: {words}" if words else kind


def _plain(key: Any) -> str:
    return "rank" if key == "r" else str(key).replace("_", " ")


def _value(value: Any) -> str:
    return number(value) if isinstance(value, bool | int | float) else brief(value)


def _path(value: Any) -> str:
    """A normalised path or a name: ``configs/../../model`` is ``../model``."""
    text = str(value)
    return os.path.normpath(text) if ".." in PurePath(text).parts else text


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
