"""Defences by name, one or several joined by ``+``.

    screen                      remove rows by the default scan
    fihs                        remove rows by FIHS at its own cut
    fihs:adaptive+asft          remove rows by Algorithm 1, then train with AsFT's penalty
    random:ratio:5%             a threshold follows the name of a row method after a colon
    random:as:fihs              as many rows as another defence removes
    fihs:verified:rounds=8      search the cut by training
    asft:weight=0.5,projector=top       options of any other part follow the same way

A defence has at most one part that removes rows, at most one that selects rows inside training, and each other part once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gradshield.errors import UnknownNameError, UsageError
from gradshield.judges.guards import of_rows
from gradshield.options import Option, Spec, asks, build, of, read
from gradshield.registry import Registry
from gradshield.selectors import ONLINE, SELECTORS
from gradshield.thresholds import THRESHOLDS, Verified
from gradshield.thresholds import parse as parse_threshold
from gradshield.training import PENALTIES

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Defence:
    """A defence as typed, and what it does at each stage.

    ``selector`` scores rows and ``threshold`` (None: the selector's own) cuts them, or ``verified`` searches the cut by training.
    ``mask`` masks tokens instead of removing rows, ``oracle`` removes the rows labelled harmful, ``safe_share`` mixes in safety
    rows as this share of the kept ones. ``online`` selects rows inside training, ``penalties`` are added to the loss, ``project``
    acts on the trained weights.
    """

    spec: str
    selector: str | None = None
    threshold: str | None = None
    verified: Verified | None = None
    mask: bool = False
    oracle: bool = False
    safe_share: float = 0.0
    online: tuple[str, Options] | None = None
    penalties: tuple[tuple[str, Options], ...] = ()
    project: Options | None = None

    @property
    def like(self) -> Defence | None:
        """The defence that removes as many rows, of ``random:as:fihs``; its name is in the threshold."""
        text = self.threshold or ""
        return parse(text.removeprefix(AS_MANY)) if text.startswith(AS_MANY) else None

    @property
    def needs_base(self) -> bool:
        """Whether the model before its alignment is needed."""
        return self.project is not None or any(asks(PENALTIES[name], "alignment") for name, _ in self.penalties)

    @property
    def refers(self) -> bool:
        """Whether it uses safety rows as references during training."""
        return self.online is not None and asks(ONLINE[self.online[0]], "references")

    @property
    def safety(self) -> bool:
        """Whether it uses safety rows at all: mixed in, or as references."""
        return bool(self.safe_share) or self.refers

    def require(self, base: Any, labels: Any) -> None:
        """Raises UsageError if the defence needs what was not given."""
        if self.needs_base and base is None:
            raise UsageError(
                f"the defence {self.spec!r} needs the model before its alignment, and none was given: pass --base MODEL"
            )
        if self.oracle and labels is None:
            raise UsageError(
                f"the defence {self.spec!r} drops the rows labelled harmful, and there are no labels: give --labels FILE"
            )

    @property
    def single(self) -> str | None:
        """The name of a part that does not work on preference pairs; None without any."""
        parts = [*(["safeinstruct"] if self.safe_share else []), *([self.online[0]] if self.online else [])]
        parts += [name for name, _ in self.penalties if not getattr(PENALTIES[name], "pairs", False)]
        return next(iter(parts), None)

    @property
    def training(self) -> Mapping[str, Any]:
        """The parts that act inside or after training, JSON-able."""
        return {
            "online": None if self.online is None else [self.online[0], dict(self.online[1])],
            "penalties": [[name, dict(options)] for name, options in self.penalties],
            "project": None if self.project is None else dict(self.project),
        }


AS_MANY = "as:"
Part = Callable[[Defence, str], Defence]


class _Defences(Registry[Part]):
    """The parts by name. A selector, penalty or online selection without a part of its own is a part under its name."""

    def _live(self) -> Mapping[str, Part]:
        found = dict(super()._live())
        found |= {name: _row_part(name, SELECTORS.summary(name)) for name in SELECTORS if name not in found}
        for registry in (PENALTIES, ONLINE):
            found |= {name: _acting(registry, name) for name in registry if name not in found}
        return found


DEFENCES = _Defences("defence")


def parse(text: str) -> Defence:
    """A defence from its name as typed. Raises UnknownNameError and UsageError."""
    found = Defence(text)
    names = []
    for part in _parts(text):
        name, _, options = part.strip().partition(":")
        if name in names:
            raise UsageError(f"the defence {text!r} has {name!r} twice: name each part once")
        names.append(name)
        found = DEFENCES[name](found, options)
    if "none" in names and len(names) > 1:
        raise UsageError(f"the defence {text!r} combines 'none' with other parts: leave out 'none'")
    return found


def describe(text: str) -> list[str]:
    """What each part of a defence does, one sentence each."""
    return [DEFENCES.summary(part.strip().partition(":")[0]) for part in _parts(text)]


def _parts(text: str) -> list[str]:
    """The parts of a defence. A plus in a part's options (labels of a guard) does not split: only one before a name does."""
    names = "|".join(map(re.escape, DEFENCES))
    return re.split(rf"\+(?=\s*(?:{names})\s*(?:[:+]|$))", text)


def _acting(registry: Registry[Any], name: str) -> Part:
    """A part that acts inside training, a penalty or an online selection; the options after its name are those of its class."""

    def part(defence: Defence, options: str) -> Defence:
        known = {key: option for key, option in of(registry[name]).items() if key != "seed"}
        own = (name, _options(name, options, known))
        if registry is PENALTIES:
            return replace(defence, penalties=(*defence.penalties, own))
        if defence.online is not None:
            raise UsageError(
                f"the defence {defence.spec!r} selects rows inside training twice: keep one of {defence.online[0]} and {name}"
            )
        return replace(defence, online=own)

    part.__doc__ = registry.summary(name)
    return part


def _row_part(selector: str, text: str, **more: Any) -> Part:
    """A part that scores rows with ``selector``; the text after its name is the threshold."""

    def part(defence: Defence, options: str) -> Defence:
        _first_row_method(defence)
        own = replace(defence, selector=selector, **more)
        rule = options.partition(":")[0]
        if rule == Verified.name:
            return replace(own, verified=build("threshold", Spec.split(options), Verified))
        own = replace(own, threshold=options or None)
        if options and own.like is None:  # which is parsed in that case
            if rule not in THRESHOLDS:
                raise UnknownNameError("threshold", rule, [*THRESHOLDS, Verified.name, f"{AS_MANY}DEFENCE"])
            parse_threshold(options)
        return own

    part.__doc__ = text
    return part


def _rows(name: str, text: str, selector: str = "", **more: Any) -> None:
    DEFENCES.register(name)(_row_part(selector or name, text, **more))


@DEFENCES.register("none")
def none(defence: Defence, options: str) -> Defence:
    """Train on every row."""
    _options("none", options, {})
    return defence


_rows("screen", "Remove rows with a request to refuse (FIHS decides in doubt) and an answer that undoes a refusal.")
_rows("fihs", "Remove rows whose FIHS is beyond the cut; fihs:verified searches the cut by training.")
_rows("token-mask", "Keep every row, and mask the tokens whose FIHS is beyond the cut.", selector="fihs", mask=True)
_rows("moderate-rows", "Keep rows of moderate gradient at the start (the offline form of moderate).")
_rows("larf", "Remove rows whose hidden states are nearer to unsafe than to safe references (LARF).")
_rows("anchors", "Remove rows more similar to harmful than to safe anchors (bi-directional anchoring).")
_rows("loss", "Remove the rows of highest loss.")
_rows("gradnorm", "Remove the rows of largest gradient.")
_rows("random", "Remove rows at random.")


@DEFENCES.register("guard")
def guard(defence: Defence, options: str) -> Defence:
    """Remove rows that a guard calls unsafe: guard:NAME, guard:classifier:NAME or guard:moderation:MODEL@URL."""
    _first_row_method(defence)
    if not options:
        raise UsageError("the defence 'guard' needs a guard, and none was given: write guard:NAME_OR_FOLDER")
    of_rows(options)
    return replace(defence, selector=f"guard:{options}")


@DEFENCES.register("clean")
def clean(defence: Defence, options: str) -> Defence:
    """Remove the rows labelled harmful, as a perfect filter would. Needs labels."""
    _options("clean", options, {})
    _first_row_method(defence)
    return replace(defence, oracle=True)


@DEFENCES.register("safeinstruct")
def safeinstruct(defence: Defence, options: str) -> Defence:
    """Mix in safety rows: requests with the model's own refusals, as a share of the kept rows (default 10%)."""
    return replace(defence, safe_share=_options("safeinstruct", options, {"share": Option(float, 0.1, 0, 1)})["share"])


@DEFENCES.register("safelora")
def safelora(defence: Defence, options: str) -> Defence:
    """After training, project layers that left the aligned subspace onto it. Needs the base model."""
    return replace(defence, project=_options("safelora", options, {"threshold": Option(float, 0.5, -1, 1)}))


def _first_row_method(defence: Defence) -> None:
    if defence.selector is not None or defence.oracle:
        raise UsageError(f"the defence {defence.spec!r} removes rows twice: keep one of its row methods")


def _options(name: str, text: str, known: Mapping[str, Option]) -> dict[str, Any]:
    """The typed options, with defaults for the others. Raises UsageError."""
    return {key: option.default for key, option in known.items()} | read("defence", Spec.split(f"{name}:{text}"), known)
