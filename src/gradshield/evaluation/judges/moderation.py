"""A moderation endpoint as a judge."""

from __future__ import annotations

from gradshield.evaluation.judges.base import JUDGES
from gradshield.evaluation.judges.guarded import GuardJudge


@JUDGES.register("moderation")
class ModerationJudge(GuardJudge):
    """An OpenAI-compatible moderation endpoint: unsafe where it flags the answer.

    Takes a ``guards.Moderations``.
    """

    name = "moderation"
