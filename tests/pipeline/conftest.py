"""One thread, no network, and one folder with a tiny model for the whole room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.pipeline.common import save_model, write_probes


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
