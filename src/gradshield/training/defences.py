"""What stands between a dataset and a fine-tuned model: defences by name, one or several joined by ``+``.

    screen                      rows out by the default scan
    fihs                        rows out by FIHS at its own cut
    fihs:adaptive+asft          rows out by Algorithm 1, then AsFT's penalty in training
    random:ratio:5%             a threshold follows the name of a row method after a colon
    random:as:fihs              as many rows as another defence removes
    fihs:verified:rounds=8      the cut is searched by training
    asft:weight=0.5,projector=top       options of any other part follow the same way

A defence has at most one part that takes rows out, at most one that chooses rows inside training, and each other part once.
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

    ``selector`` scores rows and ``threshold`` (None: the selector's own) cuts them, or ``verified`` searches the cut by
    training. ``mask`` masks tokens instead of dropping rows, ``oracle`` drops the rows labelled harmful, ``safe_share``
    mixes in safety rows as this share of the kept ones. ``online`` chooses rows inside training, ``penalties`` join the
    loss, ``project`` acts on what was trained.
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
    def needs_base(self) -> bool:
        """Whether the model before its alignment is needed."""
        return self.project is not None or any(asks(PENALTIES[name], "alignment") for name, _ in self.penalties)

    @property
    def training(self) -> Mapping[str, Any]:
        """What changes training itself, JSON-able: with the rows, all that the trained weights depend on."""
        return {
            "online": None if self.online is None else [self.online[0], dict(self.online[1])],
            "penalties": [[name, dict(options)] for name, options in self.penalties],
            "project": None if self.project is None else dict(self.project),
        }


AS_MANY = "as:"
Part = Callable[[Defence, str], Defence]


class _Defences(Registry[Part]):
    """The parts by name. A selector, a penalty or an online selection that no part takes in is one under its own name."""

    def _live(self) -> Mapping[str, Part]:
        found = dict(super()._live())
        own: tuple[tuple[Registry[Any], Callable[[str], Part]], ...] = (
            (SELECTORS, lambda name: _row_part(name, SELECTORS.summary(name))),
            (PENALTIES, lambda name: _joining(_penalised, PENALTIES, name)),
            (ONLINE, lambda name: _joining(_inside, ONLINE, name)),
        )
        for registry, part in own:
            found |= {name: part(name) for name in registry if name not in found}
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
        raise UsageError(f"the defence {text!r} joins 'none' with others: leave it out")
    return found


def told(text: str) -> list[str]:
    """What each part of a defence does, one sentence each."""
    return [DEFENCES.summary(part.strip().partition(":")[0]) for part in _parts(text)]


def _parts(text: str) -> list[str]:
    """The parts of a defence. A plus may stand in a part's options (labels of a guard): it joins only before a name."""
    names = "|".join(map(re.escape, DEFENCES))
    return re.split(rf"\+(?=\s*(?:{names})\s*(?:[:+]|$))", text)


def _joining(join: Callable[[Defence, str, Options], Defence], registry: Registry[Any], name: str) -> Part:
    """A part that joins training by a method of a registry; what follows its name are the options that its class states."""

    def part(defence: Defence, options: str) -> Defence:
        known = {key: option for key, option in of(registry[name]).items() if key != "seed"}
        return join(defence, name, read("defence", Spec.split(f"{name}:{options}"), known))

    part.__doc__ = registry.summary(name)
    return part


def _row_part(selector: str, text: str, **more: Any) -> Part:
    """A part that scores rows with ``selector``; what follows its name is the threshold."""

    def part(defence: Defence, options: str) -> Defence:
        _first_row_method(defence)
        if options.startswith(AS_MANY):
            parse(options.removeprefix(AS_MANY))
        rule = options.partition(":")[0]
        if rule == Verified.name:
            verified = build("threshold", Spec.split(options), Verified)
            return replace(defence, selector=selector, verified=verified, **more)
        if options and not options.startswith(AS_MANY):
            if rule not in THRESHOLDS:
                raise UnknownNameError("threshold", rule, [*THRESHOLDS, Verified.name, f"{AS_MANY}DEFENCE"])
            parse_threshold(options)
        return replace(defence, selector=selector, threshold=options or None, **more)

    part.__doc__ = text
    return part


def _rows(name: str, text: str, **more: Any) -> None:
    DEFENCES.register(name)(_row_part(more.pop("selector", name), text, **more))


@DEFENCES.register("none")
def none(defence: Defence, options: str) -> Defence:
    """Train on every row."""
    _no_options("none", options)
    return defence


_rows(
    "screen",
    "Rows go whose request reads as one to refuse (in doubt their FIHS decides) and whose answer undoes a refusal.",
)
_rows("fihs", "Rows beyond the cut of their FIHS go; fihs:verified searches the cut by training.")
_rows(
    "token-mask",
    "Every row stays, and tokens whose FIHS is beyond the cut are not learned.",
    selector="fihs",
    mask=True,
)
_rows("moderate-rows", "Rows of moderate gradient at the start stay (the offline form of moderate).")
_rows("larf", "Rows nearer to unsafe than to safe references in hidden states go (LARF).")
_rows("anchors", "Rows more like harmful than like safe anchors go (bi-directional anchoring).")
_rows("loss", "Rows of the highest loss go.")
_rows("gradnorm", "Rows of the largest gradient go.")
_rows("random", "Rows drawn at random go.")


@DEFENCES.register("guard")
def guard(defence: Defence, options: str) -> Defence:
    """Rows that a guard model calls unsafe go: guard:NAME, guard:classifier:NAME or guard:moderation:MODEL@URL."""
    _first_row_method(defence)
    if not options:
        raise UsageError("the defence 'guard' needs a guard, and none was given: write guard:NAME_OR_FOLDER")
    of_rows(options)
    return replace(defence, selector=f"guard:{options}")


@DEFENCES.register("clean")
def clean(defence: Defence, options: str) -> Defence:
    """Rows labelled harmful go: what a perfect filter would do. Needs labels."""
    _no_options("clean", options)
    _first_row_method(defence)
    return replace(defence, oracle=True)


@DEFENCES.register("safeinstruct")
def safeinstruct(defence: Defence, options: str) -> Defence:
    """Safety rows are mixed in: requests with the model's own refusals, as a share of the kept rows (default 10%)."""
    return replace(defence, safe_share=_options("safeinstruct", options, {"share": Option(float, 0.1, 0, 1)})["share"])


@DEFENCES.register("moderate")
def moderate(defence: Defence, options: str) -> Defence:
    """In every step, rows of moderate gradient at the current weights train, the rest is skipped."""
    return _inside(defence, "moderate", _options("moderate", options, {"ratio": Option(float, 0.2, 0, 1)}))


@DEFENCES.register("dualselect")
def dualselect(defence: Defence, options: str) -> Defence:
    """Safety references chosen by conflict and loss decide which rows train, and correct the gradient."""
    known = {
        "warmup": Option(int, 10, -1),
        "refresh": Option(int, 10, 0),
        "temperature": Option(float, 0.1, 0),
        "top": Option(int, 8, 0),
        "drop": Option(float, 0.5, -1e-9, 1),
    }
    return _inside(defence, "dualselect", _options("dualselect", options, known))


@DEFENCES.register("asft")
def asft(defence: Defence, options: str) -> Defence:
    """The weights' change is penalised where it leaves the alignment direction. Needs the base model."""
    known = {
        "weight": Option(float, 1.0, 0),
        "projector": Option(str, "published", choices=("published", "top")),
        "energy": Option(float, 0.9, 0, 1),
    }
    return _penalised(defence, "asft", _options("asft", options, known))


@DEFENCES.register("kl")
def kl(defence: Defence, options: str) -> Defence:
    """The answers' distribution is held near that of the start (a frozen-reference KL)."""
    return _penalised(defence, "kl", _options("kl", options, {"weight": Option(float, 0.1, 0)}))


@DEFENCES.register("safelora")
def safelora(defence: Defence, options: str) -> Defence:
    """After training, layers that left the aligned subspace are projected onto it. Needs the base model."""
    return replace(defence, project=_options("safelora", options, {"threshold": Option(float, 0.5, -1, 1)}))


def _first_row_method(defence: Defence) -> None:
    if defence.selector is not None or defence.oracle:
        raise UsageError(f"the defence {defence.spec!r} takes rows out twice: keep one of its row methods")


def _inside(defence: Defence, name: str, options: Options) -> Defence:
    if defence.online is not None:
        raise UsageError(
            f"the defence {defence.spec!r} chooses rows inside training twice: keep one of {defence.online[0]} and {name}"
        )
    return replace(defence, online=(name, options))


def _penalised(defence: Defence, name: str, options: Options) -> Defence:
    return replace(defence, penalties=(*defence.penalties, (name, options)))


def _no_options(name: str, text: str) -> None:
    _options(name, text, {})


def _options(name: str, text: str, known: Mapping[str, Option]) -> dict[str, Any]:
    """The options that were typed over the defaults. Raises UsageError."""
    return {key: option.default for key, option in known.items()} | read("defence", Spec.split(f"{name}:{text}"), known)
