"""The shards of a scan on Ray: actors that hold the model, on this machine or a cluster.

Shards and keys are the same as in one process, so a scan can be resumed with another number of workers. A shard is sent when an
actor is free, so that memory holds one per actor; the main process writes the results. A shard whose actor dies goes to
another.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil
from typing import Any

import numpy as np
import torch

from gradshield.errors import DataError, GradShieldError, ScoreError, UsageError, first_line
from gradshield.models.loading import keep_freed_memory
from gradshield.scanning.parcel import Origin, Parcel, bare, packed, unpacked
from gradshield.scanning.shards import Hands, Measurer, Shard, here
from gradshield.selectors import Measured
from gradshield.types import Rendered

ATTEMPTS = 3  # actors that may die on one shard before the scan gives up


@dataclass(frozen=True)
class Workers:
    """Who measures a scan's rows: this process, ``count`` actors on this machine, or actors on the Ray cluster at ``ray``.

    ``count`` defaults to 1; on a cluster to one per GPU, or per CPU for a model on the CPU. Raises UsageError if it is below
    one, or if Ray is needed and not installed.
    """

    count: int | None = None
    ray: str | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise UsageError(f"there are {self.count} workers: give at least 1")
        if not self.alone and find_spec("ray") is None:
            asked = f"--workers {self.count}" if self.ray is None else "--ray"
            raise UsageError(f"{asked} needs Ray, which is not installed: install gradshield[ray]")

    @property
    def alone(self) -> bool:
        return self.ray is None and self.count in (None, 1)

    @contextmanager
    def open(self, origin: Origin) -> Iterator[Hands]:
        """`Hands` for the jobs of one scan. Actors start at the first missing shard and are stopped when the block ends.

        Raises UsageError if no cluster answers at the address, or it has no GPU for a model on one.
        """
        if self.alone:
            yield here
            return
        with connected(self.ray, max(self.count or 1, torch.get_num_threads())) as ray:
            device, found = origin.loaded.device, ray.cluster_resources()
            cpus, gpus = int(found.get("CPU", 0)), int(found.get("GPU", 0))
            if device.type == "cuda" and origin.loaded.source is not None and device.index is not None and gpus > 1:
                raise UsageError(
                    f"the model is on {device}, and workers use all {gpus} GPUs: set CUDA_VISIBLE_DEVICES={device.index} "
                    "instead of --device, or leave out --workers and --ray"
                )
            there = gpus if device.type == "cuda" else cpus
            if not there:
                raise UsageError(
                    f"the Ray cluster has no {'GPU' if device.type == 'cuda' else 'CPU'} for the model, which is on {device}: "
                    "give --ray another address, or leave it out"
                )
            count = self.count or there
            share = gpu_share(count, gpus) if device.type == "cuda" else 0
            crew = _Crew(ray, origin, count, share, max(1, cpus // count))
            try:
                yield crew
            finally:
                crew.stop()


def gpu_share(count: int, gpus: int) -> float:
    """The share of a GPU that each of ``count`` actors requests, so that all fit."""
    return 1 / ceil(count / gpus)


@contextmanager
def connected(address: str | None, cpus: int) -> Iterator[Any]:
    """Ray: already initialised by the caller, else the cluster at the address, or a local one started here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # workers of this machine have its packages
    import ray

    if ray.is_initialized():
        yield ray
        return
    own: dict[str, Any] = {"num_cpus": cpus, "include_dashboard": False} if address is None else {}
    try:
        _reach(address or "")
        started: Any = ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, RuntimeError, ValueError) as error:
        if address is None:
            raise UsageError(
                f"Ray cannot be started on this machine ({first_line(error)}): leave out --workers"
            ) from error
        raise UsageError(
            f"no Ray cluster answers at {address!r} ({first_line(error)}): give the address of one, as `ray start --head` "
            "prints it, or auto"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()
    if address is None:  # delete the logs, but keep those of a failed scan
        shutil.rmtree(started.address_info["session_dir"], ignore_errors=True)


def _reach(address: str) -> None:
    """Raises OSError at once if nothing listens at a host and port; Ray itself would try for minutes, then exit."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


class Actor:
    """A worker process: holds the model and the current job, and measures shards."""

    def __init__(self) -> None:
        self.kept = ExitStack()  # never closed, so that the adapter stays on the model
        self.number = 0

    def load(self, parcel: np.ndarray, device: str, threads: int) -> None:
        """Load the model. Raises like `Parcel.open`."""
        keep_freed_memory()
        torch.set_num_threads(threads)
        found: Parcel = unpacked(parcel, device)
        self.device, self.model = device, self.kept.enter_context(found.open(device))

    def measure(self, number: int, order: np.ndarray, rows: Sequence[Rendered]) -> Measured:
        """Measure one shard with the selector, direction and token budget in ``order``, the same for equal ``number``."""
        if number != self.number:
            self.job = None  # its direction may be as large as the model
            selector, direction, budget = unpacked(order, self.device)
            self.job, self.number = Measurer(selector, self.model, direction, budget), number
        assert self.job is not None
        return self.job.measure(rows)


@dataclass(frozen=True, eq=False)
class _Task:
    """An actor's current work: measure ``shard``, or load the model if that is None; ``attempt`` counts from 1."""

    actor: Any
    shard: Shard | None
    attempt: int


class _Crew:
    """The actors of one scan: `Hands` that can be called for several jobs in turn."""

    def __init__(self, ray: Any, origin: Origin, count: int, gpu: float, threads: int) -> None:
        self.ray, self.origin, self.count, self.gpu, self.threads = ray, origin, count, gpu, threads
        self.parcel: Any = None
        self.free: list[Any] = []
        self.tasks: dict[Any, _Task] = {}
        self.jobs = 0

    def __call__(self, job: Measurer, missing: Iterable[Shard]) -> Iterator[tuple[str, Measured]]:
        """Raises ScoreError if ATTEMPTS actors died on one shard, and any error of an actor."""
        ray, failed, dead = self.ray, self.ray.exceptions.RayTaskError, self.ray.exceptions.RayError
        shards, waiting, order = iter(missing), deque[tuple[Shard, int]](), None
        self.jobs += 1
        while True:
            measuring = sum(task.shard is not None for task in self.tasks.values())
            while len(waiting) + measuring < self.count and (shard := next(shards, None)) is not None:
                waiting.append((shard, 1))
            if not waiting and not measuring:
                return
            if order is None:
                order = self._put(packed((bare(job.selector), job.direction, job.token_budget)))
            while waiting and self.free:
                actor, (shard, attempt) = self.free.pop(), waiting.popleft()
                self.tasks[actor.measure.remote(self.jobs, order, shard[1])] = _Task(actor, shard, attempt)
            loading = sum(task.shard is None for task in self.tasks.values())
            for _ in range(min(len(waiting) - loading, self.count - len(self.tasks))):
                self._start()
            (done,), _ = ray.wait(list(self.tasks), num_returns=1)
            task = self.tasks.pop(done)
            try:
                measured: Measured = ray.get(done)
            except failed as error:
                raise _raised(error.cause) from None
            except dead as error:  # the actor or its machine died
                ray.kill(task.actor)
                if task.attempt == ATTEMPTS:
                    raise _given_up(task, error) from error
                if task.shard is not None:
                    waiting.append((task.shard, task.attempt + 1))
                else:
                    self._start(task.attempt + 1)
                continue
            self.free.append(task.actor)
            if task.shard is not None:
                yield task.shard[0], measured

    def stop(self) -> None:
        for actor in (*self.free, *(task.actor for task in self.tasks.values())):
            self.ray.kill(actor)

    def _start(self, attempt: int = 1) -> None:
        """Start an actor, which first loads the model."""
        if self.parcel is None:
            self.parcel = self._put(self.origin.pack())
        remote = self.ray.remote(num_cpus=1, num_gpus=self.gpu, scheduling_strategy="SPREAD")(Actor)
        actor = remote.remote()
        device = self.origin.loaded.device.type
        self.tasks[actor.load.remote(self.parcel, device, self.threads)] = _Task(actor, None, attempt)

    def _put(self, data: np.ndarray) -> Any:
        full = (self.ray.exceptions.ObjectStoreFullError, self.ray.exceptions.OutOfDiskError)
        try:
            return self.ray.put(data)
        except full as error:
            raise DataError(
                f"Ray's object store has no room for {len(data) / 2**30:.1f} GiB ({first_line(error)}): free some space on its "
                "disk, or leave out --workers and --ray"
            ) from error


def _raised(cause: Exception) -> GradShieldError:
    """An actor's error as a GradShieldError."""
    if isinstance(cause, GradShieldError):
        return cause
    return ScoreError(
        f"a worker failed ({first_line(cause)}): run the scan in one process, without --workers and --ray, to see where"
    )


def _given_up(task: _Task, error: Exception) -> ScoreError:
    what = "while they loaded the model"
    if task.shard is not None:
        rows = [row.row for row in task.shard[1]]
        what = f"on rows {min(rows)} to {max(rows)}"
    return ScoreError(
        f"{ATTEMPTS} workers died in a row {what} ({first_line(error)}): if memory ran out, give fewer --workers or a smaller "
        "--token-budget; finished shards are kept"
    )
