"""How a result was made: model, training, adapter, judges and seeds as (name, value), for the pages and the Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradshield.manifests import ExamRecord, Model, TrainingRecord
from gradshield.report.text import brief, number, one_line

_ADAPTER = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "bias", "use_rslora", "use_dora")
DEFAULTS = "defaults of TRL's SFTConfig"
WHOLE = "none: every weight is trained"
LONG = 400

Pairs = list[tuple[str, str]]


def span(values: Sequence[int]) -> str:
    """``200``, or ``50 to 200``; empty for no values."""
    if not values:
        return ""
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"


def of_run(settings: TrainingRecord, model: Model) -> Pairs:
    options = {key: value for key, value in settings.training.items() if key != "online"}
    pairs: Pairs = [("Defence", settings.defence), ("Model", model_words(model))]
    if settings.base is not None:
        pairs.append(("Model before its alignment", settings.base.name))
    words = option_words(options)
    if settings.method == "dpo":
        words = ", ".join(("DPO", words)) if words else "DPO, defaults of TRL's DPOConfig"
    pairs.append(("Training", words or DEFAULTS))
    pairs.append(("Adapter", adapter_words(settings.peft) if settings.peft else WHOLE))
    pairs.append(("Measured", _exam(settings.report)))
    if settings.search is not None:
        pairs.append(("The search measured", _exam(settings.search)))
    pairs.append(("Seed", str(settings.seed)))
    return [(name, one_line(value, LONG)) for name, value in pairs]


def model_words(model: Model) -> str:
    """A model's name, kind, size, type, device and hash."""
    adapter = [f"adapter {model.adapter}"] if model.adapter else []
    parts = [model.name, model.kind, f"{model.parameters:,} parameters", *adapter, model.dtype, model.device]
    return ", ".join([*parts, f"SHA-256 {model.sha256[:12]}…"])


def _exam(exam: ExamRecord) -> str:
    """``200 requests by refusal-phrases, answers of at most 64 tokens; 100 look-alikes; 50 rows of the task by exact``."""
    requests, lookalikes, task = exam.n
    parts = []
    if requests:
        judges = [judge if isinstance(judge, str) else judge[0] for judge in exam.judges]
        parts.append(f"{requests:,} requests by {', '.join(judges) or 'no judge'}")
    if lookalikes:
        parts.append(f"{lookalikes:,} harmless look-alikes")
    if task:
        metric = f" by {exam.metric}" if exam.metric else ""
        parts.append(f"{task:,} rows of the task{metric}{' (guessed from the rows)' if exam.guessed else ''}")
    if parts and exam.tokens:
        parts.append(f"answers of at most {exam.tokens} tokens")
    if parts and exam.answer_prefix:
        parts.append(f"every answer starting with “{exam.answer_prefix}”")
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
