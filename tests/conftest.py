"""What every test has: one thread, no network, and one folder with a tiny model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_limits

from gradshield.probes import blunt, ordinary
from gradshield.scanning import preparing
from tests.common import save_model, write_probes

os.environ["GRADSHIELD_CACHE"] = ""  # what one test finds must not reach another


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """On models this small a second thread saves nothing, and on a busy machine the two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fewer_known_requests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixth of the everyday requests and of the blunt pairs: they cost a scan of a tiny model most of its time."""
    if "slow" not in request.keywords and "shared" not in request.path.parts:
        everyday, pairs = ordinary()[::6], tuple(kind[::6] for kind in blunt())
        monkeypatch.setattr(preparing, "ordinary", lambda: everyday)
        monkeypatch.setattr(preparing, "blunt", lambda: pairs)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with its tokenizer."""
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six requests in two categories."""
    return write_probes(tmp_path_factory.mktemp("probes") / "probes.jsonl")
