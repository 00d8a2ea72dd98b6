"""What the gateway keeps: projects and their keys, files, models and webhook calls; jobs are in `jobs`."""

from __future__ import annotations

import hashlib
import secrets
import time

from sqlalchemy import Select, bindparam, func, or_, select, update

from gradshield.errors import UsageError
from gradshield.gateway.database import Caller, Missing, Page, Refused, audited, found
from gradshield.gateway.jobs import ENDED, Jobs
from gradshield.gateway.settings import Policy
from gradshield.gateway.tables import Audit, Delivery, File, Job, Key, Model, Project, now

BY_HAND = "gradshield keys"  # the actor of what is typed on the server


def hashed(secret: str) -> str:
    """What is stored of a key. A key has 256 random bits, so that a plain hash cannot be searched."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Store(Jobs):
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
        data = policy.model_dump()
        with self.writing() as session:
            session.execute(update(Project).where(Project.id == project).values(policy=data))
            line = {"actor": BY_HAND, "action": "policy", "target": project, "reason": reason, "data": data}
            session.add(Audit(project_id=project, **line))

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


_KEY = select(Key.project_id, Key.id, Key.role).where(Key.revoked_at.is_(None))
_HASH, _ID = (_KEY.where(column == bindparam("value")) for column in (Key.hash, Key.id))
