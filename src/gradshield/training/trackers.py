"""Weights & Biases, MLflow, TensorBoard and the like, through the callbacks of transformers: the training, then our rates.

The rates are measured when the trainer has ended, and some of its callbacks close their run then. So their end is put off until
the rates are logged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from gradshield.errors import UsageError, first_line
from gradshield.types import EvalResult

HELD = "on_train_end"
EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_") and name != HELD]


def named(report_to: str | Sequence[str] | None) -> list[str]:
    """The names that ``report_to`` holds; none for None and ``none``."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    return [name for name in names if name != "none"]


class Reporters(TrainerCallback):  # type: ignore[misc]
    """The callbacks of some names in transformers' ``report_to``, told of everything but the end.

    Raises UsageError for a name that transformers does not have, or a package that is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self._last: tuple[Any, ...] | None = None
        try:
            made = get_reporting_integration_callbacks(list(names))
            self.callbacks = [callback() for callback in made]
        except (ValueError, RuntimeError, ImportError) as error:
            raise UsageError(
                f"report_to cannot use {', '.join(names)} ({first_line(error, most=None)}): install it, or give none"
            ) from None
        for callback in self.callbacks:
            if getattr(callback, "logging_dir", "") is None:  # TensorBoard's is else in the folder of the checkpoints
                callback.logging_dir = str(folder / "tensorboard")

    def finish(self, values: Mapping[str, float]) -> None:
        """Log values after the last step, and end the run; nothing where no training has begun."""
        if self._last is None:
            return
        args, state, control = self._last
        for callback in self.callbacks:
            callback.on_log(args, state, control, logs=dict(values))
            callback.on_train_end(args, state, control)


def _told(event: str) -> Callable[..., None]:
    def tell(self: Reporters, args: Any, state: Any, control: Any, **more: Any) -> None:
        if event == "on_train_begin":
            self._last = args, state, control
        for callback in self.callbacks:
            getattr(callback, event)(args, state, control, **more)

    return tell


for _event in EVENTS:
    setattr(Reporters, _event, _told(_event))


def values(before: EvalResult, after: EvalResult, counts: Mapping[str, float]) -> dict[str, float]:
    """Every rate as a number, and the counts, by names that all of them take; trackers group them under ``eval``."""
    rates = {f"before_{name}": rate.rate for name, rate in before.rates.items()}
    rates |= {name: rate.rate for name, rate in after.rates.items()}
    return {"eval_" + re.sub(r"[^\w .-]", "_", name): float(value) for name, value in (rates | dict(counts)).items()}
