"""The client of OpenAI-compatible endpoints: what it repeats, what it bounds, and where the key goes and does not."""

from __future__ import annotations

import json
import logging
import signal
import socket
import sys
import threading
import time
from functools import cache
from typing import Any

import httpx2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gradshield.errors import EndpointError, UsageError
from gradshield.judges import client as clients
from gradshield.judges.client import Client, Moderation
from tests.endpoint import Endpoint, Step, body, chat, endpoint, hang_up, late, moderation, status

KEY = "sk-this-is-the-key-0123456789"
PARTS = ["choices", "message", "content", "results", "flagged", "category_scores"]
TURN = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


def client(server: Endpoint, **options: Any) -> Client:
    return Client(server.url, "some/model", **options)


def test_without_the_sdk_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UsageError, match=r"'gradshield\[endpoint\]'"):
        Client("https://host/v1", "m")


def test_a_conversation_goes_out_and_its_reply_comes_back() -> None:
    with endpoint(chat("good day")) as server:
        assert client(server, key="TEST_KEY").chat(TURN) == "good day"
    ((path, headers, asked),) = server.asked
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert asked == {"model": "some/model", "messages": TURN, "temperature": 0, "max_tokens": clients.MAX_TOKENS}


@pytest.mark.parametrize("named", [None, "TEST_KEY"])
def test_what_the_environment_holds_for_openai_is_not_for_every_host(
    named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "WEBHOOK_SECRET"):
        monkeypatch.setenv(f"OPENAI_{name}", f"for-openai-{name}")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://elsewhere.example/v1")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer for-openai\nX-Mine: for-openai")
    with endpoint(chat(None)) as server:
        assert client(server, key=named).chat(TURN) == ""
    headers = {name.lower(): value for name, value in server.asked[0][1].items()}
    assert headers.pop("authorization", None) == (named and f"Bearer {KEY}")
    assert "for-openai" not in str(headers)
    assert headers.keys() == {*clients._SENT, "accept-encoding"}


def test_a_moderation() -> None:
    with endpoint(moderation(True, violence=0.9, hate=0.25)) as server:
        assert client(server).moderate("text") == Moderation(True, {"violence": 0.9, "hate": 0.25})
    assert server.asked[0][0] == "/v1/moderations"
    assert server.asked[0][2] == {"model": "some/model", "input": "text"}


BROKEN = (hang_up, status(200, "<html>"), body({}), body([]), body({"choices": []}))


@pytest.mark.parametrize("passing", [*map(status, (408, 409, 429, 500, 502, 503, 529)), *BROKEN])
def test_what_may_pass_is_tried_again(passing: Step) -> None:
    with endpoint(passing, passing, chat("at last")) as server:
        assert client(server).chat(TURN) == "at last"
    assert len(server.asked) == 3


def test_tries_are_counted_and_a_wait_that_is_asked_for_is_kept() -> None:
    with endpoint(status(500)) as server, pytest.raises(EndpointError, match=r"gave no answer .last error: status 500"):
        client(server, attempts=4).chat(TURN)
    assert len(server.asked) == 4
    started = time.monotonic()
    with endpoint(status(429, Retry_After="0.3"), chat("done")) as server:
        assert client(server).chat(TURN) == "done"
    assert time.monotonic() - started > 0.3
    with endpoint(status(429, Retry_After="3600")) as server, pytest.raises(EndpointError, match="status 429"):
        client(server).chat(TURN)
    assert len(server.asked) == 1  # too long a wait


def test_a_late_reply_is_tried_again_and_then_given_up() -> None:
    with endpoint(late(0.4, chat("late")), chat("in time")) as server:
        assert client(server, timeout=0.1).chat(TURN) == "in time"
    with (
        endpoint(late(0.4, chat("late"))) as server,
        pytest.raises(EndpointError, match=r"no whole reply within 0\.1 s"),
    ):
        client(server, timeout=0.1, attempts=2).chat(TURN)


def test_a_reply_in_drops_has_an_end() -> None:
    """Every read is in time, and the whole never comes."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not over.wait(0.02):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    started = time.monotonic()
    with pytest.raises(EndpointError, match="no whole reply within"):
        Client(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "m", attempts=1, timeout=0.3).chat(TURN)
    assert time.monotonic() - started < 5
    over.set()
    thread.join()
    listener.close()


def test_a_reply_without_end_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "LARGEST_REPLY", 1000)
    with endpoint(status(200, "x" * 1001)) as server, pytest.raises(EndpointError, match="more than 1000 bytes"):
        client(server).chat(TURN)
    assert len(server.asked) == 1


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    down = Client(f"http://127.0.0.1:{port}/v1", "m", key="TEST_KEY")
    with pytest.raises(EndpointError, match=r"gave no answer .last error: ConnectError") as caught:
        down.chat(TURN)
    assert caught.value.exit_code == 4 and KEY not in str(caught.value)


def test_an_endpoint_that_is_down_is_not_waited_for_again_and_again() -> None:
    with endpoint(*[status(500)] * (3 * 2 + 1), chat("up again")) as server:
        asking = client(server, attempts=2)
        for _ in range(clients.PATIENCE):
            assert not asking.down
            with pytest.raises(EndpointError):
                asking.chat(TURN)
        assert asking.down and len(server.asked) == 6
        with pytest.raises(EndpointError):
            asking.chat(TURN)
        assert len(server.asked) == 7
        assert asking.chat(TURN) == "up again"
        assert not asking.down


def test_one_host_gets_the_key() -> None:
    """A redirect would carry the request, and a careless client the key, to whoever the endpoint names."""
    with endpoint(chat("stolen")) as other:
        for code in (301, 302, 303, 307, 308):
            with (
                endpoint(status(code, Location=f"{other.url}/chat/completions")) as server,
                pytest.raises(UsageError, match="a redirect, which is not followed"),
            ):
                client(server, key="TEST_KEY").chat(TURN)
        assert other.asked == []


@pytest.mark.parametrize(("code", "remedy"), [(401, "the key in TEST_KEY"), (404, "its address, and that it serves")])
def test_what_the_user_must_fix_is_not_tried_again(code: int, remedy: str) -> None:
    with endpoint(status(code, "no such thing")) as server, pytest.raises(UsageError, match=remedy):
        client(server, key="TEST_KEY").chat(TURN)
    assert len(server.asked) == 1
    with endpoint(status(401)) as server, pytest.raises(UsageError, match="whether it needs a key"):
        client(server).chat(TURN)


@pytest.mark.parametrize("code", [400, 403, 413, 422])
def test_a_request_that_is_refused_is_an_error_of_its_own(code: int) -> None:
    with endpoint(status(code, "content filter"), chat("ok")) as server:
        asking = client(server)
        with pytest.raises(EndpointError, match=rf"refused this request with {code} \(content filter\)"):
            asking.chat(TURN)
        assert asking.chat(TURN) == "ok" and not asking.down


@pytest.mark.parametrize(
    ("untaken", "sent"),
    [
        (("max_tokens",), {"temperature", "max_completion_tokens"}),
        (("temperature",), {"max_tokens"}),
        (("max_tokens", "temperature"), {"max_completion_tokens"}),
    ],
)
def test_a_model_that_takes_no_such_parameter_is_asked_without(untaken: tuple[str, ...], sent: set[str]) -> None:
    def scripted(asked: Any) -> tuple[int, dict[str, str], bytes]:
        wrong = [name for name in untaken if name in asked]  # named one by one, as OpenAI does
        return (status(400, f"Unsupported: '{wrong[0]}'.") if wrong else chat("good day"))(asked)

    with endpoint(scripted) as server:
        asking = client(server)
        assert asking.chat(TURN) == asking.chat(TURN) == "good day"
    assert len(server.asked) == len(untaken) + 2  # remembered
    assert all(server.asked[n][2].keys() == {"model", "messages"} | sent for n in (-1, -2))


def test_a_refusal_that_only_speaks_of_a_parameter_changes_nothing() -> None:
    refused = status(400, "filtered: what temperature does it boil at")
    with endpoint(refused, refused, chat("ok")) as server:
        asking = client(server)
        with pytest.raises(EndpointError, match="refused this request with 400"):
            asking.chat(TURN)
        assert asking.chat(TURN) == "ok"
    assert [("temperature" in asked) for _, _, asked in server.asked] == [True, False, True]


@pytest.mark.parametrize("code", [400, 401, 404, 500, 200])
def test_the_key_is_nowhere(code: int, caplog: pytest.LogCaptureFixture) -> None:
    """An endpoint that says the key back does not get it into an error; nor does anything else show it."""
    caplog.set_level(logging.DEBUG)
    echo = f"Incorrect key \x1b[31m{KEY}\r\n" + "and so on " * 100
    with endpoint(status(code, echo)) as server, pytest.raises((EndpointError, UsageError)) as caught:
        asking = client(server, key="TEST_KEY", attempts=2)
        asking.chat(TURN)
    text = str(caught.value)
    assert KEY not in text and "***" in text
    assert text.isprintable() and len(text) < 600
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert KEY not in repr(asking) and KEY not in caplog.text
    assert "TEST_KEY" in repr(asking)


def test_results_come_in_order_and_errors_stand_in_their_place() -> None:
    busy, most = 0, 0
    lock = threading.Lock()

    def work(item: int) -> int:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.002 * (10 - item))
        with lock:
            busy -= 1
        if item == 3:
            raise EndpointError("three")
        return item * item

    asking = Client("http://localhost/v1", "m", concurrency=4)
    found = asking.each(work, range(10))
    assert [str(f) if isinstance(f, EndpointError) else f for f in found] == [0, 1, 4, "three", 16, 25, 36, 49, 64, 81]
    assert 1 < most <= 4
    assert asking.each(work, []) == []


@pytest.mark.parametrize(("third", "error"), [(["ends"], UsageError), ([], KeyboardInterrupt)])
def test_what_ends_it_waits_for_no_other_call(third: list[str], error: type[BaseException]) -> None:
    """One is asked to wait and one hangs when a third ends them; neither holds up the end, and none tries again."""

    def scripted(asked: Any) -> tuple[int, dict[str, str], bytes]:
        steps = {"busy": status(429, Retry_After="30"), "hangs": late(30, chat("")), "ends": late(0.5, status(401))}
        return steps[asked["messages"][0]["content"]](asked)

    with endpoint(scripted) as server:
        asking = Client(server.url, "m", concurrency=3)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        if not third:
            threading.Timer(0.5, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
        started = time.monotonic()
        with pytest.raises(error):
            asking.each(lambda text: asking.chat([{"role": "user", "content": text}]), ["busy", "hangs", *third])
        signal.signal(signal.SIGINT, before)
        assert time.monotonic() - started < 10
        time.sleep(0.2)
        assert len(server.asked) == 2 + len(third)


def test_many_threads_share_a_client() -> None:
    def echo(asked: Any) -> tuple[int, dict[str, str], bytes]:
        return chat(asked["messages"][0]["content"])(asked)

    with endpoint(echo) as server:
        asking = client(server, concurrency=8)
        texts = [f"text {i} ünïcödé \u2028" for i in range(64)]
        assert asking.each(lambda text: asking.chat([{"role": "user", "content": text}]), texts) == texts


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host/v1", "plain URL"),
        ("host/v1", "plain URL"),
        ("https://", "plain URL"),
        ("https://host/v1?a=b", "plain URL"),
        ("https://host/v1#a", "plain URL"),
        ("https://host/\nv1", "plain URL"),
        ("https://×/v1", "plain URL"),
        ("https://host:port/v1", "not a URL"),
        ("https://[::1/v1", "not a URL"),
        ("https://me:secret@host/v1", "user or password"),
        ("http://api.example.com/v1", "unencrypted"),
        ("http://8.8.8.8/v1", "unencrypted"),
    ],
)
def test_addresses_that_are_not_taken(url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        Client(url, "m", key="TEST_KEY")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://localhost:1/v1/", "http://127.0.0.1/v1", "http://10.0.0.1/v1", "http://[::1]/v1"]
)
def test_a_key_may_go_unencrypted_to_what_is_near(url: str) -> None:
    assert Client(url, "m", key="TEST_KEY").base_url == url.rstrip("/")


@pytest.mark.parametrize("wrong", [KEY, "gsk_0123456789abcdef", "", "A B", "ANOTHER_KEY"])
def test_a_key_in_the_place_of_its_name_is_not_repeated(wrong: str) -> None:
    with pytest.raises(UsageError) as caught:
        Client("https://host/v1", "m", key=wrong)
    assert not wrong or wrong == "ANOTHER_KEY" or wrong not in str(caught.value)


@pytest.mark.parametrize("value", ["", "  ", "two\nlines", "schlüssel"])
def test_a_variable_that_holds_no_key(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", value)
    with pytest.raises(UsageError, match="TEST_KEY") as caught:
        Client("https://host/v1", "m", key="TEST_KEY")
    assert not value.strip() or value not in str(caught.value)


@pytest.mark.parametrize(
    "result",
    [
        {"flagged": "yes"},
        {},
        {"flagged": True, "category_scores": {"a": 2}},
        {"flagged": True, "category_scores": {"a": float("nan")}},
        {"flagged": True, "category_scores": {"a": 10**400}},
    ],
)
def test_a_moderation_that_is_none(result: Any) -> None:
    text = json.dumps({"results": [result]})
    with endpoint(status(200, text)) as server, pytest.raises(EndpointError, match="breaks the protocol"):
        client(server, attempts=2).moderate("text")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda some: (
        st.lists(some, max_size=3) | st.dictionaries(st.sampled_from(PARTS) | st.text(max_size=3), some, max_size=4)
    ),
    max_leaves=12,
)


def test_half_a_character_is_the_fault_of_no_endpoint() -> None:
    with endpoint(chat("ok")) as server:
        asking = client(server)
        for _ in range(clients.PATIENCE):
            with pytest.raises(EndpointError, match="a lone surrogate"):
                asking.chat([{"role": "user", "content": "\ud800"}])
        assert not asking.down and server.asked == []


@cache
def anywhere() -> Client:
    return Client("https://host/v1", "m", attempts=1)


@settings(deadline=None)  # the first one imports the SDK
@given(
    JSON, st.sampled_from([200, 204, 299, 404, 418, 500, 599]), st.text(max_size=30) | st.floats().map(str) | st.none()
)
@example({"choices": [{"message": {"content": 5}}]}, 200, None)
def test_whatever_an_endpoint_says_is_a_reply_or_an_error_of_ours(reply: Any, code: int, wait: str | None) -> None:
    asking = anywhere()
    headers = {"content-type": "application/json"} | ({} if wait is None else {"retry-after": wait.encode()})
    answer = httpx2.Response(code, headers=headers, content=json.dumps(reply))
    asking._sdk._client._transport = httpx2.MockTransport(lambda asked: answer)
    for call in (lambda: asking.chat(TURN), lambda: asking.moderate("text")):
        try:
            found = call()
        except (EndpointError, UsageError) as error:
            assert str(error).isprintable() and len(str(error)) < 600
        else:
            assert code < 300 and isinstance(found, str | Moderation)
