"""Who has no key, another project's key, or bad intentions."""

from __future__ import annotations

import io
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2
import openai
import pytest
from sqlalchemy import select

from gradshield import files
from gradshield.gateway import content as contents
from gradshield.gateway.edge import Rates
from gradshield.gateway.settings import LAB
from gradshield.gateway.tables import Job, Key
from tests.gateway.running import ROWS, Served, serving

INJECTIONS = (
    "' OR 1=1 --",
    '" OR ""="',
    "1; DROP TABLE jobs",
    "%27%20OR%201",
    "$.x",
    "\\",
    "a' UNION SELECT hash FROM keys --",
)
SCRIPT = (
    b'{"messages": [{"role": "user", "content": "<script>alert(1)</script>"}, {"role": "assistant", "content": "A"}]}\n'
)
FORM = "multipart/form-data; boundary=x"


def part(name: str, value: bytes, more: str = "") -> bytes:
    return (
        b'--x\r\nContent-Disposition: form-data; name="'
        + name.encode()
        + b'"'
        + more.encode()
        + b"\r\n\r\n"
        + value
        + b"\r\n"
    )


def left(served: Served) -> list[Path]:
    """Files of contents that are there, parts included."""
    return [path for path in Path(served.gateway.content.root).rglob("*") if path.is_file()]


def test_every_route_asks_for_a_key(served: Served) -> None:
    document = httpx2.get(f"{served.url}/openapi.json").json()
    with httpx2.Client(base_url=served.url) as raw:
        for path, operations in document["paths"].items():
            for method in operations:
                for headers in ({}, {"Authorization": "Bearer gs-wrong"}, {"Authorization": "Basic eDp5"}):
                    found = raw.request(method, path.replace("{id}", "x"), headers=headers)
                    assert found.status_code == 401, (method, path)
                    assert "API key" in found.json()["error"]["message"]
        assert len(document["paths"]) >= 14


def test_a_revoked_key_is_none_at_once(served: Served) -> None:
    project = served.project()
    made, secret = served.store.add_key(project.id, "k")
    client = served.client(secret)
    assert client.files.list().data == []
    served.store.revoke(
        made.prefix if len([k for k in served.store.all_keys() if k.prefix == made.prefix]) == 1 else made.id
    )
    with pytest.raises(openai.AuthenticationError):
        client.files.list()
    assert [line.action for line in served.store.audits(project.id)] == ["revoke key", "create key"]


def test_text_that_a_database_cannot_hold_is_refused(served: Served) -> None:
    client = served.client()
    file = client.files.create(file=("a", ROWS), purpose="fine-tune").id
    with served.raw(client.api_key) as raw:
        for query in ("after=a%00b", "purpose=%00", "purpose=%ff"):
            assert raw.get(f"/v1/files?{query}").status_code in (200, 400, 404)
        job = {"model": LAB, "training_file": file}
        for bad in ("a\\u0000b", "\\ud800"):
            for more in (
                f'"metadata": {{"k": "{bad}"}}',
                f'"metadata": {{"{bad}": "v"}}',
                f'"suffix": "{bad}"',
                f'"{bad}": 1',
            ):
                body = json.dumps(job)[:-1] + f", {more}}}"
                found = raw.post("/v1/fine_tuning/jobs", content=body, headers={"Content-Type": "application/json"})
                assert (found.status_code, found.json()["error"]["type"]) == (400, "invalid_request_error")
    assert client.fine_tuning.jobs.list().data == []


def test_keys_are_stored_as_hashes(served: Served) -> None:
    made, secret = served.store.add_key(served.project().id, "k")
    stored = served.store.get(Key, made.project_id, made.id)
    assert secret not in json.dumps({name: str(value) for name, value in vars(stored).items()})
    assert len(secret) > 40


@pytest.fixture
def theirs(served: Served) -> dict[str, str]:
    """One object of each kind, of another project."""
    client = served.client()
    file = client.files.create(file=("secret.jsonl", ROWS), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model=LAB, training_file=file, metadata={"a": "secret"}).id
    done = client.fine_tuning.jobs.create(model=LAB, training_file=file).id
    served.store.claim(done, "me", 60)
    served.store.finish(done, "me", f"ft:lab:theirs:{done}")
    return {"files": file, "fine_tuning/jobs": job, "models": f"ft:lab:theirs:{done}"}


def routes(served: Served) -> Iterator[tuple[str, str]]:
    document = httpx2.get(f"{served.url}/openapi.json").json()
    return ((method, path) for path, ops in document["paths"].items() if "{id}" in path for method in ops)


def test_another_projects_objects_are_as_if_they_were_not(served: Served, theirs: dict[str, str]) -> None:
    own = served.client()
    count = 0
    with served.raw(own.api_key) as raw:
        for method, path in routes(served):
            kind = path.removeprefix("/v1/").partition("/{id}")[0]
            id, guess = theirs[kind], f"{theirs[kind][:-6]}{secrets.token_hex(3)}"
            found, none = (raw.request(method, path.replace("{id}", name)) for name in (id, guess))
            assert found.status_code == none.status_code == 404, (method, path)
            assert found.text.replace(id, "") == none.text.replace(guess, "")
            count += 1
        assert count == 12
        for list_path in ("files", "fine_tuning/jobs", "models"):
            assert theirs["files"] not in (listed := raw.get(f"/v1/{list_path}").text)
            assert "secret" not in listed
            assert "theirs" not in listed
        for list_path in ("files", "fine_tuning/jobs"):
            assert raw.get(f"/v1/{list_path}", params={"after": theirs[list_path]}).status_code == 404
        chat = {"model": theirs["models"], "messages": [{"role": "user", "content": "x"}]}
        assert raw.post("/v1/chat/completions", json=chat).status_code == 404
        assert (
            raw.post("/v1/fine_tuning/jobs", json={"model": theirs["models"], "training_file": "x"}).status_code == 400
        )
    with pytest.raises(openai.BadRequestError, match="no file"):
        own.fine_tuning.jobs.create(model=LAB, training_file=theirs["files"])
    assert own.fine_tuning.jobs.list(metadata={"a": "secret"}).data == []


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "..\\..\\x", "/etc/passwd", "a\0b", "x" * 3000, "<b>.jsonl", "ü\u202e.jsonl", "."]
)
def test_a_file_name_is_never_a_path(served: Served, name: str) -> None:
    before = set(left(served))
    with served.raw() as raw:
        body = part("purpose", b"fine-tune") + part("file", ROWS, f'; filename="{name}"') + b"--x--\r\n"
        found = raw.post("/v1/files", content=body, headers={"Content-Type": FORM})
        assert found.status_code == 200
        (new,) = set(left(served)) - before
        assert new == Path(served.gateway.content.root) / found.json()["id"]
        assert "\0" not in found.json()["filename"]
        assert len(found.json()["filename"]) <= 512
        for trick in ("..%2f..%2fgateway.json", "../gateway.json", "%2e%2e", found.json()["id"] + "%00"):
            assert raw.get(f"/v1/files/{trick}/content").status_code in (400, 404, 405)


def test_row_text_never_runs_in_a_browser(served: Served) -> None:
    client = served.client()
    file = client.files.create(file=("<script>.jsonl", SCRIPT * 10), purpose="fine-tune")
    with served.raw(client.api_key) as raw:
        found = raw.get(f"/v1/files/{file.id}/content")
        assert found.content == SCRIPT * 10
        assert found.headers["content-type"] == "application/octet-stream"
        assert found.headers["content-disposition"] == "attachment"
        assert found.headers["x-content-type-options"] == "nosniff"
        assert raw.get("/v1/files").headers["content-type"] == "application/json"


@pytest.mark.parametrize("text", INJECTIONS)
def test_sql_in_a_filter_is_text(served: Served, theirs: dict[str, str], text: str) -> None:
    """In every query parameter and every id of every route, beside an object that it would let through."""
    client = served.client()
    file = client.files.create(file=("own", ROWS), purpose="fine-tune").id
    own = client.fine_tuning.jobs.create(model=LAB, training_file=file, metadata={"a": "b"}).id
    filters = [("/v1/fine_tuning/jobs", name) for name in ("metadata[a]", f"metadata[{text}]")]
    for path, operations in httpx2.get(f"{served.url}/openapi.json").json()["paths"].items():
        named = operations.get("get", {}).get("parameters", [])
        filters += [(path.replace("{id}", own), one["name"]) for one in named if one["in"] == "query"]
    assert len(filters) >= 13
    with served.raw(client.api_key) as raw:
        for path, name in filters:
            found = raw.get(path, params={name: text})
            assert found.status_code in (200, 400, 404), (path, name, found.text)
            assert found.status_code != 200 or found.json()["data"] == [], (path, name)
        for method, path in routes(served):
            at = path.replace("{id}", quote(text, safe=""))
            assert raw.request(method, at).status_code in (400, 404, 405), (method, at)  # 405: it ends in another route
        assert [one["id"] for one in raw.get("/v1/fine_tuning/jobs").json()["data"]] == [own]
    with served.store.reading() as session:
        assert session.scalar(select(Job.id).where(Job.id == theirs["fine_tuning/jobs"]))  # nothing was dropped


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (FORM, b""),
        (FORM, b"nothing like it"),
        (FORM, b"--x\r\n"),
        (FORM, part("file", ROWS, '; filename="a"')),  # without the end
        (FORM, part("purpose", b"fine-tune") + b"--x--\r\n"),
        (FORM, part("purpose", b"assistants") + part("file", ROWS, '; filename="a"') + b"--x--\r\n"),
        (FORM, part("purpose", b"fine-tune") + part("file", ROWS) + b"--x--\r\n"),  # a field, not a file
        (FORM, part("purpose", b"fine-tune") + part("file", ROWS, '; filename="a"') * 2 + b"--x--\r\n"),
        (FORM, part("purpose", b"fine-tune") + part("more", b"") + part("file", ROWS, '; filename="a"') + b"--x--\r\n"),
        ("multipart/form-data", part("file", ROWS) + b"--x--\r\n"),
        ("multipart/form-data; boundary=", b"--\r\n"),
        ("application/json", b'{"file": "x"}'),
        ("text/plain", b"x"),
    ],
)
def test_a_malformed_upload_is_refused_and_leaves_nothing(served: Served, kind: str, body: bytes) -> None:
    before = left(served)
    with served.raw() as raw:
        found = raw.post("/v1/files", content=body, headers={"Content-Type": kind})
        assert found.status_code == 400
        assert found.json()["error"]["message"]
        assert raw.get("/v1/files").json()["data"] == []
    assert left(served) == before


def test_an_upload_over_the_limit_is_refused_while_it_is_read(small: Served) -> None:
    with small.raw() as raw:
        for content in (b"x" * 100_001, b"x" * 300_000):
            found = raw.post("/v1/files", files={"file": ("a", content)}, data={"purpose": "fine-tune"})
            assert (found.status_code, found.json()["error"]["type"]) == (413, "invalid_request_error")
        assert raw.post("/v1/fine_tuning/jobs", content=b'"' + b"x" * 3000).status_code == 413
        assert (
            raw.post("/v1/files", files={"file": ("a", b"x" * 100_000)}, data={"purpose": "fine-tune"}).status_code
            == 200
        )
        assert (
            raw.post("/v1/files", files={"file": ("a", b"x" * 90_000)}, data={"purpose": "fine-tune"}).status_code
            == 200
        )
        found = raw.post("/v1/files", files={"file": ("a", b"x" * 90_000)}, data={"purpose": "fine-tune"})
        assert (found.status_code, found.json()["error"]["code"]) == (413, "quota_exceeded")
    assert len(left(small)) == 2


def endless(served: Served, seconds: float) -> tuple[bytes, int]:
    """What the server answers to a body that has no end, or that stops for some seconds; and the pieces it took of 20,000."""
    sent = 0
    where = urlsplit(served.url)
    with socket.create_connection((where.hostname, where.port), timeout=20) as line:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {served.key()}\r\nContent-Type: {FORM}\r\n"
        line.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        first = (
            part("purpose", b"fine-tune") + b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        )
        line.sendall(b"%x\r\n%s\r\n" % (len(first), first))
        try:
            while sent < 20_000:
                line.sendall(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")
                sent += 1
                time.sleep(seconds)
                if seconds:
                    break
        except OSError:
            pass
        try:
            return line.recv(4096), sent
        except OSError:
            return b"", sent


def test_an_endless_upload_ends(small: Served) -> None:
    answer, sent = endless(small, 0.0)
    assert sent < 20_000  # the server hung up: what is sent lies in buffers until then
    assert answer == b"" or answer.startswith(b"HTTP/1.1 413")
    assert left(small) == []
    assert small.client().files.list().data == []


def test_an_upload_that_stops_is_given_up(small: Served) -> None:
    assert endless(small, 1.0)[0].startswith(b"HTTP/1.1 408")
    assert left(small) == []


def test_an_upload_that_breaks_off_is_not_listed(served: Served) -> None:
    before, key = left(served), served.key()
    where = urlsplit(served.url)
    with socket.create_connection((where.hostname, where.port)) as line:
        line.sendall(
            f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: {FORM}\r\n".encode()
            + b"Content-Length: 5000\r\n\r\n"
            + part("purpose", b"fine-tune")
        )
    time.sleep(0.2)
    assert left(served) == before
    assert served.client(key).files.list().data == []


def test_requests_over_the_rate_wait(small: Served) -> None:
    client = small.client()
    with pytest.raises(openai.RateLimitError) as refused:
        for _ in range(100):
            client.files.list()
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert small.client().files.list().data == []  # another key has its own


def test_a_bucket_refills() -> None:
    rates = Rates(600)
    assert [rates.wait("k") for _ in range(600)] == [0.0] * 600
    assert 0 < rates.wait("k") <= 0.1
    time.sleep(0.25)
    assert rates.wait("k") == 0.0


def test_a_project_has_so_many_jobs_at_once(small: Served) -> None:
    client = small.client()
    file = client.files.create(file=("a", ROWS), purpose="fine-tune").id
    first, _ = (client.fine_tuning.jobs.create(model=LAB, training_file=file) for _ in range(2))
    with pytest.raises(openai.ConflictError, match="2 jobs"):
        client.fine_tuning.jobs.create(model=LAB, training_file=file)
    client.fine_tuning.jobs.cancel(first.id)
    assert client.fine_tuning.jobs.create(model=LAB, training_file=file)


@pytest.mark.parametrize("when", ["write", "flush", "move"])
def test_a_full_disk_is_said_and_leaves_nothing(served: Served, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    before, client = left(served), served.client()

    def full(*_given: Any) -> None:
        raise OSError(28, "No space left on device")

    def filling(source: Any, out: Any) -> None:
        """A disk that takes some of the content."""
        out.write(source.read(100))
        full()

    with monkeypatch.context() as patched:
        if when == "write":
            patched.setattr(contents, "_copied", filling)
        else:
            patched.setattr(files.os, "fsync" if when == "flush" else "replace", full)
        with pytest.raises(openai.InternalServerError) as refused:
            client.files.create(file=("a", ROWS), purpose="fine-tune")
    assert refused.value.status_code == 503
    assert left(served) == before
    assert client.files.list().data == []
    assert client.files.create(file=("a", ROWS), purpose="fine-tune").bytes == len(ROWS)


@pytest.fixture
def storing(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A process that has stored half of a file under an id, and goes on at a line of its input."""
    id = f"file-{secrets.token_hex(16)}"
    script = f"""
import io, sys
from gradshield.gateway.content import Content
class Slow(io.BytesIO):
    def read(self, size=-1):
        if self.tell():
            print("half", flush=True)
            sys.stdin.readline()
        return super().read(100_000)
Content({str(tmp_path / "files")!r}).keep({id!r}, Slow(b"x" * 200_000))
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"half\n"
        yield process, id
        process.kill()


def test_a_server_that_is_killed_while_it_stores_a_file_leaves_none_of_that_name_and_the_next_sweeps(
    tmp_path: Path, storing: tuple[subprocess.Popen[bytes], str]
) -> None:
    process, id = storing
    process.kill()
    process.wait()
    content = contents.Content(str(tmp_path / "files"))
    (part,) = Path(content.root).iterdir()
    assert part.suffix == ".part"
    os.utime(part, (0, 0))
    with pytest.raises(FileNotFoundError):
        content.read(id)
    content.keep(other := f"file-{secrets.token_hex(16)}", io.BytesIO(b"whole"))
    with serving(tmp_path) as served:
        assert [path.name for path in left(served)] == [other]
        assert b"".join(served.gateway.content.read(other)) == b"whole"


def test_a_file_that_is_being_stored_outlives_the_start_of_another_server(
    tmp_path: Path, storing: tuple[subprocess.Popen[bytes], str]
) -> None:
    process, id = storing
    with serving(tmp_path) as served:
        (half,) = left(served)
        assert half.parent.suffix == ".part"
        process.communicate(b"\n" * 9)
        assert process.returncode == 0
        assert [path.name for path in left(served)] == [id]
        assert sum(map(len, served.gateway.content.read(id))) == 200_000
