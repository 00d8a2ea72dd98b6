"""Several processes of one machine, each with the model, that share the shards of a scan.

The shards are those of one process, so are their keys, and a scan may be begun with some number of workers and finished with
another. Each shard is sent when a worker is free for it, so memory holds as many as there are workers. A shard whose worker
dies is given to another.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

import torch

import gradshield
from gradshield import errors
from gradshield.data.spool import room
from gradshield.errors import GradShieldError, ScoreError, UsageError
from gradshield.pipeline.parcel import Origin, Parcel, bare
from gradshield.pipeline.shards import Hands, Job, Shard, here
from gradshield.pipeline.worker import Failed, Order, Setup
from gradshield.selectors import Measured

ATTEMPTS = 3  # workers that may die on one shard before the scan gives up
COMMAND: Sequence[str] = (sys.executable, "-P", "-c", "from gradshield.pipeline.worker import main; main()")


class Spread(Protocol):
    """A way to share the shards of a scan out: other processes, or other machines."""

    def open(self, origin: Origin) -> AbstractContextManager[Hands]: ...


def spread(workers: int | Spread) -> Spread:
    """The way to share shards out: as given, or so many processes. Raises UsageError for fewer than one."""
    if not isinstance(workers, int):
        return workers
    if workers < 1:
        raise UsageError(f"there are {workers} workers: give at least 1")
    return Workers(workers) if workers > 1 else Alone()


class Alone:
    """No other process."""

    @contextmanager
    def open(self, origin: Origin) -> Iterator[Hands]:
        yield here


@dataclass(frozen=True)
class Workers:
    """``count`` processes of this machine. They start with the first shard that is missing, and are gone when the block ends."""

    count: int

    @contextmanager
    def open(self, origin: Origin) -> Iterator[Hands]:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gradshield-")))
            team = Team(self.count, origin, folder)
            stack.callback(team.stop)
            yield team


def devices(device: torch.device, count: int, gpus: int, fixed: bool) -> list[str]:
    """The device of each of ``count`` workers: all GPUs in turn, or the given device where it is no GPU or ``fixed``."""
    if device.type != "cuda" or fixed or not gpus:
        return [str(device)] * count
    return [f"cuda:{n % gpus}" for n in range(count)]


@dataclass(eq=False)
class _Process:
    """A worker, where it stands in the team, the order it has, and the shard it works on."""

    place: int
    popen: subprocess.Popen[bytes]
    log: Path
    order: Order | None = None
    hand: _Hand | None = None

    def send(self, message: Any) -> None:
        """Where the worker is gone, nothing: its end is told by what it no longer answers."""
        assert self.popen.stdin is not None
        with suppress(BrokenPipeError):
            pickle.dump(message, self.popen.stdin)
            self.popen.stdin.flush()

    def kill(self, patience: float = 0) -> None:
        """End it, after so many seconds in which it may end by itself."""
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(patience)
        self.popen.kill()
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def last_words(self) -> str:
        """How it ended, with the last line that it wrote."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        code = self.popen.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{how}: {lines[-1][:200]}" if lines else how


@dataclass(frozen=True, eq=False)
class _Hand:
    """A shard that is given out for the so-manyeth time."""

    shard: Shard
    attempt: int = 1


class Team:
    """The workers of one scan: `Hands` that may be called for several jobs, one after the other."""

    def __init__(self, count: int, origin: Origin, folder: Path) -> None:
        loaded, gpus = origin.loaded, torch.cuda.device_count()
        fixed = loaded.source is not None and loaded.device.index is not None
        self.count, self.origin, self.folder = count, origin, folder
        self.devices = devices(loaded.device, count, gpus, fixed)
        self.threads = max(1, torch.get_num_threads() // count)
        self.parcel: Parcel | None = None
        self.processes: dict[int, _Process] = {}
        self.replies: SimpleQueue[tuple[_Process, Measured | Failed | None]] = SimpleQueue()
        self.made = 0

    def __call__(self, job: Job, missing: Iterable[Shard]) -> Iterator[tuple[str, Measured]]:
        """Raises ScoreError where one shard has outlived ATTEMPTS workers, and what a worker itself raises."""
        order, shards, again = self._order(job), iter(missing), deque[_Hand]()
        try:
            while True:
                while len(self._busy()) < self.count:
                    hand = again.popleft() if again else next((_Hand(shard) for shard in shards), None)
                    if hand is None:
                        break
                    self._give(hand, order)
                if not self._busy():
                    return
                process, answer = self.replies.get()
                if self.processes.get(process.place) is not process:
                    continue  # of one that was stopped
                if isinstance(answer, Failed):
                    raise raised(answer)
                hand, process.hand = process.hand, None
                if answer is None:
                    del self.processes[process.place]
                    process.kill(patience=5)
                    if hand is not None:
                        again.append(_retried(hand, process))
                elif hand is not None:
                    yield hand.shard[0], answer
        finally:
            if self._busy():  # stopped on the way: what is under way is of no use to the next job
                self.stop()

    def stop(self) -> None:
        """End every worker, whatever it is doing."""
        while self.processes:
            self.processes.popitem()[1].kill()

    def _busy(self) -> list[_Process]:
        return [process for process in self.processes.values() if process.hand is not None]

    def _give(self, hand: _Hand, order: Order) -> None:
        """To a worker that is free, or to a new one."""
        idle = [process for process in self.processes.values() if process.hand is None]
        process = idle[0] if idle else self._started()
        process.hand = hand
        if process.order is not order:
            process.order = order
            process.send(order)
        process.send(hand.shard[1])

    def _started(self) -> _Process:
        place = min(set(range(self.count)) - self.processes.keys())
        if self.parcel is None:
            with room():
                (self.folder / "model").mkdir()
                self.parcel = self.origin.pack(self.folder / "model")
        self.made += 1
        log = self.folder / f"worker-{self.made}.log"
        with log.open("wb") as written:
            popen = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=written,
                env={**os.environ, "PYTHONPATH": _python_path(), "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # Ctrl-C is for the process that started it, which stops them all
            )
        process = self.processes[place] = _Process(place, popen, log)
        Thread(target=_hear, args=(process, self.replies.put), daemon=True).start()
        process.send(Setup(self.parcel, self.devices[place], self.threads))
        return process

    def _order(self, job: Job) -> Order:
        """The job without what stays here; its direction is written once, and read by every worker."""
        found = job.direction
        if not found.tensors:
            return Order(bare(job.selector), found, job.token_budget)
        return Order(bare(job.selector), job.on_disk() or job.written(self.folder), job.token_budget)


def _retried(hand: _Hand, process: _Process) -> _Hand:
    """The shard of a worker that died, to be given to another. Raises ScoreError where enough have died on it."""
    if hand.attempt < ATTEMPTS:
        return replace(hand, attempt=hand.attempt + 1)
    rows = [row.row for row in hand.shard[1]]
    raise ScoreError(
        f"{ATTEMPTS} workers died, one after the other, on rows {min(rows)} to {max(rows)} ({process.last_words()}): where "
        "memory ran out give fewer --workers or a smaller --token-budget; what is finished is kept"
    )


def _hear(process: _Process, put: Callable[[tuple[_Process, Measured | Failed | None]], None]) -> None:
    """Hand on what a worker answers; None, and no more, when it is gone."""
    assert process.popen.stdout is not None
    try:
        while True:
            put((process, pickle.load(process.popen.stdout)))
    except (EOFError, OSError, ValueError, pickle.UnpicklingError):  # gone, perhaps in the middle of an answer
        put((process, None))


def raised(failed: Failed) -> GradShieldError:
    """A worker's error as this process would have raised it."""
    kind = getattr(errors, failed.kind, None)
    if kind is errors.UnknownNameError:
        kind = UsageError
    if kind is None:
        return ScoreError(f"a worker failed ({failed.text}): run the scan in one process (--workers 1) to see where")
    found: GradShieldError = kind(failed.text)
    return found


def _python_path() -> str:
    """Where this process has GradShield from, before what the environment says."""
    own = str(Path(gradshield.__file__).parents[1])
    return os.pathsep.join([own, *filter(None, [os.environ.get("PYTHONPATH")])])
