"""The oracle itself: against autograd written out, and against a derivative that needs no autograd."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from gradshield.gradients import Loop, gradient_direction, parameter_names, row_norms
from gradshield.types import Batch, Direction, Rendered
from tests.contracts.common import batch_of, rows, two_directions
from tests.tiny import ARCHITECTURES, tiny_model

LENGTHS = (7, 12, 9)


def row_loss(model: nn.Module, row: Rendered) -> torch.Tensor:
    """The loss of a row, summed over the tokens in it, by the model's own forward pass: no mask, no padding, no hook."""
    tokens = row.sequences[0]
    logits = model(input_ids=torch.as_tensor(tokens.ids)[None]).logits[0, :-1]
    each = functional.cross_entropy(logits, torch.as_tensor(tokens.ids)[1:], reduction="none")
    return each[torch.as_tensor(tokens.loss)[1:]].sum()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loop_is_minus_the_dot_product_of_two_gradients(arch: str) -> None:
    model = tiny_model(arch)
    direction = two_directions(model, "all")
    found = Loop().directional(model, batch_of(rows(LENGTHS)), direction)
    assert found.values.shape == (2, 3) and found.values.dtype == torch.float64
    for i, row in enumerate(rows(LENGTHS)):
        model.zero_grad(set_to_none=True)
        row_loss(model, row).backward()
        for k in range(2):
            expected = -sum(
                float((p.grad.double() * direction.tensors[name][k].double()).sum())
                for name, p in model.named_parameters()
                if p.grad is not None and name in direction.tensors
            )
            assert float(found.values[k, i]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


# Llama's and Gemma's norms and rotary positions go through float32 even in a float64 model, and their difference is noisier.
@pytest.mark.parametrize(("arch", "step", "rtol"), [("llama", 1e-4, 2e-3), ("gpt2", 1e-5, 1e-4), ("gemma", 1e-4, 2e-3)])
def test_loop_is_the_slope_of_the_loss_along_the_direction(arch: str, step: float, rtol: float) -> None:
    model = tiny_model(arch, dtype=torch.float64)
    draw = torch.Generator().manual_seed(5)
    tensors = {  # any direction will do, not only a gradient
        name: torch.randn(1, *p.shape, dtype=torch.float64, generator=draw) for name, p in model.named_parameters()
    }
    direction = Direction(tensors, ("any",), (1.0,), "")
    found = Loop().directional(model, batch_of(rows(LENGTHS)), direction).values[0]
    slopes = []
    with torch.no_grad():
        for sign in (1, -1):
            for name, p in model.named_parameters():
                p.add_(tensors[name][0], alpha=sign * step)
            slopes.append([float(row_loss(model, row)) for row in rows(LENGTHS)])
            for name, p in model.named_parameters():
                p.sub_(tensors[name][0], alpha=sign * step)
    expected = -(np.array(slopes[0]) - np.array(slopes[1])) / (2 * step)
    np.testing.assert_allclose(found.numpy(), expected, rtol=rtol)


def test_a_step_of_gradient_descent_on_a_row_of_positive_fihs_raises_the_score() -> None:
    """The sign, end to end: train on a row, and S moves as its FIHS says."""
    model = tiny_model("llama", dtype=torch.float64)
    prompt = torch.tensor([[1, 3, 40, 50, 60, 4]])

    def score(m: nn.Module) -> torch.Tensor:
        last = m(input_ids=prompt).logits[0, -1]
        return last[20] - last[30]

    direction = gradient_direction(model, {"all": [score]}, parameter_names(model, "all"))
    batch = batch_of(rows())
    found = Loop().directional(model, batch, direction).values[0]
    assert (found > 0).any() and (found < 0).any()
    before = float(score(model))
    for i in (int(found.argmax()), int(found.argmin())):
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(row_loss(model, rows()[i]), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.sub_(g, alpha=1e-6)
            change = float(score(model)) - before
            for p, g in zip(parameters, gradients, strict=True):
                p.add_(g, alpha=1e-6)
        assert change == pytest.approx(1e-6 * float(found[i]), rel=1e-2)


def test_rows_without_any_loss_are_zero() -> None:
    model = tiny_model("llama")
    batch = batch_of(rows(LENGTHS))
    silent = Batch(batch.ids, batch.attention, np.zeros_like(batch.loss), batch.rows, batch.coefficients)
    found = Loop().directional(model, silent, two_directions(model, "last:1"))
    assert not found.values.any() and not found.nll.any()


def test_a_caller_may_have_switched_gradients_off() -> None:
    model = tiny_model("llama")
    direction, batch = two_directions(model, "last:1"), batch_of(rows(LENGTHS))
    values, norms = (
        Loop().directional(model, batch, direction).values,
        row_norms(model, batch, list(direction.tensors)),
    )
    with torch.no_grad():
        assert torch.equal(Loop().directional(model, batch, direction).values, values)
        assert torch.equal(row_norms(model, batch, list(direction.tensors)).values, norms.values)
        assert not torch.is_grad_enabled()
