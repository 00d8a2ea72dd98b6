"""The OpenAI objects: what requests may hold, and how rows of the store look on the wire.

Source: the published API reference, as typed in the package ``openai`` (``types.fine_tuning``, ``types.file_object``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints, model_validator

from gradshield.gateway.tables import Checkpoint, Event, File, Job, Model

Auto = Literal["auto"]
STORABLE = r"^[^\x00]*$"  # no database holds a zero byte; halves of surrogate pairs are no text for pydantic
Word = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=STORABLE)]
Key = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=STORABLE)]
Value = Annotated[str, StringConstraints(max_length=512, pattern=STORABLE)]
LEAST_ROWS = 10
# Columns of a job that its object has, and those that are under ``gradshield`` in it.
PUBLISHED = (
    *("model", "status", "fine_tuned_model", "training_file", "validation_file", "result_files"),
    *("method", "seed", "trained_tokens", "error", "finished_at"),
)
OWN = ("stage", "done", "total", "policy", "hold", "result")


class Request(BaseModel, extra="forbid"):
    """The body of a request, or its query. An unknown parameter is refused with its name."""


class Listing(Request):
    """What a list is asked with: a page of ``limit`` objects after the one with the id ``after``."""

    after: Annotated[str | None, Field(max_length=255)] = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20


class Files(Listing):
    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    purpose: Annotated[str | None, Field(max_length=64)] = None


class Jobs(Listing, extra="allow"):
    """The route reads the other parameters, ``metadata[KEY]``."""

    metadata: Literal["null"] | None = None


class Checkpoints(Listing):
    limit: Annotated[int, Field(ge=1, le=100)] = 10


class Hyperparameters(Request):
    """``auto`` is the server's own choice; a learning rate is a multiple of the server's."""

    batch_size: Auto | Annotated[int, Field(ge=1, le=1024)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=100)] = "auto"
    n_epochs: Auto | Annotated[int, Field(ge=1, le=100)] = "auto"


class Preferences(Hyperparameters):
    """Those of DPO. A higher ``beta`` keeps the model nearer to its start."""

    beta: Auto | Annotated[float, Field(gt=0, le=2)] = "auto"


class Supervised(Request):
    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(Request):
    hyperparameters: Preferences = Preferences()


class Method(Request):
    """How a job trains."""

    type: Literal["supervised", "dpo"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None

    @model_validator(mode="after")
    def _one(self) -> Method:
        if (self.supervised if self.type == "dpo" else self.dpo) is not None:
            raise ValueError(f"the type is {self.type}, and hyperparameters of another one are given")
        if self.type == "dpo":
            self.dpo = self.dpo or Dpo()
        else:
            self.supervised = self.supervised or Supervised()
        return self

    @property
    def hyperparameters(self) -> Hyperparameters:
        return (self.dpo or self.supervised or Supervised()).hyperparameters


class JobRequest(Request):
    """``POST /v1/fine_tuning/jobs``."""

    model: Word
    training_file: Word
    validation_file: Word | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    suffix: Annotated[str, StringConstraints(max_length=64, pattern=r"^[A-Za-z0-9._-]*$")] | None = None
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = None

    @model_validator(mode="after")
    def _once(self) -> JobRequest:
        if self.method is None:  # hyperparameters may come in the older place
            own = Supervised(hyperparameters=self.hyperparameters or Hyperparameters())
            self.method = Method(type="supervised", supervised=own)
        elif self.hyperparameters is not None:
            raise ValueError("give hyperparameters inside method, not twice")
        return self


class Message(Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, StringConstraints(max_length=200_000)]
    name: Word | None = None


class StreamOptions(Request):
    include_usage: bool = False


class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    model: Word
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Literal[1] = 1
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop: Annotated[str, StringConstraints(min_length=1)] | Annotated[list[Word], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Value | None = None

    @property
    def tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Problems(BaseModel):
    """The published error body."""

    error: Problem


def _object(kind: str, row: Any, *fields: str, **more: Any) -> dict[str, Any]:
    """A row of the store as published: what all objects have, these fields of it, and what it has not."""
    own = {name: getattr(row, name) for name in fields}
    return {"id": row.id, "object": kind, "created_at": row.created_at, **own, **more}


def file_object(file: File) -> dict[str, Any]:
    more = {"status": "processed", "expires_at": None, "status_details": None}
    return _object("file", file, "bytes", "filename", "purpose", **more)


def job_object(job: Job) -> dict[str, Any]:
    """A job as published, and ``gradshield``: how far it is, why it waits, what the scan and the training found."""
    more = {
        "organization_id": job.project_id,
        "hyperparameters": job.method.get("supervised", {}).get("hyperparameters", {}),  # of supervised jobs only
        "metadata": job.labels,
        "integrations": [],
        "estimated_finish": None,
        "gradshield": {name: getattr(job, name) for name in OWN},
    }
    return _object("fine_tuning.job", job, *PUBLISHED, **more)


def event_object(event: Event) -> dict[str, Any]:
    return _object("fine_tuning.job.event", event, "level", "message", "type", "data")


def checkpoint_object(checkpoint: Checkpoint) -> dict[str, Any]:
    return _object(
        "fine_tuning.job.checkpoint",
        checkpoint,
        "metrics",
        step_number=checkpoint.step,
        fine_tuning_job_id=checkpoint.job_id,
        fine_tuned_model_checkpoint=f"{checkpoint.job_id}:step-{checkpoint.step}",
    )


def model_object(id: str, created: int = 0, owner: str = "gradshield") -> dict[str, Any]:
    """A model, by default one that can be fine-tuned."""
    return {"id": id, "object": "model", "created": created, "owned_by": owner}


def tuned_object(model: Model) -> dict[str, Any]:
    return model_object(model.id, model.created_at, model.project_id)


def listed(objects: Sequence[dict[str, Any]], more: bool = False) -> dict[str, Any]:
    """A page of objects."""
    return {
        "object": "list",
        "data": list(objects),
        "has_more": more,
        "first_id": objects[0]["id"] if objects else None,
        "last_id": objects[-1]["id"] if objects else None,
    }


def deleted(id: str, kind: str) -> dict[str, Any]:
    return {"id": id, "object": kind, "deleted": True}
