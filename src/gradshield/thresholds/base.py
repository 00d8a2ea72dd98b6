"""What a threshold is given and what it gives back. Arrays in, one number out; nothing here knows a model."""

from __future__ import annotations

import math
from typing import Protocol, TypeVar

from gradshield.errors import EmptyDataError, UsageError
from gradshield.registry import Registry
from gradshield.types import Anchors, Cut, Floats

T = TypeVar("T")


class Threshold(Protocol):
    """Decides the cut of one group of rows on one scale. Rows whose score is greater than ``Cut.value`` go.

    ``values`` and ``decoys`` are (N,); ``anchors`` are rows of known kind on the same scale. A rule takes what it needs.
    """

    name: str

    def cut(self, values: Floats, decoys: Floats | None = None, anchors: Anchors | None = None) -> Cut: ...


THRESHOLDS: Registry[type[Threshold]] = Registry("threshold")


def parse(text: str, seed: int = 0) -> Threshold:
    """A threshold from its name and options, as typed: ``decoy``, ``decoy:q=0.1``, ``ratio:0.05``, ``fixed:3.2``.

    An option without a name is the rule's first. Raises UnknownNameError and UsageError.
    """
    name, _, options = text.partition(":")
    return typed(THRESHOLDS[name], name, options, seed)


def typed(rule: type[T], name: str, options: str, seed: int = 0) -> T:
    """A rule from its options as typed, those after the colon. Raises UsageError."""
    import inspect

    known = [p for p in inspect.signature(rule).parameters if p != "seed"]
    given: dict[str, object] = {}
    for i, part in enumerate(filter(None, options.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            key, value = (known[0] if i == 0 and known else ""), key
        if key not in known:
            raise UsageError(
                f"the threshold {name!r} got the option {part!r}, and it takes {', '.join(known) or 'none'}: "
                f"write it as {name}{':' + known[0] + '=...' if known else ''}"
            )
        given[key] = value if key == "clean" else _number(name, key, value)
    if "seed" in inspect.signature(rule).parameters:
        given["seed"] = seed
    missing = [
        p for p, spec in inspect.signature(rule).parameters.items() if spec.default is spec.empty and p not in given
    ]
    if missing:
        raise UsageError(
            f"the threshold {name!r} needs {missing[0]}, and none was given: write {name}:{missing[0]}=..."
        )
    return rule(**given)


def _number(name: str, key: str, value: str) -> float:
    try:
        number = float(value[:-1]) / 100 if value.endswith("%") else float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(
            f"the option {key} of the threshold {name!r} got {value!r}, and it takes a number: write {name}:{key}=0.1"
        )
    return number


def require_rows(values: Floats) -> None:
    """Raises EmptyDataError for no rows."""
    if len(values) == 0:
        raise EmptyDataError("there are no scores to cut: no row was left to score; check the quarantine file")


def require_share(name: str, key: str, value: float) -> None:
    """Raises UsageError unless 0 < value < 1."""
    if not 0 < value < 1:
        raise UsageError(
            f"the option {key} of the threshold {name!r} got {value:g}, and it takes a share between 0 and 1 "
            f"(both excluded): write {name}:{key}=0.1"
        )
