"""Fine-tuning with TRL, and the defences that act inside it. Importing this package registers every penalty."""

from gradshield.training.asft import AsFT
from gradshield.training.fit import fit
from gradshield.training.kl import FrozenReferenceKL
from gradshield.training.penalties import PENALTIES, Penalised, Penalty, penalised
from gradshield.training.selecting import Selecting

__all__ = ["PENALTIES", "AsFT", "FrozenReferenceKL", "Penalised", "Penalty", "Selecting", "fit", "penalised"]
