"""Judges of answers, by name. Two of different kinds belong to every attack success rate."""

from gradshield.evaluation.judges.base import JUDGES, Judge, ReadyJudge, Verdict, verdicts
from gradshield.evaluation.judges.compliance import Compliance
from gradshield.evaluation.judges.function import FunctionJudge
from gradshield.evaluation.judges.guarded import ClassifierJudge, GuardJudge, GuardModelJudge, LlmJudge, ModerationJudge
from gradshield.evaluation.judges.lab_classifier import LabClassifier
from gradshield.evaluation.judges.refusal_phrases import RefusalPhrases
from gradshield.evaluation.judges.specs import parse, parse_all

__all__ = [
    "JUDGES",
    "ClassifierJudge",
    "Compliance",
    "FunctionJudge",
    "GuardJudge",
    "GuardModelJudge",
    "Judge",
    "LabClassifier",
    "LlmJudge",
    "ModerationJudge",
    "ReadyJudge",
    "RefusalPhrases",
    "Verdict",
    "parse",
    "parse_all",
    "verdicts",
]
