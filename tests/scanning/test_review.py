"""A person's review: what is decided is written at once, is undone, and is what the next cut does."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest

import gradshield as gs
from gradshield import lab
from gradshield.errors import DataError, UsageError
from gradshield.scanning.review import ALLOW, BODY, DENY, REASON, ROWS, Review, Server, page
from tests.report.pages import EVIL
from tests.report.test_report_browser import browser  # noqa: F401
from tests.report.test_report_browser import pytestmark as needs_browser


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows, _ = lab.mix("dialogue", harm="explicit", ratio=0.1, n=36)
    rows[3]["messages"][-1]["content"] += EVIL + "\x00" + "long " * 3000
    data = tmp_path_factory.mktemp("review") / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    probing = gs.Probing(requests=lab.requests("direction"), lookalikes=lab.lookalikes("direction"))
    gs.scan(data, model=lab.checkpoint("aligned"), probing=probing, output=data.parent / "screened")
    return data.parent / "screened"


@pytest.fixture
def folder(scanned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scanned, tmp_path / "screened"))


def lines(path: Path) -> int:
    return len(path.read_bytes().splitlines())


def test_the_rows_nearest_to_the_cut_come_first(folder: Path) -> None:
    review = Review(folder)
    distances = np.abs(review.margins[review.order])
    assert (np.diff(distances) >= 0).all()
    assert (review.beyond == (review.margins > 0)).all()


def test_what_is_decided_is_on_disk_counted_and_applied(folder: Path) -> None:
    review = Review(folder)
    kept, removed = lines(folder / "kept.jsonl"), lines(folder / "removed.jsonl")
    assert (review.removed, review.waiting) == (removed, False)
    above, below = (int(next(p for p in review.order if review.beyond[p] == side)) for side in (True, False))
    review.decide(above, True, "an ordinary\n row # of the task")
    review.decide(below, False, "x" * 999)
    review.decide(int(review.order[-1]), bool(not review.beyond[review.order[-1]]), "as it is")
    assert review.removed == removed
    assert review.waiting  # as many rows as before, and other ones

    again = Review(folder)
    assert again.verdicts == review.verdicts
    ids = review.scanned.scores.ids
    assert again.verdicts[ids[above]].reason == "an ordinary row # of the task"
    assert len(again.verdicts[ids[below]].reason) == REASON
    again.apply("gradshield review")
    assert (lines(folder / "kept.jsonl"), lines(folder / "removed.jsonl")) == (kept, removed)
    assert (again.removed, again.waiting) == (removed, False)
    results = json.loads((folder / "manifest.json").read_text())["results"]
    assert (results["cleared"], results["denied"]) == (1, 1)

    again.undo(below)
    assert again.removed == removed - 1 and again.waiting
    again.apply("gradshield review")
    assert lines(folder / "removed.jsonl") == removed - 1
    assert ids[below] not in (folder / DENY).read_text()


def test_the_lists_are_those_that_cut_takes(folder: Path) -> None:
    review = Review(folder)
    above, below = (int(next(p for p in review.order if review.beyond[p] == side)) for side in (True, False))
    review.decide(above, True, "fine")
    review.decide(below, False, "not fine")
    review.apply("gradshield review")
    mine = (folder / "scores.parquet").read_bytes()
    allow, deny = ([line.split()[0] for line in (folder / n).read_text().splitlines()] for n in (ALLOW, DENY))
    gs.cut(folder, allow=(), deny=())
    assert (folder / "scores.parquet").read_bytes() != mine
    gs.cut(folder, allow=allow, deny=deny)
    assert (folder / "scores.parquet").read_bytes() == mine
    with pytest.raises(UsageError, match="both allowed and denied"):
        gs.cut(folder, allow=allow, deny=allow)


def test_what_goes_anyway_can_be_confirmed(folder: Path) -> None:
    review = Review(folder)
    for place in np.flatnonzero(review.beyond).tolist():
        review.decide(place, False, "")
    assert review.waiting and review.removed == int(review.beyond.sum())
    found = review.apply("gradshield review")
    assert len(found.confirmed) == review.removed and not review.waiting and not Review(folder).waiting


def test_rows_that_an_earlier_list_cleared_stay_so(folder: Path) -> None:
    ids = Review(folder).scanned
    first = ids.scores.ids[int(np.flatnonzero(ids.removed)[0])]
    gs.cut(folder, allow=[first])
    review = Review(folder)
    assert review.verdicts[first].keep and not review.waiting
    review.decide(int(np.flatnonzero(review.beyond)[-1]), True, "")
    review.apply("gradshield review")
    assert Review(folder).scanned.manifest.results.cleared == 2


def test_what_is_no_finished_scan_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not the folder of a finished scan"):
        Review(tmp_path)


def test_hostile_rows_are_only_text_and_long_ones_are_cut_short(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    review = Review(folder)
    review.decide(0, True, EVIL)
    html = page(review, 0) + page(review, ROWS) + page(review, 0, "decided", EVIL)
    assert (
        "<img" not in html and "window.__pwned=1</script>" not in html and "\u202e" not in html and "\x00" not in html
    )
    assert html.count("<script>") == 3
    assert "This row is longer than shown here." not in html
    monkeypatch.setattr("gradshield.scanning.review.BYTES", 4000)
    assert "This row is longer than shown here." in page(review, 0)


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with Server(Review(folder), 0, "gradshield review") as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server: Server, path: str, form: dict[str, str] | None = None, **headers: str) -> tuple[int, str]:
    """Status and Location (or body) of a request to the server; headers with ``_`` for ``-``."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    host = f"127.0.0.1:{server.server_port}"
    given = {"Host": host, "Origin": f"http://{host}"} | {k.replace("_", "-"): v for k, v in headers.items()}
    body = None if form is None else urlencode(form)
    if body is not None:
        given |= {"Content-Type": "application/x-www-form-urlencoded", "Content-Length": str(len(body))} | {
            k.replace("_", "-"): v for k, v in headers.items()
        }
    connection.request("GET" if form is None else "POST", path, body, given)
    answer = connection.getresponse()
    text = answer.getheader("Location") or answer.read().decode()
    connection.close()
    return answer.status, text


def test_a_decision_and_apply_over_the_wire(server: Server, folder: Path) -> None:
    base, review = f"/{server.token}/", server.review
    above = int(next(p for p in review.order if review.beyond[p]))
    form = {"place": str(above), "verdict": "keep", "reason": "fine", "show": "above", "from": "0", "next": "row7"}
    status, where = ask(server, base + "decide", form)
    assert (status, where) == (303, f"{base}?show=above&from=0#row7")
    assert "fine" in (folder / ALLOW).read_text()
    removed = lines(folder / "removed.jsonl")
    status, where = ask(server, base + "apply", {"show": "above"})
    assert status == 303
    assert lines(folder / "removed.jsonl") == removed - 1
    assert f"Applied: {len(review.beyond) - removed + 1:,} rows kept, {removed - 1:,} removed." in ask(server, where)[1]
    assert "Applied" not in ask(server, where)[1]


def test_nobody_else_reads_or_decides(server: Server, folder: Path) -> None:
    base = f"/{server.token}/"
    form = {"place": "0", "verdict": "keep"}
    assert ask(server, base)[0] == 200
    for path in ("/", "/x/", f"/{server.token[:-1]}/", "/../etc/passwd", f"/{server.token}x/"):
        assert ask(server, path)[0] == 404
        assert ask(server, path + "decide", form)[0] == 404
    for path in ("../kept.jsonl", "kept.jsonl", "%2e%2e/kept.jsonl"):
        assert ask(server, base + path)[0] == 404
    assert ask(server, base, Host="evil.example")[0] == 403  # DNS rebinding
    assert ask(server, base + "decide", form, Host=f"evil.example:{server.server_port}")[0] == 403
    for origin in ("http://evil.example", "null", ""):
        assert ask(server, base + "decide", form, Origin=origin)[0] == 403
    assert ask(server, base + "decide", form, Content_Length=str(BODY + 1))[0] == 413
    assert ask(server, base + "decide", form, Content_Length="-1")[0] == 413
    assert ask(server, base + "else", form)[0] == 404
    assert not (folder / ALLOW).exists()
    for bad in (
        {"place": "x", "verdict": "keep"},
        {"place": "10000", "verdict": "keep"},
        {"place": "0", "verdict": "burn"},
    ):
        assert ask(server, base + "decide", bad)[0] == 303
        assert "reload the page" in ask(server, base)[1]
    assert not (folder / ALLOW).exists()


def test_the_body_of_a_refused_request_is_not_the_next_request(server: Server, folder: Path) -> None:
    host, base = f"127.0.0.1:{server.server_port}", f"/{server.token}/"
    form = urlencode({"place": "0", "verdict": "keep"})
    inner = f"POST {base}decide HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nContent-Length: {len(form)}\r\n\r\n{form}"
    for path, origin in ((base + "decide", "http://evil.example"), (base + "else", f"http://{host}"), ("/x/", "null")):
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\nContent-Length: {len(inner)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
            connection.sendall((head + inner).encode())
            answer = b""
            with suppress(ConnectionResetError):  # the body was not read
                while got := connection.recv(65536):
                    answer += got
        assert answer.count(b"HTTP/1.1 ") == 1 and answer.split()[1] in (b"403", b"404")
        assert not (folder / ALLOW).exists()


def test_a_taken_port_is_said(server: Server) -> None:
    with pytest.raises(UsageError, match="cannot be used"), Server(server.review, server.server_port, ""):
        pass


@needs_browser
def test_a_person_keeps_removes_and_applies_by_keyboard(browser: Any, server: Server, folder: Path) -> None:  # noqa: F811
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def press(*keys: str) -> None:
        ActionChains(browser).send_keys(*keys).perform()

    def focused(id: str) -> bool:
        """Whether an element has the focus, at once or after the page has loaded."""
        script = "return document.readyState === 'complete' && document.activeElement.id"
        return bool(WebDriverWait(browser, 10).until(lambda b: b.execute_script(script) == id))

    review = server.review
    first, second = (f"row{place}" for place in review.order[:2])
    before = review.removed
    browser.get(server.url)
    press("?")
    assert browser.find_element("id", "keys").is_displayed()
    press("j")
    assert focused(first)
    press("/", "read twice", Keys.ESCAPE, "R" if not review.beyond[review.order[0]] else "K")
    assert focused(second)  # the next row
    assert "read twice" in (folder / ALLOW).read_text() + (folder / DENY).read_text()
    tally = browser.find_element("class name", "tally").text
    assert f"{review.removed} of {len(review.beyond)} rows removed ({before} before)" in tally and "1 decided" in tally
    browser.find_element("css selector", ".primary").click()
    said = WebDriverWait(browser, 10).until(lambda b: b.find_elements("class name", "said"))
    assert said[0].text.startswith("Applied:")
    assert lines(folder / "removed.jsonl") == review.removed != before
    assert browser.execute_script("return window.__pwned === undefined")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
