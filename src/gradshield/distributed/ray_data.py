"""The shards of a scan on a Ray cluster: Ray Data's ``map_batches``, with actors that hold the model and the one direction.

Shards that are missing go into Ray's object store as the rows that they are, which Ray keeps within its memory and on disk
beyond; the actors take them from there, and what they measure is written by the process that was started, as it comes back.
Ray starts an actor again when it or its machine dies, and gives its shard to another.
"""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from gradshield.data.spool import room
from gradshield.errors import ScoreError, UsageError
from gradshield.models import first_line
from gradshield.pipeline.parcel import Origin, Parcel, bare
from gradshield.pipeline.shards import Hands, Job, Shard, here
from gradshield.pipeline.worker import Bench, Failed, Order, Setup, said
from gradshield.pipeline.workers import ATTEMPTS, raised
from gradshield.placement import keep_freed_memory
from gradshield.selectors import Measured
from gradshield.types import Direction


@dataclass(frozen=True)
class Ray:
    """Actors on a Ray cluster, for ``scan(..., workers=Ray("auto"))``.

    ``address`` is that of the cluster (``auto`` where this machine is part of one), or ``local`` for one that is started here
    and stopped at the end. ``actors`` is their number; None is one for each GPU, or each CPU where the model is on one.
    """

    address: str = "local"
    actors: int | None = None

    @contextmanager
    def open(self, origin: Origin) -> Iterator[Hands]:
        """Raises UsageError where Ray is not installed, or no cluster answers at the address."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise UsageError("Ray is not installed, and --ray needs it: install gradshield[ray]") from None
        with ExitStack() as stack:
            if not ray.is_initialized():
                _reach(self.address)
                own: dict[str, Any] = {"include_dashboard": False} if self.address == "local" else {}
                try:
                    ray.init(address=self.address, log_to_driver=False, **own)
                except (ConnectionError, RuntimeError, ValueError) as error:
                    raise UsageError(_NO_CLUSTER.format(self.address, first_line(error))) from None
                stack.callback(ray.shutdown)
            gpu = origin.loaded.device.type == "cuda"
            count = self.actors or int(cast(Any, ray).cluster_resources().get("GPU" if gpu else "CPU", 0))
            if count < 1:
                raise UsageError(
                    f"the Ray cluster at {self.address!r} has no {'GPU' if gpu else 'CPU'} to spare: give another, or the number "
                    "of --workers"
                )
            yield _Actors(count, gpu, origin)


_NO_CLUSTER = (
    "no Ray cluster answers at {!r} ({}): give the address of one, as `ray start --head` prints it, auto or local"
)


def _reach(address: str) -> None:
    """Raises UsageError at once where nothing listens at a host and port; Ray itself would try for minutes, then exit."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UsageError(_NO_CLUSTER.format(address, first_line(error))) from None


class _Actors:
    """`Hands` on the cluster. Each job has actors of its own; one that has no more shards than actors is done here."""

    def __init__(self, count: int, gpu: bool, origin: Origin) -> None:
        self.count, self.gpu, self.origin = count, gpu, origin
        self.parcel: Parcel | None = None

    def __call__(self, job: Job, missing: Iterable[Shard]) -> Iterator[tuple[str, Measured]]:
        """Raises ScoreError where actors die on the same shard again and again, and what an actor itself raises."""
        shards = iter(missing)
        first = list(islice(shards, self.count + 1))
        if len(first) <= self.count:  # a model is loaded more slowly than these are measured
            yield from here(job, first)
            return
        import ray
        from ray.exceptions import RayError

        if self.parcel is None:
            self.parcel = self.origin.pack(None)
        whole, order = _order(job)
        held = None if whole is None else ray.put(whole)
        setup = Setup(self.parcel, "cuda" if self.gpu else "cpu", 0)
        blocks = [ray.put(_block(*shard)) for shard in chain(first, shards)]
        measured = self._mapped(blocks, {"setup": setup, "order": order, "direction": held})
        try:
            for batch in measured.iter_batches(batch_size=None, batch_format="pyarrow"):
                for key, answer in zip(batch["key"].to_pylist(), batch["measured"].to_pylist(), strict=True):
                    found: Measured | Failed = pickle.loads(answer)
                    if isinstance(found, Failed):
                        raise raised(found)
                    yield key, found
        except RayError as error:
            raise ScoreError(
                f"the Ray cluster could not measure a shard in {ATTEMPTS} attempts ({first_line(error)}): where memory ran out "
                "give fewer --workers or a smaller --token-budget; what is finished is kept"
            ) from error

    def _mapped(self, blocks: list[Any], told: Mapping[str, Any]) -> Any:
        """The dataset of shards, mapped: one block is one shard, in and out."""
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        with warnings.catch_warnings():  # how often to try again has only a name that Ray calls old
            warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
            return ray.data.from_arrow_refs(blocks).map_batches(
                _Actor,
                batch_size=None,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=self.count, max_tasks_in_flight_per_actor=2),
                fn_constructor_kwargs=dict(told),
                num_cpus=1,
                num_gpus=1 if self.gpu else None,
                max_restarts=ATTEMPTS,
                max_task_retries=ATTEMPTS - 1,
            )


class _Actor:
    """One actor: the model, the direction, and what it says of the shards that it is given."""

    def __init__(self, setup: Setup, order: Order, direction: Any) -> None:
        import ray

        keep_freed_memory()
        self.failed: Failed | None = None
        try:
            self.bench = Bench(setup)
            with tempfile.TemporaryDirectory(prefix="gradshield-") as folder:
                if direction is not None:
                    path = Path(folder) / "direction.safetensors"
                    path.write_bytes(ray.get(direction).data)
                    order = replace(order, direction=path)
                self.bench.prepare(order)
        except Exception as error:  # told with the first shard, to the one who can tell the user
            self.failed = said(error)

    def __call__(self, batch: Any) -> Any:
        answers = []
        for rows in batch["rows"].to_pylist():
            answer: Measured | Failed | None = self.failed
            if answer is None:
                try:
                    answer = self.bench.measure(pickle.loads(rows))
                except Exception as error:
                    answer = said(error)
            answers.append(pickle.dumps(answer))
        return _table(batch["key"].to_pylist(), measured=answers)


def _block(key: str, rows: Any) -> Any:
    return _table([key], rows=[pickle.dumps(rows)])


def _table(keys: list[str], **columns: list[bytes]) -> Any:
    import pyarrow as pa

    return pa.table({"key": keys, **{name: pa.array(values, pa.large_binary()) for name, values in columns.items()}})


def _order(job: Job) -> tuple[np.ndarray | None, Order]:
    """The bytes of the saved direction, where it has tensors, and the rest of the job."""
    found = job.direction
    empty = Direction({}, found.names, found.subspace, found.scales, found.digest, found.meta)
    order = Order(bare(job.selector), empty, job.token_budget)
    if not found.tensors:
        return None, order
    if (path := job.on_disk()) is not None:
        return np.fromfile(path, dtype=np.uint8), order
    with room(), tempfile.TemporaryDirectory(prefix="gradshield-") as folder:
        return np.fromfile(job.written(Path(folder)), dtype=np.uint8), order
