"""The database at a URL, and how anything in it is looked up: within the caller's project, here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from sqlalchemy import Engine, create_engine, event, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoneToSpare
from sqlalchemy.orm import Session, object_session, sessionmaker

from gradshield.errors import UsageError
from gradshield.gateway.tables import Audit, Base, Owned

T = TypeVar("T", bound=Owned)
AWAY = (OperationalError, InterfaceError, NoneToSpare)  # the database cannot be reached, or is overloaded
THREADS = 40  # of the server, each with a connection at most
URLS = "write sqlite:///FILE or postgresql://USER@HOST/NAME"
LOCK = 6715047  # of PostgreSQL, for migrations


@dataclass(frozen=True)
class Caller:
    """Who asks: a key, in its project."""

    project: str
    key: str
    role: str = "user"


@dataclass(frozen=True)
class Page:
    """One page of a list: ``limit`` rows after the one with the id ``after``."""

    limit: int = 20
    after: str | None = None
    newest_first: bool = True


class Missing(LookupError):
    """No such object in the project. ``kind`` is a word for it."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"there is no {kind} {name!r} in this project")
        self.kind, self.name = kind, name


class Refused(Exception):
    """The object is in a state in which this cannot be done; the message is a sentence for the caller."""


class Database:
    """SQLite or PostgreSQL. ``webhooks`` are the URLs that are called at every job's end."""

    def __init__(self, url: str, webhooks: Sequence[str] = ()) -> None:
        self.webhooks = tuple(webhooks)
        self.reader, self.writer = engines(url)
        self.near = self.reader.dialect.name == "sqlite"  # a file, not a server
        self.reading = sessionmaker(self.reader, expire_on_commit=False)  # its rows can be read after it ends
        self.writing = sessionmaker(self.writer, expire_on_commit=False).begin  # committed at the end, without an error

    def migrate(self) -> Self:
        """Bring the tables to this version, in one transaction, by the steps in ``migrations/versions``."""
        from alembic import command
        from alembic.config import Config

        with self.writer.begin() as connection:
            if not self.near:  # two servers that start at once migrate one after the other
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
            config = Config(attributes={"connection": connection})
            config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
            command.upgrade(config, "head")
        return self

    def close(self) -> None:
        self.reader.dispose()
        self.writer.dispose()

    def page(self, kind: type[T], project: str, page: Page, *where: Any) -> tuple[list[T], bool]:
        """A page of a project's objects, and whether there are more."""
        order = kind.n.desc() if page.newest_first else kind.n.asc()
        wanted = select(kind).where(kind.project_id == project, *where).order_by(order).limit(page.limit + 1)
        with self.reading() as session:
            if page.after is not None:
                last = found(session, kind, project, page.after).n
                wanted = wanted.where(kind.n < last if page.newest_first else kind.n > last)
            rows = list(session.scalars(wanted))
        return rows[: page.limit], len(rows) > page.limit

    def get(self, kind: type[T], project: str, id: str) -> T:
        """One of a project's objects. Raises Missing, also for one that belongs to another project."""
        with self.reading() as session:
            return found(session, kind, project, id)


def found(session: Session, kind: type[T], project: str, id: str, lock: bool = False) -> T:
    """One of a project's objects, locked until the transaction ends if it is to change. Raises Missing."""
    wanted = select(kind).where(kind.project_id == project, kind.id == id)  # type: ignore[attr-defined]
    one = session.scalar(wanted.with_for_update() if lock else wanted)  # SQLite has one writer at a time anyway
    if one is None:
        raise Missing(kind.__name__.lower(), id)
    return one


def add(near: Base, row: Owned) -> None:
    """Add a row in the transaction of another one."""
    session = object_session(near)
    assert session is not None
    session.add(row)


def audited(near: Base, caller: Caller, action: str, target: str, reason: str = "", **data: Any) -> None:
    """A line of the audit log, in the transaction of what changed."""
    line = Audit(project_id=caller.project, actor=caller.key, action=action, target=target, reason=reason, data=data)
    add(near, line)


def engines(url: str) -> tuple[Engine, Engine]:
    """What reads and what writes SQLite (WAL) or PostgreSQL. Raises UsageError for any other URL.

    What reads begins no transactions, each of which would cost PostgreSQL two messages. SQLite takes one write at a time and has
    the others try again at intervals, so that there they wait for the one connection that writes, in turn.
    """
    try:
        parsed = make_url(url)
    except Exception:
        raise UsageError(f"the database URL cannot be read: {URLS}") from None
    kind = parsed.get_backend_name()
    if kind == "postgresql":
        own, half = parsed.set(drivername="postgresql+psycopg"), THREADS // 2
        made = create_engine(own, pool_pre_ping=True, pool_size=half, max_overflow=half)
        return made.execution_options(isolation_level="AUTOCOMMIT"), made
    if kind != "sqlite" or not parsed.database:
        raise UsageError(f"the database {kind!r} is not supported: {URLS}")
    Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    reader, writer = (
        create_engine(parsed, connect_args={"timeout": 30}, pool_size=size, max_overflow=0) for size in (THREADS, 1)
    )
    for made in (reader, writer):
        event.listen(made, "connect", _connected)
    # A transaction that reads first and then writes would fail, not wait, if another process wrote in between.
    event.listen(writer, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return reader, writer


def _connected(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins no transaction
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
