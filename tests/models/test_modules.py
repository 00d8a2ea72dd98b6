"""The quick walks over a model are torch's own, to the order."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, tiny_model
from torch import nn

from gradshield.models.modules import modules_by_name, parameters_by_name


def _same(model: nn.Module) -> None:
    ours, theirs = modules_by_name(model), dict(model.named_modules())
    assert list(ours) == list(theirs) and all(ours[name] is theirs[name] for name in ours)
    mine, its = parameters_by_name(model), dict(model.named_parameters())
    assert list(mine) == list(its) and all(mine[name] is its[name] for name in mine)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_walks_give_what_torch_gives(name: str) -> None:
    _same(tiny_model(name))


def test_walks_give_what_torch_gives_with_an_adapter_and_with_shared_parts() -> None:
    _same(get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj", "v_proj"], r=2)))
    shared = nn.Linear(2, 2)
    inner = nn.Sequential(shared, nn.ReLU())
    model = nn.ModuleDict({"a": nn.ModuleList([inner, shared]), "b": inner, "c": nn.Linear(2, 2, bias=False)})
    model["c"].weight = shared.weight
    model.add_module("none", None)
    _same(model)
