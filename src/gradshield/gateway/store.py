"""Every query of the gateway. What a caller names is looked up within the caller's project, here and nowhere else.

A change of a job's state is one transaction with its event, its audit line and its webhook calls. A job in work belongs to one
process, its ``owner``; that process alone changes it, and only until another has claimed it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Engine, Select, bindparam, create_engine, event, func, or_, select, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoneToSpare
from sqlalchemy.orm import Session

from gradshield.errors import UsageError
from gradshield.gateway.settings import Policy
from gradshield.gateway.tables import (
    Audit,
    Base,
    Checkpoint,
    Delivery,
    Event,
    File,
    Job,
    Key,
    Model,
    Owned,
    Project,
)

T = TypeVar("T", bound=Owned)
ACTIVE = ("validating_files", "queued", "running")  # a worker may claim these
ENDED = ("succeeded", "failed", "cancelled")
UNSAFE = "unsafe_model"  # code of a job whose model was withheld
AWAY = (OperationalError, InterfaceError, NoneToSpare)  # the database cannot be reached, or is overloaded
THREADS = 40  # of the server, each with a connection at most


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
    """The object is in a state in which this cannot be done."""


class Lost(Exception):
    """The job belongs to another process, or was cancelled or paused."""


def identity(prefix: str) -> str:
    """An id that cannot be guessed: 128 random bits."""
    return f"{prefix}-{secrets.token_hex(16)}"


def hashed(secret: str) -> str:
    """What is stored of a key. A key has 256 random bits, so that a plain hash cannot be searched."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Store:
    """The database at a URL of SQLite or PostgreSQL."""

    def __init__(self, url: str, webhooks: Sequence[str] = ()) -> None:
        self.url, self.webhooks = url, tuple(webhooks)
        self.reader, self.writer = engines(url)
        self.near = self.reader.dialect.name == "sqlite"  # a file, not a server

    def migrate(self) -> None:
        """Bring the tables to this version."""
        from gradshield.gateway.migrations import upgrade

        upgrade(self.writer)

    def close(self) -> None:
        self.reader.dispose()
        self.writer.dispose()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session for queries; its rows can be read after it ends."""
        with Session(self.reader, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction, committed when the block ends without an error."""
        with Session(self.writer, expire_on_commit=False) as session, session.begin():
            yield session

    # Projects and keys

    def add_project(self, name: str, policy: Policy) -> Project:
        """A new project. Raises UsageError if the name is taken."""
        with self.writing() as session:
            if session.scalar(select(Project.n).where(Project.name == name)):
                raise UsageError(f"there is a project {name!r} already: choose another name")
            made = Project(id=identity("proj"), name=name, policy=policy.model_dump(), created_at=now())
            session.add(made)
        return made

    def projects(self) -> list[Project]:
        with self.reading() as session:
            return list(session.scalars(select(Project).order_by(Project.n)))

    def project(self, id: str) -> Project:
        with self.reading() as session:
            found = session.scalar(select(Project).where(or_(Project.id == id, Project.name == id)))
        if found is None:
            raise Missing("project", id)
        return found

    def set_policy(self, project: str, policy: Policy, actor: str, reason: str) -> None:
        """A project's policy, for jobs that are made from now on."""
        with self.writing() as session:
            session.execute(update(Project).where(Project.id == project).values(policy=policy.model_dump()))
            session.add(audit(project, actor, "policy", project, reason, policy.model_dump()))

    def add_key(self, project: str, name: str, role: str = "user") -> tuple[Key, str]:
        """A new key, and its text, which is shown once."""
        secret = f"gs-{secrets.token_urlsafe(32)}"
        with self.writing() as session:
            made = Key(
                id=identity("key"),
                project_id=project,
                name=name,
                hash=hashed(secret),
                prefix=secret[:8],
                role=role,
                created_at=now(),
            )
            session.add(made)
            session.add(audit(project, "gradshield keys", "create key", made.id, "", {"name": name, "role": role}))
        return made, secret

    def all_keys(self, project: str | None = None) -> list[Key]:
        with self.reading() as session:
            wanted = select(Key).order_by(Key.n)
            return list(session.scalars(wanted if project is None else wanted.where(Key.project_id == project)))

    def revoke(self, key: str) -> Key:
        """Revoke a key by its id or the start of its text. Raises UsageError unless one key is meant."""
        with self.writing() as session:
            found = list(session.scalars(select(Key).where(or_(Key.id == key, Key.prefix == key))))
            if len(found) != 1:
                raise UsageError(f"{len(found)} keys are called {key!r}: give the id of one (gradshield keys list)")
            found[0].revoked_at = found[0].revoked_at or now()
            session.add(audit(found[0].project_id, "gradshield keys", "revoke key", found[0].id))
        return found[0]

    def caller(self, secret: str) -> Caller | None:
        """Who has this key; None if nobody has."""
        return self._caller(_HASH, hashed(secret))

    def caller_with(self, key: str) -> Caller | None:
        """Who has the key with this id; None if it was revoked."""
        return self._caller(_ID, key)

    def _caller(self, wanted: Select[str, str, str], value: str) -> Caller | None:
        with self.reader.connect() as connection:  # of every request, so without the objects and their session
            found = connection.execute(wanted, {"value": value}).first()
        return None if found is None else Caller(*found)

    # Lists and look-ups of any kind of object

    def page(self, kind: type[T], project: str, page: Page, *where: Any) -> tuple[list[T], bool]:
        """A page of a project's objects, and whether there are more."""
        order = kind.n.desc() if page.newest_first else kind.n.asc()
        wanted = select(kind).where(kind.project_id == project, *where).order_by(order).limit(page.limit + 1)
        with self.reading() as session:
            if page.after is not None:
                last = session.scalar(_one(kind, project, page.after).with_only_columns(kind.n))
                if last is None:
                    raise Missing(_word(kind), page.after)
                wanted = wanted.where(kind.n < last if page.newest_first else kind.n > last)
            found = list(session.scalars(wanted))
        return found[: page.limit], len(found) > page.limit

    def get(self, kind: type[T], project: str, id: str) -> T:
        """One of a project's objects. Raises Missing, also for one that belongs to another project."""
        with self.reading() as session:
            return _found(session, kind, project, id)

    def audits(self, project: str, limit: int = 100, before: int | None = None) -> list[Audit]:
        """Lines of the audit log, newest first, older than the one with the number ``before``."""
        older = () if before is None else (Audit.n < before,)
        return self.page(Audit, project, Page(limit), *older)[0]

    # Files

    def add_file(self, project: str, id: str, filename: str, purpose: str, bytes: int, sha256: str) -> File:
        """List a file whose content is in place."""
        with self.writing() as session:
            made = File(
                id=id,
                project_id=project,
                filename=filename,
                purpose=purpose,
                bytes=bytes,
                sha256=sha256,
                created_at=now(),
            )
            session.add(made)
        return made

    def add_result(self, job: Job, id: str, name: str, bytes: int, sha256: str) -> None:
        """List a result of a job, or renew it."""
        with self.writing() as session:
            file = session.scalar(_one(File, job.project_id, id)) or File(id=id, project_id=job.project_id)
            file.filename, file.purpose = f"{job.id}/{name}", "fine-tune-results"
            file.bytes, file.sha256, file.created_at = bytes, sha256, now()
            session.add(file)

    def stored(self, project: str) -> int:
        """Bytes of all files of a project."""
        with self.reading() as session:
            return int(
                session.scalar(select(func.coalesce(func.sum(File.bytes), 0)).where(File.project_id == project)) or 0
            )

    def delete_file(self, caller: Caller, id: str) -> None:
        """Take a file off the list. Raises Refused if a job that has not ended needs it."""
        with self.writing() as session:
            found = _found(session, File, caller.project, id)
            needs = select(Job.id).where(
                Job.project_id == caller.project,
                Job.status.not_in(ENDED),
                or_(Job.training_file == id, Job.validation_file == id),
            )
            if job := session.scalar(needs):
                raise Refused(f"the file {id} is used by the job {job}: cancel the job, or wait until it ends")
            session.delete(found)
            session.add(audit(caller.project, caller.key, "delete file", id, "", {"filename": found.filename}))

    # Jobs, as callers see them

    def add_job(self, project: str, limit: int, **fields: Any) -> Job:
        """A new job, with its policy taken from the project. Raises Refused if ``limit`` jobs of the project have not ended."""
        with self.writing() as session:
            owner = session.scalar(select(Project).where(Project.id == project).with_for_update())
            if owner is None:
                raise Missing("project", project)
            unfinished = select(func.count()).where(Job.project_id == project, Job.status.not_in(ENDED))
            if (session.scalar(unfinished) or 0) >= limit:
                raise Refused(f"the project has {limit} jobs that have not ended: wait for one, or cancel one")
            made = Job(
                id=identity("ftjob"),
                project_id=project,
                status="validating_files",
                policy=owner.policy,
                result_files=[],
                created_at=now(),
                **fields,
            )
            session.add(made)
            session.flush()
            _say(session, made, "Created fine-tuning job")
        return made

    def cancel(self, caller: Caller, id: str) -> Job:
        """Raises Refused if the job has ended."""
        with self.writing() as session:
            job = _locked(session, caller.project, id)
            if job.status in ENDED:
                raise Refused(f"the job has {job.status} and cannot be cancelled")
            job.hold = None
            self._end(session, job, "cancelled", "Fine-tuning job cancelled")
            session.add(audit(caller.project, caller.key, "cancel job", id))
        return job

    def pause(self, caller: Caller, id: str) -> Job:
        """Raises Refused unless the job waits or runs. It keeps its last checkpoint."""
        with self.writing() as session:
            job = _locked(session, caller.project, id)
            if job.status not in ACTIVE:
                raise Refused(f"the job has the status {job.status}, and only one that waits or runs can be paused")
            job.status, job.owner, job.lease_until = "paused", None, None
            _say(session, job, "Fine-tuning job paused")
        return job

    def resume(self, caller: Caller, id: str) -> Job:
        """Raises Refused unless the job was paused by its user."""
        with self.writing() as session:
            job = _locked(session, caller.project, id)
            if job.status != "paused":
                raise Refused(f"the job has the status {job.status}, and only a paused one can be resumed")
            if job.hold is not None:
                raise Refused("the job waits for an operator's review: only the operator can let it go on")
            job.status = "queued"
            _say(session, job, "Fine-tuning job resumed")
        return job

    # Jobs, as operators decide on them

    def approve(
        self,
        caller: Caller,
        id: str,
        reason: str,
        released: Iterable[str] = (),
        cut: float | None = None,
    ) -> Job:
        """Let a held job go on. Rows with the ids ``released`` train whatever they score; those above ``cut`` do not.

        Raises Refused unless the caller is an operator with a reason, the job is held, and its cut may be moved.
        """
        with self.writing() as session:
            job = self._held(session, caller, id, reason)
            if cut is not None and not (job.hold or {})["movable"]:
                raise Refused(
                    f"the policy's defence {job.policy['defence']!r} has a cut of its own, which cannot be replaced"
                )
            threshold = None if cut is None else f"fixed:value={cut!r}"
            decision = {"released": sorted(set(released)), "threshold": threshold}
            job.status, job.hold, job.decision = "queued", None, decision
            action = "override cut" if threshold else "release rows" if released else "approve job"
            session.add(audit(job.project_id, caller.key, action, id, reason, decision))
            _say(session, job, f"Approved by an operator: {reason}", data=decision)
        return job

    def reject(self, caller: Caller, id: str, reason: str) -> Job:
        """Fail a held job. Raises Refused as `approve` does."""
        with self.writing() as session:
            job = self._held(session, caller, id, reason)
            job.hold = None
            job.error = {
                "code": "rejected",
                "message": f"An operator rejected the job: {reason}",
                "param": "training_file",
            }
            self._end(session, job, "failed", str(job.error["message"]))
            session.add(audit(job.project_id, caller.key, "reject job", id, reason))
        return job

    def release_model(self, caller: Caller, id: str, name: str, reason: str) -> Job:
        """Serve, as ``name``, the model that the safety check withheld. Raises Refused unless one was withheld."""
        with self.writing() as session:
            job = self._reviewed(session, caller, id, reason)
            if job.status != "failed" or (job.error or {}).get("code") != UNSAFE:
                raise Refused("the job has no withheld model: only such a model can be released")
            job.error = None
            self._end(session, job, "succeeded", f"Model released by an operator: {reason}", model=name)
            session.add(audit(job.project_id, caller.key, "release model", name, reason, {"job": id}))
        return job

    def _reviewed(self, session: Session, caller: Caller, id: str, reason: str) -> Job:
        if caller.role != "operator":
            raise Refused("only an operator decides on jobs: make a key with gradshield keys create --role operator")
        if not reason.strip():
            raise Refused("a decision needs a reason, which the audit log keeps")
        return _locked(session, caller.project, id)

    def _held(self, session: Session, caller: Caller, id: str, reason: str) -> Job:
        job = self._reviewed(session, caller, id, reason)
        if job.status != "paused" or job.hold is None:
            raise Refused("the job does not wait for a review")
        return job

    # Jobs, as their process sees them

    def claim(self, id: str, owner: str, seconds: float) -> Job | None:
        """The job, if it is to be run and no process has it: from now on ``owner`` has it for ``seconds``."""
        time_now = time.time()
        change = (
            update(Job)
            .where(Job.id == id, *_free(time_now))
            .values(owner=owner, lease_until=time_now + seconds, attempt=Job.attempt + 1)
        )
        with self.writing() as session:
            if _changed(session, change) != 1:
                return None
            return session.scalar(select(Job).where(Job.id == id))

    def beat(self, id: str, owner: str, seconds: float) -> None:
        """Extend the lease. Raises Lost if the job is not this owner's any more."""
        self._own(id, owner, lease_until=time.time() + seconds)

    def give_up(self, id: str, owner: str, seconds: float = 0.0) -> bool:
        """End the lease of a process that has stopped; whether it had one. Another may go on after ``seconds``."""
        try:
            self._own(id, owner, owner=None, lease_until=time.time() + seconds if seconds else None)
        except Lost:
            return False
        return True

    def progress(self, id: str, owner: str, stage: str, done: int, total: int) -> None:
        self._own(id, owner, stage=stage, done=done, total=total)

    def note(self, id: str, owner: str, **fields: Any) -> None:
        """Keep fields of a job that its process found out."""
        self._own(id, owner, **fields)

    def say(
        self,
        id: str,
        owner: str,
        message: str,
        level: str = "info",
        data: Mapping[str, Any] | None = None,
        status: str | None = None,
        type: str = "message",
    ) -> None:
        """Add an event, with a new status if one is given. Raises Lost."""
        with self.writing() as session:
            job = _owned(session, id, owner)
            job.status = status or job.status
            _say(session, job, message, level, data, type)

    def add_checkpoint(self, id: str, owner: str, step: int, metrics: Mapping[str, Any]) -> None:
        """List a checkpoint, once for each step. Raises Lost."""
        with self.writing() as session:
            job = _owned(session, id, owner)
            if session.scalar(select(Checkpoint.n).where(Checkpoint.job_id == id, Checkpoint.step == step)):
                return
            session.add(
                Checkpoint(
                    id=identity("ftckpt"),
                    project_id=job.project_id,
                    job_id=id,
                    step=step,
                    metrics=dict(metrics),
                    created_at=now(),
                )
            )

    def hold(self, id: str, owner: str, why: Mapping[str, Any], message: str) -> None:
        """Let the job wait for an operator. Raises Lost."""
        with self.writing() as session:
            job = _owned(session, id, owner)
            job.status, job.hold, job.owner, job.lease_until = "paused", dict(why), None, None
            _say(session, job, message, "warn", why)

    def finish(self, id: str, owner: str, model: str, **fields: Any) -> None:
        """End the job well and list its model. Raises Lost, so that no job is finished twice."""
        with self.writing() as session:
            job = _owned(session, id, owner, **fields)
            self._end(session, job, "succeeded", "The job has successfully completed", model=model)

    def fail(self, id: str, owner: str, code: str, message: str, param: str | None = None, **fields: Any) -> None:
        """End the job with an error. Raises Lost."""
        with self.writing() as session:
            job = _owned(session, id, owner, **fields)
            job.error = {"code": code, "message": message, "param": param}
            self._end(session, job, "failed", message)

    def waiting(self) -> list[str]:
        """Jobs to be run that no process has."""
        with self.reading() as session:
            return list(session.scalars(select(Job.id).where(*_free(time.time())).order_by(Job.n)))

    def working(self) -> tuple[int, int | None]:
        """How many jobs a process has, and when the oldest was made that waits for one; of all projects."""
        time_now = time.time()
        with self.reading() as session:
            leased = session.scalar(select(func.count()).where(Job.status.in_(ACTIVE), Job.lease_until >= time_now))
            oldest = session.scalar(select(func.min(Job.created_at)).where(*_free(time_now)))
        return int(leased or 0), None if oldest is None else int(oldest)

    def counts(self) -> dict[str, int]:
        """Jobs by status, of all projects."""
        with self.reading() as session:
            return {
                str(status): int(count)
                for status, count in session.execute(select(Job.status, func.count()).group_by(Job.status))
            }

    def _own(self, id: str, by: str, **fields: Any) -> None:
        change = update(Job).where(Job.id == id, Job.owner == by, Job.status.in_(ACTIVE)).values(**fields)
        with self.writing() as session:
            if _changed(session, change) != 1:
                raise Lost(id)

    def _end(self, session: Session, job: Job, status: str, message: str, model: str | None = None) -> None:
        """A job's last state, its event and its webhook calls."""
        job.status, job.finished_at, job.owner, job.lease_until = status, now(), None, None
        job.fine_tuned_model = model
        if model is not None:
            session.add(Model(id=model, project_id=job.project_id, job_id=job.id, base=job.model, created_at=now()))
        level = "error" if status == "failed" else "info"
        _say(session, job, message, level, None if job.error is None else job.error)
        for url in self.webhooks:
            id = identity("evt")
            body = {
                "id": id,
                "object": "event",
                "created_at": now(),
                "type": f"fine_tuning.job.{status}",
                "data": {"id": job.id},
            }
            session.add(
                Delivery(
                    id=identity("whd"),
                    project_id=job.project_id,
                    url=url,
                    body=json.dumps(body),
                    due_at=time.time(),
                    created_at=now(),
                )
            )

    # Models

    def delete_model(self, caller: Caller, id: str) -> Model:
        """Take a model out of service; its files are the caller's to remove."""
        with self.writing() as session:
            found = _found(session, Model, caller.project, id)
            session.delete(found)
            session.add(audit(caller.project, caller.key, "delete model", id, "", {"job": found.job_id}))
        return found

    # Webhook calls

    def due(self, limit: int = 20) -> list[Delivery]:
        """Calls to make now, each marked as not due again for a minute, so that two workers do not make it at once."""
        time_now = time.time()
        with self.writing() as session:
            wanted = select(Delivery).where(Delivery.due_at <= time_now).order_by(Delivery.n).limit(limit)
            found = list(session.scalars(wanted.with_for_update(skip_locked=True)))
            for one in found:
                one.due_at, one.attempt = time_now + 60, one.attempt + 1
        return found

    def called(self, id: str, error: str | None, again_at: float | None) -> None:
        """What came of a call: no error, or when to try again (None: never)."""
        with self.writing() as session:
            values = {"error": error, "due_at": again_at, "delivered_at": now() if error is None else None}
            session.execute(update(Delivery).where(Delivery.id == id).values(**values))


_KEY = select(Key.project_id, Key.id, Key.role).where(Key.revoked_at.is_(None))
_HASH, _ID = (_KEY.where(column == bindparam("value")) for column in (Key.hash, Key.id))


def now() -> int:
    return int(time.time())


def audit(
    project: str, actor: str, action: str, target: str, reason: str = "", data: Mapping[str, Any] | None = None
) -> Audit:
    """A line of the audit log."""
    return Audit(
        project_id=project,
        actor=actor,
        action=action,
        target=target,
        reason=reason,
        data=dict(data or {}),
        created_at=now(),
    )


def _one(kind: type[T], project: str, id: str) -> Select[T]:
    return select(kind).where(kind.project_id == project, kind.id == id)  # type: ignore[attr-defined, return-value]


def _word(kind: type[Base]) -> str:
    return kind.__name__.lower()


def _found(session: Session, kind: type[T], project: str, id: str) -> T:
    found = session.scalar(_one(kind, project, id))
    if found is None:
        raise Missing(_word(kind), id)
    return found


def _locked(session: Session, project: str, id: str) -> Job:
    """A job, with its row locked until the transaction ends. SQLite has one writer at a time anyway."""
    job = session.scalar(_one(Job, project, id).with_for_update())
    if job is None:
        raise Missing("job", id)
    return job


def _free(now: float) -> tuple[Any, Any]:
    """Of the jobs: to be run, and no process has it."""
    return Job.status.in_(ACTIVE), or_(Job.lease_until.is_(None), Job.lease_until < now)


def _owned(session: Session, id: str, owner: str, **fields: Any) -> Job:
    """A job of this owner, with new values of some fields. Raises Lost."""
    job = session.scalar(select(Job).where(Job.id == id, Job.owner == owner, Job.status.in_(ACTIVE)).with_for_update())
    if job is None:
        raise Lost(id)
    for name, value in fields.items():
        setattr(job, name, value)
    return job


def _say(
    session: Session,
    job: Job,
    message: str,
    level: str = "info",
    data: Mapping[str, Any] | None = None,
    type: str = "message",
) -> None:
    session.add(
        Event(
            id=identity("ftevent"),
            project_id=job.project_id,
            job_id=job.id,
            level=level,
            message=message,
            type=type,
            data=dict(data or {}),
            created_at=now(),
        )
    )


def _changed(session: Session, change: Any) -> int:
    return int(session.connection().execute(change).rowcount)


def engines(url: str) -> tuple[Engine, Engine]:
    """What reads and what writes SQLite (WAL) or PostgreSQL. Raises UsageError for any other URL.

    What reads begins no transactions, whose beginning and end PostgreSQL is told apart. SQLite takes one write at a time and has
    the others try again at intervals, so that there they wait for the one connection that writes, in turn.
    """
    try:
        parsed = make_url(url)
    except Exception:
        raise UsageError(
            "the database URL cannot be read: write sqlite:///FILE or postgresql://USER@HOST/NAME"
        ) from None
    kind = parsed.get_backend_name()
    if kind == "postgresql":
        made = create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            pool_pre_ping=True,
            pool_size=THREADS // 2,
            max_overflow=THREADS // 2,
        )
        return made.execution_options(isolation_level="AUTOCOMMIT"), made
    if kind != "sqlite" or not parsed.database:
        raise UsageError(f"the database {kind!r} is not supported: use sqlite:///FILE or postgresql://USER@HOST/NAME")
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
