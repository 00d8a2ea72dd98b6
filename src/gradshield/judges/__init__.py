"""Judges of answers, by name. Report every attack success rate by two judges of different kinds."""

from gradshield.judges.base import (
    JUDGES,
    FunctionJudge,
    GuardJudge,
    Judge,
    ReadyJudge,
    Verdict,
    parse,
    parse_all,
    verdicts,
)
from gradshield.judges.compliance import Compliance
from gradshield.judges.lab_classifier import LabClassifier
from gradshield.judges.refusal_phrases import RefusalPhrases

__all__ = [
    "JUDGES",
    "Compliance",
    "FunctionJudge",
    "GuardJudge",
    "Judge",
    "LabClassifier",
    "ReadyJudge",
    "RefusalPhrases",
    "Verdict",
    "parse",
    "parse_all",
    "verdicts",
]
