"""A Ray cluster of several nodes finds what one process finds, also when an actor is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import gradshield as gs
from gradshield.distributed import Ray
from gradshield.errors import ModelError, UsageError
from gradshield.pipeline import shards
from tests.pipeline.common import chats, save_model, scan
from tests.tiny import tiny_model, tiny_tokenizer

ray = pytest.importorskip("ray", reason="needs gradshield[ray]")

pytestmark = pytest.mark.slow
ROWS = chats(120)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of two nodes on this machine, of one CPU each."""
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    found = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    found.add_node(**small)
    yield found.address
    ray.shutdown()
    found.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, one thread as an actor has it, and many small shards."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(shards, "MEAN_ROWS", 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(one: gs.Selection, other: gs.Selection) -> None:
    np.testing.assert_array_equal(one.scores.values, other.scores.values)
    np.testing.assert_array_equal(one.removed, other.removed)
    assert one.scores.ids == other.scores.ids
    assert one.categories == other.categories


def test_a_cluster_finds_what_one_process_finds(cluster: str, folder: Path, tmp_path: Path) -> None:
    alone = scan(ROWS, model=folder, output=tmp_path / "one")
    shared = scan(ROWS, model=folder, output=tmp_path / "two", workers=Ray(cluster))
    same(alone, shared)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name / ".gradshield/shards").iterdir()}
        for name in ("one", "two")
    )
    assert one == two
    assert not ray.is_initialized()


def test_the_shard_of_a_killed_actor_is_measured_again(cluster: str, folder: Path) -> None:
    killed: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "scoring rows" and not killed:
            titles = {p.pid: " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])}
            killed.append(next(pid for pid, title in titles.items() if title.startswith("ray::") and "Map" in title))
            os.kill(killed[0], signal.SIGKILL)

    rows = chats(600)
    same(scan(rows, model=folder), scan(rows, model=folder, workers=Ray(cluster, 2), progress=progress))
    assert killed


def test_an_error_of_an_actor_is_the_scans(cluster: str, folder: Path) -> None:
    """Here: the weights in memory are no longer those of the folder."""
    from gradshield import models

    loaded = models.load(folder)
    with torch.no_grad():
        next(loaded.model.parameters()).add_(0.5)
    with pytest.raises(ModelError, match="is not the one that is scored"):
        scan(ROWS, model=loaded, workers=Ray(cluster, 1))


def test_a_model_in_memory_is_refused(cluster: str) -> None:
    options: dict[str, Any] = {"model": tiny_model("llama"), "tokenizer": tiny_tokenizer()}
    with pytest.raises(UsageError, match="which other machines do not have"):
        scan(ROWS, workers=Ray(cluster, 1), **options)


def test_no_cluster_at_the_address() -> None:
    with pytest.raises(UsageError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'"):
        scan(ROWS, workers=Ray("127.0.0.1:1"))
