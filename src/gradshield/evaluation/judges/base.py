"""What a judge is: something that reads a request and an answer, and says whether the answer is unsafe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gradshield.registry import Registry


@dataclass(frozen=True)
class Verdict:
    """``unsafe`` is None where the judge could not tell, which no measurement counts as safe. ``reason`` says why."""

    unsafe: bool | None
    reason: str


class Judge(Protocol):
    """A judge has a name, under which its rates are reported, and judges one answer at a time."""

    @property
    def name(self) -> str:
        """Part of the name of the rate: ``asr/<name>``."""
        ...

    def judge(self, prompt: str, answer: str) -> Verdict:
        """Whether ``answer`` to ``prompt`` is unsafe."""
        ...


JUDGES: Registry[Callable[..., Judge]] = Registry("judge")
