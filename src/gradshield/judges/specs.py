"""Judges as typed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from gradshield.errors import UsageError
from gradshield.judges.base import JUDGES, GuardJudge, Judge
from gradshield.judges.guards.base import short_name
from gradshield.judges.guards.specs import OF_CLIENT, make
from gradshield.options import Spec, build


def parse(spec: str) -> Judge:
    """A judge as typed: ``refusal-phrases``, ``compliance``, ``lab-classifier``, or a guard in one of its FORMS.

    Nothing is loaded or called yet.

    Raises
    ------
    UnknownNameError
        A kind that is not one of ``JUDGES``.
    UsageError
        A judge without its model or endpoint, an option that it does not take, or a missing key.
    """
    parts = Spec.split(spec)
    made = JUDGES[parts.name]
    return GuardJudge(make(parts)) if made is GuardJudge else build("judge", parts, made)


def parse_all(specs: Sequence[str]) -> tuple[Judge, ...]:
    """Judges as typed, each with a unique name, before anything is loaded or called.

    Guards whose short names clash are named with organisation and host as well, and if that is not enough with everything
    typed. Raises like ``parse``, and UsageError for a judge that is given twice.
    """
    typed = [_what(Spec.split(spec)) for spec in specs]
    for number, spec in enumerate(specs):
        if typed[number] in typed[:number]:
            raise UsageError(f"the judge {spec!r} is given twice: give each judge once")
    judges = tuple(parse(spec) for spec in specs)
    for longer in (_placed, _whole):
        names = [judge.name for judge in judges]
        for judge, what in zip(judges, typed, strict=True):
            if isinstance(judge, GuardJudge) and names.count(judge.name) > 1:
                judge.name = longer(judge, what)
    return judges


def _what(spec: Spec) -> Spec:
    """A spec without the client's options: judges that differ only in those are the same."""
    options = {name: value for name, value in spec.options.items() if name not in OF_CLIENT}
    return replace(spec, target=spec.target.rstrip("/"), options=options)


def _placed(judge: GuardJudge, spec: Spec) -> str:
    client = getattr(judge.guard, "client", None)
    if client is None:
        return short_name(spec.name, spec.target, parts=2)
    return f"{short_name(spec.name, client.model, parts=2)}@{urlsplit(client.base_url).netloc}"


def _whole(judge: GuardJudge, spec: Spec) -> str:
    text = ",".join([f"{spec.name}:{spec.target}", *(f"{name}={value}" for name, value in spec.options.items())])
    return "".join(c if c.isprintable() else "?" for c in text)
