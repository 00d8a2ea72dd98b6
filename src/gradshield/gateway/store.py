"""Every change of what the gateway keeps: projects, keys, files, models, webhook calls, and jobs.

A change of a job, by its user, by an operator or by the process that runs it, is one transaction with its event, its audit line
and its webhook calls. A job in work belongs to one process, its ``owner``, which alone changes it, until another has claimed it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Select, bindparam, func, or_, select, update

from gradshield.errors import UsageError
from gradshield.gateway.database import Caller, Database, Missing, Page, Refused, add, audited, found
from gradshield.gateway.settings import Policy
from gradshield.gateway.tables import Audit, Checkpoint, Delivery, Event, File, Job, Key, Model, Project, identity, now

ACTIVE = ("validating_files", "queued", "running")  # a worker may claim these
ENDED = ("succeeded", "failed", "cancelled")
STATUSES = (*ACTIVE, "paused", *ENDED)
UNSAFE = "unsafe_model"  # code of a job whose model was withheld
BY_HAND = "gradshield keys"  # the actor of what is typed on the server
Found = Mapping[str, Any] | None  # what an event comes with
_KEY = select(Key.project_id, Key.id, Key.role).where(Key.revoked_at.is_(None))
_HASH, _ID = (_KEY.where(column == bindparam("value")) for column in (Key.hash, Key.id))


class Lost(Exception):
    """The job belongs to another process, or was cancelled or paused."""


def hashed(secret: str) -> str:
    """What is stored of a key. A key has 256 random bits, so that a plain hash cannot be searched."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Store(Database):
    """The database with all that is in it."""

    # Projects and keys

    def add_project(self, name: str, policy: Policy) -> Project:
        """A new project. Raises UsageError if the name is taken."""
        with self.writing() as session:
            if session.scalar(select(Project.n).where(Project.name == name)):
                raise UsageError(f"there is a project {name!r} already: choose another name")
            made = Project(name=name, policy=policy.model_dump())
            session.add(made)
        return made

    def projects(self) -> list[Project]:
        with self.reading() as session:
            return list(session.scalars(select(Project).order_by(Project.n)))

    def project(self, id: str) -> Project:
        with self.reading() as session:
            one = session.scalar(select(Project).where(or_(Project.id == id, Project.name == id)))
        if one is None:
            raise Missing("project", id)
        return one

    def set_policy(self, project: str, policy: Policy, reason: str) -> None:
        """A project's policy, for jobs that are made from now on."""
        with self.writing() as session:
            one = session.scalars(select(Project).where(Project.id == project)).one()
            one.policy = policy.model_dump()
            audited(one, Caller(project, BY_HAND), "policy", project, reason, **one.policy)

    def add_key(self, project: str, name: str, role: str = "user") -> tuple[Key, str]:
        """A new key, and its text, which is shown once."""
        secret = f"gs-{secrets.token_urlsafe(32)}"
        with self.writing() as session:
            made = Key(project_id=project, name=name, hash=hashed(secret), prefix=secret[:8], role=role)
            session.add(made)
            session.flush()  # which gives it its id
            audited(made, Caller(project, BY_HAND), "create key", made.id, name=name, role=role)
        return made, secret

    def all_keys(self, project: str | None = None) -> list[Key]:
        with self.reading() as session:
            wanted = select(Key).order_by(Key.n)
            return list(session.scalars(wanted if project is None else wanted.where(Key.project_id == project)))

    def revoke(self, key: str) -> Key:
        """Revoke a key by its id or the start of its text. Raises UsageError unless one key is meant."""
        with self.writing() as session:
            meant = list(session.scalars(select(Key).where(or_(Key.id == key, Key.prefix == key))))
            if len(meant) != 1:
                raise UsageError(f"{len(meant)} keys are called {key!r}: give the id of one (gradshield keys list)")
            meant[0].revoked_at = meant[0].revoked_at or now()
            audited(meant[0], Caller(meant[0].project_id, BY_HAND), "revoke key", meant[0].id)
        return meant[0]

    def caller(self, secret: str) -> Caller | None:
        """Who has this key; None if nobody has."""
        return self._caller(_HASH, hashed(secret))

    def caller_with(self, key: str) -> Caller | None:
        """Who has the key with this id; None if it was revoked."""
        return self._caller(_ID, key)

    def _caller(self, wanted: Select[str, str, str], value: str) -> Caller | None:
        with self.reader.connect() as connection:  # of every request, so without the objects and their session
            row = connection.execute(wanted, {"value": value}).first()
        return None if row is None else Caller(*row)

    def audits(self, project: str, limit: int = 100, before: int | None = None) -> list[Audit]:
        """Lines of the audit log, newest first, older than the one with the number ``before``."""
        older = () if before is None else (Audit.n < before,)
        return self.page(Audit, project, Page(limit), *older)[0]

    # Files and models

    def add_file(self, project: str, id: str, filename: str, purpose: str, bytes: int, sha256: str) -> File:
        """List a file whose content is in place, or renew it."""
        with self.writing() as session:
            file = session.scalar(select(File).where(File.project_id == project, File.id == id))
            file = file or File(id=id, project_id=project)
            file.filename, file.purpose, file.bytes, file.sha256 = filename, purpose, bytes, sha256
            file.created_at = now()
            session.add(file)
        return file

    def stored(self, project: str) -> int:
        """Bytes of all files of a project."""
        with self.reading() as session:
            return int(session.scalar(select(func.sum(File.bytes)).where(File.project_id == project)) or 0)

    def delete_file(self, caller: Caller, id: str) -> None:
        """Take a file off the list. Raises Refused if a job that has not ended needs it."""
        with self.writing() as session:
            file = found(session, File, caller.project, id)
            used = or_(Job.training_file == id, Job.validation_file == id)
            needs = select(Job.id).where(Job.project_id == caller.project, Job.status.not_in(ENDED), used)
            if job := session.scalar(needs):
                raise Refused(f"The file {id} is used by the job {job}: cancel the job, or wait until it ends.")
            audited(file, caller, "delete file", id, filename=file.filename)
            session.delete(file)

    def delete_model(self, caller: Caller, id: str) -> None:
        """Take a model out of service. Its job keeps its files."""
        with self.writing() as session:
            model = found(session, Model, caller.project, id)
            audited(model, caller, "delete model", id, job=model.job_id)
            session.delete(model)

    # Webhook calls

    def due(self, limit: int = 20) -> list[Delivery]:
        """Calls to make now, each marked as not due again for a minute, so that two workers do not make it at once."""
        time_now = time.time()
        with self.writing() as session:
            wanted = select(Delivery).where(Delivery.due_at <= time_now).order_by(Delivery.n).limit(limit)
            calls = list(session.scalars(wanted.with_for_update(skip_locked=True)))
            for one in calls:
                one.due_at, one.attempt = time_now + 60, one.attempt + 1
        return calls

    def called(self, id: str, error: str | None, again_at: float | None) -> None:
        """What came of a call: no error, or when to try again (None: never)."""
        with self.writing() as session:
            values = {"error": error, "due_at": again_at, "delivered_at": now() if error is None else None}
            session.execute(update(Delivery).where(Delivery.id == id).values(**values))

    # Jobs, as callers see them

    def add_job(self, project: str, limit: int, **fields: Any) -> Job:
        """A new job, with its policy taken from the project. Raises Refused if ``limit`` jobs of the project have not ended."""
        with self.writing() as session:
            policy = session.scalars(select(Project.policy).where(Project.id == project).with_for_update()).one()
            unfinished = select(func.count()).where(Job.project_id == project, Job.status.not_in(ENDED))
            if (session.scalar(unfinished) or 0) >= limit:
                raise Refused(f"The project has {limit} jobs that have not ended: wait for one, or cancel one.")
            made = Job(project_id=project, status="validating_files", policy=policy, result_files=[], **fields)
            session.add(made)
            session.flush()  # which gives it its id
            _say(made, "Created fine-tuning job")
        return made

    def cancel(self, caller: Caller, id: str) -> Job:
        """Raises Refused if the job has ended."""
        with self._changing(caller, id) as job:
            if job.status in ENDED:
                raise Refused(f"The job has {job.status} and cannot be cancelled.")
            job.hold = None
            self._end(job, "cancelled", "Fine-tuning job cancelled")
            audited(job, caller, "cancel job", id)
        return job

    def pause(self, caller: Caller, id: str) -> Job:
        """Raises Refused unless the job waits or runs. It keeps its last checkpoint."""
        with self._changing(caller, id) as job:
            if job.status not in ACTIVE:
                raise Refused(f"The job has the status {job.status}, and only one that waits or runs can be paused.")
            job.status, job.owner, job.lease_until = "paused", None, None
            _say(job, "Fine-tuning job paused")
        return job

    def resume(self, caller: Caller, id: str) -> Job:
        """Raises Refused unless the job was paused by its user."""
        with self._changing(caller, id) as job:
            if job.status != "paused":
                raise Refused(f"The job has the status {job.status}, and only a paused one can be resumed.")
            if job.hold is not None:
                raise Refused("The job waits for an operator's review: only the operator can let it go on.")
            job.status = "queued"
            _say(job, "Fine-tuning job resumed")
        return job

    # Jobs, as operators decide on them

    def approve(
        self, caller: Caller, id: str, reason: str, released: Iterable[str] = (), cut: float | None = None
    ) -> Job:
        """Let a held job go on. Rows with the ids ``released`` train whatever they score; those above ``cut`` do not.

        Raises Refused unless the caller is an operator with a reason, the job is held, and its cut may be moved.
        """
        with self._deciding(caller, id, reason) as job:
            why, own = _waited(job), job.policy["defence"]
            if cut is not None and not why["movable"]:
                raise Refused(f"The policy's defence {own!r} has a cut of its own, which cannot be replaced.")
            threshold = None if cut is None else f"fixed:value={cut!r}"
            decision = {"released": sorted(set(released)), "threshold": threshold}
            job.status, job.decision = "queued", decision
            action = "override cut" if threshold else "release rows" if released else "approve job"
            audited(job, caller, action, id, reason, **decision)
            _say(job, f"Approved by an operator: {reason}", data=decision)
        return job

    def reject(self, caller: Caller, id: str, reason: str) -> Job:
        """Fail a held job. Raises Refused as `approve` does."""
        with self._deciding(caller, id, reason) as job:
            _waited(job)
            said = f"An operator rejected the job: {reason}"
            job.error = {"code": "rejected", "message": said, "param": "training_file"}
            self._end(job, "failed", said)
            audited(job, caller, "reject job", id, reason)
        return job

    def release_model(self, caller: Caller, id: str, name: str, reason: str) -> Job:
        """Serve, as ``name``, the model that the safety check withheld. Raises Refused unless one was withheld."""
        with self._deciding(caller, id, reason) as job:
            if job.status != "failed" or (job.error or {}).get("code") != UNSAFE:
                raise Refused("The job has no withheld model: only such a model can be released.")
            job.error = None
            self._end(job, "succeeded", f"Model released by an operator: {reason}", name)
            audited(job, caller, "release model", name, reason, job=id)
        return job

    @contextmanager
    def _changing(self, caller: Caller, id: str) -> Iterator[Job]:
        with self.writing() as session:
            yield found(session, Job, caller.project, id, lock=True)

    @contextmanager
    def _deciding(self, caller: Caller, id: str, reason: str) -> Iterator[Job]:
        if caller.role != "operator":
            raise Refused("Only an operator decides on jobs: make a key with gradshield keys create --role operator.")
        if not reason.strip():
            raise Refused("A decision needs a reason, which the audit log keeps.")
        with self._changing(caller, id) as job:
            yield job

    # Jobs, as their processes see them

    def claim(self, id: str, owner: str, seconds: float) -> Job | None:
        """The job, if it is to be run and no process has it: from now on ``owner`` has it for ``seconds``."""
        with self.writing() as session:
            job = session.scalar(select(Job).where(Job.id == id, *_free(time.time())).with_for_update())
            if job is not None:
                job.owner, job.lease_until, job.attempt = owner, time.time() + seconds, job.attempt + 1
        return job

    def beat(self, id: str, owner: str, seconds: float) -> None:
        """Extend the lease. Raises Lost if the job is not this owner's any more."""
        self.note(id, owner, lease_until=time.time() + seconds)

    def give_up(self, id: str, owner: str, seconds: float = 0.0) -> bool:
        """End the lease of a process that has stopped; whether it had one. Another may go on after ``seconds``."""
        try:
            self.note(id, owner, owner=None, lease_until=time.time() + seconds if seconds else None)
        except Lost:
            return False
        return True

    def note(self, id: str, by: str, **fields: Any) -> None:
        """Keep fields of a job that its process found out. Raises Lost."""
        with self._owned(id, by, fields):
            pass

    def say(self, id: str, owner: str, message: str, level: str = "info", data: Found = None, **fields: Any) -> None:
        """Add an event, and keep fields such as a new status. Raises Lost."""
        with self._owned(id, owner, fields) as job:
            _say(job, message, level, data)

    def step(self, id: str, owner: str, done: int, total: int) -> None:
        """Add an event of the training's progress. Raises Lost."""
        with self._owned(id, owner) as job:
            _say(job, f"Step {done}/{total}", data={"step": done, "total_steps": total}, type="metrics")

    def add_checkpoint(self, id: str, owner: str, step: int, metrics: Mapping[str, Any]) -> None:
        """List a checkpoint, once for each step. Raises Lost."""
        with self._owned(id, owner) as job, self.reading() as session:
            if not session.scalar(select(Checkpoint.n).where(Checkpoint.job_id == id, Checkpoint.step == step)):
                add(job, Checkpoint(project_id=job.project_id, job_id=id, step=step, metrics=dict(metrics)))

    def hold(self, id: str, owner: str, why: Mapping[str, Any], message: str) -> None:
        """Let the job wait for an operator. Raises Lost."""
        with self._owned(id, owner) as job:
            job.status, job.hold, job.owner, job.lease_until = "paused", dict(why), None, None
            _say(job, message, "warn", why)

    def finish(self, id: str, owner: str, model: str, **fields: Any) -> None:
        """End the job well and list its model. Raises Lost, so that no job is finished twice."""
        with self._owned(id, owner, fields) as job:
            self._end(job, "succeeded", "The job has successfully completed", model)

    def fail(self, id: str, owner: str, code: str, message: str, param: str | None = None, **fields: Any) -> None:
        """End the job with an error. Raises Lost."""
        with self._owned(id, owner, fields) as job:
            job.error = {"code": code, "message": message, "param": param}
            self._end(job, "failed", message)

    def waiting(self) -> list[str]:
        """Jobs to be run that no process has."""
        with self.reading() as session:
            return list(session.scalars(select(Job.id).where(*_free(time.time())).order_by(Job.n)))

    def working(self) -> tuple[int, int | None]:
        """How many jobs a process has, and when the oldest was made that waits for one; of all projects."""
        time_now = time.time()
        with self.reading() as session:
            leased = session.scalar(select(func.count()).where(Job.status.in_(ACTIVE), Job.lease_until >= time_now))
            return int(leased or 0), session.scalar(select(func.min(Job.created_at)).where(*_free(time_now)))

    def counts(self) -> dict[str, int]:
        """Jobs by status, of all projects."""
        with self.reading() as session:
            counted = session.execute(select(Job.status, func.count()).group_by(Job.status))
            return {str(status): int(count) for status, count in counted}

    @contextmanager
    def _owned(self, id: str, owner: str, fields: Mapping[str, Any] | None = None) -> Iterator[Job]:
        """A job of this owner, with new values of some fields. Raises Lost."""
        with self.writing() as session:
            wanted = select(Job).where(Job.id == id, Job.owner == owner, Job.status.in_(ACTIVE))
            if (job := session.scalar(wanted.with_for_update())) is None:
                raise Lost(id)
            for name, value in (fields or {}).items():
                setattr(job, name, value)
            yield job

    def _end(self, job: Job, status: str, message: str, model: str | None = None) -> None:
        """A job's last state, its event and its webhook calls."""
        job.status, job.finished_at, job.owner, job.lease_until = status, now(), None, None
        job.fine_tuned_model = model
        if model is not None:
            add(job, Model(id=model, project_id=job.project_id, job_id=job.id, base=job.model))
        _say(job, message, "error" if status == "failed" else "info", job.error)
        for url in self.webhooks:
            body = {"id": identity("evt"), "object": "event", "created_at": now(), "type": f"fine_tuning.job.{status}"}
            text = json.dumps({**body, "data": {"id": job.id}})
            add(job, Delivery(project_id=job.project_id, url=url, body=text, due_at=time.time()))


def name_of(job: Job) -> str:
    """The name that a job's model is served under."""
    return f"ft:{job.model}:{job.project_id[5:13]}:{job.suffix or ''}:{job.id[-12:]}"


def _waited(job: Job) -> dict[str, Any]:
    """Why a job was held, which it is no longer. Raises Refused if it was not."""
    if job.status != "paused" or job.hold is None:
        raise Refused("The job does not wait for a review.")
    why, job.hold = job.hold, None
    return why


def _free(now: float) -> tuple[Any, Any]:
    """Of the jobs: to be run, and no process has it."""
    return Job.status.in_(ACTIVE), or_(Job.lease_until.is_(None), Job.lease_until < now)


def _say(job: Job, message: str, level: str = "info", data: Found = None, type: str = "message") -> None:
    own = {"project_id": job.project_id, "job_id": job.id}
    add(job, Event(level=level, message=message, type=type, data=dict(data or {}), **own))
