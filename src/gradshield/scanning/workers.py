"""The shards of a scan on Ray: actors that hold the model, on this machine or a cluster.

Shards and keys are the same as in one process, so a scan can be resumed with another number of workers. A shard is sent when an
actor is free, so that memory holds one per actor; the main process writes the results. Ray starts an actor that died again, and
gives it its shard again.

The scored model travels as a `Parcel`: the actor loads it from its source, or gets it as an object, and compares it with the one
that was sent before it measures anything. Nothing is written to a file, and of files only a model's are read (`models.loading`).
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from gradshield.errors import DataError, GradShieldError, ModelError, ScoreError, UsageError, first_line
from gradshield.gradients import adapted
from gradshield.models.loading import LoadedModel, ModelSource, keep_freed_memory, parameters_digest
from gradshield.scanning.shards import Hands, Measurer, Shard, here
from gradshield.selectors import Measured, Selector
from gradshield.types import Rendered

if TYPE_CHECKING:
    from peft import PeftConfig

ATTEMPTS = 3  # actors that may die on one shard before the scan gives up
LIBRARIES = ("accelerate.", "peft.", "transformers.")  # their hooks do not change a model's numbers


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
    def open(self, loaded: LoadedModel, model: nn.Module, adapter: PeftConfig | None, seed: int) -> Iterator[Hands]:
        """`Hands` for the jobs of one scan of ``model``, the loaded one with its adapter, which was initialised under ``seed``.

        Actors start at the first missing shards and are stopped when the block ends.

        Raises UsageError if no cluster answers at the address, or it has no GPU for a model on one.
        """
        if self.alone:
            yield here
            return
        with connected(self.ray, max(self.count or 1, torch.get_num_threads())) as ray:
            device, found = loaded.device, ray.cluster_resources()
            cpus, gpus = int(found.get("CPU", 0)), int(found.get("GPU", 0))
            if device.type == "cuda" and loaded.source is not None and device.index is not None and gpus > 1:
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
            pack = partial(Parcel.of, loaded, model, adapter, seed)
            crew = _Crew(ray, pack, device.type, count, share, max(1, cpus // count))
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
        self.model: nn.Module | None = None
        self.number = 0

    def measure(
        self, parcel: list[Any], device: str, threads: int, number: int, order: np.ndarray, rows: Sequence[Rendered]
    ) -> Measured:
        """Measure one shard with the selector, direction and token budget in ``order``, the same for equal ``number``.

        ``parcel`` holds a reference, so that only the first call, which loads the model, fetches it. Raises like `Parcel.open`.
        """
        if self.model is None:
            keep_freed_memory()
            torch.set_num_threads(threads)
            import ray

            found: Parcel = unpacked(ray.get(parcel[0]), device)
            self.model = self.kept.enter_context(found.open(device))
        if number != self.number:
            self.job = None  # its direction may be as large as the model
            selector, direction, budget = unpacked(order, device)
            self.job, self.number = Measurer(selector, self.model, direction, budget), number
        assert self.job is not None
        return self.job.measure(rows)


class _Crew:
    """The actors of one scan: `Hands` that can be called for several jobs in turn."""

    def __init__(self, ray: Any, pack: Callable[[], Parcel], device: str, count: int, gpu: float, threads: int) -> None:
        self.ray, self.pack, self.device, self.count, self.threads = ray, pack, device, count, threads
        # An actor that dies is started again, and its shard with it, ATTEMPTS times in all.
        self.new = ray.remote(
            num_cpus=1, num_gpus=gpu, scheduling_strategy="SPREAD", max_restarts=-1, max_task_retries=ATTEMPTS - 1
        )(Actor).remote
        self.parcel: Any = None
        self.free: list[Any] = []
        self.tasks: dict[Any, tuple[Any, Shard]] = {}
        self.jobs = 0

    def __call__(self, job: Measurer, missing: Iterable[Shard]) -> Iterator[tuple[str, Measured]]:
        """Raises ScoreError if ATTEMPTS actors died on one shard, and any error of an actor."""
        order = None
        self.jobs += 1
        for shard in missing:
            if order is None:
                # A selector that cannot travel is refused before the model, which may be large, is hashed and packed.
                order = self._put(packed((bare(job.selector), job.direction, job.token_budget)))
                self.parcel = self.parcel or self._put(packed(self.pack()))
            actor = self.free.pop() if self.free else self.new()
            given = ([self.parcel], self.device, self.threads, self.jobs, order, shard[1])
            self.tasks[actor.measure.remote(*given)] = actor, shard
            if len(self.tasks) == self.count:
                yield self._next()
        while self.tasks:
            yield self._next()

    def _next(self) -> tuple[str, Measured]:
        """The next shard that is done, with its key."""
        (done,), _ = self.ray.wait(list(self.tasks), num_returns=1)
        actor, (key, rows) = self.tasks.pop(done)
        self.free.append(actor)
        try:
            return key, self.ray.get(done)
        except self.ray.exceptions.RayTaskError as error:
            raise _raised(error.cause) from None
        except self.ray.exceptions.RayError as error:  # the actors or their machines died
            numbers = [row.row for row in rows]
            raise ScoreError(
                f"{ATTEMPTS} workers died in a row on rows {min(numbers)} to {max(numbers)} ({first_line(error)}): if memory "
                "ran out, give fewer --workers or a smaller --token-budget; finished shards are kept"
            ) from error

    def stop(self) -> None:
        for actor in (*self.free, *(actor for actor, _ in self.tasks.values())):
            self.ray.kill(actor)

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


@dataclass(frozen=True, eq=False)
class Parcel:
    """The scored model for another process: from ``source``, or as ``model``.

    ``adapter`` is the PEFT config of the adapter that a scan adds to a loaded model, initialised under ``seed``.
    ``identity`` is that of the model with its adapter.
    """

    source: ModelSource | None
    model: nn.Module | None
    adapter: PeftConfig | None
    seed: int
    identity: str

    @contextmanager
    def open(self, device: str) -> Iterator[nn.Module]:
        """The model on a device. Raises ModelError if it is not bit-identical to the scored one."""
        given = self.model if self.source is None else self.source.load(device).model
        assert given is not None
        with adapted(given, self.adapter, self.seed) as model:
            if identity(model) != self.identity:
                origin = self.source.name if self.source else "a copy"
                raise ModelError(
                    f"the model that another process loaded from {origin} is not the scored one (its weights, attention, classes "
                    "or hooks differ): do not change its files while a scan runs, give a changed model as an object "
                    "(model=loaded.model, tokenizer=...), or leave out --workers and --ray"
                )
            yield model

    @classmethod
    def of(cls, loaded: LoadedModel, model: nn.Module, adapter: PeftConfig | None, seed: int) -> Parcel:
        """The scored ``model``, which is the loaded one with its adapter. Raises UsageError if it cannot be sent."""
        devices = {str(parameter.device) for parameter in model.parameters()}
        if len(devices) > 1:
            raise UsageError(
                f"the model is spread over {len(devices)} devices ({', '.join(sorted(devices))}), and every worker needs its own "
                "device: leave out --workers and --ray, or --device-map"
            )
        if loaded.source is not None:
            return cls(loaded.source, None, adapter, seed, identity(model))
        odd = sorted({type(parameter).__name__ for parameter in model.parameters()} - {"Parameter"})
        if odd:
            raise UsageError(
                f"the model in memory has weights of the type {odd[0]}, which cannot be sent to another process: give the "
                "path or hub name of the model (with --quantize if it is quantized), or leave out --workers and --ray"
            )
        return cls(None, model, None, seed, identity(model))


def packed(thing: Any) -> np.ndarray:
    """An object as bytes (N,), including tensors and the caller's own functions and classes.

    Raises UsageError if it cannot be pickled.
    """
    from ray import cloudpickle

    buffer = io.BytesIO()
    try:
        torch.save(thing, buffer, pickle_module=cloudpickle)
    except (TypeError, AttributeError, pickle.PicklingError, RuntimeError) as error:
        raise UsageError(
            f"the model or the selector cannot be sent to another process ({first_line(error)}): save the model with "
            "save_pretrained and give its path, or leave out --workers and --ray"
        ) from error
    return np.frombuffer(buffer.getbuffer(), np.uint8)


def unpacked(data: np.ndarray, device: str) -> Any:
    """The inverse of `packed`, tensors on a device. Raises UsageError if code that it needs is not installed here."""
    try:
        return torch.load(io.BytesIO(data.data), device, weights_only=False)  # never from a file
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"the model or the selector needs code that another process does not have ({first_line(error)}): install it on "
            "every node, or leave out --workers and --ray"
        ) from error


def identity(model: nn.Module) -> str:
    """SHA-256 of everything that determines a model's numbers: its parameters, its attention, and the code of each module.

    Hooks of accelerate, PEFT and transformers do not change numbers and are ignored.
    """
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    sha = hashlib.sha256(f"{parameters_digest(model)} {attention}\n".encode())
    for name, module in model.named_modules():
        sha.update(f"{name} {_named(type(module))} {_added(module)}\n".encode())
    return sha.hexdigest()


def _added(module: nn.Module) -> list[str]:
    """The names of code that runs in a module in addition to its class: the caller's hooks, and a replaced forward."""
    own = vars(module)
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    found = [hook for some in hooks for hook in some.values()]
    forward, around = own.get("forward"), own.get("_hf_hook")
    if around is not None:  # accelerate's, which moves inputs and outputs between devices
        forward = own.get("_old_forward")
        found += map(type, getattr(around, "hooks", (around,)))
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        found.append(forward)
    return [name for name in map(_named, found) if not name.startswith(LIBRARIES)]


def _named(thing: Any) -> str:
    made = getattr(thing, "func", thing)  # of a partial
    made = made if hasattr(made, "__qualname__") else type(made)
    return f"{made.__module__}.{made.__qualname__}"


def bare(selector: Selector) -> Selector:
    """The selector with only what `measure` needs: a probe may hold a model.

    Raises UsageError for one that uses another model.
    """
    if not selector.travels:
        raise UsageError(
            f"the selector {selector.name} does not measure with the scored model, so more processes do not help: leave out "
            "--workers and --ray"
        )
    found = copy(selector)
    for name in ("probe", "requests", "aggregate", "references"):  # what prepare and finish read
        if hasattr(found, name):
            setattr(found, name, None)
    return found
