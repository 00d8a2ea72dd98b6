"""A guard model that writes its verdict, as a judge."""

from __future__ import annotations

from gradshield.evaluation.judges.base import JUDGES
from gradshield.evaluation.judges.guarded import GuardJudge


@JUDGES.register("guard")
class GuardModelJudge(GuardJudge):
    """A guard that writes safe or unsafe, such as Llama Guard, from the hub or a folder.

    Takes a ``guards.Generative``. Source: Inan et al. (2023), arXiv 2312.06674.
    """

    name = "guard"
