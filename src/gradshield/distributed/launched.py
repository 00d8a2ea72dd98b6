"""The shards of a scan among the processes that ``accelerate launch`` or ``torchrun`` started.

The first process runs the scan and deals shards, one to each process a round, its own among them; the others `serve`. They
speak over gloo, which needs no GPU, in a process group of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed

from gradshield.errors import ScoreError, UsageError
from gradshield.launcher import first, processes
from gradshield.models import first_line
from gradshield.pipeline.parcel import Origin, Parcel, bare
from gradshield.pipeline.shards import Hands, Job, Shard, here
from gradshield.pipeline.worker import Bench, Failed, Order, Setup, said
from gradshield.pipeline.workers import raised
from gradshield.selectors import Measured
from gradshield.types import Direction

WAIT = timedelta(days=7)  # the others wait while the first reads its rows; one that dies is noticed at once
ROUND = "round"  # the message before shards are dealt


class Launched:
    """The launched processes, for ``scan(..., workers=Launched())`` in the first of them; all others call `serve`.

    Where no launcher started more than one, that one measures.
    """

    @contextmanager
    def open(self, origin: Origin) -> Iterator[Hands]:
        """Raises UsageError in any process but the first."""
        if not first():
            raise UsageError(
                "a scan with Launched() runs in the first process of the launcher, and this is another one: call "
                "gradshield.distributed.serve() in it (docs/scaling.md)"
            )
        if processes() == 1:
            yield here
            return
        with _joined() as group, TemporaryDirectory(prefix="gradshield-") as folder:
            dealer = _Dealer(origin, Path(folder), group)
            try:
                yield dealer
            finally:
                with suppress(RuntimeError):  # a process that died has been told already
                    _tell(None, group)


def serve() -> None:
    """In every launched process but the first: measure what is dealt until the scan of the first one ends."""
    bench: Bench | None = None
    failed: Failed | None = None
    with _joined() as group:
        while (message := _tell(None, group)) is not None:
            try:
                if isinstance(message, Setup):
                    bench = Bench(replace(message, device=_device(message.device)))
                elif isinstance(message, Order) and bench is not None:
                    bench.prepare(message)
            except Exception as error:  # told with the first shard, to the one who can tell the user
                failed = said(error)
            if message == ROUND:
                rows = _deal(None, group)
                answer: Measured | Failed | None = None
                if rows is not None:
                    answer = failed or _answer(bench, rows)
                distributed.gather_object(answer, None, 0, group)


class _Dealer:
    """`Hands` that deal: one shard for each process, then all answers, in their order."""

    def __init__(self, origin: Origin, folder: Path, group: Any) -> None:
        self.origin, self.folder, self.group = origin, folder, group
        self.parcel: Parcel | None = None

    def __call__(self, job: Job, missing: Iterable[Shard]) -> Iterator[tuple[str, Measured]]:
        """Raises ScoreError where a process died, and what one of them raises."""
        shards, count, ordered = iter(missing), processes(), False
        while dealt := list(islice(shards, count)):
            try:
                if not ordered:
                    self._order(job)
                    ordered = True
                answers = self._round(job, [rows for _, rows in dealt])
            except RuntimeError as error:
                raise ScoreError(
                    f"one of the {count} launched processes is gone ({first_line(error)}): where memory ran out launch fewer of "
                    "them, or give a smaller --token-budget; what is finished is kept"
                ) from error
            for (key, _), answer in zip(dealt, answers, strict=False):
                if isinstance(answer, Failed):
                    raise raised(answer)
                yield key, answer

    def _order(self, job: Job) -> None:
        """What the others need before the first shard of a job."""
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
        if self.parcel is None:
            self.parcel = self.origin.pack(self.folder if one_machine else None)
            threads = torch.get_num_threads()
            _tell(Setup(self.parcel, self.origin.loaded.device.type, threads), self.group)
        found = job.direction
        direction: Direction | Path | None = job.on_disk() if one_machine and found.tensors else None
        if direction is None:
            direction = replace(found, tensors={name: v.cpu() for name, v in found.tensors.items()})
        _tell(Order(bare(job.selector), direction, job.token_budget), self.group)

    def _round(self, job: Job, rows: list[Any]) -> list[Measured | Failed]:
        _tell(ROUND, self.group)
        own = _deal(rows + [None] * (processes() - len(rows)), self.group)
        try:
            mine: Measured | Failed = job.measure(own)
        except Exception as error:
            mine = said(error)
        except BaseException:
            distributed.gather_object(None, [None] * processes(), 0, self.group)  # nobody is left waiting
            raise
        answers: list[Any] = [None] * processes()
        distributed.gather_object(mine, answers, 0, self.group)
        return answers


def _answer(bench: Bench | None, rows: Any) -> Measured | Failed:
    assert bench is not None
    try:
        return bench.measure(rows)
    except Exception as error:
        return said(error)


def _device(kind: str) -> str:
    return f"cuda:{os.environ['LOCAL_RANK']}" if kind == "cuda" else kind


def _tell(message: Any, group: Any) -> Any:
    """From the first process to all; each gets what the first gave."""
    box = [message]
    distributed.broadcast_object_list(box, 0, group)
    return box[0]


def _deal(rows: list[Any] | None, group: Any) -> Any:
    """The part of this process of what the first one gave."""
    box: list[Any] = [None]
    distributed.scatter_object_list(box, rows, 0, group)
    return box[0]


@contextmanager
def _joined() -> Iterator[Any]:
    """A gloo group of all processes, beside one that the caller may have."""
    own = not distributed.is_initialized()
    if own:
        distributed.init_process_group("gloo", timeout=WAIT)
    group = distributed.new_group(backend="gloo", timeout=WAIT)
    try:
        yield group
    finally:
        distributed.destroy_process_group(None if own else group)
