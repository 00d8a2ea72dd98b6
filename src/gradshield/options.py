"""Methods and their options as they are typed: ``name``, ``name:value`` or ``name:value,key=value``, for every kind of method.

A value without a key belongs to the first option. ``5%`` is 0.05. A class declares its options in its constructor, and may
state what they take::

    class Ratio:
        name = "ratio"

        def __init__(self, share: Annotated[float, Option(most=1)] = 0.1) -> None:
            check(Ratio, share=share)

    build("threshold", Spec.split("ratio:5%"), Ratio)      # Ratio(share=0.05)
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from gradshield.errors import UsageError

T = TypeVar("T")
Given = Mapping[str, Callable[[], Any]]  # constructor arguments that are not typed by the user, made on demand

_OPTION = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_KINDS: dict[str, type] = {"tuple": tuple, "Sequence": tuple, "float": float, "int": int, "str": str}


@dataclass(frozen=True)
class Spec:
    """A method as typed, split: ``target`` is the text between its name and its ``key=value`` options."""

    name: str
    target: str
    options: Mapping[str, str]

    @staticmethod
    def split(text: str) -> Spec:
        """Split a spec. Raises UsageError for an option that is given twice."""
        name, _, rest = text.strip().partition(":")
        parts, options = rest.split(","), dict[str, str]()
        while parts and (found := _OPTION.fullmatch(parts[-1].strip())):
            if found[1] in options:
                raise UsageError(f"{text!r} gives {found[1]} twice: give it once")
            options[found[1]] = found[2]
            parts.pop()
        return Spec(name.strip(), ",".join(parts).strip(), dict(reversed(options.items())))


@dataclass(frozen=True)
class Option:
    """The values an option takes: a number (``float``, ``int``) in a range, text, or ``a+b`` (``tuple``).

    A number is above ``above``, at least ``least``, up to ``most`` and below ``below``.

    With ``choices``, the text must be one of them. ``default`` serves as the example in errors.
    """

    kind: type = float
    default: Any = None
    above: float = -math.inf
    most: float = math.inf
    choices: tuple[str, ...] = ()
    required: bool = False
    least: float = -math.inf
    below: float = math.inf

    def read(self, text: str) -> Any:
        """The value. Raises ValueError if it is not allowed."""
        if self.kind is tuple:
            return tuple(text.split("+"))
        value = text if self.kind is str else number(text)
        if not self.takes(value):
            raise ValueError(text)
        return self.kind(value)

    def takes(self, value: Any) -> bool:
        """Whether a value of this kind is allowed."""
        if self.kind in (str, tuple):
            return not self.choices or value in self.choices
        within = math.isfinite(value) and self.above < value < self.below and self.least <= value <= self.most
        return within and (self.kind is not int or value == int(value))

    def __str__(self) -> str:
        if self.choices:
            return " or ".join(self.choices)
        found = "a whole number" if self.kind is int else "a number"
        if self.below < math.inf:
            return f"{found} strictly between {self.above:g} and {self.below:g}"
        found += f" above {self.above:g}" if self.above > -math.inf else ""
        found += f" of at least {self.least:g}" if self.least > -math.inf else ""
        return found + (f", up to {self.most:g}" if self.most < math.inf else "")


def number(text: str) -> float:
    """``0.05``, ``5e-2`` or ``5%``; NaN if the text is not a finite number."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def read(kind: str, spec: Spec, known: Mapping[str, Option], form: str = "") -> dict[str, Any]:
    """The typed options by key. ``form`` is the full syntax, for errors. Raises UsageError."""
    what, first = f"the {kind} {spec.name!r}", next(iter(known), "")
    takes = (
        f"it takes {', '.join(known) or 'no option'}: write {form or spec.name + (f':{first}=...' if first else '')}"
    )
    typed = dict(spec.options)
    if spec.target:
        value, comma, more = spec.target.partition(",")
        if not first or (comma and known[first].kind is not str):
            raise UsageError(f"{what} got the option {(more if first else spec.target)!r}, and {takes}")
        if first in typed:
            raise UsageError(f"{what} got {first} twice, as {value!r} and as {typed[first]!r}: give it once")
        typed = {first: spec.target, **typed}
    found = {}
    for key, text in typed.items():
        if key not in known:
            raise UsageError(f"{what} got the option {key!r}, and {takes}")
        try:
            found[key] = known[key].read(text)
        except ValueError:
            default = known[key].default
            example = form or f"{spec.name}:{key}={0.1 if default is None else default}"
            raise UsageError(
                f"the option {key} of {what} got {text!r}, and it takes {known[key]}: write {example}"
            ) from None
    for key, option in known.items():
        if option.required and key not in found:
            raise UsageError(f"{what} needs {key}, and none was given: write {form or f'{spec.name}:{key}=...'}")
    return found


def of(made: Callable[..., Any]) -> dict[str, Option]:
    """The constructor parameters that can be typed: numbers, texts, words of a ``Literal``, and sequences of texts."""
    parameters = evaluated = inspect.signature(made).parameters
    with suppress(NameError):  # an annotation may be imported for type checkers alone
        evaluated = inspect.signature(made, eval_str=True).parameters
    found = {}
    for name, parameter in parameters.items():
        default = None if parameter.default is parameter.empty else parameter.default
        for stated in getattr(evaluated[name].annotation, "__metadata__", ()):
            if isinstance(stated, Option):
                found[name] = replace(stated, default=default, required=parameter.default is parameter.empty)
        if name in found:
            continue
        words = re.findall(r"\w+", inspect.formatannotation(parameter.annotation))
        if parameter.annotation is parameter.empty:
            words = [type(default).__name__]
        if words[:1] == ["Literal"]:
            found[name] = Option(str, default, choices=tuple(words[1:]), required=parameter.default is parameter.empty)
            continue
        kinds = [kind for word, kind in _KINDS.items() if word in words]
        if kinds and "Callable" not in words and (kinds[0] is not tuple or "str" in words):
            found[name] = Option(kinds[0], default, required=parameter.default is parameter.empty)
    return found


def build(kind: str, spec: Spec, made: Callable[..., T], given: Given | None = None) -> T:
    """Call ``made`` with the typed options and with those arguments in ``given`` that its signature names.

    Raises UsageError for an unknown option, and for a required parameter that is neither typed nor given.
    """
    given = given or {}
    parameters = inspect.signature(made).parameters
    typed = read(kind, spec, {name: option for name, option in of(made).items() if name not in given})
    for name, parameter in parameters.items():
        plain = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if plain and parameter.default is parameter.empty and name not in given and name not in typed:
            raise UsageError(
                f"the constructor of the {kind} {spec.name!r} requires {name!r}, which is not a text, a number or one of "
                f"{', '.join(given) or 'nothing else'}: give it a default"
            )
    return made(**asked(made, given), **typed)


def check(made: type, **values: Any) -> None:
    """Raises UsageError for a value that the constructor of a method does not take, as its annotations state; None is none."""
    known = of(made)
    for key, value in values.items():
        if value is not None and not known[key].takes(value):
            raise UsageError(f"{getattr(made, 'name', made.__name__)} got {key}={value}: give {known[key]}")


def asks(made: Callable[..., Any], name: str) -> bool:
    """Whether a constructor has a parameter of that name."""
    return name in inspect.signature(made).parameters


def asked(made: Callable[..., Any], given: Given) -> dict[str, Any]:
    """The arguments in ``given`` that a constructor names, made."""
    return {name: make() for name, make in given.items() if asks(made, name)}
