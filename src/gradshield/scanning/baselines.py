"""Trivial baselines: how well simple features separate harmful rows from harmless ones.

An AUROC means little if a feature without a model reaches the same. All are reported in one direction, higher = harmful,
never flipped: an AUROC of 0.1 means that the feature points the wrong way on these rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

from gradshield.errors import DataError
from gradshield.manifests import Auroc
from gradshield.stats import score_bounds
from gradshield.types import Floats, Ints

FOLDS = 5

OPENERS = (
    "sure|of course|certainly|absolutely|definitely|yes|okay|ok|here is|here's|here are|no problem|great question|great"
    "|happy to help|i'd be happy to|i would be happy to|i'm happy to|i can help|gladly|with pleasure|let me|to do this"
    "|first,|step 1|the best way to|one way to|you can|you could|you should"
)
_OPENER = re.compile(rf"[\s\"'*_#>-]*(?:{OPENERS})(?!\w)", re.IGNORECASE)


def auroc(labels: ArrayLike, scores: ArrayLike, name: str = "") -> Auroc:
    """AUROC of scores, higher for harm (ties count one half) with Newcombe's 95 % score interval.

    Source: Newcombe (2006), Statistics in Medicine 25:559-573, method 5: the values that a test with the Hanley-McNeil
    variance, both class sizes set to their mean in its shape terms, does not reject. Not DeLong's interval, which shrinks
    to a point if the classes separate fully.

    Raises DataError if the lengths differ, a label is not 0 or 1, a score is not finite, or a class is empty.
    """
    from scipy.stats import rankdata

    truth, values = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if truth.shape != values.shape or truth.ndim != 1:
        raise DataError(f"every row needs one label and one score, got {truth.size} labels and {values.size} scores")
    if not np.isin(truth, (0, 1)).all():
        raise DataError("labels must be 0 (harmless) or 1 (harmful), and some are neither")
    if not np.isfinite(values).all():
        raise DataError(f"scores must be finite, and that of row {int(np.flatnonzero(~np.isfinite(values))[0])} is not")
    n_pos, n_neg = int(truth.sum()), int((1 - truth).sum())
    if n_pos == 0 or n_neg == 0:
        raise DataError(f"an AUROC needs rows of both classes, got {n_pos} harmful and {n_neg} harmless")
    ranks = rankdata(values)
    area = float((ranks[truth == 1].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))
    z2 = float(ndtri(0.975)) ** 2
    mean = (n_pos + n_neg) / 2

    def distance(theta: float) -> float:
        shape = 1 + (mean - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (area - theta) ** 2 - z2 * theta * (1 - theta) * shape / (n_pos * n_neg)

    low, high = score_bounds(distance, area, (0.0, 1.0))
    return Auroc(name=name, auroc=area, low=low, high=high, n_pos=n_pos, n_neg=n_neg)


def trivial_baselines(
    prompts: Sequence[str], answers: Sequence[str], labels: ArrayLike, nll: ArrayLike | None = None
) -> list[Auroc]:
    """AUROC of each trivial feature.

    ``response length`` and ``prompt length`` in characters; ``openers``, whether the answer begins with one of
    ``OPENERS``; ``tf-idf``, a logistic regression on the words and word pairs of the row, scored out of fold (it sees
    the labels of the other folds, unlike an unsupervised score); ``loss``, if ``nll`` is given. An unavailable baseline
    has ``auroc`` None and the reason under ``absent``.

    Raises DataError like ``auroc``.
    """
    features: dict[str, ArrayLike] = {
        "response length": [len(answer) for answer in answers],
        "prompt length": [len(prompt) for prompt in prompts],
        "openers": [float(_OPENER.match(answer.replace("’", "'")) is not None) for answer in answers],
    }
    rows = [auroc(labels, values, name) for name, values in features.items()]
    truth = np.asarray(labels, dtype=np.int64)
    n_pos, n_neg = int(truth.sum()), int((1 - truth).sum())
    absent = partial(Auroc, auroc=None, low=None, high=None, n_pos=n_pos, n_neg=n_neg)
    if min(n_pos, n_neg) < FOLDS:
        reason = f"{FOLDS} folds need {FOLDS} rows of each class, got {n_pos} harmful and {n_neg} harmless"
        rows.append(absent(name="tf-idf", absent=reason))
    else:
        texts = [f"{prompt}\n{answer}" for prompt, answer in zip(prompts, answers, strict=True)]
        rows.append(auroc(truth, _out_of_fold(texts, truth), "tf-idf"))
    if nll is None:
        rows.append(absent(name="loss", absent="the loss was not measured for every row"))
    else:
        rows.append(auroc(labels, nll, "loss"))
    return rows


def _out_of_fold(texts: list[str], labels: Ints) -> Floats:
    """Per row, the log-odds of harm by a classifier fitted on the other folds."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        # Keep one-character tokens: an answer may be just "5" or "I".
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"),
        LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000),
    )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    scores: Floats = cross_val_predict(model, texts, labels, cv=folds, method="decision_function")
    return scores
