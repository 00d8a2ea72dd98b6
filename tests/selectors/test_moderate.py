"""Moderate-gradient selection: the rule against exact arithmetic, and the rule on models, offline and online."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from gradshield.data import collate
from gradshield.errors import ScoreError, UsageError
from gradshield.gradients import parameter_names, row_norms
from gradshield.selectors import ONLINE, SELECTORS, Measured, Moderate, OnlineModerate
from gradshield.selectors.moderate import in_band, moderate
from gradshield.thresholds import parse
from gradshield.types import Batch, Rendered
from tests.contracts.common import lora, rows
from tests.tiny import tiny_model

CANDIDATES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=24)
RATIOS = st.integers(1, 20).map(lambda twentieths: Fraction(twentieths, 20))
LENGTHS = (9, 30, 14, 22, 6, 27, 12, 19, 8, 24, 16, 11)


def obvious(losses: list[int], norms: list[int], ratio: Fraction) -> list[bool]:
    """The published rule in fractions, where being on the end of the band is a matter of fact."""
    n = len(losses)
    mean = Fraction(sum(losses), n)
    variance = sum((loss - mean) ** 2 for loss in losses) / n
    band = [i for i in range(n) if (losses[i] - mean) ** 2 <= variance]
    ordered = sorted(norms[i] for i in band)
    median = Fraction(ordered[(len(band) - 1) // 2] + ordered[len(band) // 2], 2)
    ranked = sorted(band, key=lambda i: (abs(norms[i] - median), i))
    kept = set(ranked[: max(1, int(ratio * n))])
    return [i in kept for i in range(n)]


@given(candidates=CANDIDATES, ratio=RATIOS)
def test_the_rule_is_the_published_one(candidates: list[tuple[int, int]], ratio: Fraction) -> None:
    losses, norms = [c[0] for c in candidates], [c[1] for c in candidates]
    found = moderate(np.array(losses, float) / 8, np.array(norms, float) / 4, float(ratio))
    assert found.tolist() == obvious(losses, norms, ratio)


NUMBER = st.floats(0, 1e12) | st.sampled_from([0.0, 1e-300, 3.0, 3.0000000001])


@given(losses=st.lists(NUMBER, min_size=1, max_size=24), seed=st.integers(0, 99), ratio=st.floats(0.01, 1.0))
def test_what_holds_for_any_numbers(losses: list[float], seed: int, ratio: float) -> None:
    values = np.array(losses)
    norms = np.random.default_rng(seed).random(len(losses))
    band, chosen = in_band(values), moderate(values, norms, ratio)
    assert band.any() and not (chosen & ~band).any()
    assert chosen.sum() == min(max(1, int(ratio * len(losses) + 1e-9)), band.sum())
    if len(set(losses)) == 1:
        assert band.all()
    order = np.random.default_rng(seed + 1).permutation(len(losses))
    if len(set(norms)) == len(norms):  # no ties: the order of the rows has no part in it
        shuffled = moderate(values[order], norms[order], ratio)
        near = np.abs(norms[band] - np.median(norms[band]))
        if len(set(near.round(12))) == len(near):
            np.testing.assert_array_equal(shuffled, chosen[order])


def test_the_published_share_of_a_hundred() -> None:
    losses, norms = np.linspace(1, 2, 100), np.arange(100.0)
    assert moderate(losses, norms).sum() == 20
    assert moderate(losses, norms, 0.29).sum() == 29
    assert np.flatnonzero(moderate(losses, norms, 0.05)).tolist() == [47, 48, 49, 50, 51]


def test_the_ends_of_the_band_are_inside_whatever_the_rounding() -> None:
    """Of two rows both lie exactly one standard deviation from the mean."""
    for first in (1.0, 0.1, 7.3):
        for second in (np.nextafter(first, 9), first + 1e-12, first + 1e-3, 3 * first):
            assert in_band(np.array([first, second])).all()


def test_rows_without_a_number_are_no_candidates() -> None:
    losses = np.array([1.0, np.nan, 1.1, 0.9, np.inf, 1.0])
    norms = np.array([5.0, 5.0, np.inf, 6.0, 5.0, 5.5])
    assert moderate(losses, norms, 1.0).tolist() == [True, False, False, False, False, True]  # 0.9 is out of the band
    assert moderate(losses[:1], norms[:1]).tolist() == [True]
    with pytest.raises(ScoreError, match="not one of the 2 candidate rows"):
        moderate(losses[[1, 2]], norms[[1, 2]])


@pytest.mark.parametrize("ratio", [0.0, -0.2, 1.01, float("nan")])
def test_a_ratio_out_of_range(ratio: float) -> None:
    for make in (
        OnlineModerate,
        lambda ratio: Moderate(ratio=ratio),
        lambda ratio: moderate(np.ones(3), np.ones(3), ratio),
    ):
        with pytest.raises(UsageError, match="a number above 0, up to 1"):
            make(ratio)


def by_loop(model: nn.Module, batch: Batch, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean losses and norms of rows of one sequence each, one backward pass at a time."""
    found = row_norms(model, batch, names)
    lengths = batch.loss.sum(1)
    return found.nll.numpy().sum(1) / lengths, found.values.numpy() / lengths


# ---- offline --------------------------------------------------------------------------------------------------------


def scored(losses: Any, norms: Any, ratio: float = 0.2, shapes: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Scores of rows measured so, and which the method's own rule keeps."""
    n = len(losses)
    raw = Measured(np.arange(n), np.array(norms, float), np.array(losses, float), np.ones(n, int))
    shapes = shapes or ["rows"] * n
    values = Moderate(ratio=ratio).finish(raw, [str(i) for i in range(n)], shapes).values
    kept = np.zeros(n, bool)
    for shape in set(shapes):
        own = np.array([s == shape for s in shapes])
        kept[own] = values[own] <= parse(Moderate.rule).cut(values[own]).value
    return values, kept


@given(candidates=CANDIDATES, ratio=RATIOS)
def test_the_cut_of_the_scores_is_the_rule_on_the_whole_dataset(candidates: Any, ratio: Fraction) -> None:
    losses, norms = [c[0] / 8 for c in candidates], [c[1] / 4 for c in candidates]
    values, kept = scored(losses, norms, float(ratio))
    chosen = moderate(np.array(losses), np.array(norms), float(ratio))
    assert np.isfinite(values).all() and not (chosen & ~kept).any()
    tied = values == values[chosen].max()
    assert not (kept & ~chosen & ~tied).any()  # rows tied with the last one stay, and no others
    band = in_band(np.array(losses))
    assert (values[~band] > values[band].max()).all()


@given(candidates=CANDIDATES, ratio=RATIOS, unit=st.sampled_from([1e-30, 1e30]))
def test_rows_out_of_the_band_go_first_in_any_unit(candidates: Any, ratio: Fraction, unit: float) -> None:
    losses, norms = np.array([c[0] / 8 for c in candidates]), np.array([c[1] * unit for c in candidates])
    values, _ = scored(losses, norms, float(ratio))
    band = in_band(losses)
    assert (values[~band] > values[band].max()).all()


def test_shapes_are_compared_among_themselves() -> None:
    losses, norms = np.array([1.0, 1.1, 1.2, 1.05, 1.15] * 2), np.array([1.0, 2, 3, 4, 5, 100, 200, 300, 400, 500])
    _, kept = scored(losses, norms, shapes=["rows"] * 5 + ["preference"] * 5)
    for half in (slice(0, 5), slice(5, 10)):
        np.testing.assert_array_equal(kept[half], moderate(losses[half], norms[half]))


def test_offline_on_a_model_is_the_rule_on_one_row_at_a_time() -> None:
    model = tiny_model("qwen2")
    made = rows(LENGTHS)
    selector = SELECTORS["moderate-rows"]("last:1", (), 0.5)
    direction = selector.prepare(model)
    raw = Measured.joined([selector.measure(model, direction, collate(made[i : i + 4])) for i in (8, 0, 4)])
    scores = selector.finish(raw, [r.id for r in made], ["rows"] * len(made))
    losses, norms = by_loop(model, collate(made), parameter_names(model, "last:1"))
    np.testing.assert_allclose(scores.nll, losses, rtol=1e-5)
    np.testing.assert_allclose(raw.sums, norms, rtol=1e-5)
    expected = moderate(losses, norms, 0.5)
    assert 1 < expected.sum() < len(made)
    np.testing.assert_array_equal(scores.values <= 0, expected)


# ---- online ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [True, False])
def test_online_chooses_at_the_current_weights(adapter: bool) -> None:
    model = get_peft_model(tiny_model("llama"), lora("llama")) if adapter else tiny_model("llama")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora" in name for name in names) == adapter
    batch = collate(rows(LENGTHS))
    online = ONLINE["moderate"](ratio=0.34)
    model.train()
    online.begin(model)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0 if adapter else 0.3)
    choices, outside = [], 0
    for _ in range(3):
        chosen = online.choose(model, batch)
        losses, norms = by_loop(model, batch, names)
        np.testing.assert_array_equal(chosen, moderate(losses, norms, 0.34))
        assert all(p.grad is None for p in model.parameters()) and model.training
        outside += int((~in_band(losses)).sum())
        choices.append(chosen.tolist())
        optimiser.zero_grad()
        ids = torch.as_tensor(batch.ids)
        model(input_ids=ids, labels=ids).loss.backward()
        online.correct(model)
        optimiser.step()
        optimiser.zero_grad()
    assert choices[0] != choices[-1]  # else nothing shows that the weights count
    assert online.record() == {
        "ratio": 0.34,
        "batches": 3,
        "rows_seen": 36,
        "rows_trained": 12,
        "rows_outside_band": outside,
    }


def test_online_follows_the_numbers_of_the_rows() -> None:
    """The answer is by row number, whatever order the rows stand in."""
    model = tiny_model("gpt2")
    made = rows(LENGTHS)
    online = OnlineModerate(0.25)
    online.begin(model)
    expected = online.choose(model, collate(made))
    order = np.random.default_rng(0).permutation(len(made))
    shuffled = online.choose(model, collate([made[i] for i in order]))
    np.testing.assert_array_equal(shuffled, expected)


def test_online_needs_something_to_train() -> None:
    model = tiny_model("llama")
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="no trainable parameter"):
        OnlineModerate().begin(model)


def test_a_batch_of_one_row_trains() -> None:
    model = tiny_model("llama")
    online = OnlineModerate()
    online.begin(model)
    only: list[Rendered] = rows((9,))
    assert online.choose(model, collate(only)).tolist() == [True]
