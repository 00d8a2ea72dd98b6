"""A text-classification model as a judge."""

from __future__ import annotations

from gradshield.evaluation.judges.base import JUDGES
from gradshield.evaluation.judges.guarded import GuardJudge


@JUDGES.register("classifier")
class ClassifierJudge(GuardJudge):
    """A text-classification model of the hub or a folder, its labels mapped to unsafe.

    Takes a ``guards.Classifier``. Source: none of its own; what it is worth is what the model is worth.
    """

    name = "classifier"
