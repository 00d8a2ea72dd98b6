"""The worker, which runs jobs from the queue: ``python -m gradshield.gateway.worker FOLDER``.

Each job has a process of its own, here or on a node of a Ray cluster, which holds the lease. When that process or the worker
ends, however it ends, the job goes on in another one from its last checkpoint.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from huey.consumer import Consumer

from gradshield.gateway.database import AWAY
from gradshield.gateway.queue import Queue
from gradshield.gateway.settings import Settings
from gradshield.gateway.store import Store
from gradshield.gateway.webhooks import deliver

ROUND = 2.0  # seconds between looks at what waits
stopping = threading.Event()
running: dict[str, str] = {}  # the jobs of this worker, and the owner of each
log = structlog.get_logger("gradshield.gateway.worker")


def here(arguments: Sequence[str]) -> int:
    """Run Python with these arguments on this machine; the exit status."""
    with subprocess.Popen([sys.executable, *arguments], stdin=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if stopping.wait(0.2):
                process.send_signal(signal.SIGTERM)
                process.wait()
    return int(process.returncode)


def run(settings: Settings, job: str, python: Callable[[Sequence[str]], int] = here) -> None:
    """Run a job in a process of its own, which ``python`` starts, until that process ends or the worker stops."""
    owner = secrets.token_hex(16)
    if running.setdefault(job, owner) != owner:  # a message that came twice; on a full cluster the job waits unclaimed
        return
    try:
        status = python(["-m", "gradshield.gateway.job", str(settings.folder), job, owner])
    finally:
        del running[job]
    if status:
        early = True
        with closing(Store(settings.database_url)) as store, suppress(*AWAY):  # else its lease runs out
            early = store.give_up(job, owner)
        if early:  # of a job that ended, was cancelled or was paused, the process just went
            log.warning("the process of a job ended early", job=job, status=status)


def sweep(store: Store, queue: Queue) -> list[str]:
    """Send again what waits in the database and in no queue: the message was lost, or the process that ran it."""
    if len(queue):
        return []
    waiting = store.waiting()
    for job in waiting:
        queue.send(job)
    return waiting


def look_after(settings: Settings, queue: Queue) -> None:
    """Sweep and make webhook calls until the worker stops. It stops by itself when the server is gone."""
    store, parent = Store(settings.database_url, settings.webhooks), os.getppid()
    while not stopping.wait(ROUND):
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
        try:
            sweep(store, queue)
            deliver(settings, store)
        except Exception as error:  # a database that restarts
            log.warning("the worker cannot look after its jobs now", error=f"{type(error).__name__}: {error}")
    store.close()


class _Consumer(Consumer):  # type: ignore[misc]
    """huey's consumer, which on any signal lets the jobs' processes end and waits for them."""

    def stop(self, graceful: bool = False) -> None:
        stopping.set()
        super().stop(graceful=True)


def main(arguments: Sequence[str]) -> int:
    settings = Settings.read(Path(arguments[0]))
    with ExitStack() as stack:
        python = here
        if settings.ray:
            from gradshield.gateway.cluster import Cluster
            from gradshield.scanning.workers import connected

            python = Cluster(stack.enter_context(connected(settings.ray, 0)), stopping).run
        queue = Queue(settings, partial(run, settings, python=python))
        consumer: Any = _Consumer(queue.huey, workers=max(1, settings.workers), periodic=False, max_delay=ROUND)
        threading.Thread(target=look_after, args=(settings, queue), daemon=True).start()
        consumer.run()
    return 0


class Worker:
    """A worker as a child of the server, started again if it ends."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.ended = settings, threading.Event()
        self.process = self._started()
        self.guard = threading.Thread(target=self._guarded, daemon=True)
        self.guard.start()

    def _started(self) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C reaches the server, which then stops the worker.
        return subprocess.Popen(
            [sys.executable, "-m", "gradshield.gateway.worker", str(self.settings.folder)],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _guarded(self) -> None:
        while not self.ended.wait(1.0):
            if self.process.poll() is not None:
                log.warning("the worker ended and is started again", status=self.process.returncode)
                self.process = self._started()

    def stop(self) -> None:
        """Stop the worker and its jobs, which go on at the next start."""
        self.ended.set()
        self.guard.join()
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


if __name__ == "__main__":
    from gradshield.gateway.logs import configure

    configure()
    raise SystemExit(main(sys.argv[1:]))
