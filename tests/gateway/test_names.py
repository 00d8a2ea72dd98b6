"""No user of the API and no page learns where anything lies on the server."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import httpx2
import openai
import pyarrow.parquet as pq
import pytest

from gradshield import lab
from gradshield.gateway import job as jobs
from gradshield.gateway.content import RESULTS, results
from gradshield.gateway.database import Caller
from gradshield.gateway.settings import Policy
from tests.gateway.running import ROWS, Served, serving

PLACES = ("/", "/models", "/health", "/audit")


def texts(content: bytes, tmp_path: Path) -> str:
    """What a reader sees of a file or a page, and its source: marks and line breaks would hide a path."""
    if content.startswith(b"PAR1"):
        (tmp_path / "table").write_bytes(content)
        return str(pq.read_table(tmp_path / "table").to_pylist()) + str(pq.read_schema(tmp_path / "table").metadata)
    source = content.decode("utf-8", "replace")
    return source + html.unescape(re.sub(r"<[^>]*>|\u200b", "", source)).replace("\\/", "/")


def entered(served: Served, secret: str) -> httpx2.Client:
    """A browser of an operator who is logged in."""
    client = httpx2.Client(base_url=served.url, timeout=60)
    token = re.search(r'name="token" value="(\w+)"', client.get("/login").text)
    assert token is not None
    assert client.post("/login", data={"token": token[1], "key": secret}).status_code == 303
    return client


def settings_of(root: Path) -> dict[str, Any]:
    """A model, requests and look-alikes in folders of the server."""
    own = root / "models" / "base"
    shutil.copytree(lab.checkpoint("aligned"), own)
    for name, rows in (("probes", lab.requests("direction")), ("safety", lab.requests("report")[:40])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    training = {**lab.recipe("dialogue"), "max_steps": 3}
    training.pop("save_strategy")
    files = {"probes": root / "probes.jsonl", "safety": str(root / "safety.jsonl")}
    return {"models": {"base": str(own)}, "training": training, "lora": lab.LORA, "max_new_tokens": 8, **files}


@pytest.mark.slow
def test_nothing_that_a_job_leaves_names_a_folder_of_the_server(tmp_path: Path) -> None:
    with serving(tmp_path / "gateway", **settings_of(tmp_path)) as served:
        served.gateway.settings.save()
        project = served.project(Policy(rows="review", limit=0.9))
        secret = served.key(project, "operator")
        client = served.client(secret)
        rows, _ = lab.mix("dialogue", harm="explicit", ratio=0.08, n=120)
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file, held = (client.files.create(file=("a.jsonl", one), purpose="fine-tune").id for one in (content, content))
        id = client.fine_tuning.jobs.create(model="base", training_file=file, validation_file=held).id
        run = [str(served.gateway.settings.folder), id]
        assert jobs.main([*run, "first"]) == 0
        assert client.fine_tuning.jobs.retrieve(id).status == "paused"
        desk, seen = entered(served, secret), dict[str, bytes]()

        def look() -> None:
            """Every page, every answer of the API and every file that can be saved now."""
            token = re.search(r'name="token" value="(\w+)"', desk.get("/health").text)
            assert token is not None
            shown = desk.post(f"/jobs/{id}", data={"token": token[1], "page": "1"})
            assert 'class="tokens"' in shown.text
            seen[f"rows {len(seen)}"] = shown.content
            files = [f"/jobs/{id}/files/{one.path}" for one, _ in results(served.gateway.settings.job_folder(id))]
            pages = [f"/jobs/{id}", f"/jobs/{id}/live", f"/jobs/{id}/cut?value=0.5", *PLACES, *files]
            job = client.fine_tuning.jobs.retrieve(id)
            api = [f"fine_tuning/jobs/{id}{more}" for more in ("", "/events?limit=100", "/checkpoints")]
            api += ["fine_tuning/jobs", "files", "models", *(f"files/{one}/content" for one in job.result_files)]
            if job.fine_tuned_model:
                api.append(f"models/{job.fine_tuned_model}/certificate")
            with served.raw(secret) as raw:
                for who, path in [*((desk, path) for path in pages), *((raw, f"/v1/{path}") for path in api)]:
                    answer = who.get(path)
                    assert answer.status_code == 200, path
                    seen[path] = answer.content

        look()
        served.store.approve(Caller(project.id, "key", "operator"), id, "looked at")
        assert jobs.main([*run, "second"]) == 0
        assert client.fine_tuning.jobs.retrieve(id).status == "succeeded"
        look()
        saved = [path for path in seen if "/content" in path]
        assert len(saved) == sum(bool(one.name) for one in RESULTS) - 1  # no row is broken
    assert b"training_file.jsonl" in seen[f"/jobs/{id}/files/report.html"]  # it is made from names
    root, home = str(tmp_path), str(Path(lab.__file__).parent.parent)
    for path, answer in seen.items():
        said = texts(answer, tmp_path)
        for place in (root, home, tmp_path.name):
            at = said.find(place)
            assert at < 0, (path, said[max(at - 200, 0) : at + 200])


def refused(served: Served, **more: Any) -> Any:
    """The error of a job, and what its page says."""
    project = served.project()
    client = served.client(served.key(project))
    file = client.files.create(file=("a.jsonl", ROWS), purpose="fine-tune").id
    id = client.fine_tuning.jobs.create(model="base", training_file=file, **more).id
    assert jobs.main([str(served.gateway.settings.folder), id, "me"]) == 0
    found = client.fine_tuning.jobs.retrieve(id)
    said = found.to_json() + str(client.fine_tuning.jobs.list_events(id).to_json())
    assert str(served.gateway.settings.folder.parent) not in said
    return found.error


def test_errors_name_no_folder_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common, logged = settings_of(tmp_path), list[str]()
    monkeypatch.setattr(jobs.log, "error", lambda _event, error: logged.append(error), raising=False)
    for wrong in (
        {"probes": tmp_path / "nowhere.jsonl"},
        {"safety": str(tmp_path / "nowhere.jsonl")},
        {"judges": (f"classifier:{tmp_path}/nowhere",)},
        {"lora": {"r": 8, f"{tmp_path}/nowhere": 1}},
        {"training": {f"{tmp_path}/nowhere": 1}},
        {"models": {"base": str(tmp_path / "nowhere")}},
    ):
        with serving(tmp_path / "gateway", **{**common, **wrong}) as served:
            served.gateway.settings.save()
            error = refused(served)
        assert (error.code, error.param) == ("server_error", None), error
        assert "ask its operator, and name the job ftjob-" in error.message
        assert str(tmp_path / "nowhere") in logged.pop()  # the log says what is wrong
    shutil.rmtree(tmp_path / "models")
    with serving(tmp_path / "gateway", **common) as served, pytest.raises(openai.InternalServerError) as failed:
        asked: Any = [{"role": "user", "content": "Hello"}]
        served.client().chat.completions.create(model="base", messages=asked)
    assert failed.value.status_code == 503 and str(tmp_path) not in str(failed.value.body)
