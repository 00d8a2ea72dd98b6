"""Several processes find what one finds, whatever dies on the way, and no process is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file

import gradshield as gs
from gradshield.data import RenderConfig, read, render_all
from gradshield.errors import DataError, ScoreError, UsageError
from gradshield.models import loading
from gradshield.models.loading import parameters_digest
from gradshield.scanning import shards, workers
from gradshield.scanning.workers import Workers
from gradshield.selectors import Loss
from tests.common import chats, command, jsonl, scan, scan_arguments, write
from tests.tiny import tiny_model, tiny_tokenizer

ray = pytest.importorskip("ray", reason="needs gradshield[ray]")

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
ROWS = chats(120)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MEAN_ROWS", 10)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of two nodes on this machine, of one CPU each."""
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "HF_HUB_OFFLINE": "1"}
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    found = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    found.add_node(**small)
    yield found.address
    ray.shutdown()
    found.shutdown()


def rendered(count: int) -> list[Any]:
    return list(render_all(read(chats(count)).examples, tiny_tokenizer(), RenderConfig(max_length=64)).rendered)


def actors() -> dict[int, psutil.Process]:
    """The processes of our actors on this machine that were started by this one."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "Actor" in " ".join(child.cmdline()):
                found[child.pid] = child
    return found


def same(one: gs.Selection, other: gs.Selection) -> None:
    np.testing.assert_array_equal(one.scores.values, other.scores.values)
    assert one.scores.ids == other.scores.ids
    np.testing.assert_array_equal(one.removed, other.removed)
    assert one.categories == other.categories
    assert one.manifest.settings.direction_sha256 == other.manifest.settings.direction_sha256


# ---- on a cluster -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_actors_find_what_one_process_finds_though_one_is_killed(
    cluster: str, folder: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "scoring rows" and not killed:
            killed.append(max(actors()))
            os.kill(killed[-1], signal.SIGKILL)

    model: Any = tiny_model("llama")
    model.model.layers[1].register_forward_hook(lambda module, given, found: 1.5 * found)
    model = get_peft_model(model, LORA)
    before = parameters_digest(model)
    options: dict[str, Any] = {"model": model, "tokenizer": tiny_tokenizer()}
    alone = scan(ROWS, output=tmp_path / "one", **options)
    shared = scan(ROWS, output=tmp_path / "two", workers=gs.Workers(2, cluster), progress=progress, **options)
    assert killed
    assert parameters_digest(model) == before
    same(alone, shared)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name / ".gradshield/shards").iterdir()}
        for name in ("one", "two")
    )
    assert len(one) > 3
    assert one == two
    assert not ray.is_initialized()
    _until(lambda: not actors(), 20)


class _Light:
    """An actor that loads nothing: ``measures`` says what it does in place of work."""

    measures = "works"

    def measure(self, *given: Any) -> Any:
        if self.measures == "dies":
            os._exit(1)
        if self.measures == "refuses":
            raise DataError("not these rows: give others")
        if self.measures == "fails":
            raise ValueError("a shape is wrong")
        return [row.row for row in given[-1]]


def given_to(cluster: str, monkeypatch: pytest.MonkeyPatch, **what: str) -> list[tuple[str, Any]]:
    """What light actors give back of ten shards of two rows each."""
    monkeypatch.setattr(workers, "Actor", type("Light", (_Light,), what))
    rows = rendered(20)
    model = tiny_model("llama")
    job = shards.Measurer(Loss(), model, Loss().prepare(model), 100)
    drawn: list[int] = []

    def missing() -> Iterator[shards.Shard]:
        for start in range(0, 20, 2):
            drawn.append(start)
            yield str(start), [rows[start], rows[start + 1]]

    found = []
    with Workers(2, cluster).open(loading.wrap(model, tiny_tokenizer()), model, None, 0) as hands:
        for key, part in hands(job, missing()):
            found.append((key, part))
            assert len(drawn) <= len(found) + 2  # as many shards in memory as actors, and no more
    return found


@pytest.mark.slow
def test_each_shard_comes_back_once(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = given_to(cluster, monkeypatch)
    assert sorted(found, key=lambda one: int(one[0])) == [(str(n), [n, n + 1]) for n in range(0, 20, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "error", "sentence"),
    [
        ({"measures": "dies"}, ScoreError, r"^3 workers died in a row on rows \d+ to \d+ \("),
        ({"measures": "refuses"}, DataError, "^not these rows: give others$"),
        (
            {"measures": "fails"},
            ScoreError,
            r"^a worker failed \(ValueError: a shape is wrong\): run the scan in one process",
        ),
    ],
    ids=["dies", "refuses", "fails"],
)
def test_what_goes_wrong_in_actors_is_one_sentence(
    what: dict[str, str], error: type[Exception], sentence: str, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(error, match=sentence) as raised:
        given_to(cluster, monkeypatch, **what)
    assert "\n" not in str(raised.value)
    assert type(raised.value) is error
    _until(lambda: not actors(), 20)


def test_no_cluster_at_the_address() -> None:
    with pytest.raises(UsageError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'"):
        scan(ROWS, workers=gs.Workers(2, "127.0.0.1:1"))


# ---- on this machine --------------------------------------------------------------------------------------------------


@contextmanager
def started(*arguments: Any) -> Iterator[subprocess.Popen[str]]:
    """Python in a process group of its own, killed at the end.

    It has one thread, as the tests have: a direction found with two differs in its last bits, and so do the shards' keys.
    """
    command = [sys.executable, *map(str, arguments)]
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=nothing, stderr=pipe, text=True, start_new_session=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finished(folder: Path) -> dict[Path, int]:
    """When each finished shard was written."""
    return {path: path.stat().st_mtime_ns for path in (folder / ".gradshield" / "shards").glob("*.safetensors")}


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_one_process_goes_on(
    folder: Path, probes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MEAN_ROWS", 128)  # as the command has it
    data, out = write(tmp_path / "data.jsonl", jsonl(chats(6000))), tmp_path / "out"
    arguments = scan_arguments(data, folder, out, probes, "--threshold", "ratio:50%")
    with started("-m", "gradshield", *arguments, "--workers", "2") as process:
        _until(lambda: finished(out), 120)
        begun = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said.strip().splitlines()[-1].startswith("interrupted: finished work is kept")
    assert "Traceback" not in said and "ray" not in said.lower()
    assert len(begun) > 2 and not psutil.wait_procs(begun, timeout=20)[1]
    before = finished(out)
    assert command(*arguments).code == 0
    after = finished(out)
    assert before.items() < after.items()
    assert sum(len(load_file(path)["lengths"]) for path in after) == 6000


ALIVE = """
import sys
import time
from pathlib import Path
from types import SimpleNamespace
import torch
from gradshield.scanning.workers import Workers
with Workers(2).open(SimpleNamespace(device=torch.device("cpu"), source=None), None, None, 0):
    Path(sys.argv[1]).touch()
    time.sleep(600)
"""


@pytest.mark.slow
def test_no_process_outlives_one_that_is_killed(tmp_path: Path) -> None:
    with started("-c", ALIVE, tmp_path / "alive") as process:
        _until((tmp_path / "alive").exists, 120)
        begun = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        ours = [child for child in begun if "Agent" not in child.name()]  # Ray's own agents end within a minute
        assert len(ours) > 2 and not psutil.wait_procs(ours, timeout=20)[1]


def test_one_process_needs_no_ray(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(workers, "find_spec", lambda name: None)
    scan(chats(6), model=folder, workers=1)
    for given, asked in (((2,), "--workers 2"), ((None, "auto"), "--ray")):
        with pytest.raises(UsageError, match=rf"^{asked} needs Ray, which is not installed: install gradshield\[ray\]"):
            scan(ROWS, workers=gs.Workers(*given))
    data = write(tmp_path / "data.jsonl", jsonl(ROWS))
    done = command("scan", data, "--model", folder, "--output", tmp_path / "out", "--workers", "2")
    assert done.code == UsageError.exit_code
    assert done.sentence.startswith("--workers 2 needs Ray")


def test_the_number_of_workers_is_checked() -> None:
    with pytest.raises(UsageError, match="there are 0 workers: give at least 1"):
        scan(ROWS, workers=0)


def test_every_actor_finds_room_on_the_gpus() -> None:
    assert [workers.gpu_share(count, 2) for count in (1, 2, 3, 4, 5)] == [1, 1, 1 / 2, 1 / 2, 1 / 3]


def _until(met: Any, seconds: float) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := met():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not met in {seconds} seconds")
