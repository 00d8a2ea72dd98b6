"""The database: one typed class a table. ``migrations/`` makes exactly these."""

from __future__ import annotations

import secrets
import time
from functools import partial
from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, Integer, MetaData, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, declared_attr, mapped_column

Number = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up an INTEGER only


def identity(prefix: str) -> str:
    """An id that cannot be guessed: 128 random bits."""
    return f"{prefix}-{secrets.token_hex(16)}"


def now() -> int:
    return int(time.time())


def _id(prefix: str) -> Mapped[str]:
    return mapped_column(String(64), unique=True, default=partial(identity, prefix))


class Base(DeclarativeBase):
    """Rows are numbered by ``n`` in the order they were made, which lists go by; ``id`` is what the wire names them by."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {dict[str, Any]: JSON(none_as_null=True), list[str]: JSON()}

    @declared_attr.directive
    def __tablename__(cls) -> str:
        return f"{cls.__name__.lower()}s"

    n: Mapped[int] = mapped_column(Number, primary_key=True, autoincrement=True)
    created_at: Mapped[int] = mapped_column(BigInteger, default=now)


class Project(Base):
    id: Mapped[str] = _id("proj")
    name: Mapped[str] = mapped_column(String(64), unique=True)
    policy: Mapped[dict[str, Any]]


class Owned(Base):
    """What belongs to a project."""

    __abstract__ = True

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)


class Key(Owned):
    """An API key: the SHA-256 of it, and the start of it to tell it by. ``role`` is ``user`` or ``operator``."""

    id: Mapped[str] = _id("key")
    name: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    prefix: Mapped[str] = mapped_column(String(16))
    role: Mapped[str] = mapped_column(String(16))
    revoked_at: Mapped[int | None] = mapped_column(BigInteger)


class File(Owned):
    """A file whose content is complete. ``filename`` is what the caller calls it, and never part of a path."""

    id: Mapped[str] = _id("file")
    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))


class Job(Owned):
    """A fine-tuning job. ``owner`` is the process that runs it, until ``lease_until``; ``attempt`` counts those processes.

    ``stage`` and ``done`` of ``total`` say how far it is. ``hold`` says why it waits for an operator, ``decision`` what the
    operator said, ``result`` what the scan and the training found.
    """

    __table_args__ = (Index("ix_jobs_status_lease_until", "status", "lease_until"),)

    id: Mapped[str] = _id("ftjob")
    status: Mapped[str] = mapped_column(String(24))
    model: Mapped[str] = mapped_column(Text)
    training_file: Mapped[str] = mapped_column(String(64))
    validation_file: Mapped[str | None] = mapped_column(String(64))
    method: Mapped[dict[str, Any]]
    seed: Mapped[int] = mapped_column(BigInteger)
    suffix: Mapped[str | None] = mapped_column(String(64))
    labels: Mapped[dict[str, Any] | None] = mapped_column("metadata", JSON(none_as_null=True))
    policy: Mapped[dict[str, Any]]
    error: Mapped[dict[str, Any] | None]
    fine_tuned_model: Mapped[str | None] = mapped_column(Text)
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    result_files: Mapped[list[str]]
    finished_at: Mapped[int | None] = mapped_column(BigInteger)
    stage: Mapped[str] = mapped_column(String(64), default="")
    done: Mapped[int] = mapped_column(BigInteger, default=0)
    total: Mapped[int] = mapped_column(BigInteger, default=0)
    hold: Mapped[dict[str, Any] | None]
    decision: Mapped[dict[str, Any] | None]
    result: Mapped[dict[str, Any] | None]
    owner: Mapped[str | None] = mapped_column(String(64))
    lease_until: Mapped[float | None] = mapped_column(Float)
    attempt: Mapped[int] = mapped_column(default=0)


class Event(Owned):
    """A line of a job's log."""

    id: Mapped[str] = _id("ftevent")
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    level: Mapped[str] = mapped_column(String(8))
    message: Mapped[str] = mapped_column(Text)
    type: Mapped[str] = mapped_column(String(16))
    data: Mapped[dict[str, Any]]


class Checkpoint(Owned):
    """A step of a job's training that was saved."""

    __table_args__ = (Index("uq_checkpoints_job_id_step", "job_id", "step", unique=True),)

    id: Mapped[str] = _id("ftckpt")
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    step: Mapped[int] = mapped_column(BigInteger)
    metrics: Mapped[dict[str, Any]]


class Model(Owned):
    """A fine-tuned model that is served; ``id`` is its name."""

    id: Mapped[str] = mapped_column(String(255), unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), unique=True)
    base: Mapped[str] = mapped_column(Text)


class Delivery(Owned):
    """A webhook call that is due at ``due_at``, until it was ``delivered_at`` or given up (``due_at`` is None)."""

    __tablename__ = "deliveries"

    id: Mapped[str] = _id("whd")
    url: Mapped[str] = mapped_column(Text)
    body: Mapped[str] = mapped_column(Text)
    attempt: Mapped[int] = mapped_column(default=0)
    due_at: Mapped[float | None] = mapped_column(Float, index=True)
    delivered_at: Mapped[int | None] = mapped_column(BigInteger)
    error: Mapped[str | None] = mapped_column(Text)


class Audit(Owned):
    """Who did what to which object, and why."""

    __tablename__ = "audit"

    actor: Mapped[str] = mapped_column(Text)
    action: Mapped[str] = mapped_column(String(32))
    target: Mapped[str] = mapped_column(String(255))
    reason: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]]
