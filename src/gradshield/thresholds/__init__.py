"""Where to cut: one published rule per file, arrays in, one number out. Importing this package registers them all."""

from gradshield.thresholds.adaptive import Adaptive
from gradshield.thresholds.base import THRESHOLDS, Threshold, parse
from gradshield.thresholds.competition import Competition
from gradshield.thresholds.conformal import Conformal
from gradshield.thresholds.decoy import Decoy
from gradshield.thresholds.fixed import Fixed
from gradshield.thresholds.ratio import Ratio

__all__ = ["THRESHOLDS", "Adaptive", "Competition", "Conformal", "Decoy", "Fixed", "Ratio", "Threshold", "parse"]
