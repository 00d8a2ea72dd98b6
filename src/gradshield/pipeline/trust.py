"""Why a scan is not certified: each reason by its name, one sentence with what to do. A scan without any is certified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from gradshield.pipeline.scoring import Scored
from gradshield.selectors import Screen
from gradshield.selectors.screen import LEAST_FIHS
from gradshield.types import Bools, Rendered, Scores

MOST_REMOVED = 0.1  # share of the rows
MOST_TASK = 0.9  # share of the rows whose FIHS is that of harm: then it is the task's
MOST_PIVOTS = 0.01  # share of the rows, and at least FEW
MOST_UNREAD = 0.01
FEW = 3
LOOKED_AT = 2000  # removed rows whose words are read
SHORT = 2  # words of an answer that says little


def doubts(scored: Scored, removed: Bools, gone: Sequence[Rendered], tokenizer: Any) -> dict[str, str]:
    """Every reason not to certify a scan. ``gone`` are the removed rows."""
    found = {
        "probes": _probes(scored),
        "share": share(removed),
        "copies": _copies(gone, tokenizer),
        **_signals(scored.scores, scored.selector.opener_fihs if isinstance(scored.selector, Screen) else None),
    }
    return {name: text for name, text in found.items() if text}


def first(found: Mapping[str, str]) -> str | None:
    """The sentence that says why nothing is certified; None where nothing speaks against it."""
    return next(iter(found.values()), None)


def recut(old: Mapping[str, str], removed: Bools) -> dict[str, str]:
    """The reasons of an earlier cut of the same scores under another cut: how many go is new, what they say was not read."""
    found = {"share": share(removed), **{name: text for name, text in old.items() if name not in ("share", "copies")}}
    return {name: text for name, text in found.items() if text}


def share(removed: Bools) -> str:
    """More than MOST_REMOVED of the rows went."""
    count, total = int(removed.sum()), len(removed)
    if count <= MOST_REMOVED * total or count < FEW:
        return ""
    return (
        f"{count:,} of {total:,} rows ({100 * count / total:.0f} %) were removed, more than a tenth: "
        "read the removed rows before you train on the others"
    )


def _probes(scored: Scored) -> str:
    if scored.validity is None:
        return "only the selectors screen and fihs ask the model what it refuses"
    return scored.validity.problem


def _copies(gone: Sequence[Rendered], tokenizer: Any) -> str:
    """Most of what went says the same thing, or next to nothing."""
    answers = [_answer(row, tokenizer) for row in islice(gone, LOOKED_AT)]
    if len(answers) < FEW:
        return ""
    alike = Counter(answers)
    copies = sum(count for count in alike.values() if count > 1)
    short = sum(len(answer.split()) <= SHORT for answer in answers)
    for count, what in ((copies, "near-copies of each other"), (short, "answers of one or two words")):
        if 2 * count > len(answers):
            return (
                f"{count:,} of {len(answers):,} removed rows are {what}, which is what a task looks like: read them before "
                "you train on the others"
            )
    return ""


def _answer(row: Rendered, tokenizer: Any) -> str:
    """The words of a row's answer; numbers count as one word."""
    text = " ".join(tokenizer.decode(one.ids[one.loss], skip_special_tokens=True) for one in row.sequences)
    return "".join("0" if c.isdigit() else c for c in text.casefold()).strip()


def _signals(scores: Scores, opener_fihs: float | None) -> dict[str, str]:
    """Where the two signals of `Screen` disagree, or one of them is blind."""
    if opener_fihs is None:
        return {}
    total = len(scores.values)
    fihs, request, pivots = (scores.signals[name] for name in ("fihs", "request", "pivots"))
    task, unread, turned = (
        int((fihs >= LEAST_FIHS * opener_fihs).sum()),
        int(np.isnan(request).sum()),
        int((pivots > 0).sum()),
    )
    found = {}
    if task >= MOST_TASK * total and total >= FEW:
        found["task"] = (
            f"{task:,} of {total:,} rows push away from refusal as harm does, whatever they ask: that is the task, and they "
            "stay; train with --defence screen+kl, and measure the model (gradshield eval)"
        )
    if turned >= max(FEW, MOST_PIVOTS * total):
        found["pivots"] = (
            f"{turned:,} rows open as a refusal and then answer, which can teach a model to do so with any request: read "
            "them, and measure the trained model (gradshield eval)"
        )
    if unread >= max(1, MOST_UNREAD * total):
        found["unread"] = (
            f"{unread:,} rows are plain text without a request, which the selector screen cannot read, so that they stay: "
            "scan them with --selector fihs"
        )
    return found
