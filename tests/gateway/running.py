"""A gateway that listens, and a real PostgreSQL, for the tests."""

from __future__ import annotations

import os
import pwd
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import uvicorn
from openai import OpenAI

from gradshield.gateway.api import Gateway
from gradshield.gateway.app import create_app
from gradshield.gateway.settings import LAB, Policy, Settings
from gradshield.gateway.store import Store
from gradshield.gateway.tables import Project

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
ROW = b'{"messages": [{"role": "user", "content": "Q%d"}, {"role": "assistant", "content": "A"}]}\n'
ROWS = b"".join(ROW % i for i in range(12))


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Postgres:
    """A server in a folder of its own. It refuses to run as root, so then it runs as nobody."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.port = folder, PROGRAMS[-1].parent, free_port()
        self.more: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            self.more = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        self._call("initdb", "-D", str(folder / "data"), "-U", "test", "-A", "trust", "--no-sync")
        self.start()

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=200"
        self._call(
            "pg_ctl", "-D", str(self.folder / "data"), "-w", "-l", str(self.folder / "log"), "-o", options, "start"
        )

    def stop(self) -> None:
        self._call("pg_ctl", "-D", str(self.folder / "data"), "-w", "-m", "immediate", "stop")

    def database(self) -> str:
        """The URL of a new database."""
        name = f"t{secrets.token_hex(6)}"
        with psycopg.connect(f"postgresql://test@127.0.0.1:{self.port}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql://test@127.0.0.1:{self.port}/{name}"

    def _call(self, name: str, *arguments: str) -> None:
        subprocess.run(
            [str(self.bin / name), *arguments], check=True, cwd=self.folder, stdout=subprocess.DEVNULL, **self.more
        )


@dataclass
class Served:
    """A gateway that listens. Jobs that it sends are kept in ``sent``; nothing runs them."""

    gateway: Gateway
    url: str
    sent: list[str] = field(default_factory=list)

    @property
    def store(self) -> Store:
        return self.gateway.store

    def project(self, policy: Policy | None = None) -> Project:
        return self.store.add_project(f"p-{secrets.token_hex(6)}", policy or Policy())

    def key(self, project: Project | None = None, role: str = "user") -> str:
        return self.store.add_key((project or self.project()).id, "key", role)[1]

    def client(self, key: str | None = None) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key(), max_retries=0)

    def raw(self, key: str | None = None) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {key or self.key()}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=30)


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """The URL of an app that a thread serves."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def serving(folder: Path, **more: Any) -> Iterator[Served]:
    sent: list[str] = []
    app = create_app(Settings(**{"models": {LAB: LAB}, "folder": folder, **more}), sent.append)
    with listening(app) as url:
        yield Served(app.state.gateway, url, sent)
