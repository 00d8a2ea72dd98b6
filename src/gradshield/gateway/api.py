"""The routes under ``/v1``, as the OpenAI API publishes them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CollectorRegistry
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.types import Receive, Scope, Send

from gradshield.gateway import content as contents
from gradshield.gateway import wire
from gradshield.gateway.chat import Chats
from gradshield.gateway.content import BLOCK, Content
from gradshield.gateway.database import AWAY, Caller, Missing, Page, T
from gradshield.gateway.edge import ApiError
from gradshield.gateway.settings import Settings
from gradshield.gateway.store import Store
from gradshield.gateway.tables import Checkpoint, Event, File, Job, Model, identity

LONGEST_NAME = 512
FIELDS = {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": ["fine-tune"]}}
SCHEMA = {"type": "object", "required": list(FIELDS), "properties": FIELDS, "additionalProperties": False}
UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": SCHEMA}}}}


@dataclass(eq=False)
class Gateway:
    """One server's parts, which these routes and the pages share. ``send`` puts a job into the queue."""

    settings: Settings
    store: Store
    content: Content
    send: Callable[[str], None]
    chats: Chats
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)


class Answer(JSONResponse):
    """A JSON object, as it is: FastAPI would validate what a route returns, in a thread of its own."""

    def render(self, content: Any) -> bytes:
        return to_json(content)


async def gateway_of(request: Request) -> Gateway:  # async: a thread's turn costs as much as a look-up
    found: Gateway = request.app.state.gateway
    return found


async def _caller(request: Request) -> Caller:
    found: Caller = request.state.caller
    return found


router = APIRouter(
    prefix="/v1",
    dependencies=[Depends(HTTPBearer(auto_error=False))],  # for the OpenAPI document: Edge asks for the key
    responses={"4XX": {"model": wire.Problems}, "5XX": {"model": wire.Problems}},
)
Here = Annotated[Gateway, Depends(gateway_of)]
Asker = Annotated[Caller, Depends(_caller)]


def _page(
    here: Gateway, asker: Caller, kind: type[T], form: Callable[[T], dict[str, Any]], page: Page, *where: Any
) -> Answer:
    found, more = here.store.page(kind, asker.project, page, *where)
    return Answer(wire.listed([form(one) for one in found], more))


def _unknown(name: str) -> ApiError:
    return ApiError(400, f"Unknown parameter: {name!r}.", name, "unknown_parameter")


# Files


@router.post("/files", openapi_extra=UPLOAD)
async def create_file(request: Request, here: Here, asker: Asker) -> Any:
    """Upload a file of training rows.

    The body is parsed as it comes, into a temporary file without a name; a file is listed once its content is in place.
    """
    async with request.form(max_files=1, max_fields=8) as form:
        if unknown := sorted(set(form) - set(FIELDS)):
            raise _unknown(unknown[0])
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "Missing required parameter: 'file'.", "file", "missing_required_parameter")
        if purpose != "fine-tune":
            raise ApiError(400, "Invalid value for 'purpose': it must be 'fine-tune'.", "purpose", "invalid_value")
        return await run_in_threadpool(_keep, here, asker, file)


def _keep(here: Gateway, asker: Caller, file: UploadFile) -> Answer:
    limits, size = here.settings.limits, file.size or 0
    if size > limits.upload:
        raise ApiError(413, f"The file is larger than {limits.upload} bytes.", "file", "file_too_large")
    if here.store.stored(asker.project) + size > limits.project:
        raise ApiError(413, f"The project's files would exceed {limits.project} bytes.", "file", "quota_exceeded")
    id = identity("file")
    size, sha256 = here.content.keep(id, file.file)
    try:
        name = (file.filename or "file")[:LONGEST_NAME].replace("\0", "")
        return Answer(wire.file_object(here.store.add_file(asker.project, id, name, "fine-tune", size, sha256)))
    except AWAY:
        raise  # it may have been listed all the same, and then needs its content
    except BaseException:
        here.content.delete(id)
        raise


@router.get("/files")
def list_files(here: Here, asker: Asker, asked: Annotated[wire.Files, Query()]) -> Any:
    where = () if asked.purpose is None else (File.purpose == asked.purpose,)
    return _page(here, asker, File, wire.file_object, Page(asked.limit, asked.after, asked.order == "desc"), *where)


@router.get("/files/{id}")
def get_file(id: str, here: Here, asker: Asker) -> Any:
    return Answer(wire.file_object(here.store.get(File, asker.project, id)))


@router.delete("/files/{id}")
def delete_file(id: str, here: Here, asker: Asker) -> Any:
    here.store.delete_file(asker, id)
    here.content.delete(id)
    return Answer(wire.deleted(id, "file"))


@router.get("/files/{id}/content", response_class=Response)
def file_content(id: str, here: Here, asker: Asker) -> Response:
    """The bytes of a file. A browser saves them, whatever they are."""
    file = here.store.get(File, asker.project, id)
    try:
        blocks = here.content.read(file.id)
    except FileNotFoundError:
        raise Missing("file", id) from None
    headers, kind = {"Content-Disposition": "attachment", "Content-Length": str(file.bytes)}, "application/octet-stream"
    if file.bytes > BLOCK:
        return StreamingResponse(blocks, media_type=kind, headers=headers)
    return Response(b"".join(blocks), media_type=kind, headers=headers)


# Jobs


@router.post("/fine_tuning/jobs")
def create_job(body: wire.JobRequest, here: Here, asker: Asker) -> Any:
    if body.model not in here.settings.models:
        known = ", ".join(here.settings.models)
        message = f"The model {body.model!r} cannot be fine-tuned here: choose one of {known}."
        raise ApiError(400, message, "model", "model_not_available")
    for name in ("training_file", "validation_file"):
        id = getattr(body, name)
        with suppress(Missing):
            if id is None or here.store.get(File, asker.project, id).purpose == "fine-tune":
                continue
        raise ApiError(400, f"There is no file {id!r} with the purpose 'fine-tune'.", name, "invalid_file")
    asked = body.model_dump(exclude={"hyperparameters"})
    asked["method"] = {name: value for name, value in asked["method"].items() if value is not None}
    asked |= {"labels": asked.pop("metadata"), "suffix": body.suffix or None}
    asked["seed"] = secrets.randbelow(2**31) if body.seed is None else body.seed
    job = here.store.add_job(asker.project, here.settings.limits.jobs, **asked)
    here.send(job.id)
    return Answer(wire.job_object(job))


@router.get("/fine_tuning/jobs")
def list_jobs(request: Request, here: Here, asker: Asker, asked: Annotated[wire.Jobs, Query()]) -> Any:
    """Jobs, newest first. ``metadata[KEY]=VALUE`` asks for those with that metadata, ``metadata=null`` for those without any."""
    where = [] if asked.metadata is None else [Job.labels.is_(None)]
    for name in asked.model_extra or ():
        key, value = name.removeprefix("metadata[").removesuffix("]"), request.query_params[name]
        if not name.startswith("metadata["):
            raise _unknown(name)
        if not key or any(mark in key for mark in '"\\\0') or "\0" in value:
            raise ApiError(400, f"Invalid value for {name!r}: no key of metadata.", "metadata", "invalid_value")
        where.append(Job.labels[key].as_string() == value)
    return _page(here, asker, Job, wire.job_object, Page(asked.limit, asked.after), *where)


@router.get("/fine_tuning/jobs/{id}")
def get_job(id: str, here: Here, asker: Asker) -> Any:
    return Answer(wire.job_object(here.store.get(Job, asker.project, id)))


@router.post("/fine_tuning/jobs/{id}/cancel")
def cancel_job(id: str, here: Here, asker: Asker) -> Any:
    return Answer(wire.job_object(here.store.cancel(asker, id)))


@router.post("/fine_tuning/jobs/{id}/pause")
def pause_job(id: str, here: Here, asker: Asker) -> Any:
    return Answer(wire.job_object(here.store.pause(asker, id)))


@router.post("/fine_tuning/jobs/{id}/resume")
def resume_job(id: str, here: Here, asker: Asker) -> Any:
    job = here.store.resume(asker, id)
    here.send(job.id)
    return Answer(wire.job_object(job))


@router.get("/fine_tuning/jobs/{id}/events")
def list_events(id: str, here: Here, asker: Asker, asked: Annotated[wire.Listing, Query()]) -> Any:
    job = here.store.get(Job, asker.project, id)
    return _page(here, asker, Event, wire.event_object, Page(asked.limit, asked.after), Event.job_id == job.id)


@router.get("/fine_tuning/jobs/{id}/checkpoints")
def list_checkpoints(id: str, here: Here, asker: Asker, asked: Annotated[wire.Checkpoints, Query()]) -> Any:
    job = here.store.get(Job, asker.project, id)
    page = Page(asked.limit, asked.after)
    return _page(here, asker, Checkpoint, wire.checkpoint_object, page, Checkpoint.job_id == job.id)


# Models


@router.get("/models")
def list_models(here: Here, asker: Asker) -> Any:
    """The models that can be fine-tuned, and the project's own."""
    own, _ = here.store.page(Model, asker.project, Page(10_000))
    base = [wire.model_object(name) for name in here.settings.models]
    return Answer({"object": "list", "data": base + [wire.tuned_object(model) for model in own]})


@router.get("/models/{id}")
def get_model(id: str, here: Here, asker: Asker) -> Any:
    if id in here.settings.models:
        return Answer(wire.model_object(id))
    return Answer(wire.tuned_object(here.store.get(Model, asker.project, id)))


@router.delete("/models/{id}")
def delete_model(id: str, here: Here, asker: Asker) -> Any:
    """Take a model out of service. Its job keeps its files and its certificate."""
    if id in here.settings.models:
        raise ApiError(403, f"The model {id!r} belongs to the server.", "model", "forbidden")
    here.store.delete_model(asker, id)
    here.chats.forget(id)
    return Answer(wire.deleted(id, "model"))


@router.get("/models/{id}/certificate")
def certificate(id: str, here: Here, asker: Asker) -> Any:
    """What may be claimed of a model's safety, and the hashes of what that rests on."""
    model = here.store.get(Model, asker.project, id)
    if (found := contents.certificate(here.settings.job_folder(model.job_id))) is None:
        raise Missing("certificate", id)
    return Answer(found)


@router.post("/chat/completions")
def chat(body: wire.ChatRequest, here: Here, asker: Asker) -> Any:
    """Ask a model, one of the project's or one that can be fine-tuned."""
    if body.model in here.settings.models:
        folder = here.settings.models[body.model]
    else:
        folder = str(here.settings.job_folder(here.store.get(Model, asker.project, body.model).job_id))
    if body.stream:
        chunks = here.chats.stream(body, folder)
        first = next(chunks, None)  # an error is an answer of its own, not a broken stream
        if first is None:
            raise ApiError(502, "The server that answers chats sent nothing.", code="upstream")
        return _Stream(first, chunks)
    return JSONResponse(here.chats.answer(body, folder))


class _Stream(StreamingResponse):
    """Chunks as server-sent events. However the reader ends, the chunks are closed."""

    def __init__(self, first: dict[str, Any], chunks: Generator[dict[str, Any]]) -> None:
        super().__init__(map(_event, chain((first,), chunks, (None,))), media_type="text/event-stream")
        self.chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await run_in_threadpool(self.chunks.close)


def _event(chunk: dict[str, Any] | None) -> str:
    return f"data: {'[DONE]' if chunk is None else json.dumps(chunk)}\n\n"
