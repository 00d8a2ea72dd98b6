"""The queue of jobs: huey, on the database's own kind or on Redis.

It says that a job waits; the lease in the database says who runs it. So a message that comes twice starts nothing twice, and one
that is lost is sent again (`worker.sweep`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import structlog
from huey import PostgresHuey, RedisHuey, SqliteHuey
from huey.registry import Message
from huey.serializer import Serializer
from sqlalchemy.engine import make_url

from gradshield.errors import UsageError
from gradshield.gateway.settings import Settings

NAME = "gradshield"
log = structlog.get_logger("gradshield.gateway.queue")


class _Json(Serializer):  # type: ignore[misc]
    """Messages as JSON: huey's own pickles would let whoever writes to the queue run code."""

    def _serialize(self, data: Any) -> bytes:
        return json.dumps(data).encode()

    def _deserialize(self, data: bytes) -> Any:
        return Message(*json.loads(data))


class Queue:
    """A huey with the gateway's one task, which a worker gives its ``work``; whoever only sends needs none."""

    def __init__(self, settings: Settings, work: Callable[[str], None] | None = None) -> None:
        self.huey = _huey(settings)

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


def _huey(settings: Settings) -> Any:
    """Raises UsageError for a URL that is no queue's."""
    url, common = settings.queue or settings.database_url, {"results": False, "serializer": _Json()}
    kind = url.partition(":")[0].partition("+")[0]
    if kind == "sqlite":
        return SqliteHuey(NAME, filename=str(settings.folder / "queue.db"), **common)
    if kind == "postgresql":
        dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        return PostgresHuey(NAME, dsn=dsn, **common)
    if kind in ("redis", "rediss"):
        return RedisHuey(NAME, url=url, **common)
    raise UsageError(
        f"the queue {kind!r} is not supported: use sqlite:///FILE, postgresql://USER@HOST/NAME or redis://HOST"
    )
