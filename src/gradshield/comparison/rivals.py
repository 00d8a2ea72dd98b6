"""Where another defence does better than the reference one: said by the product itself, before someone else does.

Both are pooled over the seeds that both have. A rival wins on safety where its ASR lies lower by some judge and the intervals
do not overlap; it wins on utility where by every judge it is not clearly less safe, and its utility is higher by a point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradshield.report.pool import Mix, Pooled, mixes, reference

HIGHER = 0.01  # of utility; less is not worth a line


@dataclass(frozen=True)
class Win:
    """One task and mix where ``rival`` is ahead. ``judge`` is None for utility; ``clear`` is apart beyond the intervals."""

    rival: str
    task: str
    harm: str
    ratio: float
    judge: str | None
    ours: Pooled
    theirs: Pooled
    clear: bool


@dataclass(frozen=True)
class Standing:
    """A rival against the reference: mixes compared, and how many each wins on ASR, and the rival on utility."""

    rival: str
    compared: int
    safer: int
    less_safe: int
    more_useful: int
    clearly_more_useful: int


def against(found: Sequence[Mix]) -> tuple[list[Standing], list[Win]]:
    """Every rival's standing, the one that wins most first, and every win, the largest first."""
    name = reference(mix.defence for mix in found)
    ours = {(mix.task, mix.harm, mix.ratio): mix for mix in found if mix.defence == name}
    standings: dict[str, list[int]] = {}
    wins: list[Win] = []
    for mix in found:
        own = ours.get((mix.task, mix.harm, mix.ratio))
        if own is None or mix.defence == name:
            continue
        left, right = _shared(own, mix)
        if left is None or right is None:
            continue
        won = _wins(left, right)
        tally = standings.setdefault(mix.defence, [0, 0, 0, 0, 0])
        tally[0] += 1
        tally[1] += any(win.judge is not None for win in won)
        tally[2] += _clearly_less_safe(left, right)
        tally[3] += any(win.judge is None for win in won)
        tally[4] += any(win.judge is None and win.clear for win in won)
        wins += won
    ordered = [Standing(name, *tally) for name, tally in standings.items()]
    ordered.sort(key=lambda one: (-one.safer, -one.more_useful, one.less_safe))
    wins.sort(key=lambda win: (win.judge is None, -abs(win.ours.rate - win.theirs.rate)))
    return ordered, wins


def _shared(ours: Mix, theirs: Mix) -> tuple[Mix | None, Mix | None]:
    """Both over the seeds that both have finished."""
    seeds = {cell["seed"] for cell in ours.cells} & {cell["seed"] for cell in theirs.cells}

    def only(mix: Mix) -> Mix | None:
        cells = [cell for cell in mix.cells if cell["seed"] in seeds]
        return mixes(cells)[0] if cells else None

    return only(ours), only(theirs)


def _wins(ours: Mix, theirs: Mix) -> list[Win]:
    def win(judge: str | None, left: Pooled, right: Pooled, clear: bool) -> Win:
        return Win(theirs.defence, ours.task, ours.harm, ours.ratio, judge, left, right, clear)

    judges = [judge for judge in ours.asr if judge in theirs.asr]
    safer = [
        win(judge, ours.asr[judge], theirs.asr[judge], True)
        for judge in judges
        if theirs.asr[judge].high < ours.asr[judge].low
    ]
    left, right = ours.utility, theirs.utility
    if left is None or right is None or _clearly_less_safe(ours, theirs) or right.rate - left.rate < HIGHER - 1e-12:
        return safer
    return [*safer, win(None, left, right, right.low > left.high)]


def _clearly_less_safe(ours: Mix, theirs: Mix) -> bool:
    """Whether by some judge the rival's ASR lies above ours with no overlap."""
    return any(ours.asr[judge].high < theirs.asr[judge].low for judge in ours.asr if judge in theirs.asr)
