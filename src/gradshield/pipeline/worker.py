"""One process of several that measure shards: `main`, in a process that `workers` started.

It is told on its standard input what to measure, answers on its standard output, and ends as soon as the input does,
whatever it is doing: a worker never outlives the process that started it. Both ends are ours, so messages are pickled;
nothing of them is written to a file.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue
from threading import Event, Thread
from typing import Any

import torch
from torch import nn

from gradshield.errors import GradShieldError
from gradshield.gradients import direction as directions
from gradshield.pipeline.parcel import Parcel
from gradshield.pipeline.shards import Job
from gradshield.placement import keep_freed_memory
from gradshield.selectors import Measured, Selector
from gradshield.types import Direction, Rendered


@dataclass(frozen=True, eq=False)
class Setup:
    """The first message: the model, where to put it, and how many threads to use (0: as many as torch likes)."""

    parcel: Parcel
    device: str
    threads: int


@dataclass(frozen=True, eq=False)
class Order:
    """How the shards that follow are measured. ``direction`` is the file of one with tensors, else itself."""

    selector: Selector
    direction: Direction | Path
    token_budget: int


@dataclass(frozen=True, eq=False)
class Failed:
    """What went wrong in a worker: the name of the error's class (empty for one that is not ours), and what it said."""

    kind: str
    text: str


class Bench:
    """The model in this process, and the job that it has."""

    def __init__(self, setup: Setup) -> None:
        if setup.threads:
            torch.set_num_threads(setup.threads)
        self.kept = ExitStack()  # as long as this object, so that the adapter stays on the model
        self.model: nn.Module = self.kept.enter_context(setup.parcel.open(setup.device))
        self.job: Job | None = None

    def prepare(self, order: Order) -> None:
        """Load the order's direction onto the model's device."""
        direction = order.direction
        if isinstance(direction, Path):
            direction = directions.load(direction)
        device = next(self.model.parameters()).device
        direction = replace(direction, tensors={name: v.to(device) for name, v in direction.tensors.items()})
        self.job = Job(order.selector, self.model, direction, order.token_budget)

    def measure(self, rows: list[Rendered]) -> Measured:
        """One shard, as the last order says."""
        assert self.job is not None
        return self.job.measure(rows)


def main() -> None:
    """Answer one message for each list of rows until the input ends."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    keep_freed_memory()
    told: Queue[Any] = Queue()
    Thread(target=_listen, args=(told,), daemon=True).start()
    try:
        bench = Bench(told.get())
        while True:
            message = told.get()
            if isinstance(message, Order):
                bench.prepare(message)
                continue
            pickle.dump(bench.measure(message), replies)
            replies.flush()
    except Exception as error:  # told to the one who can tell the user, and who ends this process
        traceback.print_exc()
        pickle.dump(said(error), replies)
        replies.flush()
        Event().wait()


def said(error: Exception) -> Failed:
    """An error as it goes to the process that was started."""
    if isinstance(error, GradShieldError):
        return Failed(type(error).__name__, str(error))
    return Failed("", f"{type(error).__name__}: {error}")


def _listen(told: Queue[Any]) -> None:
    """Every message of the input; its end is the end of this process, in the middle of a batch too."""
    try:
        while True:
            told.put(pickle.load(sys.stdin.buffer))
    except EOFError:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
