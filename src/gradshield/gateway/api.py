"""The routes under ``/v1``, as the OpenAI API publishes them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable, Generator
from contextlib import suppress
from itertools import chain
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.types import Receive, Scope, Send

from gradshield.gateway import results, wire
from gradshield.gateway.content import BLOCK
from gradshield.gateway.database import AWAY, Caller, Missing, Page, T
from gradshield.gateway.edge import ApiError
from gradshield.gateway.shared import Gateway
from gradshield.gateway.tables import Checkpoint, Event, File, Job, Model, identity

LONGEST_NAME = 512
FIELDS = {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": ["fine-tune"]}}
SCHEMA = {"type": "object", "required": list(FIELDS), "properties": FIELDS, "additionalProperties": False}
UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": SCHEMA}}}}


class Answer(JSONResponse):
    """A JSON object, as it is: FastAPI would validate what a route returns, in a thread of its own."""

    def render(self, content: Any) -> bytes:
        return to_json(content)


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Problems(BaseModel):
    """The published error body."""

    error: Problem


async def _here(request: Request) -> Gateway:  # async, as all that needs no thread: each hop costs as much as a look-up
    found: Gateway = request.app.state.gateway
    return found


async def _caller(request: Request) -> Caller:
    found: Caller = request.state.caller
    return found


def _known(*names: str) -> Callable[[Request], Awaitable[None]]:
    """A dependency that refuses any other query parameter, but for filters ``metadata[KEY]`` where there is ``metadata``."""

    async def check(request: Request) -> None:
        for name in request.query_params:
            if name not in names and not ("metadata" in names and name.startswith("metadata[")):
                raise ApiError(400, f"Unknown parameter: {name!r}.", param=name, code="unknown_parameter")

    return check


router = APIRouter(
    prefix="/v1",
    dependencies=[Depends(HTTPBearer(auto_error=False))],  # for the OpenAPI document: Edge asks for the key
    responses={"4XX": {"model": Problems}, "5XX": {"model": Problems}},
)
Here = Annotated[Gateway, Depends(_here)]
Asker = Annotated[Caller, Depends(_caller)]
Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(max_length=255)]
PAGED = [Depends(_known("after", "limit"))]


def _page(
    here: Gateway, kind: type[T], asker: Caller, page: Page, form: Callable[[T], dict[str, Any]], *where: Any
) -> Any:
    found, more = here.store.page(kind, asker.project, page, *where)
    return Answer(wire.listed([form(one) for one in found], more))


# Files


@router.post("/files", openapi_extra=UPLOAD)
async def create_file(request: Request, here: Here, asker: Asker) -> Any:
    """Upload a file of training rows.

    The body is parsed as it comes, into a temporary file without a name; a file is listed once its content is in place.
    """
    async with request.form(max_files=1, max_fields=8) as form:
        if unknown := sorted(set(form) - set(FIELDS)):
            raise ApiError(400, f"Unknown parameter: {unknown[0]!r}.", param=unknown[0], code="unknown_parameter")
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "Missing required parameter: 'file'.", param="file", code="missing_required_parameter")
        if purpose != "fine-tune":
            raise ApiError(
                400, "Invalid value for 'purpose': it must be 'fine-tune'.", param="purpose", code="invalid_value"
            )
        return await run_in_threadpool(_keep, here, asker, file)


def _keep(here: Gateway, asker: Caller, file: UploadFile) -> Answer:
    limits, size = here.settings.limits, file.size or 0
    if size > limits.upload:
        raise ApiError(413, f"The file is larger than {limits.upload} bytes.", param="file", code="file_too_large")
    if here.store.stored(asker.project) + size > limits.project:
        raise ApiError(
            413, f"The project's files would exceed {limits.project} bytes.", param="file", code="quota_exceeded"
        )
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


@router.get("/files", dependencies=[Depends(_known("after", "limit", "order", "purpose"))])
def list_files(
    here: Here,
    asker: Asker,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> Any:
    where = () if purpose is None else (File.purpose == purpose,)
    return _page(here, File, asker, Page(limit, after, order == "desc"), wire.file_object, *where)


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
    headers = {"Content-Disposition": "attachment", "Content-Length": str(file.bytes)}
    if file.bytes > BLOCK:
        return StreamingResponse(blocks, media_type="application/octet-stream", headers=headers)
    return Response(b"".join(blocks), media_type="application/octet-stream", headers=headers)


# Jobs


@router.post("/fine_tuning/jobs")
def create_job(body: wire.JobRequest, here: Here, asker: Asker) -> Any:
    if body.model not in here.settings.models:
        message = (
            f"The model {body.model!r} cannot be fine-tuned here: choose one of {', '.join(here.settings.models)}."
        )
        raise ApiError(400, message, "model", "model_not_available")
    for name in ("training_file", "validation_file"):
        id = getattr(body, name)
        with suppress(Missing):
            if id is None or here.store.get(File, asker.project, id).purpose == "fine-tune":
                continue
        raise ApiError(400, f"There is no file {id!r} with the purpose 'fine-tune'.", name, "invalid_file")
    job = here.store.add_job(
        asker.project,
        here.settings.limits.jobs,
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        method=body.wanted.stored(),
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        suffix=body.suffix or None,
        labels=body.metadata,
    )
    here.send(job.id)
    return Answer(wire.job_object(job))


@router.get("/fine_tuning/jobs", dependencies=[Depends(_known("after", "limit", "metadata"))])
def list_jobs(
    request: Request,
    here: Here,
    asker: Asker,
    after: After = None,
    limit: Limit = 20,
    metadata: Annotated[Literal["null"] | None, Query()] = None,
) -> Any:
    """Jobs, newest first. ``metadata[KEY]=VALUE`` asks for those with that metadata, ``metadata=null`` for those without any."""
    where = [] if metadata is None else [Job.labels.is_(None)]
    for name, value in request.query_params.items():
        if name.startswith("metadata["):
            key = name.removeprefix("metadata[").removesuffix("]")
            if not key or any(mark in key for mark in '"\\\0') or "\0" in value:
                raise ApiError(
                    400, f"Invalid value for {name!r}: no key of metadata.", param="metadata", code="invalid_value"
                )
            where.append(Job.labels[key].as_string() == value)
    return _page(here, Job, asker, Page(limit, after), wire.job_object, *where)


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


@router.get("/fine_tuning/jobs/{id}/events", dependencies=PAGED)
def list_events(id: str, here: Here, asker: Asker, after: After = None, limit: Limit = 20) -> Any:
    job = here.store.get(Job, asker.project, id)
    return _page(here, Event, asker, Page(limit, after), wire.event_object, Event.job_id == job.id)


@router.get("/fine_tuning/jobs/{id}/checkpoints", dependencies=PAGED)
def list_checkpoints(id: str, here: Here, asker: Asker, after: After = None, limit: Limit = 10) -> Any:
    job = here.store.get(Job, asker.project, id)
    return _page(here, Checkpoint, asker, Page(limit, after), wire.checkpoint_object, Checkpoint.job_id == job.id)


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
        raise ApiError(403, f"The model {id!r} belongs to the server.", param="model", code="forbidden")
    here.store.delete_model(asker, id)
    here.chats.forget(id)
    return Answer(wire.deleted(id, "model"))


@router.get("/models/{id}/certificate")
def certificate(id: str, here: Here, asker: Asker) -> Any:
    """What may be claimed of a model's safety, and the hashes of what that rests on."""
    model = here.store.get(Model, asker.project, id)
    if (found := results.certificate(here.settings.job_folder(model.job_id))) is None:
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
            raise ApiError(502, "The server that answers chats sent nothing.", code="upstream", type="server_error")
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
