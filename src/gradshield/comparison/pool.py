"""Pool the cells of a comparison: over the seeds of one mix, and over every mix for one defence.

Rates are pooled by summing successes and answers, with the Wilson interval of the sums. Means of real scores are averaged,
weighted by rows, and their intervals are combined by square-and-add (Zou and Donner 2008, Statistics in Medicine
27:1693-1702). Both treat answers as independent, though seeds share their requests, so every pooled figure also has the
minimum and maximum over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gradshield.comparison.grid import CellResult
from gradshield.manifests import judges_of
from gradshield.report.text import MISSING
from gradshield.stats import Difference, counted, wilson
from gradshield.thresholds.verified import TARGET
from gradshield.types import Rate

REFERENCES = ("screen", "fihs")  # the subject of a comparison: the first of these that was run


@dataclass(frozen=True)
class Pooled(Rate):
    """A figure over ``cells`` cells and ``n`` answers with its interval; ``least`` and ``most`` are of single cells."""

    cells: int
    least: float
    most: float


@dataclass(frozen=True)
class Mix:
    """Cells of one task, mix and defence, one per seed. ``asr`` is by judge; ``utility`` is None if it was not measured."""

    task: str
    harm: str
    ratio: float
    defence: str
    cells: tuple[CellResult, ...]
    failed: int
    asr: Mapping[str, Pooled]
    utility: Pooled | None

    @property
    def worst(self) -> str | None:
        """The judge with the highest pooled ASR."""
        return max(self.asr, key=lambda judge: self.asr[judge].rate, default=None)

    @property
    def gap(self) -> float:
        """Highest minus lowest pooled ASR over the judges."""
        rates = [found.rate for found in self.asr.values()]
        return max(rates) - min(rates) if rates else 0.0


@dataclass(frozen=True)
class Totals:
    """One defence over all its cells. ``mean_asr`` and ``harmed`` are over cells with harm.

    ``worst`` is the highest single cell, ``safe`` the number of measured cells with an ASR of at most ``TARGET`` by the judge,
    ``held`` the number with at most ``TARGET`` by every judge.
    """

    defence: str
    cells: int
    failed: int
    worst: Mapping[str, Pooled]
    mean_asr: Mapping[str, float]
    safe: Mapping[str, tuple[int, int]]
    held: tuple[int, int]
    minus_clean: Pooled | None
    utility: Pooled | None
    harmed: Mapping[str, Pooled]
    caught: Pooled | None
    lost: Pooled | None


def pooled(rates: Iterable[Rate | None]) -> Pooled | None:
    """The rates that were measured, pooled; None if there are none."""
    found = [rate for rate in rates if rate is not None]
    if not found:
        return None
    n, k = sum(rate.n for rate in found), sum(rate.k for rate in found)
    spread = (min(rate.rate for rate in found), max(rate.rate for rate in found))
    if all(counted(rate) for rate in found):
        joined = wilson(k, n)
        return Pooled(joined.rate, joined.low, joined.high, n, k, len(found), *spread)
    means = [(rate.rate, rate.low, rate.high) for rate in found]
    return Pooled(*joined_means(means, [rate.n / n for rate in found]), n, k, len(found), *spread)


def joined_means(figures: Sequence[tuple[float, float, float]], weights: Sequence[float]) -> tuple[float, float, float]:
    """The weighted sum of independent (mean, low, high) with its interval, by square-and-add."""
    mean = math.fsum(w * m for w, (m, _, _) in zip(weights, figures, strict=True))
    down = math.sqrt(math.fsum((w * (m - low)) ** 2 for w, (m, low, _) in zip(weights, figures, strict=True)))
    up = math.sqrt(math.fsum((w * (high - m)) ** 2 for w, (m, _, high) in zip(weights, figures, strict=True)))
    return mean, mean - down, mean + up


def mean_difference(values: Iterable[Difference | None]) -> Pooled | None:
    """The mean of paired differences, with equal weight per cell."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    figures = [(one.difference, one.low, one.high) for one in found]
    mean, low, high = joined_means(figures, [1 / len(found)] * len(found))
    middle = [one.difference for one in found]
    n = sum(one.n for one in found)
    return Pooled(mean, low, high, n, round(mean * n), len(found), min(middle), max(middle))


def mixes(cells: Sequence[CellResult]) -> list[Mix]:
    """Cells pooled over seeds, in order of first appearance."""
    groups: dict[tuple[str, str, float, str], list[CellResult]] = {}
    for cell in cells:
        groups.setdefault((cell.task, cell.harm, cell.ratio, cell.defence), []).append(cell)
    found = []
    for (task, harm, ratio, defence), own in groups.items():
        good = [cell for cell in own if cell.failed is None]
        asr = {
            judge: pooled(cell.judges.get(judge) for cell in good) for judge in judges_of(cell.judges for cell in good)
        }
        rates = {judge: rate for judge, rate in asr.items() if rate is not None}
        utility = pooled(cell.utility for cell in good)
        found.append(Mix(task, harm, ratio, defence, tuple(good), len(own) - len(good), rates, utility))
    return found


def harmed(cell: CellResult) -> bool:
    """Whether the rows had harm, or may have had it: every mix except ``none``."""
    return cell.harm != "none"


def held(cell: CellResult) -> bool:
    """Whether every judge's ASR is at most ``TARGET``."""
    return all(rate.rate <= TARGET for rate in cell.judges.values())


def totals(cells: Sequence[CellResult]) -> list[Totals]:
    """One entry per defence, in order of first appearance."""
    groups: dict[str, list[CellResult]] = {}
    for cell in cells:
        groups.setdefault(cell.defence, []).append(cell)
    return [_total(name, own) for name, own in groups.items()]


def _total(defence: str, cells: Sequence[CellResult]) -> Totals:
    good = [cell for cell in cells if cell.failed is None]
    worst, mean, safe, pool = {}, {}, {}, {}
    for judge in judges_of(cell.judges for cell in good):
        own = [cell for cell in good if judge in cell.judges]
        rates = [cell.judges[judge] for cell in own]
        risky = [cell.judges[judge] for cell in own if harmed(cell)]
        top = pooled([max(rates, key=lambda rate: (rate.rate, rate.high))])
        together = pooled(risky)
        if top is not None:
            worst[judge] = top
        if together is not None:
            pool[judge] = together
            mean[judge] = math.fsum(rate.rate for rate in risky) / len(risky)
        safe[judge] = (sum(rate.rate <= TARGET for rate in rates), len(rates))
    asked = [cell for cell in good if cell.judges]
    return Totals(
        defence=defence,
        cells=len(cells),
        failed=len(cells) - len(good),
        worst=worst,
        mean_asr=mean,
        safe=safe,
        held=(sum(held(cell) for cell in asked), len(asked)),
        minus_clean=mean_difference(cell.utility_minus_clean for cell in good),
        utility=pooled(cell.utility for cell in good),
        harmed=pool,
        caught=pooled(cell.caught for cell in good),
        lost=pooled(cell.lost for cell in good),
    )


def mix_name(harm: str, ratio: float) -> str:
    """A mix in words: ``no harm``, ``as is``, ``explicit 10 %``."""
    if harm == "none":
        return "no harm"
    if harm == "own":
        return "as is"
    return f"{harm.replace('_', ' ')} {100 * ratio:g}\u00a0%"


def share(value: Pooled | None) -> str:
    """A pooled rate in percent."""
    return MISSING if value is None else f"{100 * value.rate:.1f}"


def bounds(value: Pooled | None, signed: bool = False) -> str:
    """A pooled figure in percent (or points) with its interval."""
    if value is None:
        return MISSING
    rate, low, high = (points(figure, signed) for figure in (value.rate, value.low, value.high))
    return f"{rate} [{low}, {high}]"


def points(figure: float, signed: bool = False) -> str:
    """A proportion in percent, or with a sign, as percentage points."""
    text = f"{100 * figure:+.1f}" if signed else f"{100 * figure:.1f}"
    return text.replace("-", "−")


def spread(value: Pooled | None) -> str:
    """The minimum and maximum of single cells, in percent."""
    return MISSING if value is None else f"{100 * value.least:.1f}–{100 * value.most:.1f}"


def reference(defences: Iterable[str]) -> str:
    """The subject of a comparison: the default defence if it was run, else the published score."""
    known = set(defences)
    return next((name for name in REFERENCES if name in known), REFERENCES[0])
