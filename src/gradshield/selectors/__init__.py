"""Row-selection methods, one published method per file. Importing this package registers them all."""

from gradshield.selectors.aggregates import AGGREGATES, Aggregate
from gradshield.selectors.aggregates import parse as parse_aggregate
from gradshield.selectors.base import SELECTORS, Measured, Selector
from gradshield.selectors.fihs import Fihs

__all__ = ["AGGREGATES", "SELECTORS", "Aggregate", "Fihs", "Measured", "Selector", "parse_aggregate"]
