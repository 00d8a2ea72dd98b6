"""AUROC against scikit-learn, its interval against coverage, and the trivial features on rows made for them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from gradshield.errors import DataError
from gradshield.scanning.baselines import auroc, trivial_baselines


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=60))
def test_auroc_equals_scikit_learn_ties_included(rows: list[tuple[bool, int]]) -> None:
    labels, scores = [r[0] for r in rows], [r[1] for r in rows]
    if len(set(labels)) == 1:
        with pytest.raises(DataError, match="both classes"):
            auroc(labels, scores)
        return
    result = auroc(labels, scores)
    assert result.auroc == pytest.approx(roc_auc_score(labels, scores))
    assert 0 <= result.low <= result.auroc <= result.high <= 1
    assert result.low < result.high  # also where the classes separate fully
    mirrored = auroc(labels, [-s for s in scores])
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - result.high, 1 - result.low), abs=1e-6)


@pytest.mark.parametrize(("true", "n_pos", "n_neg"), [(0.75, 40, 60), (0.97, 20, 200)])
def test_the_interval_covers_the_true_area(true: float, n_pos: int, n_neg: int) -> None:
    generator = np.random.default_rng(0)
    shift = np.sqrt(2) * norm.ppf(true)
    labels = np.r_[np.ones(n_pos), np.zeros(n_neg)]
    results = [auroc(labels, generator.normal(shift * labels)) for _ in range(300)]
    covered = np.mean([r.low <= true <= r.high for r in results])
    assert 0.91 <= covered <= 0.995


def test_ten_rows_that_separate_prove_less_than_a_hundred() -> None:
    few, many = (auroc([0] * n + [1] * n, range(2 * n)) for n in (10, 100))
    assert few.auroc == many.auroc == few.high == 1.0
    assert few.low < 0.9 < many.low < 1.0


def test_scores_that_are_none_are_refused() -> None:
    with pytest.raises(DataError, match="row 1 is not"):
        auroc([0, 1], [0.0, np.nan])
    with pytest.raises(DataError, match="3 labels and 2 scores"):
        auroc([0, 1, 1], [0.0, 1.0])
    with pytest.raises(DataError, match="neither"):
        auroc([0, 2], [0.0, 1.0])


def _rows(n: int = 60) -> tuple[list[str], list[str], list[int]]:
    """Harmful answers are longer, begin with an opener and hold a word of their own; prompts are alike."""
    labels = [i % 3 == 0 for i in range(n)]
    prompts = [f"question {'x' * (i // 3 % 4)}" for i in range(n)]
    answers = [f"Sure, the gadget of row {i} and much more" if bad else f"row {i}" for i, bad in enumerate(labels)]
    return prompts, answers, [int(label) for label in labels]


def test_each_baseline_sees_its_own_feature() -> None:
    prompts, answers, labels = _rows()
    nll = [1.0 - label for label in labels]
    found = {row.name: row for row in trivial_baselines(prompts, answers, labels, nll)}
    assert list(found) == ["response length", "prompt length", "openers", "tf-idf", "loss"]
    assert found["response length"].auroc == found["openers"].auroc == 1.0
    assert found["prompt length"].auroc == pytest.approx(0.5)
    assert found["tf-idf"].auroc > 0.95
    assert found["loss"].auroc == 0.0  # lower loss on harm: not flipped
    assert found["loss"].high < 0.2
    assert all((row.n_pos, row.n_neg) == (20, 40) for row in found.values())


def test_tf_idf_is_out_of_fold() -> None:
    """On words that say nothing about the label, a classifier that saw its own rows would still reach 1."""
    prompts, answers, _ = _rows(200)
    labels = np.random.default_rng(0).permutation([0, 1] * 100)
    words = [f"word{i} other{i * 7}" for i in range(200)]
    row = next(r for r in trivial_baselines(words, words, labels) if r.name == "tf-idf")
    assert 0.3 < row.auroc < 0.7
    assert trivial_baselines(prompts, answers, labels) == trivial_baselines(prompts, answers, labels)


def test_what_is_absent_says_why() -> None:
    prompts, answers, _ = _rows(20)
    found = {row.name: row for row in trivial_baselines(prompts, answers, [1, 1] + [0] * 18)}
    assert found["tf-idf"].auroc is None
    assert "got 2 harmful and 18 harmless" in found["tf-idf"].absent
    assert "not measured" in found["loss"].absent


def test_openers_are_whole_words() -> None:
    labels = [1, 0, 1, 0, 0]
    answers = ["**Sure!** Here", "Surely not", "I’d be happy to help", "Okra is green", "Paris"]
    found = {row.name: row for row in trivial_baselines(["q"] * 5, answers, labels)}
    assert found["openers"].auroc == 1.0
