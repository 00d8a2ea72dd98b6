"""The API through the unmodified client of OpenAI, on every kind of database."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from openai import OpenAI

from gradshield.gateway.chat import SEATS
from gradshield.gateway.database import Caller
from gradshield.gateway.settings import LAB
from gradshield.gateway.tables import Job
from tests.gateway.running import ROWS, Served, listening, serving

ASKED: list[Any] = [{"role": "user", "content": "Tell me how to bake a cake."}]


def uploaded(client: OpenAI, content: bytes = ROWS, name: str = "data.jsonl") -> str:
    return client.files.create(file=(name, content), purpose="fine-tune").id


def created(client: OpenAI, **more: Any) -> Any:
    return client.fine_tuning.jobs.create(**{"model": LAB, "training_file": uploaded(client), **more})


def finished(served: Served, job: str, model: str = "ft:lab:mine") -> None:
    """Let a job end well, as its process does."""
    assert served.store.claim(job, "me", 60) is not None
    served.store.finish(job, "me", f"{model}:{job}")


def test_a_file_goes_up_is_listed_comes_down_and_goes(served: Served) -> None:
    client = served.client()
    made = client.files.create(file=("data.jsonl", ROWS), purpose="fine-tune")
    assert (made.object, made.bytes, made.filename, made.purpose, made.status) == (
        "file",
        len(ROWS),
        "data.jsonl",
        "fine-tune",
        "processed",
    )
    assert client.files.list().data == [made] == [client.files.retrieve(made.id)]
    assert client.files.content(made.id).read() == ROWS
    gone = client.files.delete(made.id)
    assert (gone.id, gone.deleted) == (made.id, True)
    assert client.files.list().data == []
    with pytest.raises(openai.NotFoundError):
        client.files.content(made.id)


def test_lists_go_on_after_an_id_in_either_order(served: Served) -> None:
    client = served.client()
    ids = [uploaded(client, b"%d" % i) for i in range(5)]
    assert [file.id for file in client.files.list(limit=2)] == ids[::-1]  # the client asks for every page
    assert [file.id for file in client.files.list(limit=3, order="asc")] == ids
    page = client.files.list(limit=2)
    assert (page.has_more, page.data[0].id, page.data[-1].id) == (True, ids[4], ids[3])
    assert client.files.list(purpose="fine-tune-results").data == []
    jobs = [client.fine_tuning.jobs.create(model=LAB, training_file=ids[0]).id for _ in range(5)]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == jobs[::-1]


def test_a_job_has_what_was_asked_and_is_sent_to_the_queue(served: Served) -> None:
    client = served.client()
    job = created(
        client,
        seed=7,
        suffix="mine",
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
    )
    assert (job.object, job.status, job.model, job.seed, job.metadata) == (
        "fine_tuning.job",
        "validating_files",
        LAB,
        7,
        {"team": "a"},
    )
    assert job.hyperparameters.n_epochs == job.method.supervised.hyperparameters.n_epochs == 2
    assert job.hyperparameters.learning_rate_multiplier == "auto"
    assert (job.error, job.fine_tuned_model, job.finished_at, job.result_files) == (None, None, None, [])
    assert served.sent[-1] == job.id
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    (event,) = client.fine_tuning.jobs.list_events(job.id).data
    assert (event.object, event.level, event.type) == ("fine_tuning.job.event", "info", "message")
    assert client.fine_tuning.jobs.checkpoints.list(job.id).data == []
    given = {"beta": 0.2, "n_epochs": "auto", "batch_size": 4, "learning_rate_multiplier": 0.5}
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": given}}
    pairs = created(client, method=method)
    assert pairs.method.to_dict() == method and pairs.hyperparameters.n_epochs is None
    assert created(client, method={"type": "dpo"}).method.dpo.hyperparameters.beta == "auto"
    older = created(client, hyperparameters={"n_epochs": 3})
    assert older.method.supervised.hyperparameters.n_epochs == 3
    assert older.seed != created(client).seed


def test_jobs_are_found_by_metadata(served: Served) -> None:
    client = served.client()
    one, two, none = (created(client, metadata=m).id for m in ({"team": "a"}, {"team": "b", "x": "1"}, None))
    listed = client.fine_tuning.jobs.list
    assert [job.id for job in listed(metadata={"team": "a"})] == [one]
    assert [job.id for job in listed(metadata={"team": "b", "x": "1"})] == [two]
    assert [job.id for job in listed(extra_query={"metadata": "null"})] == [none]
    assert [job.id for job in listed(metadata={"none": "a"})] == []


def test_a_job_is_paused_resumed_and_cancelled(served: Served) -> None:
    client, jobs = served.client(), served.client
    jobs = client.fine_tuning.jobs
    id = created(client).id
    assert jobs.pause(id).status == "paused"
    with pytest.raises(openai.ConflictError, match="can be paused"):
        jobs.pause(id)
    assert served.store.claim(id, "me", 60) is None
    assert jobs.resume(id).status == "queued"
    assert served.sent[-1] == id
    assert jobs.cancel(id).status == "cancelled"
    for refused in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(openai.ConflictError):
            refused(id)
    messages = [event.message for event in jobs.list_events(id)]
    assert messages[0] == "Fine-tuning job cancelled"
    assert len(messages) == 4


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"surprise": 1}, "surprise", "unknown_parameter"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"epochs": 1}}}},
            "epochs",
            "unknown_parameter",
        ),
        ({"integrations": [{"type": "wandb"}]}, "integrations", "unknown_parameter"),
        ({"model": None}, "model", "invalid_value"),
        ({"model": "nobody"}, "model", "model_not_available"),
        ({"training_file": "file-0"}, "training_file", "invalid_file"),
        ({"validation_file": "file-0"}, "validation_file", "invalid_file"),
        ({"method": {"type": "reinforcement"}}, "method.type", "invalid_value"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method", "invalid_value"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, "beta", "invalid_value"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 1}}}},
            "beta",
            "unknown_parameter",
        ),
        ({"hyperparameters": {"n_epochs": 0}}, "n_epochs", "invalid_value"),
        ({"hyperparameters": {"batch_size": "many"}}, "batch_size", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"suffix": "a/../b"}, "suffix", "invalid_value"),
        ({"suffix": "x" * 65}, "suffix", "invalid_value"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "invalid_value"),
        ({"metadata": {"k": 1}}, "metadata.k", "invalid_value"),
        ({"metadata": {"k": "x" * 513}}, "metadata.k", "invalid_value"),
    ],
)
def test_a_job_that_cannot_be_is_refused_with_the_parameter(
    served: Served, body: dict[str, Any], param: str, code: str
) -> None:
    client = served.client()
    with pytest.raises(openai.BadRequestError) as refused:
        created(client, extra_body=body)
    error: Any = refused.value.body
    assert error["code"] == code
    assert error["type"] == "invalid_request_error"
    assert param in (error["param"], str(error["param"]).rpartition(".")[2])
    assert client.fine_tuning.jobs.list().data == []


def test_a_missing_parameter_and_broken_json_are_named(served: Served) -> None:
    with served.raw() as raw:
        found = raw.post("/v1/fine_tuning/jobs", json={"model": LAB})
        assert found.status_code == 400
        assert found.json()["error"]["message"] == "Missing required parameter: 'training_file'."
        found = raw.post("/v1/fine_tuning/jobs", content=b"{", headers={"Content-Type": "application/json"})
        assert (found.status_code, found.json()["error"]["code"]) == (400, "invalid_json")
        assert raw.get("/v1/files?limit=2&colour=red").json()["error"]["param"] == "colour"
        assert raw.get("/v1/nothing").status_code == 404
        assert raw.put("/v1/files").status_code == 405


def test_a_file_in_use_stays(served: Served) -> None:
    client = served.client()
    job = created(client)
    with pytest.raises(openai.ConflictError, match=job.id):
        client.files.delete(job.training_file)
    client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(job.training_file).deleted


def test_a_finished_job_has_a_model_that_can_be_deleted(served: Served) -> None:
    client = served.client()
    job = created(client)
    finished(served, job.id)
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded"
    assert [model.id for model in client.models.list()] == [LAB, job.fine_tuned_model]
    assert client.models.retrieve(job.fine_tuned_model).object == "model"
    assert client.models.delete(job.fine_tuned_model).deleted
    assert [model.id for model in client.models.list()] == [LAB]
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete(LAB)


def test_the_certificate_of_a_model_is_served(served: Served) -> None:
    client = served.client()
    job = created(client)
    finished(served, job.id)
    folder = served.gateway.settings.job_folder(job.id)
    with served.raw(client.api_key) as raw:
        path = f"/v1/models/ft:lab:mine:{job.id}/certificate"
        assert raw.get(path).status_code == 404
        folder.mkdir(parents=True)
        (folder / "certificate.json").write_text("half of one")
        assert raw.get(path).status_code == 404
        (folder / "certificate.json").write_text('{"predicate": {"certified": true, "judges": {}}}')
        assert raw.get(path).json() == {"predicate": {"certified": True, "judges": {}}}
    with served.raw() as other:
        assert other.get(path).status_code == 404


def test_a_stream_says_what_a_whole_answer_says(served: Served) -> None:
    client = served.client()
    ask = client.chat.completions.create
    whole = ask(model=LAB, messages=ASKED, temperature=0)
    text = whole.choices[0].message.content
    assert text
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(ask(model=LAB, messages=ASKED, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == "stop"
    short = ask(model=LAB, messages=ASKED, temperature=0, max_completion_tokens=2)
    assert (short.choices[0].finish_reason, short.usage and short.usage.completion_tokens) == ("length", 2)
    word = text.split()[2]
    stopped = ask(model=LAB, messages=ASKED, temperature=0, stop=word).choices[0].message.content
    assert stopped == text[: text.index(word)]
    drawn = [ask(model=LAB, messages=ASKED, temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1)]
    assert drawn[0] == drawn[1]
    coldest = (
        ask(model=LAB, messages=ASKED, temperature=1e-300).choices[0].message.content
    )  # divided by it, logits overflow
    assert coldest == text


def test_a_chat_that_cannot_be_is_refused(served: Served) -> None:
    ask = served.client().chat.completions.create
    with pytest.raises(openai.NotFoundError):
        ask(model="nobody", messages=ASKED)
    with pytest.raises(openai.BadRequestError, match="'stop': List should have at most 4 items"):
        ask(model=LAB, messages=ASKED, stop=["a"] * 5)
    with pytest.raises(openai.BadRequestError, match="tools"):
        ask(model=LAB, messages=ASKED, tools=[])
    with pytest.raises(openai.BadRequestError, match="has room for"):
        ask(model=LAB, messages=[{"role": "user", "content": "word " * 5000}])
    with pytest.raises(openai.BadRequestError):
        ask(model=LAB, messages=[])


def test_chats_are_passed_on_where_another_server_answers(tmp_path: Any) -> None:
    seen: list[dict[str, Any]] = []
    other = FastAPI()

    @other.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        body = await request.json()
        seen.append({**body, "authorization": request.headers["authorization"]})
        if not body.get("stream"):
            return {"id": "1", "object": "chat.completion", "choices": [{"index": 0, "message": {"content": "hi"}}]}

        def lines() -> Iterator[str]:
            for word in ("h", "i"):
                yield f"data: {json.dumps({'id': '1', 'choices': [{'index': 0, 'delta': {'content': word}}]})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    with listening(other) as url, serving(tmp_path, upstream=f"{url}/v1", upstream_key="sk-x") as served:
        ask = served.client().chat.completions.create
        assert ask(model=LAB, messages=ASKED, temperature=0.5).choices[0].message.content == "hi"
        assert [c.choices[0].delta.content for c in ask(model=LAB, messages=ASKED, stream=True)] == ["h", "i"]
        assert seen[0] == {"model": LAB, "messages": ASKED, "temperature": 0.5, "authorization": "Bearer sk-x"}
        with pytest.raises(openai.NotFoundError):
            ask(model="somebody else's", messages=ASKED)
        assert len(seen) == 2
    with (
        serving(tmp_path, upstream="http://127.0.0.1:9/v1") as served,
        pytest.raises(openai.InternalServerError, match="cannot be reached"),
    ):
        served.client().chat.completions.create(model=LAB, messages=ASKED)


def test_chats_over_the_most_at_once_are_told_to_wait(served: Served) -> None:
    ask, seats = served.client().chat.completions.create, served.gateway.chats.seats
    for _ in range(SEATS):
        assert seats.acquire(blocking=False)
    for more in ({}, {"stream": True}):
        with pytest.raises(openai.RateLimitError, match="at once"):
            ask(model=LAB, messages=ASKED, **more)
    seats.release(SEATS)
    for _ in range(SEATS + 2):  # readers that leave in the middle give their seat back
        with ask(model=LAB, messages=ASKED, stream=True) as stream:
            next(iter(stream))
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and seats._value < SEATS:
        time.sleep(0.05)
    assert seats._value == SEATS


def test_operations_see_health_metrics_and_request_ids(served: Served) -> None:
    created(served.client())
    with httpx2.Client(base_url=served.url) as raw:
        assert raw.get("/healthz").json() == {"status": "ok"}
        assert raw.get("/readyz").json() == {"status": "ready"}
        assert len(raw.get("/healthz").headers["x-request-id"]) == 32
        lines = raw.get("/metrics").text
        assert 'gradshield_jobs{status="validating_files"}' in lines
        assert 'route="/v1/fine_tuning/jobs"' in lines


def test_an_operator_decides_over_a_job_that_waits(served: Served) -> None:
    project = served.project()
    client, operator = served.client(served.key(project)), Caller(project.id, "key-x", "operator")
    job = created(client)
    served.store.claim(job.id, "me", 60)
    served.store.hold(job.id, "me", {"code": "review", "message": "look", "removed": 2}, "look")
    found = client.fine_tuning.jobs.retrieve(job.id)
    assert (found.status, found.model_extra["gradshield"]["hold"]["removed"]) == ("paused", 2)
    with pytest.raises(openai.ConflictError, match="operator"):
        client.fine_tuning.jobs.resume(job.id)
    served.store.approve(operator, job.id, "seen", released=["abc"])
    assert client.fine_tuning.jobs.retrieve(job.id).status == "queued"
    assert served.store.get(Job, project.id, job.id).decision == {"released": ["abc"], "threshold": None}
