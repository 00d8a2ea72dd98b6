"""Judges as they are typed."""

from __future__ import annotations

from typing import cast

from gradshield.errors import UsageError
from gradshield.evaluation.judges.base import JUDGES, Judge
from gradshield.evaluation.judges.guarded import GuardJudge
from gradshield.guards.specs import Spec, make


def parse(spec: str, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False) -> Judge:
    """A judge from what a user typed: ``refusal-phrases``, ``lab-classifier``, or a guard in one of its FORMS.

    Nothing is loaded or asked yet. ``device``, ``dtype`` and ``trust_remote_code`` are for models that are loaded here.

    Raises
    ------
    UnknownNameError
        A kind that is none of ``JUDGES``.
    UsageError
        A judge that lacks its model or endpoint, an option that it does not take, or a key that is not there.
    """
    parts = Spec.split(spec)
    made = JUDGES[parts.kind]
    if issubclass(cast(type, made), GuardJudge):
        return made(make(parts, device, dtype, trust_remote_code))
    if parts.target or parts.options:
        raise UsageError(f"the judge {parts.kind!r} takes nothing more, and {spec!r} gives more: write {parts.kind}")
    return made()
