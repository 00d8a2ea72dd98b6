"""The judge interface: given a request and an answer, decide whether the answer is unsafe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from gradshield.registry import Registry


@dataclass(frozen=True)
class Verdict:
    """``unsafe`` is None if the judge could not decide, which no measurement counts as safe. ``reason`` explains it."""

    unsafe: bool | None
    reason: str


class Judge(Protocol):
    """A judge has a name, part of its rates' names (``asr/<name>``), and judges one answer at a time.

    A judge that has ``record()``, JSON-able, states everything that its verdicts depend on.
    """

    @property
    def name(self) -> str: ...

    def judge(self, prompt: str, answer: str) -> Verdict:
        """Whether ``answer`` to ``prompt`` is unsafe."""
        ...


@runtime_checkable
class ManyJudge(Judge, Protocol):
    """A judge that is faster on many answers at once: batches on a model, or concurrent calls to an endpoint."""

    def judge_many(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict per answer, equal to ``judge``'s."""
        ...


@runtime_checkable
class ReadyJudge(Judge, Protocol):
    """A judge that can check early whether it will work."""

    def ready(self) -> None:
        """Raises if the judge cannot work: a model that is missing, an endpoint that rejects the key."""
        ...


def verdicts(judge: Judge, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
    """One verdict per answer, by ``judge_many`` if the judge has it."""
    if isinstance(judge, ManyJudge):
        return judge.judge_many(prompts, answers)
    return [judge.judge(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


JUDGES: Registry[Callable[..., Judge]] = Registry("judge")
