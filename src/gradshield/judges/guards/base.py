"""The guard interface, and a guard's opinion on one answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from gradshield import options
from gradshield.errors import EndpointError, UsageError
from gradshield.judges.client import TIMEOUT_SECONDS, Client
from gradshield.options import Option, Spec
from gradshield.registry import Registry

Item = TypeVar("Item")

# The input of a guard without turns: request and answer, or only the answer.
Reads = Annotated[str, Option(str, choices=("pair", "answer"))]


@dataclass(frozen=True)
class Opinion:
    """The probability, from 0 to 1, that an answer is unsafe; None if the guard could not decide. ``reason`` explains it.

    Above 0.5 is what the guard itself calls unsafe. ``lost``: there is no probability because the endpoint has stopped
    answering, and a later run may get one.
    """

    probability: float | None
    reason: str
    lost: bool = False


class Guard(Protocol):
    """A model that reads a request and an answer. It is loaded on first use.

    ``name`` is its kind and its model (``classifier:toxic-bert``). ``ready`` raises early if the guard cannot work.
    ``record`` is JSON-able: everything that its opinions depend on, and no secret.
    """

    @property
    def name(self) -> str: ...

    def ready(self) -> None: ...

    def opinions(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Opinion]: ...

    def record(self) -> Mapping[str, Any]: ...


GUARDS: Registry[Callable[..., Guard]] = Registry("guard")


def short_name(kind: str, model: str, parts: int = 1) -> str:
    """``kind:model``, with the last ``parts`` of a folder or an address; one line of at most 80 characters."""
    last = "/".join(model.rstrip("/\\").replace("\\", "/").split("/")[-parts:])
    return f"{kind}:{''.join(c if c.isprintable() else '?' for c in last)[:60]}"


def asked(client: Client, ask: Callable[[Item], Opinion], items: Sequence[Item]) -> list[Opinion]:
    """An opinion per item from an endpoint, requested concurrently; None with the error for a failed call."""
    found = client.each(ask, items)
    down = client.down
    return [Opinion(None, str(one), down) if isinstance(one, EndpointError) else one for one in found]


# ---- as typed: KIND:MODEL[@URL][,option=value]... --------------------------------------------------------------------


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
