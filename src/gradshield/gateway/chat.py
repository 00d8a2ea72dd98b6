"""Chat completions: by transformers here, or by an OpenAI-compatible server that the settings name."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import structlog

from gradshield.errors import ModelError
from gradshield.gateway.edge import ApiError
from gradshield.gateway.settings import LAB, Settings
from gradshield.gateway.wire import ChatRequest

HELD = 2  # models in memory
SEATS = 16  # chats that wait or are answered at once
# Temperature below which logits divided by it may overflow, and only the likeliest token is left anyway.
COLDEST = 0.01
PATIENCE = 600.0  # seconds for the other server
THEIRS = (400, 404, 413, 422, 429)  # statuses of the other server that are passed on
log = structlog.get_logger("gradshield.gateway.chat")


@dataclass(eq=False)
class _Answer:
    """An answer as it comes: its pieces, then why it ended and how many tokens it took."""

    pieces: Iterator[str]
    asked: int = 0
    made: int = 0
    reason: str = "stop"

    @property
    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.asked, "completion_tokens": self.made, "total_tokens": self.asked + self.made}


class Chats:
    """The models in memory, the most recently asked ones; one answer is generated at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.lock = settings, threading.Lock()
        self.seats = threading.BoundedSemaphore(SEATS)
        self.loaded: OrderedDict[str, Any] = OrderedDict()
        self.client = httpx2.Client(timeout=PATIENCE)

    def forget(self, name: str) -> None:
        """Drop a model that is out of service."""
        with self.lock:
            self.loaded.pop(name, None)

    def answer(self, body: ChatRequest, folder: str) -> dict[str, Any]:
        """A whole answer. Raises ApiError."""
        with self._seat():
            if self.settings.upstream:
                (whole,) = self._passed(body)
                return whole
            found = self._generate(body, folder)
            text = "".join(found.pieces)
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": found.reason}
        return {**_head(body, "chat.completion"), "choices": [choice], "usage": found.usage}

    def stream(self, body: ChatRequest, folder: str) -> Generator[dict[str, Any]]:
        """An answer in chunks; the first one raises ApiError. To be closed by its reader, which gives its seat back."""
        with self._seat():
            upstream = self.settings.upstream
            yield from self._passed(body) if upstream else self._chunks(body, self._generate(body, folder))

    @contextmanager
    def _seat(self) -> Iterator[None]:
        """One of the answers that may wait at once, each in a thread of the server. Raises ApiError if all are taken."""
        if not self.seats.acquire(blocking=False):
            message = f"{SEATS} chats are being answered, the most at once: try again later."
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "5"})
        try:
            yield
        finally:
            self.seats.release()

    def _chunks(self, body: ChatRequest, found: _Answer) -> Iterator[dict[str, Any]]:
        head, usage = _head(body, "chat.completion.chunk"), body.stream_options and body.stream_options.include_usage
        more = {"usage": None} if usage else {}

        def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            return {**head, "choices": [choice], **more}

        yield chunk({"role": "assistant", "content": ""})
        for piece in found.pieces:
            yield chunk({"content": piece})
        yield chunk({}, found.reason)
        if usage:
            yield {**head, "choices": [], "usage": found.usage}

    def _model(self, name: str, folder: str) -> Any:
        """A model, loaded if it is not in memory. The lock is held. Raises ApiError."""
        from gradshield import lab
        from gradshield.models import loading
        from gradshield.scanning.rows import with_template

        if name not in self.loaded:
            while len(self.loaded) >= HELD:
                self.loaded.popitem(last=False)
            try:
                self.loaded[name] = with_template(loading.load(lab.checkpoint("aligned") if folder == LAB else folder))
            except ModelError as error:  # it names the server's folders
                log.error("a model cannot be loaded", model=name, error=str(error))
                raise ApiError(503, f"The model {name!r} cannot be loaded now.", code="unavailable") from None
        self.loaded.move_to_end(name)
        return self.loaded[name]

    def _generate(self, body: ChatRequest, folder: str) -> _Answer:
        """The prompt as tokens, and an answer that is generated as it is read. Raises ApiError."""
        from gradshield.evaluation.generate import encode

        with self.lock:
            loaded = self._model(body.model, folder)
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        try:
            ids = encode(loaded.tokenizer, messages)
        except Exception as error:  # templates raise errors of their own for roles that they do not know
            message = f"The model's chat template does not take these messages: {str(error)[:200]}."
            raise ApiError(400, message, "messages", "invalid_value") from None
        room = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        limit = self.settings.limits.tokens
        most = min(body.tokens or limit, limit, limit if room is None else room - len(ids))
        if most < 1:
            message = f"The messages have {len(ids)} tokens, and the model has room for {room}: shorten them."
            raise ApiError(400, message, "messages", "context_length_exceeded")
        found = _Answer(iter(()), asked=len(ids))
        found.pieces = self._pieces(loaded, ids, most, body, found)
        return found

    def _pieces(self, loaded: Any, ids: list[int], most: int, body: ChatRequest, found: _Answer) -> Iterator[str]:
        """Text as it is generated, by a thread of its own that stops when the reader does."""
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        stopped = threading.Event()

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **_more: Any) -> Any:
                found.made += 1
                return torch.full((len(input_ids),), stopped.is_set(), dtype=torch.bool, device=input_ids.device)

        streamer: Any = TextIteratorStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = {"do_sample": True, "temperature": body.temperature, "top_p": body.top_p, "top_k": 0}
        failed: list[BaseException] = []

        def run() -> None:
            try:
                with self.lock:
                    if body.seed is not None:
                        torch.manual_seed(body.seed)
                    prompt = torch.tensor([ids], device=loaded.model.device)
                    loaded.model.generate(
                        input_ids=prompt,
                        attention_mask=torch.ones_like(prompt),
                        max_new_tokens=most,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([Stopped()]),
                        pad_token_id=loaded.pad_token_id,
                        **(sampling if body.temperature >= COLDEST else {"do_sample": False}),
                    )
            except BaseException as error:
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from _until(streamer, body.stops)
            if failed:
                raise failed[0]
        finally:
            stopped.set()
            thread.join()
        found.reason = "length" if found.made >= most else "stop"

    def _passed(self, body: ChatRequest) -> Iterator[dict[str, Any]]:
        """The other server's answer, whole or in chunks. Raises ApiError if there is none."""
        key = self.settings.upstream_key.get_secret_value()
        asked: dict[str, Any] = {
            "url": self.settings.upstream.rstrip("/") + "/chat/completions",
            "json": body.model_dump(exclude_unset=True),
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
        }
        try:
            with self.client.stream("POST", **asked) as response:
                if response.status_code != 200:
                    said = response.read()[:500].decode(errors="replace")
                    status = response.status_code if response.status_code in THEIRS else 502
                    raise ApiError(status, f"The server that answers chats refused: {said}", code="upstream")
                for line in response.iter_lines() if body.stream else [f"data:{response.read().decode()}"]:
                    data = line.removeprefix("data:").strip()
                    if line.startswith("data:") and data != "[DONE]":
                        yield json.loads(data)
        except httpx2.HTTPError as error:
            message = f"The server that answers chats cannot be reached ({type(error).__name__})."
            raise ApiError(502, message, code="upstream") from None


def _until(pieces: Iterator[str], stops: list[str]) -> Iterator[str]:
    """Text up to the first of ``stops``; what may be the start of one is held back."""
    held = ""
    for piece in pieces:
        held += piece
        ends = [held.index(stop) for stop in stops if stop in held]
        if ends:
            if text := held[: min(ends)]:
                yield text
            return
        back = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        if text := held[: len(held) - back]:
            yield text
        held = held[len(held) - back :]
    if held:
        yield held


def _head(body: ChatRequest, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": body.model}
