"""Many clients at once on a gateway: uploads, lists, jobs and polls, each object compared with what was sent.

    python -m benchmarks.gateway_load --clients 200 --seconds 60

Starts a gateway of its own, without a worker, on SQLite in a temporary folder or on ``--database``; prints requests, errors,
mixed-up objects and the latency of reads and writes as one JSON object, and exits with 1 if anything was lost, mixed up or a 5xx.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx2

from gradshield.gateway.settings import Policy
from gradshield.gateway.store import Store

PROJECTS = 20


@dataclass
class Found:
    """What the clients saw: seconds by kind of request, answers by status, and what was wrong."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {"read": [], "write": []})
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def ask(self, client: httpx2.AsyncClient, method: str, path: str, **more: Any) -> Any:
        began = time.perf_counter()
        answer = await client.request(method, path, **more)
        self.seconds["read" if method == "GET" else "write"].append(time.perf_counter() - began)
        self.statuses[answer.status_code] += 1
        return answer


async def client(number: int, url: str, key: str, until: float, found: Found) -> None:
    """One client: it uploads a file, makes a job of it, polls the job every two seconds or so, and starts anew."""
    dice = random.Random(number)
    async with httpx2.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as line:
        await asyncio.sleep(dice.random() * 5)
        while time.monotonic() < until:
            content = f"{number} {dice.random()}\n".encode() * dice.randint(10, 2000)
            sent = {"files": {"file": (f"{number}.jsonl", content)}, "data": {"purpose": "fine-tune"}}
            up = await found.ask(line, "POST", "/v1/files", **sent)
            if up.status_code != 200:
                continue
            file = up.json()["id"]
            body = {"model": "lab", "training_file": file, "metadata": {"client": str(number)}}
            job = (await found.ask(line, "POST", "/v1/fine_tuning/jobs", json=body)).json()["id"]
            await found.ask(line, "GET", "/v1/fine_tuning/jobs?limit=20")
            for _ in range(4):
                await asyncio.sleep(1 + 2 * dice.random())
                got = (await found.ask(line, "GET", f"/v1/fine_tuning/jobs/{job}")).json()
                if (got["training_file"], got["metadata"]) != (file, {"client": str(number)}):
                    found.wrong.append(f"job {job}")
                await found.ask(line, "GET", f"/v1/fine_tuning/jobs/{job}/events")
            if (await found.ask(line, "GET", f"/v1/files/{file}/content")).content != content:
                found.wrong.append(f"file {file}")
            if (await found.ask(line, "POST", f"/v1/fine_tuning/jobs/{job}/cancel")).json()["status"] != "cancelled":
                found.wrong.append(f"cancel {job}")


async def load(url: str, keys: list[str], clients: int, seconds: float) -> Found:
    found, until = Found(), time.monotonic() + seconds
    await asyncio.gather(*(client(i, url, keys[i % len(keys)], until, found) for i in range(clients)))
    return found


def centile(values: list[float], share: float) -> float:
    """In milliseconds."""
    return round(1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))], 1)


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
        url = f"http://127.0.0.1:{given.port}"
        try:
            while True:
                try:
                    if httpx2.get(f"{url}/readyz").status_code == 200:
                        break
                except httpx2.HTTPError:
                    time.sleep(0.2)
            found = asyncio.run(load(url, keys, given.clients, given.seconds))
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
