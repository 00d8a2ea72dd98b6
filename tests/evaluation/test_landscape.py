"""The landscape: moved weights against plain arithmetic, what is put back, VISAGE against a fine Riemann sum."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradshield.errors import DataError, UsageError
from gradshield.evaluation.landscape import (
    Landscape,
    landscape,
    moved,
    norm,
    random_directions,
    unit_norm,
    visage,
    weights,
)
from gradshield.stats import wilson
from gradshield.types import Rate
from tests.tiny import ARCHITECTURES, tiny_model


def held(model: nn.Module) -> dict[tuple[str, str], tuple[int, bytes]]:
    """Which parameter object is in each slot, tied ones included, and its bits."""
    return {
        (name, slot): (id(p), p.detach().numpy().tobytes())
        for name, module in model.named_modules()
        for slot, p in module._parameters.items()
        if p is not None
    }


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 14)[None]).logits


# ---- moving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_moved_is_the_model_with_these_weights_and_then_as_it_was(arch: str) -> None:
    model, slow = tiny_model(arch, seed=1).eval(), tiny_model(arch, seed=1).eval()
    direction = random_directions(weights(model), 1, seed=2)["random-0"]
    before, plain = held(model), logits(model)
    with torch.no_grad():
        for name, p in slow.named_parameters():
            p.add_(direction[name], alpha=3.0)
    with moved(model, direction, 3.0):
        assert torch.equal(logits(model), logits(slow))
        assert not torch.equal(logits(model), plain)
    assert held(model) == before and torch.equal(logits(model), plain)


def test_moved_puts_back_after_an_exception_and_an_interrupt() -> None:
    model = tiny_model("gemma", seed=0)
    direction = random_directions(weights(model), 1)["random-0"]
    before = held(model)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), moved(model, direction, 1.0):
            raise error
        assert held(model) == before


def test_moves_nest() -> None:
    model = tiny_model("llama", seed=0)
    first, second = random_directions(weights(model), 2).values()
    before = held(model)
    with moved(model, first, 1.0), moved(model, second, -2.0):
        both = weights(model)
    assert held(model) == before
    for name, p in weights(model).items():
        torch.testing.assert_close(both[name], p + first[name] - 2.0 * second[name])


@pytest.mark.parametrize("tensors", [{"no.such": torch.zeros(2)}, {"lm_head.weight": torch.zeros(2, 2)}])
def test_a_direction_that_does_not_fit_is_reported(tensors: dict) -> None:
    model = tiny_model("llama", seed=0)
    with pytest.raises(UsageError, match="computed on this model"), moved(model, tensors, 1.0):
        pass


# ---- directions -----------------------------------------------------------------------------------------------------


def test_random_directions_have_norm_one_and_the_shares_of_their_model() -> None:
    model = tiny_model("qwen2", seed=0)
    like = weights(model)
    found = random_directions(like, 3, seed=1)
    assert list(found) == ["random-0", "random-1", "random-2"]
    for direction in found.values():
        assert norm(direction) == pytest.approx(1.0, abs=1e-6)
        for name, tensor in direction.items():
            assert float(tensor.norm()) == pytest.approx(float(like[name].norm()) / norm(like), rel=1e-4, abs=1e-9)
    first, second = (torch.cat([tensor.flatten() for tensor in found[f"random-{i}"].values()]) for i in (0, 1))
    assert abs(float(first @ second)) < 0.05
    again = random_directions(like, 3, seed=1)
    assert all(torch.equal(again[d][n], found[d][n]) for d in found for n in like)
    assert not torch.equal(
        random_directions(like, 1, seed=2)["random-0"]["lm_head.weight"], found["random-0"]["lm_head.weight"]
    )


def test_invalid_directions_are_reported() -> None:
    for wrong in ({"w": torch.zeros(3)}, {"w": torch.tensor([math.nan])}):
        with pytest.raises(UsageError, match="norm above 0"):
            unit_norm(wrong)


# ---- VISAGE ---------------------------------------------------------------------------------------------------------


def test_visage_by_hand() -> None:
    # Cells 0.25, 0.5, 0.5, 0.5, 0.25 long; the ends are fully unsafe and do not count.
    assert visage([-1, -0.5, 0, 0.5, 1], [1, 0.5, 0, 0.5, 1]) == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert visage([1, -0.5, 0, 0.5, -1], [1, 0.5, 0, 0.5, 1]) == pytest.approx(2 / 3)  # the order plays no part
    assert visage([-1, 0, 1], [0, 0, 0]) == 1.0
    assert visage([-1, 0, 1], [1, 1, 1]) == 0.0
    assert visage([-1, 0, 1], [0.5, 0.1, 0.5], highest=0.5) == pytest.approx(0.4)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=8), st.integers(0, 99), st.sampled_from([0.3, 0.7, 1.0]))
def test_visage_as_a_fine_riemann_sum(asr: list[float], seed: int, highest: float) -> None:
    """The slow twin: every point of a fine grid takes the rate of its nearest step."""
    generator = np.random.default_rng(seed)
    alphas = np.sort(generator.choice(np.arange(-50, 51), size=len(asr), replace=False) / 50)
    alphas[0], alphas[-1] = -1.02, 1.02
    fine = np.linspace(-1.02, 1.02, 40_001)
    nearest = [asr[i] for i in np.abs(fine[:, None] - alphas[None]).argmin(axis=1)]
    below = [highest - s for s in nearest if s < highest]
    assert visage(alphas, asr, highest) == pytest.approx(sum(below) / len(below) if below else 0.0, abs=2e-3)
    assert visage(alphas, asr, highest, conditional=False) == pytest.approx(sum(below) / len(nearest), abs=2e-3)


def test_what_the_two_readings_say_of_a_wider_basin_in_an_unsafe_plain() -> None:
    alphas = np.linspace(-1, 1, 201)
    lines = [np.where(np.abs(alphas) > width + 1e-9, 1.0, 0.0) for width in (0.2, 0.5, 0.8)]
    assert [visage(alphas, line) for line in lines] == [1.0, 1.0, 1.0]
    assert [visage(alphas, line, conditional=False) for line in lines] == pytest.approx([0.2, 0.5, 0.8], abs=0.006)


@pytest.mark.parametrize(
    ("alphas", "asr"),
    [
        ([0, 1, 2], [0, 0, 0]),
        ([-1, 0, 1], [0, 0]),
        ([-1, 0, 0, 1], [0, 0, 0, 0]),
        ([-1, 0, 1], [0, math.nan, 0]),
        ([], []),
    ],
)
def test_visage_says_what_it_cannot_take(alphas: list, asr: list) -> None:
    with pytest.raises(DataError, match="VISAGE"):
        visage(alphas, asr)


# ---- the whole ------------------------------------------------------------------------------------------------------


def measured(model: nn.Module, calls: list[int]) -> dict[str, Rate]:
    """A rate that depends on the weights: how many of 20 entries of the head are above 0; and one that some points lack."""
    calls.append(1)
    k = int((weights(model)["lm_head.weight"].flatten()[:20] > 0).sum())
    return {"up": wilson(k, 20), **({"undecided": wilson(1, 2)} if k % 2 else {})}


def test_landscape_as_a_loop_over_copied_weights() -> None:
    model = tiny_model("llama", seed=3)
    lines = random_directions({"lm_head.weight": weights(model)["lm_head.weight"]}, 2, seed=5)
    # A direction of another length is the same direction.
    longer = {name: {n: 7.0 * t for n, t in line.items()} for name, line in lines.items()}
    before, calls = held(model), []
    found = landscape(model, longer, [1.0, 0, -1, 0.5], 2.0, lambda: measured(model, calls))
    assert held(model) == before
    assert found.alphas == (-1.0, 0.0, 0.5, 1.0) and len(calls) == 7
    for name, line in lines.items():
        for a, rate in zip(found.alphas, found.rates[name]["up"], strict=True):
            shifted = weights(model)["lm_head.weight"] + 2.0 * a * line["lm_head.weight"]
            assert rate == wilson(int((shifted.flatten()[:20] > 0).sum()), 20)
        assert list(found.rates[name]) in (["up"], ["up", "undecided"])
    both = [visage(found.alphas, found.curve(name, "up")) for name in lines]
    assert found.visage("up") == pytest.approx(sum(both) / 2) and found.visage("up", ["random-1"]) == both[1]
    wide = [visage(found.alphas, found.curve(name, "up"), 0.5, conditional=False) for name in lines]
    assert found.visage("up", highest=0.5, conditional=False) == pytest.approx(sum(wide) / 2)
    plain = json.loads(json.dumps(asdict(found)))
    assert plain["unit"] == 2.0 and plain["rates"]["random-0"]["up"][1] == asdict(found.rates["random-0"]["up"][1])


def test_landscape_puts_back_when_the_measurement_fails() -> None:
    model = tiny_model("llama", seed=3)
    before = held(model)
    with pytest.raises(RuntimeError):
        landscape(
            model, random_directions(weights(model), 1), [-1, 1], 1.0, lambda: (_ for _ in ()).throw(RuntimeError)
        )
    assert held(model) == before


def test_landscape_says_what_it_cannot_take() -> None:
    model = tiny_model("llama", seed=3)
    lines = random_directions(weights(model), 1)
    for directions, alphas in (({}, [0]), (lines, []), (lines, [1, 1]), (lines, [math.inf])):
        with pytest.raises(UsageError, match="a landscape takes"):
            landscape(model, directions, alphas, 1.0, dict)
    found = Landscape((0.0,), 1.0, {"d": {"r": (wilson(1, 2),)}})
    with pytest.raises(UsageError, match="no direction 'x': choose one of d"):
        found.curve("x", "r")
    with pytest.raises(UsageError, match="no rate 'x': choose one of r"):
        found.curve("d", "x")
