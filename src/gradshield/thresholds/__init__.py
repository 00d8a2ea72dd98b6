"""Where to cut: one published rule per file, arrays in, one number out. Importing this package registers them all.

``verified`` is not one of them: it searches with real fine-tunes, passed in as a callable, and cannot cut by itself.
"""

from gradshield.thresholds import adaptive, anchored, competition, conformal, decoy, fixed, ratio
from gradshield.thresholds.base import THRESHOLDS, Threshold, parse
from gradshield.thresholds.verified import Verified
