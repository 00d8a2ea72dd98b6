"""Every error GradShield raises on purpose, and the exit code the command line gives it (``exit_code``).

A message is one sentence in four parts: what is wrong, what was given, what is allowed, what to do.
``str(error)`` is the whole message; nothing else is printed to a user.
"""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` with the closest known name; empty if none is close."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"did you mean {close[0]!r}?" if close else ""


class GradShieldError(Exception):
    """Base class. ``exit_code`` is the exit status of the command line."""

    exit_code = 1


class UsageError(GradShieldError):
    """An option, a name or a combination of them is not allowed."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that no registry holds."""

    def __init__(self, kind: str, name: str, allowed: list[str]) -> None:
        self.kind, self.name = kind, name
        hint = did_you_mean(name, allowed)
        super().__init__(f"unknown {kind} {name!r}: {hint + ' ' if hint else ''}choose one of {', '.join(allowed)}")


class DataError(GradShieldError):
    """The data cannot be used as it is."""

    exit_code = 3


class FormatError(DataError):
    """A file or row whose shape is unknown."""


class EmptyDataError(DataError):
    """Nothing is left to score."""


class ModelError(GradShieldError):
    """The model cannot be loaded, or cannot be scored."""

    exit_code = 4


class HubError(ModelError):
    """A model could not be fetched."""


class EndpointError(ModelError):
    """An endpoint that does not answer after every retry, or breaks its protocol."""


class ProbeError(ModelError):
    """The probe is invalid on this model: it does not refuse, or it reasons before it answers."""


class ScoreError(ModelError):
    """A score that is not finite, or an engine that disagrees with the oracle."""


class GateError(GradShieldError):
    """More was removed than the gate allows, no verified cut met its targets, or a certificate does not hold."""

    exit_code = 5


def first_line(error: Exception, most: int | None = 200) -> str:
    """``KeyError: what it says``: the first line of a library's error, cut to ``most`` characters, for one of ours."""
    text = str(error).strip().split("\n", 1)[0].rstrip(".")
    return f"{type(error).__name__}: {text[:most]}"
