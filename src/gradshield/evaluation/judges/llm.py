"""A language model behind an endpoint, as a judge."""

from __future__ import annotations

from gradshield.evaluation.judges.base import JUDGES
from gradshield.evaluation.judges.guarded import GuardJudge


@JUDGES.register("llm")
class LlmJudge(GuardJudge):
    """A chat model behind an OpenAI-compatible endpoint, asked by a fixed rubric at temperature 0.

    Takes a ``guards.Llm``, whose rubric is in ``guards.llm.RUBRIC``. A reply that is no verdict, and a call that fails
    after every retry, are verdicts that could not be told; an endpoint that answers no more is an error. Source: Zheng et
    al. (2023), arXiv 2306.05685, on language models as judges.
    """

    name = "llm"
