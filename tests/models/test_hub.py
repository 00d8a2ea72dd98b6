"""Whether the hub can be reached: any answer counts, silence does not, and offline mode makes no request."""

from __future__ import annotations

import http.client
import ssl
import urllib.error
import urllib.request
from email.message import Message

import pytest

from gradshield.models import loading

ANSWERS: list[tuple[Exception, bool]] = [
    (urllib.error.HTTPError("https://huggingface.co", 403, "Forbidden", Message(), None), True),
    (urllib.error.URLError(ssl.SSLError("certificate verify failed")), True),
    (urllib.error.URLError(OSError(-2, "Name or service not known")), False),
    (TimeoutError("timed out"), False),
    (ValueError("unknown url type"), False),
    (http.client.BadStatusLine("SSH-2.0"), False),
]


@pytest.mark.parametrize(("answer", "expected"), ANSWERS, ids=lambda value: type(value).__name__)
def test_what_counts_as_an_answer(answer: Exception, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(request: urllib.request.Request, timeout: float) -> None:
        assert (request.full_url, request.get_method()) == ("https://mirror.example", "HEAD")
        assert timeout <= 5
        raise answer

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert loading.reachable() is expected


def test_an_address_that_is_none_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://host:abc")
    assert loading.reachable() is False


@pytest.mark.parametrize("word", ["1", "true", "YES", "on"])
def test_offline_asks_nobody(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", word)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("the network was asked"))
    assert loading.reachable() is False
