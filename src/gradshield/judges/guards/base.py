"""The guard interface, and a guard's opinion on one answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

from gradshield.errors import EndpointError
from gradshield.judges.client import Client
from gradshield.options import Option
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
