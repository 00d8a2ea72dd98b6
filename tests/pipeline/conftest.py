"""No network, and one folder with a tiny model for the whole room."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.common import save_model, write_probes


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with its tokenizer."""
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="package")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six requests in two categories."""
    return write_probes(tmp_path_factory.mktemp("probes") / "probes.jsonl")
