"""Judges of answers, by name. Two of different kinds belong to every attack success rate."""

from gradshield.evaluation.judges.base import JUDGES, Judge, Verdict
from gradshield.evaluation.judges.function import FunctionJudge
from gradshield.evaluation.judges.refusal_phrases import RefusalPhrases

__all__ = ["JUDGES", "FunctionJudge", "Judge", "RefusalPhrases", "Verdict"]
