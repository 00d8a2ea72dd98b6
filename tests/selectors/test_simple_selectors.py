"""Loss, gradient norm and chance: each against its definition."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from gradshield.data import collate
from gradshield.errors import ScoreError, UsageError
from gradshield.gradients import adapted, parameter_names
from gradshield.selectors import GradNorm, Loss, Measured, Moderate, Random
from gradshield.selectors.base import no_direction
from gradshield.types import Rendered, Tokens
from tests.contracts.common import lora, rows
from tests.tiny import VOCABULARY, tiny_model


def pair() -> Rendered:
    draw = np.random.default_rng(3)
    sides = [(14, 1.0), (9, -1.0)]
    return Rendered(
        40, "pair", "preference", tuple(Tokens(draw.integers(5, VOCABULARY, n), np.arange(n) >= 4, c) for n, c in sides)
    )


def test_loss_is_the_mean_cross_entropy_of_the_answer() -> None:
    model = tiny_model("mistral")
    made = [*rows(), pair()]
    found = Loss().measure(model, Loss().prepare(model), collate(made))
    for i, row in enumerate(made):
        each = []
        for side in row.sequences:
            logits = model(input_ids=torch.as_tensor(side.ids)[None]).logits[0, :-1]
            loss = functional.cross_entropy(logits, torch.as_tensor(side.ids)[1:], reduction="none")
            each += loss[torch.as_tensor(side.loss)[1:]].tolist()
        assert found.sums[i] == found.nll[i] == pytest.approx(np.mean(each), rel=1e-5)
        assert found.lengths[i] == len(each)


@pytest.mark.parametrize("subspace", ["all", "last:1", "lora", "targets"])
def test_gradnorm_is_the_norm_of_the_gradient_of_the_mean_loss(subspace: str) -> None:
    with adapted(tiny_model("phi"), lora("phi") if subspace == "lora" else None, seed=0) as model:
        weights = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
        targets = weights if subspace == "targets" else []
        selector = GradNorm(subspace, targets)
        model.eval()  # a fresh adapter has its dropout on
        made = [*rows(), pair()]
        found = selector.measure(model, selector.prepare(model), collate(made))
        parameters = [
            p.requires_grad_() for n, p in model.named_parameters() if n in parameter_names(model, subspace, targets)
        ]
        for i, row in enumerate(made):
            total = torch.zeros(())
            for side in row.sequences:
                logits = model(input_ids=torch.as_tensor(side.ids)[None]).logits[0, :-1]
                loss = functional.cross_entropy(logits, torch.as_tensor(side.ids)[1:], reduction="none")
                total = total + side.coefficient * loss[torch.as_tensor(side.loss)[1:]].sum()
            total = total / sum(int(side.loss.sum()) for side in row.sequences)
            squares = [float(g.double().square().sum()) for g in torch.autograd.grad(total, parameters)]
            assert found.sums[i] == pytest.approx(sum(squares) ** 0.5, rel=1e-4)
        assert found.nll[0] == pytest.approx(
            Loss().measure(model, Loss().prepare(model), collate(made)).nll[0], rel=1e-5
        )


def drawn(ids: list[str], seed: int) -> list[float]:
    n = len(ids)
    raw = Measured(np.arange(n), np.zeros(n), np.zeros(n), np.ones(n, int))
    return Random(seed).finish(raw, ids, ["rows"] * n).values.tolist()


@given(ids=st.lists(st.text(max_size=5), min_size=2, max_size=9, unique=True), seed=st.integers(0, 9))
def test_a_row_draws_its_number_from_seed_and_content(ids: list[str], seed: int) -> None:
    values = drawn(ids, seed)
    assert all(0 <= v < 1 for v in values) and len(set(values)) == len(values)
    assert drawn(ids[::-1], seed) == values[::-1]
    assert not set(drawn(ids, seed + 1)) & set(values)


def test_the_numbers_are_spread_evenly() -> None:
    values = np.array(drawn([f"row{i}" for i in range(20_000)], 0))
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # 99.9 % of chi-squared with 19 degrees of freedom


def test_random_never_asks_the_model() -> None:
    found = Random(0).measure(None, Random(0).prepare(None), collate(rows()))  # type: ignore[arg-type]
    assert found.lengths.tolist() == [int(r.sequences[0].loss.sum()) for r in rows()]


@pytest.mark.parametrize("selector", [Loss(), GradNorm(), Moderate()])
def test_a_value_that_is_not_finite_names_its_row(selector: Loss | GradNorm | Moderate) -> None:
    for bad in (np.nan, np.inf):
        raw = Measured(np.array([3, 8]), np.array([1.0, bad]), np.array([1.0, 1.0]), np.array([2, 2]))
        with pytest.raises(ScoreError, match=r"rows 8\)"):
            selector.finish(raw, ["a", "b"], ["rows", "rows"])


@pytest.mark.parametrize("make", [GradNorm, Moderate])
def test_a_wrong_subspace_is_refused_at_once(make: type[GradNorm] | type[Moderate]) -> None:
    with pytest.raises(UsageError, match="unknown subspace 'first:2'"):
        make("first:2")


def test_the_digest_without_a_direction_tells_models_and_methods_apart() -> None:
    """Saved shards are found by it: measured on other weights, they must not be."""
    model = tiny_model("llama")
    first = no_direction("loss", model).digest
    assert no_direction("loss", tiny_model("llama")).digest == first
    assert not no_direction("loss", model).tensors and no_direction("loss", model).names == ()
    others = [
        no_direction("gradnorm", model),
        no_direction("loss", model, "lora"),
        no_direction("loss", tiny_model("llama", 1)),
    ]
    with torch.no_grad():
        bit = model.model.norm.weight
        bit[3] = torch.nextafter(bit[3], torch.tensor(9.0))
    others.append(no_direction("loss", model))
    others.append(no_direction("loss", tiny_model("llama", dtype=torch.bfloat16)))
    assert len({first, *[d.digest for d in others]}) == 6
