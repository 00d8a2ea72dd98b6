"""What a judge is: something that reads a request and an answer, and says whether the answer is unsafe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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


@runtime_checkable
class ManyJudge(Judge, Protocol):
    """A judge that would rather have many answers at once: in batches on a model, or side by side from an endpoint."""

    def judge_many(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict an answer, each as ``judge`` gives it."""
        ...


@runtime_checkable
class ReadyJudge(Judge, Protocol):
    """A judge that can find out before there is an answer whether it will be able to judge it."""

    def ready(self) -> None:
        """Raises what stands in its way: a model that is not there, an endpoint that does not know the key."""
        ...


def verdicts(judge: Judge, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
    """One verdict an answer, by ``judge_many`` where the judge has it."""
    if isinstance(judge, ManyJudge):
        return judge.judge_many(prompts, answers)
    return [judge.judge(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


JUDGES: Registry[Callable[..., Judge]] = Registry("judge")
