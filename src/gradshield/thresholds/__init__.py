"""Where to cut: one published rule per file, arrays in, one number out. Importing this package registers them all.

``verified`` is not one of them: it searches with real fine-tunes, passed in as a callable, and cannot cut by itself.
"""

from gradshield.thresholds.adaptive import Adaptive
from gradshield.thresholds.anchored import Anchored
from gradshield.thresholds.base import THRESHOLDS, Threshold, parse
from gradshield.thresholds.competition import Competition
from gradshield.thresholds.conformal import Conformal
from gradshield.thresholds.decoy import Decoy
from gradshield.thresholds.fixed import Fixed
from gradshield.thresholds.ratio import Ratio
from gradshield.thresholds.verified import Trial, Verified, decided

__all__ = [
    "THRESHOLDS",
    "Adaptive",
    "Anchored",
    "Competition",
    "Conformal",
    "Decoy",
    "Fixed",
    "Ratio",
    "Threshold",
    "Trial",
    "Verified",
    "decided",
    "parse",
]
