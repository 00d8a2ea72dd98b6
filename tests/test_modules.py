"""The quick walks over a model are torch's own, to the order; what a process keeps of its memory is the user's to set."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, tiny_model
from torch import nn

from gradshield import placement
from gradshield.modules import modules_by_name, parameters_by_name


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


class _Libc:
    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def mallopt(self, option: int, value: int) -> int:
        self.asked.append((option, value))
        return 1


@pytest.mark.parametrize(
    ("system", "environment", "asked"),
    [("linux", {}, True), ("linux", {"MALLOC_TRIM_THRESHOLD_": "1"}, False), ("darwin", {}, False)],
)
def test_freed_memory_is_kept_where_glibc_is_the_allocator_and_the_user_said_nothing(
    system: str, environment: dict[str, str], asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = _Libc()
    monkeypatch.setattr(placement.sys, "platform", system)
    monkeypatch.setattr(placement.os, "environ", environment)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: libc)
    placement.keep_freed_memory()
    assert libc.asked == ([(-1, 2**30), (-3, 2**30)] if asked else [])


def test_another_libc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    other: Any = object()
    monkeypatch.setattr(placement.sys, "platform", "linux")
    monkeypatch.setattr(placement.os, "environ", {})
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: other)
    placement.keep_freed_memory()
