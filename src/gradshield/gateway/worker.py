"""The worker, which runs jobs from the queue and makes webhook calls: ``python -m gradshield.gateway.worker FOLDER``.

The queue says that a job waits; the lease in the database says who runs it. So a message that comes twice starts nothing twice,
and one that is lost is sent again (`sweep`). Each job has a process of its own, here or on a node of a Ray cluster, which holds
the lease. When that process, its node or the worker ends, however it ends, the job goes on in another process from its last
checkpoint.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import structlog
from huey import PostgresHuey, RedisHuey, SqliteHuey
from huey.consumer import Consumer
from huey.registry import Message
from huey.serializer import Serializer
from sqlalchemy.engine import make_url
from structlog.contextvars import merge_contextvars
from structlog.processors import JSONRenderer, TimeStamper, add_log_level, format_exc_info

from gradshield.errors import UsageError
from gradshield.gateway.database import AWAY
from gradshield.gateway.settings import Settings
from gradshield.gateway.store import Store
from gradshield.gateway.tables import Delivery

NAME = "gradshield"
ROUND = 2.0  # seconds between looks at what waits
LOST = 1  # exit status of a process that a lost or stopped task ran
PREFIX = "whsec_"
ATTEMPTS = 10  # of a webhook call, over about three days
FIRST = 5.0  # seconds before the second attempt; each later one waits four times as long, up to a day
DAY = 86_400.0
stopping = threading.Event()
running: dict[str, str] = {}  # the jobs of this worker, and the owner of each
log = structlog.get_logger("gradshield.gateway.worker")


def configure() -> None:
    """Log as JSON, a line each on the error stream, with what is bound to the context: the request's id, or the job's."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    structlog.configure(
        processors=[merge_contextvars, add_log_level, TimeStamper("iso"), format_exc_info, JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def main(arguments: Sequence[str]) -> int:
    settings = Settings.read(Path(arguments[0]))
    with ExitStack() as stack:
        python: Callable[[Sequence[str]], int] = here
        if settings.ray:
            from gradshield.scanning.workers import connected

            python = spread(stack.enter_context(connected(settings.ray, 0)))
        queue = Queue(settings, partial(run, settings, python=python))
        consumer: Any = _Consumer(queue.huey, workers=max(1, settings.workers), periodic=False, max_delay=ROUND)
        threading.Thread(target=look_after, args=(settings, queue), daemon=True).start()
        consumer.run()
    return 0


class _Consumer(Consumer):  # type: ignore[misc]
    """huey's consumer, which on any signal lets the jobs' processes end and waits for them."""

    def stop(self, graceful: bool = False) -> None:
        stopping.set()
        super().stop(graceful=True)


def here(arguments: Sequence[str]) -> int:
    """Run Python with these arguments on this machine, until it ends or the worker stops; the exit status."""
    with subprocess.Popen([sys.executable, *arguments], stdin=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None and not stopping.is_set():
                time.sleep(0.2)  # Ray interrupts a cancelled task between two looks, not while it waits for a lock
        finally:
            process.terminate()
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


def spread(ray: Any) -> Callable[[Sequence[str]], int]:
    """`here` on some node of a cluster, with a GPU where the cluster has any, else a CPU."""
    gpus = min(1, ray.cluster_resources().get("GPU", 0))
    # A second attempt is the queue's: it has an owner of its own.
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, scheduling_strategy="SPREAD")(here)

    def python(arguments: Sequence[str]) -> int:
        found = task.remote(list(arguments))
        while not ray.wait([found], timeout=0.2)[0]:
            if stopping.is_set():
                ray.cancel(found)
        try:
            return int(ray.get(found))
        except ray.exceptions.RayError:
            return LOST

    return python


class Worker(threading.Thread):
    """A worker as a child of the server, started again if it ends."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(daemon=True)
        self.settings, self.ended = settings, threading.Event()
        self.start()

    def run(self) -> None:
        command = [sys.executable, "-m", "gradshield.gateway.worker", str(self.settings.folder)]
        while not self.ended.is_set():
            # A session of its own: Ctrl-C reaches the server, which then stops the worker.
            with subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True) as process:
                while process.poll() is None and not self.ended.wait(1.0):
                    pass
                if self.ended.is_set():
                    process.terminate()
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(30)
                    process.kill()
                else:
                    log.warning("the worker ended and is started again", status=process.returncode)
                    self.ended.wait(1.0)

    def stop(self) -> None:
        """Stop the worker and its jobs, which go on at the next start."""
        self.ended.set()
        self.join()


# The queue: huey, on the database's own kind or on Redis


class _Json(Serializer):  # type: ignore[misc]
    """Messages as JSON: huey's own pickles would let whoever writes to the queue run code."""

    def _serialize(self, data: Any) -> bytes:
        return json.dumps(data).encode()

    def _deserialize(self, data: bytes) -> Any:
        return Message(*json.loads(data))


class Queue:
    """A huey with the gateway's one task, which a worker gives its ``work``; whoever only sends needs none."""

    def __init__(self, settings: Settings, work: Callable[[str], None] | None = None) -> None:
        """Raises UsageError for a URL that is no queue's."""
        url, common = settings.queue or settings.database_url, {"results": False, "serializer": _Json()}
        kind = url.partition(":")[0].partition("+")[0]
        if kind == "sqlite":
            self.huey: Any = SqliteHuey(NAME, filename=str(settings.folder / "queue.db"), **common)
        elif kind == "postgresql":
            dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
            self.huey = PostgresHuey(NAME, dsn=dsn, **common)
        elif kind in ("redis", "rediss"):
            self.huey = RedisHuey(NAME, url=url, **common)
        else:
            known = "sqlite:///FILE, postgresql://USER@HOST/NAME or redis://HOST"
            raise UsageError(f"the queue {kind!r} is not supported: use {known}")

        @self.huey.task()  # type: ignore[untyped-decorator]
        def run(job: str) -> None:
            assert work is not None, "a job came to a process that runs none"
            work(job)

        self._run = run

    def send(self, job: str) -> None:
        """Say that a job is to be run. Never fails: the worker sends again what waits in the database."""
        try:
            self._run(job)
        except Exception as error:  # of SQLite, PostgreSQL or Redis
            log.warning("the queue cannot be reached", job=job, error=f"{type(error).__name__}: {error}")

    def __len__(self) -> int:
        return int(self.huey.pending_count())


def look_after(settings: Settings, queue: Queue) -> None:
    """Sweep and make webhook calls until the worker stops. It stops by itself when the server has ended."""
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


def sweep(store: Store, queue: Queue) -> list[str]:
    """Send again what waits in the database and in no queue: the message was lost, or the process that ran it."""
    waiting = [] if len(queue) else store.waiting()
    for job in waiting:
        queue.send(job)
    return waiting


# Webhook calls, signed as the OpenAI API signs them, by Standard Webhooks 1.0.0: ``client.webhooks.unwrap`` checks them


def new_secret() -> str:
    """A secret for `signature`, as the receiving end needs it."""
    return PREFIX + base64.b64encode(secrets.token_bytes(24)).decode()


def signature(secret: str, id: str, timestamp: int, body: str) -> str:
    """The header webhook-signature: ``v1,`` and the base64 HMAC-SHA256 of id, timestamp and body, joined by dots."""
    key = base64.b64decode(secret.removeprefix(PREFIX)) if secret.startswith(PREFIX) else secret.encode()
    return "v1," + base64.b64encode(hmac.digest(key, f"{id}.{timestamp}.{body}".encode(), hashlib.sha256)).decode()


def deliver(settings: Settings, store: Store) -> None:
    """Make every call that is due. One that fails is made again later."""
    if not (due := store.due()):
        return
    with httpx2.Client(timeout=10, follow_redirects=False) as client:
        for one in due:
            again, error = None, _called(client, settings, one)
            if error is not None:
                log.warning("a webhook call failed", url=one.url, attempt=one.attempt, error=error)
                if one.attempt < ATTEMPTS:
                    again = time.time() + min(DAY, FIRST * 4 ** (one.attempt - 1))
            store.called(one.id, error, again)


def _called(client: httpx2.Client, settings: Settings, one: Delivery) -> str | None:
    """One call; what went wrong. The id stays the same over the attempts, so that the receiving end knows a repetition."""
    now = int(time.time())
    headers = {
        "content-type": "application/json",
        "webhook-id": one.id,
        "webhook-timestamp": str(now),
        "webhook-signature": signature(settings.webhook_secret.get_secret_value(), one.id, now, one.body),
    }
    try:
        response = client.post(one.url, content=one.body.encode(), headers=headers)
    except httpx2.HTTPError as error:
        return type(error).__name__
    return None if response.is_success else f"status {response.status_code}"


if __name__ == "__main__":
    # Under its own name, so that the nodes of a cluster import what they are sent.
    from gradshield.gateway import worker

    worker.configure()
    raise SystemExit(worker.main(sys.argv[1:]))
