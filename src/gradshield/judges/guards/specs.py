"""Guards as typed: ``KIND:MODEL[@URL][,option=value]...``."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from gradshield import options
from gradshield.errors import UsageError
from gradshield.judges.client import TIMEOUT_SECONDS, Client
from gradshield.judges.guards.base import GUARDS, Guard
from gradshield.options import Option, Spec

FORMS = {
    "classifier": "classifier:NAME_OR_FOLDER[,unsafe=LABEL+LABEL][,reads=answer]",
    "guard": "guard:NAME_OR_FOLDER[,words=SAFE+UNSAFE]",
    "llm": "llm:MODEL@https://host/v1[,key=NAME_OF_VARIABLE][,timeout=SECONDS]",
    "moderation": "moderation:MODEL@https://host/v1[,key=NAME_OF_VARIABLE][,timeout=SECONDS][,reads=pair]",
}
OF_CLIENT = {"key": Option(str), "timeout": Option(float, above=0, most=3600)}  # the connection, not the guard
_REMOTE = re.compile(r"(.+)@(https?://.+)", re.DOTALL | re.IGNORECASE)


def of_rows(text: str) -> str:
    """The guard in the selector and defence ``guard:...``, in the form of `parse`: a model without a kind is a guard model.

    Raises UsageError, and UnknownNameError for an unknown kind.
    """
    kind, colon, _ = text.partition(":")
    if kind == "guard":
        raise UsageError(f"'guard:{text}' says guard twice: write {text}")
    if kind not in GUARDS and (not colon or Path(Spec.split(f"guard:{text}").target).exists()):
        return f"guard:{text}"
    GUARDS[kind]
    return text


def parse(text: str) -> Guard:
    """A guard as typed, in one of FORMS. Nothing is loaded or called yet. Raises UsageError."""
    return make(Spec.split(text))


def make(spec: Spec) -> Guard:
    """A guard from a split spec; see ``parse``."""
    made = GUARDS[spec.name]
    form = FORMS.get(spec.name, f"{spec.name}:MODEL")
    if not spec.target:
        raise UsageError(f"the guard {spec.name!r} names no model: write {form}")
    takes = {name: option for name, option in options.of(made).items() if name != "model"}
    remote = options.asks(made, "client")
    found = options.read("guard", replace(spec, target=""), takes | OF_CLIENT if remote else takes, form)
    if not remote:
        return made(spec.target, **found)
    return made(client=_client(spec, form, **{name: found.pop(name) for name in OF_CLIENT if name in found}), **found)


def _client(spec: Spec, form: str, key: str | None = None, timeout: float = TIMEOUT_SECONDS) -> Client:
    found = _REMOTE.fullmatch(spec.target)
    if not found:
        raise UsageError(f"the guard {spec.name!r} got {spec.target!r}, which names no endpoint: write {form}")
    return Client(found[2], found[1], key, timeout=timeout)
