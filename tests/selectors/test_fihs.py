"""FIHS from batch to score: folding pairs, multi-turn masks, joining parts, and scores that are not finite."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from gradshield.data import batches, collate
from gradshield.errors import ScoreError
from gradshield.gradients import ENGINES, Loop
from gradshield.probes import FunctionProbe, PromptBatch, Prompts, first_logits
from gradshield.selectors import SELECTORS, Fihs, Measured, parse_aggregate
from gradshield.types import Rendered, Tokens
from tests.contracts.common import rows, two_directions
from tests.tiny import VOCABULARY, tiny_model

PROMPTS = Prompts(
    tuple(tuple(np.random.default_rng(i).integers(5, VOCABULARY, 4 + i % 5).tolist()) for i in range(20)),
    tuple("ab"[i % 2] for i in range(20)),
    tuple(map(str, range(20))),
)


def gap(model: nn.Module, batch: PromptBatch) -> torch.Tensor:
    logits = first_logits(model, batch)
    return (logits[:, 20] - logits[:, 30]).mean()


def selector(engine: str = "forward", aggregate: str = "sum") -> Fihs:
    return Fihs(FunctionProbe(gap), PROMPTS, ENGINES[engine](), parse_aggregate(aggregate), "last:1")


def pairs() -> list[Rendered]:
    draw = np.random.default_rng(4)
    made = []
    for i, (chosen, rejected) in enumerate([(9, 6), (14, 20), (8, 8), (25, 11)]):
        sides = []
        for length, sign in ((chosen, 1.0), (rejected, -1.0)):
            loss = np.arange(length) >= 3
            loss[5] = False  # two trained turns
            sides.append(Tokens(draw.integers(5, VOCABULARY, length), loss, sign))
        made.append(Rendered(10 * i + 3, f"p{i}", "preference", tuple(sides)))
    return made


@pytest.mark.parametrize("name", list(ENGINES))
def test_an_answer_to_avoid_is_minus_the_answer(name: str) -> None:
    model, fihs = tiny_model("llama"), selector(name)
    direction = fihs.prepare(model)
    toward = rows()[:3]
    away = [replace(row, row=row.row + 3, sequences=(replace(row.sequences[0], coefficient=-1.0),)) for row in toward]
    found = fihs.measure(model, direction, collate([*toward, *away]))
    assert np.abs(found.sums).min() > 0.01
    np.testing.assert_allclose(found.sums[3:], -found.sums[:3], rtol=1e-3)
    np.testing.assert_allclose(found.nll[3:], found.nll[:3], rtol=1e-3)


@pytest.mark.parametrize("name", list(ENGINES))
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_pair_is_chosen_minus_rejected(name: str, arch: str) -> None:
    model = tiny_model(arch)
    fihs = selector(name)
    direction = fihs.prepare(model)
    made = pairs()
    found = fihs.measure(model, direction, collate(made))
    assert found.rows.tolist() == [3, 13, 23, 33]
    for i, row in enumerate(made):
        values, nll, lengths, tokens = [], 0.0, 0, []
        for side in row.sequences:
            alone = collate([Rendered(0, "", "rows", (Tokens(side.ids, side.loss),))])
            one = Loop().directional(model, alone, direction)
            values.append(float(one.values[0, 0]))
            nll += float(one.nll.sum())
            lengths += int(side.loss.sum())
            if ENGINES[name].per_token:
                of_tokens = ENGINES["forward"]().directional(model, alone, direction).values[0, 0].numpy()
                tokens.append(side.coefficient * of_tokens[side.loss])
        assert found.sums[i] == pytest.approx(values[0] - values[1], rel=1e-2, abs=1e-2)
        assert abs(values[1]) > 0.1  # else the sign could not be seen
        assert found.lengths[i] == lengths
        assert found.nll[i] == pytest.approx(nll / lengths, rel=1e-3)
        if ENGINES[name].per_token:
            assert found.tokens is not None
            np.testing.assert_allclose(found.tokens[i], np.concatenate(tokens), rtol=0.05, atol=0.02)
    assert (found.tokens is not None) == ENGINES[name].per_token


def test_rows_keep_their_own_whatever_the_batch_and_its_order() -> None:
    model = tiny_model("qwen2")
    fihs = selector()
    direction = fihs.prepare(model)
    mixed = [*pairs(), *[Rendered(r.row + 40, r.id, r.shape, r.sequences) for r in rows()]]
    shuffled = [mixed[i] for i in np.random.default_rng(0).permutation(len(mixed))]
    whole = Measured.joined([fihs.measure(model, direction, collate(shuffled))])
    parts = Measured.joined([fihs.measure(model, direction, b) for b in batches(shuffled, 90, 60)])
    assert whole.rows.tolist() == parts.rows.tolist() == sorted(r.row for r in mixed)
    np.testing.assert_allclose(whole.sums, parts.sums, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(whole.nll, parts.nll, rtol=1e-4)
    assert whole.lengths.tolist() == parts.lengths.tolist()
    assert whole.tokens is not None and parts.tokens is not None
    for row, a, b in zip(sorted(mixed, key=lambda r: r.row), whole.tokens, parts.tokens, strict=True):
        assert len(a) == sum(int(s.loss.sum()) for s in row.sequences)
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=2e-3)
    np.testing.assert_allclose([t.sum() for t in whole.tokens], whole.sums, rtol=1e-9)


def test_a_trained_turn_counts_and_an_untrained_one_does_not() -> None:
    model = tiny_model("llama")
    fihs = selector()
    direction = two_directions(model, "last:1")
    ids = np.random.default_rng(0).integers(5, VOCABULARY, 12)
    masks = {"first": slice(3, 5), "second": slice(8, 12), "both": np.r_[3:5, 8:12]}
    found = {}
    for name, where in masks.items():
        loss = np.zeros(12, dtype=bool)
        loss[where] = True
        found[name] = fihs.measure(model, direction, collate([Rendered(0, "", "rows", (Tokens(ids, loss),))]))
    assert found["both"].sums[0] == pytest.approx(found["first"].sums[0] + found["second"].sums[0], rel=1e-5)
    assert found["both"].tokens is not None and len(found["both"].tokens[0]) == 6


def test_prepare_is_the_gradient_over_all_prompts_whatever_the_chunk() -> None:
    model = tiny_model("llama")
    fihs = selector()
    direction = fihs.prepare(model)  # 20 prompts, in chunks of 16 and 4
    parameters = {n: p for n, p in model.named_parameters() if n in direction.tensors}
    whole = torch.autograd.grad(gap(model, PROMPTS.batch(torch.device("cpu"))), list(parameters.values()))
    for name, g in zip(parameters, whole, strict=True):
        torch.testing.assert_close(direction.tensors[name][0], g, rtol=1e-3, atol=1e-5)
    assert direction.names == ("all",)


def measured(sums: list[float], tokens: list[list[float]] | None = None) -> Measured:
    n = len(sums)
    return Measured(
        np.arange(n) + 5,
        np.array(sums),
        np.ones(n),
        np.full(n, 2),
        None if tokens is None else tuple(map(np.array, tokens)),
    )


def test_finish_aggregates_and_turns_signs_for_decoys() -> None:
    raw = measured([1.0, 4.0], [[3.0, -2.0], [4.0, 0.0]])
    scores = selector(aggregate="top:1").finish(raw, ["x", "y"], ["rows", "preference"])
    assert scores.values.tolist() == [3.0, 4.0]
    assert scores.decoys is not None and scores.decoys.tolist() == [2.0, 0.0]
    assert scores.rows.tolist() == [5, 6] and scores.ids == ["x", "y"] and scores.shapes == ["rows", "preference"]
    without = selector("loop").finish(measured([1.0, 4.0]), ["x", "y"], ["rows", "rows"])
    assert without.values.tolist() == [1.0, 4.0] and without.decoys is None and without.tokens is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_is_named_by_row(bad: float) -> None:
    with pytest.raises(ScoreError, match=r"1 of 3 rows .* \(rows 6\).*float32"):
        selector("loop").finish(measured([1.0, bad, 2.0]), "abc", ["rows"] * 3)
    lossy = measured([1.0, 3.0, 2.0])
    lossy.nll[2] = bad
    with pytest.raises(ScoreError, match=r"1 of 3 rows .* \(rows 7\).*float32"):
        selector("loop").finish(lossy, "abc", ["rows"] * 3)
    with pytest.raises(ScoreError, match=r"14 of 14 rows .* \(rows 5, 6, .*, 14 and 4 more\)"):
        selector("loop").finish(measured([bad] * 14), "a" * 14, ["rows"] * 14)


@pytest.mark.parametrize("name", list(SELECTORS))
def test_every_selector_has_its_three_verbs(name: str) -> None:
    entry = SELECTORS[name]
    assert entry.name == name and SELECTORS.summary(name).endswith(".")
    assert all(callable(getattr(entry, verb)) for verb in ("prepare", "measure", "finish"))
