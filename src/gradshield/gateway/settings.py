"""Everything an operator chooses, as one model. ``serve`` writes it to the folder, where the workers and jobs read it."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, Field, PlainSerializer, SecretStr, ValidationError, ValidationInfo

from gradshield.errors import UsageError
from gradshield.options import Spec

M = TypeVar("M", bound=BaseModel)
NAME = "gateway.json"
DATABASE = "gateway.db"
DEFENCE = "screen"
LAB = "lab"  # the bundled model, with the requests and the recipe of its world


def _defence(value: str) -> str:
    if value == DEFENCE:  # known without the methods, which take seconds to import
        return value
    from gradshield.training.defences import parse

    wanted = parse(value)
    if wanted.needs_base or wanted.oracle:
        needs = f"the defence {value!r} needs labels or the model before its alignment"
        raise UsageError(f"{needs}, which a job has not: choose another")
    return value


class Policy(BaseModel, frozen=True, extra="forbid"):
    """What a project's jobs go through.

    ``rows`` says what happens to rows that the scan finds: ``remove`` trains on the rest, ``reject`` fails the job, ``review``
    waits for an operator. ``defence`` is as typed after ``gradshield train --defence``; ``none`` turns screening off. A trained
    model is served if no judge's upper bound of its attack success rate is over ``limit``.
    """

    rows: Literal["remove", "reject", "review"] = "remove"
    defence: Annotated[str, AfterValidator(_defence)] = DEFENCE
    limit: float = Field(default=0.06, gt=0, lt=1)


class Limits(BaseModel, frozen=True, extra="forbid"):
    """Bounds of what one caller may use. Sizes are in bytes, rates in requests per minute and key."""

    upload: int = Field(default=512 * 2**20, gt=0)
    body: int = Field(default=2**20, gt=0)
    project: int = Field(default=100 * 2**30, gt=0)
    requests: int = Field(default=6000, gt=0)
    jobs: int = Field(default=100, gt=0)  # of a project that have not ended
    idle: float = Field(default=60.0, gt=0)  # seconds without a byte of a request's body
    tokens: int = Field(default=1024, gt=0)  # longest answer of a chat


def _absolute(path: str | Path) -> Path:
    return Path(os.path.expanduser(path)).absolute()  # which leaves the home of nobody as it is


def _typed(value: str, info: ValidationInfo) -> str:
    """The whole path of a folder that is here; a name of the hub stays as it was saved."""
    local = info.mode != "json" and value != LAB and _absolute(value).is_dir()
    return str(_absolute(value)) if local else value


def _judge(value: str, info: ValidationInfo) -> str:
    target = Spec.split(value).target
    if info.mode == "json" or not target or not _absolute(target).exists():
        return value
    kind, _, rest = value.partition(":")  # which may have the name of its folder
    return f"{kind}:{rest.replace(target, str(_absolute(target)), 1)}"


def _safety(value: str) -> str:
    return value if value in ("", "builtin", "none") else str(_absolute(value))


def _database(value: str) -> str:
    file = re.fullmatch(r"(sqlite(?:\+\w+)?:///)(?!file:|:memory:)(.+)", value)
    return f"{file[1]}{_absolute(file[2])}" if file else value


def _files(value: str) -> str:
    return str(_absolute(value)) if value and "://" not in value and "::" not in value else value


# Paths are made absolute where settings are made, since workers and jobs have working folders of their own. What may be a name of
# the hub as well as a path stays as it was saved when it is read from the file.
Place = Annotated[Path, AfterValidator(_absolute)]
Secret = Annotated[SecretStr, PlainSerializer(SecretStr.get_secret_value, when_used="json")]


class Settings(BaseModel, frozen=True, extra="forbid"):
    """The gateway's settings. An empty URL is the default inside ``folder``."""

    models: dict[str, Annotated[str, AfterValidator(_typed)]]  # name on the wire to folder or hub name
    folder: Place
    database: Annotated[str, AfterValidator(_database)] = ""
    files: Annotated[str, AfterValidator(_files)] = ""  # any fsspec URL
    queue: str = ""  # redis://...; by default in the database's kind
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, lt=65536)
    workers: int = Field(default=1, ge=0)
    ray: str = ""  # address of the cluster that runs the jobs; by default the worker's own machine
    policy: Policy = Policy()  # of new projects
    limits: Limits = Limits()
    upstream: str = ""  # an OpenAI-compatible server that answers chats
    upstream_key: Secret = SecretStr("")
    webhooks: tuple[str, ...] = ()
    webhook_secret: Secret = SecretStr("")
    lease: float = Field(default=60.0, gt=0)  # seconds after which a silent job may be claimed again
    attempts: int = Field(default=10, gt=0)
    probes: Place | None = None
    lookalikes: Place | None = None
    safety: Annotated[str, AfterValidator(_safety)] = "builtin"
    judges: tuple[Annotated[str, AfterValidator(_judge)], ...] = ("refusal-phrases",)
    max_new_tokens: int = Field(default=64, gt=0)
    training: dict[str, Any] = Field(default_factory=dict)
    lora: dict[str, Any] = Field(default_factory=dict)

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.folder / DATABASE}"

    @property
    def files_url(self) -> str:
        return self.files or str(self.folder / "files")

    def job_folder(self, job: str) -> Path:
        """Where a job trains and leaves its model; ``job`` is an id that the store made."""
        return self.folder / "jobs" / job

    def save(self) -> None:
        """Write the settings, with their secrets, to a file that only the owner can read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        os.replace(private(self.folder / NAME, self.model_dump_json(indent=1)), self.folder / NAME)

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """The settings in a folder. Raises UsageError if it has none."""
        try:
            return cls.model_validate_json((folder / NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is not as serve wrote it"
            what = f"{str(folder)!r} is not the folder of a gateway ({NAME}: {why})"
            raise UsageError(f"{what}: start one there with `gradshield serve`") from None


def private(path: Path, text: str) -> Path:
    """A new file next to ``path`` that only the owner can read, at any moment."""
    handle, part = tempfile.mkstemp(".part", f"{path.name}.", path.parent)
    with os.fdopen(handle, "w") as out:
        out.write(text)
    return Path(part)


def made(kind: type[M], **given: Any) -> M:
    """Settings, or a policy, from options. Raises UsageError for the first that is not allowed."""
    try:
        return kind(**given)
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"]))
        raise UsageError(f"{where} of the {kind.__name__.lower()} is not allowed: {wrong['msg']}") from None
