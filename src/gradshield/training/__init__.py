"""Fine-tuning with TRL, and the defences that act inside it. Importing this package registers every penalty."""

from gradshield.training.asft import AsFT
from gradshield.training.fit import fit
from gradshield.training.inside import PENALTIES, Penalised, Penalty, Selecting, penalised
from gradshield.training.kl import FrozenReferenceKL

__all__ = ["PENALTIES", "AsFT", "FrozenReferenceKL", "Penalised", "Penalty", "Selecting", "fit", "penalised"]
