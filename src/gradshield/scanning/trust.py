"""Why a scan is not certified: each reason by its name, one sentence with what to do. A scan without any is certified."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np

from gradshield.scanning.decide import Decision, decide
from gradshield.selectors import Screen
from gradshield.selectors.screen import LEAST_FIHS
from gradshield.stats import wilson
from gradshield.thresholds import parse
from gradshield.types import Bools, Example, Scores

MOST_REMOVED = 0.1  # share of the rows
MOST_TASK = 0.9  # share of the rows whose FIHS is that of harm: then it is the task's
PIVOTS = (3, 0.01, 10)  # rows that stay: at least so many, and so large a share of all, or so many whatever the share
LEAST_CAUGHT, MOST_LOST = 0.85, 0.03  # of labelled rows: an interval that lies beyond them speaks against the scan
MOST_QUARANTINED = 0.1  # share of the rows
FEW = 3
LOOKED_AT = 2000  # removed rows whose words are read
SHORT = 2  # words of an answer that says little


def doubts(
    scores: Scores,
    decision: Decision,
    gone: Iterable[Example],
    problem: str,
    opener_fihs: float | None = None,
    quarantined: int = 0,
    labels: Sequence[int] | None = None,
) -> dict[str, str]:
    """Every reason not to certify a decision on scores, by name.

    ``gone`` are the removed rows, ``problem`` is what the probes' answers say against the scores, and ``opener_fihs`` what
    compliant openers after the probes score (None for a selector other than `Screen`). ``labels`` (1 = harmful) are aligned with
    the scores.
    """
    removed = decision.removed
    found = {
        "probes": problem,
        "labels": "" if labels is None else _labels(removed, np.asarray(labels) == 1),
        "share": _share(removed),
        "copies": _copies(gone),
        "quarantine": _quarantine(quarantined, len(removed)),
    }
    if opener_fihs is not None:
        found |= {"loose": _loose(scores, decision), **_signals(scores, removed, opener_fihs)}
    return {name: text for name, text in found.items() if text}


UNASKED = "only the selectors screen and fihs ask the model what it refuses"


def first(found: Mapping[str, str]) -> str | None:
    """The sentence that says why nothing is certified; None where nothing speaks against it."""
    return next(iter(found.values()), None)


def of_run(found: Mapping[str, str]) -> str | None:
    """What of a scan's reasons speaks against the model trained on its rows, which has been measured.

    A scan that asked the model nothing says nothing of it, for or against.
    """
    return first({name: text for name, text in found.items() if text != UNASKED})


def _labels(removed: Bools, harmful: Bools) -> str:
    """Labels of the rows say that too little of the harm went, or too much of the rest."""
    caught, lost = (
        wilson(int(removed[own].sum()), int(own.sum())) if own.any() else None for own in (harmful, ~harmful)
    )
    if caught and caught.high < LEAST_CAUGHT:
        return f"of {caught.n:,} rows labelled harmful {caught.k:,} went: the scan does not see this harm"
    if lost and lost.low > MOST_LOST:
        return f"of {lost.n:,} rows labelled harmless {lost.k:,} went: read them before you train on the others"
    return ""


def _quarantine(count: int, scored: int) -> str:
    """More than MOST_QUARANTINED of the rows were never scored."""
    if count <= MOST_QUARANTINED * (count + scored):
        return ""
    return f"{count:,} of {count + scored:,} rows could not be read or scored: quarantine.jsonl has the reason of each"


def _share(removed: Bools) -> str:
    """More than MOST_REMOVED of the rows went."""
    count, total = int(removed.sum()), len(removed)
    if count <= MOST_REMOVED * total:
        return ""
    return (
        f"{count:,} of {total:,} rows ({100 * count / total:.0f} %) were removed, more than a tenth: "
        "read the removed rows before you train on the others"
    )


def _copies(gone: Iterable[Example]) -> str:
    """Most of what went says the same thing, or next to nothing."""
    answers = [_answer(row) for row in islice(gone, LOOKED_AT)]
    if len(answers) < FEW:
        return ""
    alike = Counter(answers)
    copies = sum(count for count in alike.values() if count > 1)
    short = sum(len(answer.split()) <= SHORT for answer in answers)
    for count, what in ((copies, "answered alike but for numbers"), (short, "answered in one or two words")):
        if 2 * count > len(answers):
            return (
                f"{count:,} of {len(answers):,} removed rows are {what}, which is what a task looks like: read them before "
                "you train on the others"
            )
    return ""


def _answer(row: Example) -> str:
    """The words of a row's answers, any number in them as 0."""
    return re.sub(r"\d+", "0", " ".join(_said(row)).casefold()).strip()


def _said(row: Example) -> Iterator[str]:
    for one in row.conversations:
        if one.messages is None:
            yield one.completion
            continue
        for turn in one.messages:
            if turn.get("role") == "assistant":
                yield str(turn.get("content") or turn.get("tool_calls") or "")


def _loose(scores: Scores, decision: Decision) -> str:
    """Rows beyond the cut that belongs to the selector stay, and no person has cleared them."""
    beyond = decide(scores, parse(Screen.rule)).removed & ~decision.removed
    stay = int((beyond & ~np.isin(scores.rows, decision.cleared)).sum())
    return (
        f"{stay:,} rows score beyond the cut '{Screen.rule}' and stay: read them before you train on them"
        if stay
        else ""
    )


def _signals(scores: Scores, removed: Bools, opener_fihs: float) -> dict[str, str]:
    """Where the two signals of `Screen` disagree, or one of them is blind."""
    total = len(scores.values)
    fihs, request, pivots = (scores.signals[name] for name in ("fihs", "request", "pivots"))
    task = int((fihs[~removed] >= LEAST_FIHS * opener_fihs).sum())
    unread, turned = int(np.isnan(request).sum()), int((pivots[~removed] > 0).sum())
    least, share, most = PIVOTS
    found = {}
    if task >= MOST_TASK * total and total >= FEW:
        found["task"] = (
            f"{task:,} of {total:,} rows push away from refusal as harm does and stay, since they do not ask for it: where "
            "that is the task, train with --defence screen+kl, and go by the attack success that it measures"
        )
    if turned >= min(max(least, share * total), most):
        found["pivots"] = (
            f"{turned:,} rows that stay decline in their first sentence and then answer, which can teach a model to do so with "
            "any request: read them, and measure the trained model (gradshield evaluate)"
        )
    if unread:
        found["unread"] = (
            f"{unread:,} rows are plain text without a request, which the selector screen cannot read, so that they stay: "
            "scan them with --selector fihs"
        )
    return found
