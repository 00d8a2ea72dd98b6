"""Fine-tuning with TRL, and the defences that act inside it. Importing this package registers every penalty."""

from gradshield.training.asft import AsFT
from gradshield.training.base import PENALTIES, Penalty
from gradshield.training.fit import fit
from gradshield.training.kl import FrozenReferenceKL
from gradshield.training.mixin import Penalised, penalised
from gradshield.training.online import Selecting

__all__ = ["PENALTIES", "AsFT", "FrozenReferenceKL", "Penalised", "Penalty", "Selecting", "fit", "penalised"]
