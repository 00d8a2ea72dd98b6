"""Many clients at once on a gateway: uploads, lists, jobs and polls, each object compared with what was sent.

    python -m benchmarks.gateway_load --clients 200 --seconds 60

Starts a gateway of its own, without a worker, on SQLite in a temporary folder or on ``--database``; prints requests, errors,
mixed-up objects and the latency of reads and writes as one JSON object, and exits with 1 if anything was lost, mixed up or a 5xx.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from gradshield.gateway.settings import Policy
from gradshield.gateway.store import Store

PROJECTS = 20
UPLOAD = (
    b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n%b\r\n--x--\r\n'
)


@dataclass
class Found:
    """What the clients saw: seconds by kind of request, answers by status, and what was wrong."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"read": [], "write": []})
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Line:
    """One client's connection, kept open as the OpenAI client keeps it."""

    def __init__(self, port: int, key: str, found: Found) -> None:
        self.line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.key, self.found = {"Authorization": f"Bearer {key}"}, found

    def ask(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
        began = time.perf_counter()
        self.line.request(method, path, body, {**self.key, "Content-Type": kind})
        answer = self.line.getresponse()
        content = answer.read()
        self.found.seconds["read" if method == "GET" else "write"].append(time.perf_counter() - began)
        self.found.statuses[answer.status] += 1
        if answer.status != 200:
            raise ValueError(f"{method} {path} answers {answer.status}")
        return content

    def json(self, *asked: Any) -> Any:
        return json.loads(self.ask(*asked))


def client(number: int, port: int, key: str, until: float, found: Found) -> None:
    """One client: it uploads a file, makes a job of it, polls the job every two seconds or so, and starts anew."""
    dice, line = random.Random(number), Line(port, key, found)
    time.sleep(dice.random() * 5)
    with closing(line.line):
        while time.monotonic() < until:
            try:
                once(number, dice, line, found)
            except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
                found.wrong.append(f"client {number}: {error!r}")
                line.line.close()
                time.sleep(1)


def once(number: int, dice: random.Random, line: Line, found: Found) -> None:
    content = f"{number} {dice.random()}\n".encode() * dice.randint(10, 2000)
    file = line.json("POST", "/v1/files", UPLOAD % content, "multipart/form-data; boundary=x")["id"]
    body = {"model": "lab", "training_file": file, "metadata": {"client": str(number)}}
    job = line.json("POST", "/v1/fine_tuning/jobs", json.dumps(body).encode())["id"]
    if job not in [one["id"] for one in line.json("GET", "/v1/fine_tuning/jobs?limit=20")["data"]]:
        found.wrong.append(f"list without {job}")
    for _ in range(4):
        time.sleep(1 + 2 * dice.random())
        got = line.json("GET", f"/v1/fine_tuning/jobs/{job}")
        if (got["id"], got["training_file"], got["metadata"]) != (job, file, {"client": str(number)}):
            found.wrong.append(f"job {job}")
        line.ask("GET", f"/v1/fine_tuning/jobs/{job}/events")
    if line.ask("GET", f"/v1/files/{file}/content") != content:
        found.wrong.append(f"file {file}")
    if line.json("POST", f"/v1/fine_tuning/jobs/{job}/cancel")["status"] != "cancelled":
        found.wrong.append(f"cancel {job}")


def load(port: int, keys: list[str], clients: int, seconds: float) -> Found:
    """The clients are threads, which cost little: they share the machine with the server they measure."""
    found, until = Found(), time.monotonic() + seconds
    threads = [
        threading.Thread(target=client, args=(i, port, keys[i % len(keys)], until, found)) for i in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def centile(values: list[float], share: float) -> float:
    """In milliseconds."""
    return round(1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))], 1)


def ready(port: int) -> bool:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as line:
        try:
            line.request("GET", "/readyz")
            return line.getresponse().status == 200
        except OSError:
            return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--database", default="")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(given.database or f"sqlite:///{folder}/gateway.db")
        store.migrate()
        names = [f"load-{time.time_ns()}-{number}" for number in range(PROJECTS)]
        keys = [store.add_key(store.add_project(name, Policy()).id, "load")[1] for name in names]
        store.close()
        common = ["--folder", folder, *(["--database", given.database] if given.database else [])]
        serve = [
            sys.executable,
            "-m",
            "gradshield",
            "serve",
            "--model",
            "lab",
            "--workers",
            "0",
            "--port",
            str(given.port),
            *common,
        ]
        server = subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            while not ready(given.port):
                time.sleep(0.2)
            found = load(given.port, keys, given.clients, given.seconds)
        finally:
            server.terminate()
            server.wait()
    failed = sum(count for status, count in found.statuses.items() if status >= 500)
    told = {
        "clients": given.clients,
        "seconds": given.seconds,
        "database": re.sub(":.*", "", given.database) or "sqlite",
        "requests": sum(found.statuses.values()),
        "statuses": dict(sorted(found.statuses.items())),
        "wrong": found.wrong[:10],
        **{
            f"{kind}_ms": {f"p{p}": centile(all_, p / 100) for p in (50, 95, 99)}
            for kind, all_ in found.seconds.items()
        },
    }
    print(json.dumps(told))
    return 1 if failed or found.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
