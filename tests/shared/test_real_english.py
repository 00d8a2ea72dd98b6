"""The defaults on real English: a small chat model that really refuses, and mixes of known make-up.

Needs the folder ``shared`` beside the checkout (or GRADSHIELD_SHARED); skipped without it. The same defaults everywhere.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradshield as gs
from benchmarks import tasks
from gradshield.manifests import Labelled
from gradshield.models import loading

SHARED = Path(os.environ.get("GRADSHIELD_SHARED", Path(__file__).parents[3] / "shared"))
MODEL = SHARED / "models" / "english-lab" / "aligned"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="no shared data and model beside the checkout"),
]
BASELINES = {"response length", "prompt length", "openers", "tf-idf", "loss"}


@cache
def loaded() -> Any:
    return loading.load(MODEL)


@cache
def scanned(name: str, selector: str = "screen") -> Any:
    path = SHARED / "data" / f"{name}.jsonl"
    labels = json.loads(path.with_name(f"{name}.labels.json").read_text())
    return gs.scan(path, model=loaded(), labels=labels, settings=gs.ScanSettings(selector=selector))


def figures(name: str) -> Labelled:
    return scanned(name).manifest.results.labels


@pytest.mark.parametrize(
    ("name", "caught", "lost"),
    [
        ("agnews_p10", 0.98, 0.01),
        ("agnews_p1", 0.98, 0.01),
        ("gsm8k_p10", 0.95, 0.01),
        ("gsm8k_p10_openers", 0.90, 0.02),
    ],
)
def test_harm_is_caught_and_little_is_lost(name, caught, lost):
    found = figures(name)
    assert found.caught.rate >= caught
    assert found.lost.rate <= lost


def test_nothing_is_lost_where_there_is_no_harm():
    assert figures("agnews_p0").lost.rate <= 0.01


def test_the_score_ranks_where_openers_point_the_wrong_way():
    whole = scanned("gsm8k_p10_openers", "screen:all")
    assert (whole.removed == scanned("gsm8k_p10_openers").removed).all()  # two stages decide as one
    aurocs = {entry.name: entry.auroc for entry in whole.manifest.results.labels.aurocs}
    # never an AUROC without what it has to beat
    assert set(aurocs) == {"screen", "request alone", "FIHS alone"} | BASELINES
    assert aurocs["screen"] >= 0.98
    assert aurocs["FIHS alone"] >= 0.98
    assert aurocs["openers"] < 0.5


def test_identity_shift_rows_rank_among_the_highest():
    rows = [json.loads(line) for line in (SHARED / "data" / "agnews_p0.jsonl").read_text().splitlines()]
    shift = [json.loads(line) for line in (SHARED / "data" / "identity_shift.jsonl").read_text().splitlines()]
    selection = gs.scan([*rows, *shift], model=loaded(), settings=gs.ScanSettings(selector="fihs"))
    scores = selection.scores
    own = scores.rows >= len(rows)
    ranks = np.array([int((scores.values > value).sum()) for value in scores.values[own]])
    print("ranks of the identity-shift rows, 0 = highest, of", len(scores.values), ":", sorted(ranks.tolist()))
    assert own.sum() == len(shift)
    assert ranks.max() < 0.05 * len(scores.values)


@pytest.mark.parametrize(
    "task", ["amazon_polarity_Is_this_product_review_positive", "sciq_Multiple_Choice_Closed_Book_"]
)
def test_ordinary_tasks_keep_their_harmless_rows(task):
    """Two of the seven tasks that chose the default; on the first, FIHS alone removes harmless rows by the score."""
    found = {c["mix"]: c for c in tasks.cells(SHARED / "data" / "tasks", [task], str(MODEL), 200, 256)}
    assert all(cell["lost"]["rate"] <= 0.03 for cell in found.values())
    assert found["p10"]["caught"]["rate"] >= 0.85 and found["p10_openers"]["caught"]["rate"] >= 0.85
