"""Guards: what says how likely an answer is unsafe. Judges and the row selector of that name are thin over these."""

from gradshield.guards.base import GUARDS, Guard, Opinion
from gradshield.guards.classifier import Classifier
from gradshield.guards.generative import Generative
from gradshield.guards.llm import Llm
from gradshield.guards.moderations import Moderations
from gradshield.guards.specs import of_rows, parse

__all__ = ["GUARDS", "Classifier", "Generative", "Guard", "Llm", "Moderations", "Opinion", "of_rows", "parse"]
