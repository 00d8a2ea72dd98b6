"""An endpoint on this machine that speaks the OpenAI protocol from a script, and writes down what it was asked.

    with endpoint(status(500), chat("hello")) as server:
        Client(server.url, "m").chat([])

Each request takes the next step of the script; the last step is repeated. A step gets the request's JSON.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Step = Callable[[Any], tuple[int, dict[str, str], bytes]]


@dataclass
class Endpoint:
    """``asked`` holds (path, headers, JSON) of every request."""

    url: str
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)


def status(code: int, body: str = "", **headers: str) -> Step:
    """A bare status; an underscore in a header's name is a hyphen."""
    return lambda _asked: (code, {name.replace("_", "-"): value for name, value in headers.items()}, body.encode())


def body(value: Any) -> Step:
    """Any JSON as the reply."""
    return lambda _asked: (200, {"Content-Type": "application/json"}, json.dumps(value).encode())


def chat(content: str | None) -> Step:
    """A chat completion."""
    return body({"choices": [{"message": {"role": "assistant", "content": content}}]})


def verdict(unsafe: bool, reason: str = "so it is") -> Step:
    """A chat completion that is a good verdict."""
    return chat(json.dumps({"unsafe": unsafe, "reason": reason}))


def moderation(flagged: bool, **scores: float) -> Step:
    """A moderation result."""
    return body({"results": [{"flagged": flagged, "category_scores": scores}]})


def late(seconds: float, step: Step) -> Step:
    """A step that keeps the client waiting."""

    def wait(asked: Any) -> tuple[int, dict[str, str], bytes]:
        time.sleep(seconds)
        return step(asked)

    return wait


def hang_up(_asked: Any) -> tuple[int, dict[str, str], bytes]:
    """Close the connection without a word."""
    raise ConnectionAbortedError


@contextmanager
def endpoint(*script: Step) -> Iterator[Endpoint]:
    """A server on a free port for as long as the block lasts."""
    lock = threading.Lock()
    known: list[Endpoint] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                step = script[min(len(known[0].asked), len(script) - 1)]
                known[0].asked.append((self.path, dict(self.headers), asked))
            try:
                code, headers, content = step(asked)
                self.send_response(code)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except ConnectionError:
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    known.append(Endpoint(f"http://127.0.0.1:{server.server_port}/v1"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield known[0]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
