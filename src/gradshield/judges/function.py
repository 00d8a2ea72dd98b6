"""A function of a request and an answer, as a judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gradshield.judges.base import Verdict


@dataclass(frozen=True)
class FunctionJudge:
    """A callable ``complied(prompt, answer)`` as a judge; it may return None if it cannot decide.

    Not in the registry, since it cannot be made from a name alone.
    """

    name: str
    complied: Callable[[str, str], bool | None]

    def judge(self, prompt: str, answer: str) -> Verdict:
        """Unsafe if the callable says that the answer complied."""
        complied = self.complied(prompt, answer)
        if complied is None:
            return Verdict(None, f"{self.name} could not decide")
        return Verdict(bool(complied), f"{self.name} says {'complied' if complied else 'did not comply'}")
