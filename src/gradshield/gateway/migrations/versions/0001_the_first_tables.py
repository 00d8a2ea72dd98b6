"""The first tables"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _text(name: str, length: int | None = None, **more: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.String(length) if length else sa.Text(), **{"nullable": False, **more})


def _count(name: str, **more: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.BigInteger(), **{"nullable": False, **more})


def _json(name: str, **more: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.JSON(none_as_null=True), **{"nullable": False, **more})


def _id(length: int = 64) -> sa.Column[Any]:
    return _text("id", length, unique=True)


def _job(**more: Any) -> sa.Column[Any]:
    return sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id"), nullable=False, **more)


def _table(name: str, *columns: sa.Column[Any], owned: bool = True) -> None:
    """A table with what all have: a number, a time, and of all but projects their project."""
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    common = [sa.Column("n", number, primary_key=True, autoincrement=True), _count("created_at")]
    if owned:
        project = sa.ForeignKey("projects.id")
        common.append(sa.Column("project_id", sa.String(64), project, nullable=False, index=True))
    op.create_table(name, *common, *columns)


def upgrade() -> None:
    _table("projects", _id(), _text("name", 64, unique=True), _json("policy"), owned=False)
    _table(
        "keys",
        _id(),
        _text("name", 64),
        _text("hash", 64, unique=True),
        _text("prefix", 16),
        _text("role", 16),
        _count("revoked_at", nullable=True),
    )
    _table("files", _id(), _text("filename"), _text("purpose", 32), _count("bytes"), _text("sha256", 64))
    _table(
        "jobs",
        _id(),
        _text("status", 24),
        _text("model"),
        _text("training_file", 64),
        _text("validation_file", 64, nullable=True),
        _json("method"),
        _count("seed"),
        _text("suffix", 64, nullable=True),
        _json("metadata", nullable=True),
        _json("policy"),
        _json("error", nullable=True),
        _text("fine_tuned_model", nullable=True),
        _count("trained_tokens", nullable=True),
        _json("result_files"),
        _count("finished_at", nullable=True),
        _text("stage", 64),
        _count("done"),
        _count("total"),
        _json("hold", nullable=True),
        _json("decision", nullable=True),
        _json("result", nullable=True),
        _text("owner", 64, nullable=True),
        sa.Column("lease_until", sa.Float()),
        sa.Column("attempt", sa.Integer(), nullable=False),
    )
    op.create_index("ix_jobs_status_lease_until", "jobs", ["status", "lease_until"])
    _table("events", _id(), _job(index=True), _text("level", 8), _text("message"), _text("type", 16), _json("data"))
    _table("checkpoints", _id(), _job(), _count("step"), _json("metrics"))
    op.create_index("uq_checkpoints_job_id_step", "checkpoints", ["job_id", "step"], unique=True)
    _table("models", _id(255), _job(unique=True), _text("base"))
    _table(
        "deliveries",
        _id(),
        _text("url"),
        _text("body"),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("due_at", sa.Float(), index=True),
        _count("delivered_at", nullable=True),
        _text("error", nullable=True),
    )
    _table("audit", _text("actor"), _text("action", 32), _text("target", 255), _text("reason"), _json("data"))


def downgrade() -> None:
    raise NotImplementedError("there is no version before this one")
