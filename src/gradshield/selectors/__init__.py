"""Row-selection methods, one published method per file. Importing this package registers them all."""

from gradshield.selectors.base import ONLINE, SELECTORS, Measured, Selector, check, make
from gradshield.selectors.dualselect import DualSelect
from gradshield.selectors.fihs import AGGREGATES, Aggregate, Fihs, parse_aggregate
from gradshield.selectors.gradnorm import GradNorm
from gradshield.selectors.guard import GuardFilter
from gradshield.selectors.loss import Loss
from gradshield.selectors.moderate import Moderate, OnlineModerate
from gradshield.selectors.random import Random
from gradshield.selectors.representation import Anchoring, Larf
from gradshield.selectors.screen import Screen
