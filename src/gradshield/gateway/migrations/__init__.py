"""Alembic's migrations, and how they run. ``versions/`` has one file a step."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, text

LOCK = 6715047  # of PostgreSQL: two servers that start at once migrate one after the other


def upgrade(engine: Engine) -> None:
    """Bring the database to the newest version, in one transaction."""
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
        command.upgrade(config, "head")
