"""Why a scan is not certified: named reasons, one sentence each with what to do. Without any, it is certified."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np

from gradshield.scanning.decide import ROWS, Decision, caught_and_lost, decide
from gradshield.thresholds import parse
from gradshield.types import LEAST_ANCHORS, Anchors, Bools, Example, Floats, Rate, Scores

MOST_REMOVED = 0.1  # share of the rows
MOST_TASK = 0.9  # share of rows whose FIHS is as high as harm's: then the task itself pushes
PIVOTS = (3, 0.01, 10)  # kept rows that decline and then answer: least number, least share, number that always counts
LEAST_READ, MOST_TAKEN = 0.5, 0.2  # known harmful prompts beyond the cut, and everyday ones
MOST_NEAR = 0.25  # of the removed rows beyond the default cut, those nearer to it than to known harm
LEAST_CAUGHT, MOST_LOST = 0.85, 0.03  # of labelled rows: an interval entirely beyond them is a doubt
MOST_QUARANTINED = 0.1  # share of the rows
FEW = 3
LOOKED_AT = 2000  # removed rows whose text is read
SHORT = 2  # words in a short answer
READ = "read the removed rows, and confirm or keep each (gradshield review)"


def doubts(
    scores: Scores,
    decision: Decision,
    examples: Iterable[Example],
    problem: str,
    opener_fihs: float | None = None,
    quarantined: int = 0,
    labels: Sequence[int] | None = None,
) -> dict[str, str]:
    """Every reason not to certify a decision on scores, by name.

    ``examples`` are the removed rows that nobody has confirmed (`Decision.unread`), ``problem`` is the problem with the probes,
    if any, and ``opener_fihs`` the score of compliant openers after the probes (None for a selector other than `Screen`).
    ``labels`` (1 = harmful) are aligned with the scores.
    """
    removed, unread = decision.removed, decision.unread(scores.rows)
    found = {
        "probes": problem,
        "labels": "" if labels is None else _labels(caught_and_lost(removed, labels)),
        "share": _share(unread) if not removed.all() else "every row was removed: there is nothing to train on",
        "copies": _copies(examples),
        "quarantine": _quarantine(quarantined, len(removed)),
    }
    if opener_fihs is not None:
        from gradshield.selectors import Screen  # where needed: it brings torch

        default = decide(scores, parse(Screen.rule))
        assert scores.anchors is not None  # or there is no such cut
        found |= {
            "ruler": _ruler(scores.anchors, default.cuts[ROWS].value),
            "near": _near(scores.values[unread & default.removed], default.cuts[ROWS].value, scores.anchors),
            "loose": _loose(scores, decision, default),
            "strict": _strict(unread & ~default.removed, default),
            **_signals(scores, removed, opener_fihs, bool(found["share"])),
        }
    return {name: text for name, text in found.items() if text}


UNASKED = "this selector does not ask the model what it refuses: screen and fihs do"


def first(found: Mapping[str, str]) -> str | None:
    """The first reason; None without any."""
    return next(iter(found.values()), None)


def of_run(found: Mapping[str, str]) -> list[str]:
    """A scan's reasons that count against the trained and measured model: all but UNASKED."""
    return [text for text in found.values() if text != UNASKED]


def _labels(rates: Mapping[str, Rate]) -> str:
    """By the labels, too little of the harm was removed, or too much of the rest."""
    caught, lost = rates.get("caught"), rates.get("lost")
    if caught and caught.high < LEAST_CAUGHT:
        return f"of {caught.n:,} rows labelled harmful {caught.k:,} were removed: the scan does not detect this harm"
    if lost and lost.low > MOST_LOST:
        return f"of {lost.n:,} rows labelled harmless {lost.k:,} were removed: read them before you train on the others"
    return ""


def _quarantine(count: int, scored: int) -> str:
    """More than MOST_QUARANTINED of the rows were never scored."""
    if count <= MOST_QUARANTINED * (count + scored):
        return ""
    return f"{count:,} of {count + scored:,} rows could not be read or scored: see quarantine.jsonl for the reasons"


def _share(removed: Bools) -> str:
    """More than MOST_REMOVED of the rows were removed."""
    count, total = int(removed.sum()), len(removed)
    if count <= MOST_REMOVED * total:
        return ""
    return f"{count:,} of {total:,} rows ({100 * count / total:.0f} %) were removed, more than a tenth: {READ}"


def _copies(examples: Iterable[Example]) -> str:
    """Most removed rows have the same answer, or a very short one; a row that is twice in the file counts once."""
    answers = list({row.id.partition("-")[0]: _answer(row) for row in islice(examples, LOOKED_AT)}.values())
    if len(answers) < FEW:
        return ""
    alike = Counter(answers)
    copies = sum(count for count in alike.values() if count > 1)
    short = sum(len(answer.split()) <= SHORT for answer in answers)
    for count, what in ((copies, "the same answer except for numbers"), (short, "an answer of one or two words")):
        if 2 * count > len(answers):
            return f"{count:,} of {len(answers):,} removed rows have {what}, which is typical of a task: {READ}"
    return ""


def _answer(row: Example) -> str:
    """The text of a row's answers, with every number as 0; of a row that came as tokens, their ids."""
    if ids := [
        str(own) for one in row.conversations for own, counts in zip(one.ids, one.counted, strict=True) if counts
    ]:
        return " ".join(ids)
    return re.sub(r"\d+", "0", " ".join(_answers(row)).casefold()).strip()


def _answers(row: Example) -> Iterator[str]:
    for one in row.conversations:
        if one.messages is None:
            yield one.completion
            continue
        for turn in one.messages:
            if turn.get("role") == "assistant":
                yield str(turn.get("content") or turn.get("tool_calls") or "")


def _ruler(known: Anchors, cut: float) -> str:
    """The model does not tell the known kinds of requests apart, at the selector's default cut."""
    if min(len(known.harmful), len(known.harmless)) < LEAST_ANCHORS:
        return (
            f"{len(known.harmful):,} harmful requests that the model refuses and {len(known.harmless):,} everyday ones are too "
            f"few to tell the two apart: give --probes of which it refuses {LEAST_ANCHORS} or more"
        )
    read, taken = (int((values > cut).sum()) for values in (known.harmful, known.harmless))
    if read < LEAST_READ * len(known.harmful):
        return (
            f"the model reads only {read:,} of {len(known.harmful):,} known harmful requests as harm, so rows like the others "
            "are kept: scan with a larger model of the same family, or with --selector fihs"
        )
    if taken > MOST_TAKEN * len(known.harmless):
        return (
            f"the model reads {taken:,} of {len(known.harmless):,} everyday requests as harm, so harmless rows like them are "
            f"removed: {READ}"
        )
    return ""


def _near(beyond: Floats, cut: float, known: Anchors) -> str:
    """Many removed rows score nearer to the selector's default cut than to known harm, where lost harmless rows score."""
    near = int((beyond < halfway(cut, known)).sum())
    if near < FEW or near <= MOST_NEAR * len(beyond):
        return ""
    return (
        f"{near:,} of {len(beyond):,} removed rows score nearer to the cut than to known harm, as harmless rows that a scan "
        f"loses do: {READ}"
    )


def halfway(cut: float, known: Anchors) -> float:
    """The score halfway from a cut to the median of known harm: rows below it are nearer to the cut."""
    return float(cut + np.median(known.harmful)) / 2


def _loose(scores: Scores, decision: Decision, default: Decision) -> str:
    """Rows above the selector's default cut are kept, and no reviewer has cleared them."""
    kept = int((default.removed & ~decision.removed & ~np.isin(scores.rows, decision.cleared)).sum())
    if not kept:
        return ""
    cut, rows = default.cuts[ROWS], "1 row scores" if kept == 1 else f"{kept:,} rows score"
    return (
        f"{rows} above the default cut ({cut.rule}, {cut.value:.4g}) and stay: read what stays above it before training"
    )


def _strict(below: Bools, default: Decision) -> str:
    """Rows that score below the selector's default cut go, and no reviewer has said so."""
    if not (removed := int(below.sum())):
        return ""
    cut, rows = default.cuts[ROWS], "1 removed row scores" if removed == 1 else f"{removed:,} removed rows score"
    return f"{rows} below the default cut ({cut.rule}, {cut.value:.4g}), as harmless rows do: {READ}"


def _signals(scores: Scores, removed: Bools, opener_fihs: float, many: bool) -> dict[str, str]:
    """Where the two signals of `Screen` disagree, or one is blind; ``many``: the share removed is a doubt already."""
    from gradshield.selectors.screen import LEAST_FIHS, LEAST_READING

    total = len(scores.values)
    fihs, request, pivots = (scores.signals[name] for name in ("fihs", "request", "pivots"))
    # Of rows that read as harmless a sample is measured, of the others all: those would count too much.
    measured = fihs[~removed & np.isfinite(fihs) & ~(request >= LEAST_READING)]
    task = int((measured >= LEAST_FIHS * opener_fihs).sum())
    unread, turned = int(np.isnan(request).sum()), int((pivots[~removed] > 0).sum())
    least, share, most = PIVOTS
    found = {}
    if len(measured) >= FEW and task >= MOST_TASK * len(measured) and not many:
        found["task"] = (
            f"{task:,} of the {len(measured):,} kept rows measured that read as harmless push away from refusal like harm, but "
            "do not ask for it: if that is the task, train with --defence screen+kl (preference pairs: with a higher beta), and "
            "check the attack success that it measures"
        )
    if turned >= min(max(least, share * total), most):
        found["pivots"] = (
            f"{turned:,} kept rows decline in their first sentence and then answer, which can teach a model to do so for any "
            "request: read them, and measure the trained model (gradshield evaluate)"
        )
    if unread:
        found["unread"] = (
            f"{unread:,} rows have no request (plain text, or an empty message) for the selector screen to read, so they are "
            "kept: scan them with --selector fihs"
        )
    return found
