"""Guards as they are typed: ``KIND:MODEL[@URL][,option=value]...``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass

from gradshield.clients import TIMEOUT_SECONDS, Client
from gradshield.errors import UsageError
from gradshield.guards.base import GUARDS, Guard

FORMS = {
    "classifier": "classifier:NAME_OR_FOLDER[,unsafe=LABEL+LABEL][,reads=answer]",
    "guard": "guard:NAME_OR_FOLDER[,words=SAFE+UNSAFE]",
    "llm": "llm:MODEL@https://host/v1[,key=NAME_OF_VARIABLE][,timeout=SECONDS]",
    "moderation": "moderation:MODEL@https://host/v1[,key=NAME_OF_VARIABLE][,timeout=SECONDS][,reads=pair]",
}
LONGEST_TIMEOUT = 3600  # seconds
OF_CLIENT = ("key", "timeout")  # how a guard is reached, not what it is
_OPTION = re.compile(r"([a-z_]+)=(.*)", re.DOTALL)
_REMOTE = re.compile(r"(.+)@(https?://.+)", re.DOTALL | re.IGNORECASE)
_SEVERAL = ("unsafe", "words")
_LOCAL = ("device", "dtype")


@dataclass(frozen=True)
class Spec:
    """A guard or judge as it was typed, in parts; ``target`` is empty where nothing followed the kind."""

    kind: str
    target: str
    options: Mapping[str, str]

    @staticmethod
    def split(text: str) -> Spec:
        """Take a spec apart. Raises UsageError for an option that is given twice."""
        kind, _, rest = text.strip().partition(":")
        parts, options = rest.split(","), dict[str, str]()
        while parts and (found := _OPTION.fullmatch(parts[-1].strip())):
            if found[1] in options:
                raise UsageError(f"{text!r} gives {found[1]} twice: give it once")
            options[found[1]] = found[2]
            parts.pop()
        return Spec(kind.strip(), ",".join(parts).strip(), dict(reversed(options.items())))


def parse(text: str, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False) -> Guard:
    """A guard from what a user typed, in one of FORMS. Nothing is loaded or asked yet.

    ``device``, ``dtype`` and ``trust_remote_code`` are for guards whose model is loaded here. Raises UsageError.
    """
    return make(Spec.split(text), device, dtype, trust_remote_code)


def make(spec: Spec, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False) -> Guard:
    """A guard from a spec in parts; see ``parse``."""
    made = GUARDS[spec.kind]
    form = FORMS[spec.kind]
    if not spec.target:
        raise UsageError(f"the guard {spec.kind!r} names no model: give {form}")
    takes = inspect.signature(made).parameters
    remote = "client" in takes
    allowed = [name for name in takes if name in ("unsafe", "words", "reads")] + [*(OF_CLIENT if remote else _LOCAL)]
    if wrong := [name for name in spec.options if name not in allowed]:
        raise UsageError(f"{spec.kind} has no option {wrong[0]!r}: choose from {', '.join(allowed)}, as in {form}")
    options = {
        name: tuple(value.split("+")) if name in _SEVERAL else value
        for name, value in spec.options.items()
        if name not in OF_CLIENT
    }
    if remote:
        return made(client=_client(spec, form), **options)
    common = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    return made(spec.target, **common | options)


def _client(spec: Spec, form: str) -> Client:
    found = _REMOTE.fullmatch(spec.target)
    if not found:
        raise UsageError(f"{spec.kind} is given {spec.target!r}, which names no endpoint: give {form}")
    timeout = TIMEOUT_SECONDS
    if (typed := spec.options.get("timeout")) is not None:
        try:
            timeout = float(typed)
        except ValueError:
            timeout = 0.0
        if not 0 < timeout <= LONGEST_TIMEOUT:
            raise UsageError(f"timeout is {typed!r}: give seconds, more than 0 and at most {LONGEST_TIMEOUT}")
    return Client(found[2], found[1], spec.options.get("key"), timeout=timeout)
