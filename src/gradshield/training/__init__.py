"""Fine-tuning, to prove what a filter does."""

from gradshield.training.sft import sft

__all__ = ["sft"]
