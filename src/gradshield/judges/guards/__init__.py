"""Guards: models that say how likely an answer is unsafe, used by judges and by the selector ``guard``."""

from gradshield.judges.guards.base import GUARDS, Guard, Opinion, of_rows, parse
from gradshield.judges.guards.classifier import Classifier
from gradshield.judges.guards.generative import Generative
from gradshield.judges.guards.llm import Llm
from gradshield.judges.guards.moderations import Moderations

__all__ = ["GUARDS", "Classifier", "Generative", "Guard", "Llm", "Moderations", "Opinion", "of_rows", "parse"]
