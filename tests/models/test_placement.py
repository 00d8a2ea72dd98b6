"""What a process keeps of its memory is the user's to say, and another allocator's own affair."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from gradshield.models import loading


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
    monkeypatch.setattr(loading.sys, "platform", system)
    monkeypatch.setattr(loading.os, "environ", environment)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: libc)
    loading.keep_freed_memory()
    assert libc.asked == ([(-1, 2**30), (-3, 2**30)] if asked else [])


def test_another_libc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    other: Any = object()
    monkeypatch.setattr(loading.sys, "platform", "linux")
    monkeypatch.setattr(loading.os, "environ", {})
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: other)
    loading.keep_freed_memory()
