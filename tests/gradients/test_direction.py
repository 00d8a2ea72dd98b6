"""Directions: what they are, that they are checked, and that they come back from a file as they went in."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gradshield.errors import DataError, ScoreError, UsageError
from gradshield.gradients import ENGINES, gradient_direction, parameter_names
from gradshield.gradients.direction import digest, load, save
from gradshield.types import Direction
from tests.contracts.common import batch_of, gap, reluctance, rows, two_directions
from tests.tiny import tiny_model

MODEL = tiny_model("qwen2")
NAMES = parameter_names(MODEL, "last:1")


def make() -> Direction:
    return two_directions(MODEL, "last:1")


def test_a_direction_is_the_gradient_and_its_scale() -> None:
    direction = make()
    assert direction.names == ("gap", "reluctance")
    parameters = dict(MODEL.named_parameters())
    for k, score in enumerate((gap, reluctance)):
        gradients = torch.autograd.grad(score(MODEL), [parameters[n] for n in NAMES])
        for name, g in zip(NAMES, gradients, strict=True):
            torch.testing.assert_close(direction.tensors[name][k], g)
        theta = torch.cat([parameters[n].detach().flatten() for n in NAMES]).norm()
        v = torch.cat([g.flatten() for g in gradients]).norm()
        assert direction.scales[k] == pytest.approx(float(theta / v), rel=1e-4)


def test_parts_of_a_score_add_up() -> None:
    whole = gradient_direction(MODEL, {"x": [lambda m: gap(m) + reluctance(m)]}, NAMES)
    parts = gradient_direction(MODEL, {"x": [gap, reluctance]}, NAMES)
    for name in NAMES:
        torch.testing.assert_close(parts.tensors[name], whole.tensors[name])


def test_a_score_alone_has_the_bits_it_has_next_to_others_and_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    together = make()
    monkeypatch.setattr(torch, "stack", None)
    for k, (name, score) in enumerate((("gap", gap), ("reluctance", reluctance))):
        alone = gradient_direction(MODEL, {name: [score]}, NAMES)
        assert alone.scales == (together.scales[k],)
        assert all(torch.equal(alone.tensors[p][0], together.tensors[p][k]) for p in NAMES)


def test_parameters_that_no_score_moves_are_left_out() -> None:
    direction = gradient_direction(MODEL, {"x": [gap]}, parameter_names(MODEL, "all"))
    assert set(direction.tensors) <= set(parameter_names(MODEL, "all"))
    only_head = gradient_direction(MODEL, {"x": [lambda m: m.lm_head.weight.sum()]}, parameter_names(MODEL, "all"))
    assert list(only_head.tensors) == ["lm_head.weight"]


@pytest.mark.parametrize("factor", [0.0, float("nan"), float("inf")])
def test_a_gradient_that_is_no_direction_is_an_error(factor: float) -> None:
    with pytest.raises(ScoreError, match=r"'x'.*norm (0|nan|inf).*another probe"):
        gradient_direction(MODEL, {"x": [lambda m: gap(m) * factor]}, NAMES)


def test_a_direction_comes_back_from_its_file(tmp_path: Path) -> None:
    direction = make()
    save(direction, tmp_path / "d.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]
    found = load(tmp_path / "d.safetensors")
    for field in ("names", "scales", "digest"):
        assert getattr(found, field) == getattr(direction, field)
    assert set(found.tensors) == set(direction.tensors)
    assert all(torch.equal(found.tensors[n], direction.tensors[n]) for n in found.tensors)


def test_other_bytes_do_not_match_the_digest(tmp_path: Path) -> None:
    direction = make()
    name = NAMES[0]
    one_bit = {**direction.tensors, name: direction.tensors[name].clone()}
    one_bit[name].view(-1)[3] = torch.nextafter(one_bit[name].view(-1)[3], torch.tensor(9.0))
    renamed = {(f"{n}x" if n == name else n): t for n, t in direction.tensors.items()}
    for tensors in (one_bit, renamed):
        assert digest(direction.names, tensors) != direction.digest
        save(dataclasses.replace(direction, tensors=tensors), tmp_path / "d.safetensors")
        with pytest.raises(DataError, match=r"d\.safetensors does not match its digest"):
            load(tmp_path / "d.safetensors")
    assert digest(("gap", "other"), direction.tensors) != direction.digest
    assert digest(direction.names, dict(reversed(direction.tensors.items()))) == direction.digest


def test_a_file_that_is_no_direction_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("not a direction")
    save_file({"w": torch.ones(2)}, tmp_path / "headless.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "half.safetensors", {"names": "[]"})
    for name in ("text", "headless", "half"):
        with pytest.raises(DataError, match=rf"{name}\.safetensors could not be read"):
            load(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("name", list(ENGINES))
def test_a_direction_of_another_model_is_refused(name: str) -> None:
    direction = make()
    batch = batch_of(rows((5, 8)))
    absent = dataclasses.replace(direction, tensors={**direction.tensors, "model.no.such": torch.ones(2, 3)})
    shape = dataclasses.replace(direction, tensors={NAMES[0]: torch.ones(2, 3, 5)})
    for wrong, what in ((absent, "no such parameter"), (shape, r"of shape \(3, 5\)")):
        with pytest.raises(UsageError, match=rf"{what}.*fits only the model and subspace"):
            ENGINES[name]().directional(MODEL, batch, wrong)


def test_dropout_has_no_part_in_a_direction() -> None:
    noisy = tiny_model("gpt2")
    for module in noisy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    quiet = two_directions(noisy, "last:1")
    noisy.train()
    assert two_directions(noisy, "last:1").digest == quiet.digest
    assert noisy.training
