"""The dashboard without a browser: who gets in, what each page shows, and what its forms do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import update

import gradshield as gs
from gradshield import lab
from gradshield.gateway.app import create_app
from gradshield.gateway.dashboard import pages
from gradshield.gateway.dashboard.visit import COOKIE, LIFETIME, SECRET, Sessions
from gradshield.gateway.settings import LAB, Policy, Settings
from gradshield.gateway.store import UNSAFE, Store
from gradshield.gateway.tables import Audit, Job, Key, identity
from gradshield.scanning.settings import ScanSettings
from gradshield.stats import wilson
from gradshield.training.course import lab_probing

EVIL = "<script>window.__pwned=1</script>\u202egnp.\u0007jsonl"
METHOD = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}}


@pytest.fixture(scope="session")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real scan of the lab's rows: 40 of a task and 30 planted ones."""
    folder = tmp_path_factory.mktemp("scanned")
    rows, _ = lab.mix("dialogue", harm="explicit", ratio=0.43, n=40)
    path = folder / "training_file.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    gs.scan(
        str(path),
        model=lab.checkpoint("aligned"),
        probing=lab_probing(),
        output=folder / "scan",
        settings=ScanSettings(seed=1),
    )
    return folder


class Desk:
    """A gateway, and an operator of its one project who is logged in."""

    def __init__(self, folder: Path) -> None:
        self.settings, self.sent = Settings(models={LAB: LAB}, folder=folder), list[str]()
        self.app = create_app(self.settings, self.sent.append)
        self.store: Store = self.app.state.gateway.store
        self.project = self.store.add_project("assistants", Policy(rows="review")).id
        self.key, self.secret = self.store.add_key(self.project, "Ada", "operator")
        self.client = self.visitor(self.secret)

    def visitor(self, secret: str = "") -> TestClient:
        client = TestClient(self.app, follow_redirects=False)
        if secret:
            assert self.enter(client, secret).status_code == 303
        return client

    def enter(self, client: TestClient, secret: str) -> Response:
        return client.post("/login", data={"token": token(client.get("/login")), "key": secret})

    def job(self, project: str = "", name: str = "rows.jsonl", **fields: Any) -> str:
        project = project or self.project
        file = self.store.add_file(project, identity("file"), name, "fine-tune", 9, "0" * 64)
        given = {"model": LAB, "validation_file": None, "method": METHOD, "seed": 1, "suffix": None, "labels": None}
        return self.store.add_job(project, 100, training_file=file.id, **given | fields).id

    def held(self, scanned: Path, project: str = "", **fields: Any) -> str:
        id = self.job(project, **fields)
        shutil.copytree(scanned / "scan", self.settings.job_folder(id) / "scan")
        self.store.claim(id, "me", 60)
        self.store.hold(
            id, "me", {"code": "review", "message": "30 rows are harmful", "removed": 30, "movable": True}, "look"
        )
        return id

    def post(self, path: str, client: TestClient | None = None, **data: Any) -> Response:
        client = client or self.client
        return client.post(path, data={"token": token(client.get("/health")), **data})

    def status(self, id: str) -> str:
        return self.store.get(Job, self.project, id).status

    def audit(self) -> Audit:
        return self.store.audits(self.project)[0]


def token(page: Response) -> str:
    found = re.search(r'name="token" value="([0-9a-f]{64})"', page.text)
    assert found, page.text[:500]
    return found.group(1)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.store.close()


# In and out


@pytest.mark.parametrize(
    "path", ["/", "/models", "/health", "/audit", "/jobs/x", "/jobs/x/live", "/jobs/x/files/report.html"]
)
def test_no_page_without_a_session(desk: Desk, path: str) -> None:
    answer = desk.visitor().get(path)
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")


def test_the_cookie_and_the_policy_are_strict(desk: Desk) -> None:
    client = desk.visitor()
    answer = desk.enter(client, desk.secret)
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and desk.secret not in cookie
    assert "Secure" not in cookie  # on plain loopback; over TLS it is:
    over = TestClient(desk.app, base_url="https://testserver", follow_redirects=False)
    assert "Secure" in desk.enter(over, desk.secret).headers["set-cookie"]
    for path in ("/", "/login", "/jobs/none"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self' 'sha256-" in policy
        assert "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert headers["cache-control"] == "no-store"
    assert (desk.settings.folder / SECRET).stat().st_mode & 0o777 == 0o600


def test_a_wrong_key_a_users_key_and_a_revoked_key_do_not_enter(desk: Desk) -> None:
    user = desk.store.add_key(desk.project, "ci")[1]
    for secret, said in (("gs-wrong", "no such key"), (user, "is a user"), ("", "no such key"), ("\0", "no such key")):
        client = desk.visitor()
        answer = desk.enter(client, secret)
        assert answer.status_code == 403
        assert said in answer.text
        assert client.get("/").status_code == 303
    desk.store.revoke(desk.key.id)
    assert desk.client.get("/").status_code == 303  # a session ends with its key
    assert desk.enter(desk.visitor(), desk.secret).status_code == 403


def test_a_user_cannot_approve_even_with_a_session(desk: Desk, scanned: Path) -> None:
    id, form = desk.held(scanned), token(desk.client.get("/"))
    with desk.store.writing() as session:
        session.execute(update(Key).where(Key.id == desk.key.id).values(role="user"))
    answer = desk.client.post(f"/jobs/{id}", data={"token": form, "do": "approve", "reason": "x"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert desk.status(id) == "paused"


def test_a_forged_an_ended_and_another_gateways_cookie_are_nothing(desk: Desk, tmp_path: Path) -> None:
    sessions: Sessions = desk.app.state.sessions
    good = sessions.new(desk.key.id)
    other = tmp_path / "other"
    other.mkdir()
    key, until, nonce, mac = good.split(".")
    later = f"{key}.{int(until) + 9}.{nonce}"
    ended = sessions.sign(f"{key}.{int(time.time()) - 1}.{nonce}")
    forged = (
        f"{later}.{mac}",
        f"{key}.{until}.{nonce}.{'0' * 64}",
        Sessions(other).sign(later),
        ended,
        "....",
        "x",
        mac,
        sessions.new(),  # one that nobody has logged into
    )
    for cookie, status in [(good, 200), *((one, 303) for one in forged)]:
        client = desk.visitor()
        client.cookies.set(COOKIE, cookie)
        assert client.get("/").status_code == status, cookie
    assert int(until) - time.time() == pytest.approx(LIFETIME, abs=9)
    assert Sessions(desk.settings.folder).key(good) == desk.key.id  # after a restart, and in another process


def test_a_form_without_this_sessions_token_does_nothing(desk: Desk, scanned: Path) -> None:
    id, stranger = desk.held(scanned), desk.visitor(desk.secret)
    wrong = ({}, {"token": ""}, {"token": "0" * 64}, {"token": token(stranger.get("/"))}, {"token": "\u00e9"})
    for path in (f"/jobs/{id}", "/models/delete", "/logout", "/login"):
        for fields in wrong:
            answer = desk.client.post(path, data={"do": "approve", "reason": "x", "key": desk.secret, **fields})
            assert answer.status_code == 403, path
            assert "out of date" in answer.text
    assert desk.status(id) == "paused"
    assert desk.client.get("/").status_code == 200


def test_the_log_in_page_says_what_the_server_says_and_leaves_a_visit_alone(desk: Desk) -> None:
    assert "hacked" not in desk.client.get("/login?problem=hacked&status=500").text
    assert desk.client.get("/").status_code == 200


def test_logging_out_ends_the_visit(desk: Desk) -> None:
    left = desk.post("/logout")
    assert left.headers["location"] == "/login"
    assert left.headers["cache-control"] == "no-store" and "content-security-policy" in left.headers
    assert desk.client.get("/").status_code == 303


# One project never sees another


def test_another_projects_job_is_not_there(desk: Desk, scanned: Path) -> None:
    other = desk.store.add_project("others", Policy()).id
    id = desk.held(scanned, other, name="theirs.jsonl", suffix="theirs")
    for path in ("", "/live", "/cut?value=0", "/files/scan/removed.jsonl"):
        assert desk.client.get(f"/jobs/{id}{path}").status_code == 404, path
    for do in ("approve", "reject", "look", "release model"):
        assert desk.post(f"/jobs/{id}", do=do, reason="x").status_code == 404
    assert "theirs" not in desk.client.get("/").text
    assert "theirs" not in desk.client.get("/audit").text
    assert desk.store.get(Job, other, id).status == "paused"
    assert desk.client.get(f"/?after={id}").status_code == 404


def test_another_projects_model_is_not_there(desk: Desk) -> None:
    other = desk.store.add_project("others", Policy()).id
    id = desk.job(other)
    desk.store.claim(id, "me", 60)
    desk.store.finish(id, "me", "ft:lab:theirs")
    assert "theirs" not in desk.client.get("/models").text
    assert desk.post("/models/delete", model="ft:lab:theirs").status_code == 404


@pytest.mark.parametrize("text", ["' OR 1=1 --", "1; DROP TABLE jobs", "\\", "%27%20OR%201"])
def test_sql_in_an_address_is_text(desk: Desk, text: str) -> None:
    id = desk.job(suffix="mine")
    for path, name in (("/", "after"), ("/models", "after"), ("/audit", "before"), (f"/jobs/{id}/cut", "value")):
        answer = desk.client.get(path, params={name: text})
        assert answer.status_code in (400, 404) and "mine" not in answer.text, (path, answer.status_code)
    for form in ({"do": text}, {"page": text}, {"cut": text}, {"released": text}):
        assert desk.post(f"/jobs/{id}", **form).status_code in (200, 409)
    assert desk.post("/models/delete", model=text).status_code == 404
    assert desk.client.get(f"/jobs/{quote(text, safe='')}").status_code == 404
    assert desk.status(id) == "validating_files"


# What pages show


def test_hostile_text_is_only_text(desk: Desk, scanned: Path) -> None:
    id = desk.held(scanned, name=EVIL, suffix=EVIL, labels={EVIL: EVIL})
    assert desk.post(f"/jobs/{id}", do="reject", reason=f"{EVIL}\0").status_code == 303
    assert "\0" not in desk.audit().reason
    for path in ("/", f"/jobs/{id}", f"/jobs/{id}/live", "/audit"):
        page = desk.client.get(path).text
        assert "&lt;script&gt;" in page, path
        assert "<script>" not in page
        assert not {"\u202e", "\u0007", "\0"} & set(page)


def test_hostile_rows_are_only_text(desk: Desk, scanned: Path) -> None:
    id = desk.held(scanned)
    folder = desk.settings.job_folder(id) / "scan"
    views = json.loads((folder / ".gradshield" / "views.json").read_text())
    half = list(views)[::2]  # the other half is shown from the files of rows
    evil = {row: [[EVIL, "prompt", None], [EVIL, "response", 1.0]] for row in half}
    (folder / ".gradshield" / "views.json").write_text(json.dumps(evil))
    for name in ("kept.jsonl", "removed.jsonl"):
        lines = len((folder / name).read_text().splitlines())
        (folder / name).write_text(f"{json.dumps(EVIL, ensure_ascii=False)}\n" * lines)
    everything = "".join(desk.post(f"/jobs/{id}", page=str(page), cut="-9").text for page in range(1, 5))
    assert everything.count("&lt;script&gt;") >= 2 * 70
    assert everything.count("⟨U+202E⟩") >= 2 * 70
    assert "<script>" not in everything
    assert "\u202e" not in everything


def test_rows_are_shown_only_when_asked_for_and_never_in_a_url(desk: Desk, scanned: Path) -> None:
    id = desk.held(scanned)
    first = desk.client.get(f"/jobs/{id}").text
    assert "These rows may hold harmful text" in first
    assert 'class="tokens"' not in first
    shown = desk.post(f"/jobs/{id}", page="1").text
    assert shown.count('name="released"') == pages.ROWS
    assert shown.index("may hold harmful text") < shown.index('class="tokens"')
    assert re.search(r'<span class="[hs]\d', shown)  # tints
    assert "Page 1 of 2" in shown
    rest = pq.read_table(scanned / "scan" / "scores.parquet")["removed"].to_pylist().count(True) - pages.ROWS
    assert 0 < rest < pages.ROWS
    assert desk.post(f"/jobs/{id}", page="99999").text.count('name="released"') == rest  # the last page
    assert all("?" not in link or link.startswith("/assets/") for link in re.findall(r'(?:href|src)="([^"]+)"', shown))


def test_the_answer_to_a_moved_cut_is_that_of_the_scores(desk: Desk, scanned: Path) -> None:
    id = desk.held(scanned)
    table = pq.read_table(scanned / "scan" / "scores.parquet")
    scores, removed = table["score"].to_numpy(), table["removed"].to_numpy(zero_copy_only=False)
    for value in (*np.quantile(scores, [0.2, 0.9]), -9.0, 9.0):
        page = desk.client.get(f"/jobs/{id}/cut?value={value}").text
        go = scores > value
        assert f"{go.sum()} of {len(scores)} rows go" in page
        assert f"{(go & ~removed).sum()} more and {(removed & ~go).sum()} fewer" in page
        assert f"{go.sum()} removed" in page  # the chart's caption
        for words, which in (("Also removed", go & ~removed), ("No longer removed", removed & ~go)):
            named = re.search(rf"{words}: rows? ([\d, ]+)", page)
            assert bool(named) == bool(which.any())
            if named:
                numbers = [int(one) for one in named.group(1).split(",") if one.strip()]
                assert numbers == np.flatnonzero(which).tolist()[: pages.NAMED]
    for value in ("nan", "inf", "x"):
        assert desk.client.get(f"/jobs/{id}/cut?value={value}").status_code in (400, 404)
    again = desk.post(f"/jobs/{id}", do="look", cut="-9", reason="kept while looking")
    assert f"{len(scores)} of {len(scores)} rows go" in again.text
    assert "kept while looking" in again.text
    assert desk.post(f"/jobs/{id}", do="approve", cut="<b>", reason="x").status_code == 409
    assert desk.status(id) == "paused"


def test_rows_whose_tokens_were_not_kept_are_shown_as_they_came(scanned: Path) -> None:
    found = pages.read_scan(scanned / "scan")
    assert found is not None
    bare = pages.Scan(found.folder, found.manifest, found.scores, found.removed, found.categories, found.cuts, {})
    shown, count, near = bare.rows(-9.0, 1)
    lines = (scanned / "training_file.jsonl").read_text().split("\n")
    assert count == 4
    assert near == []
    for row in shown:
        assert "".join(text for text, _, _ in row.view.pieces).strip() == lines[row.view.row]


def test_a_scan_that_is_damaged_or_not_there_shows_none(desk: Desk, scanned: Path, tmp_path: Path) -> None:
    assert pages.read_scan(tmp_path) is None
    id = desk.held(scanned)
    folder = desk.settings.job_folder(id) / "scan"
    table = pq.read_table(folder / "scores.parquet")
    pq.write_table(table.slice(3), folder / "scores.parquet")
    assert pages.read_scan(folder) is None
    (folder / "scores.parquet").write_bytes(b"x")
    page = desk.client.get(f"/jobs/{id}")
    assert page.status_code == 200
    assert "Scores and cut" not in page.text
    assert isinstance(table, pa.Table)


def test_progress_is_live_and_works_by_loading_the_page(desk: Desk) -> None:
    id = desk.job()
    desk.store.claim(id, "me", 60)
    desk.store.say(id, "me", "Fine-tuning job started", status="running")
    desk.store.note(id, "me", stage="scoring rows", done=12, total=40)
    for path in ("/", f"/jobs/{id}", f"/jobs/{id}/live"):
        page = desk.client.get(path).text
        assert '<progress value="12" max="40"' in page
        assert "scoring rows, 12 of 40" in page
    assert "Fine-tuning job started" in desk.client.get(f"/jobs/{id}/live").text


def test_lists_have_pages(desk: Desk) -> None:
    ids = [desk.job(suffix=f"s{i:02}") for i in range(pages.JOBS + 3)]
    first = desk.client.get("/").text
    assert first.count("/jobs/") == pages.JOBS
    older = re.search(r'href="(/\?after=[^"]+)"', first)
    assert older
    second = desk.client.get(older.group(1)).text
    assert [f'/jobs/{id}"' in second for id in ids[:4]] == [True, True, True, False]
    for i in range(pages.LINES + 2):
        desk.store.set_policy(desk.project, Policy(), f"reason {i}.")
    first = desk.client.get("/audit").text
    assert "reason 101." in first and "reason 1." not in first
    second = desk.client.get(re.search(r'href="(/audit\?before=\d+)"', first).group(1)).text  # type: ignore[union-attr]
    assert "reason 1." in second and "reason 101." not in second


# What forms do


def test_approving_is_audited_and_sends_the_job(desk: Desk, scanned: Path) -> None:
    id = desk.held(scanned)
    assert desk.post(f"/jobs/{id}", do="approve", reason="  ").status_code == 409
    assert desk.status(id) == "paused"
    assert desk.post(f"/jobs/{id}", do="approve", reason="All are harmful").headers["location"] == f"/jobs/{id}"
    assert (desk.status(id), desk.sent) == ("queued", [id])
    line = desk.audit()
    assert (line.actor, line.action, line.target, line.reason) == (desk.key.id, "approve job", id, "All are harmful")
    assert "All are harmful" in desk.client.get("/audit").text
    assert "Ada" in desk.client.get("/audit").text
    again = desk.post(f"/jobs/{id}", do="approve", reason="twice")
    assert again.status_code == 409
    assert "does not wait for a review" in again.text
    assert desk.sent == [id]


def test_released_rows_and_a_moved_cut_reach_the_job(desk: Desk, scanned: Path) -> None:
    id = desk.held(scanned)
    first = desk.post(f"/jobs/{id}", page="1").text
    chosen = re.findall(r'type="checkbox" name="released" value="([^"]+)"', first)[:2]
    second = desk.post(f"/jobs/{id}", page="2", released=chosen, reason="so far").text
    assert all(f'<input type="hidden" name="released" value="{one}">' in second for one in chosen)
    assert "2 released on other pages" in second
    back = desk.post(f"/jobs/{id}", page="1", released=chosen).text
    assert back.count(" checked>") == 2
    refused = desk.post(f"/jobs/{id}", do="approve", reason="x", released=[*chosen, "not-a-row"], cut="0.9")
    assert refused.status_code == 409
    assert 'name="cut"' in refused.text and 'value="0.9"' in refused.text  # what was typed is still there
    assert desk.status(id) == "paused"
    desk.post(f"/jobs/{id}", do="approve", reason="Two are jokes", released=chosen, cut="0.9")
    job = desk.store.get(Job, desk.project, id)
    assert job.decision == {"released": sorted(chosen), "threshold": "fixed:value=0.9"}
    assert desk.audit().data == job.decision


def test_looking_at_a_job_needs_no_torch(desk: Desk, scanned: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from gradshield.gateway.dashboard import pages; "
        "found = pages.read_scan(Path(sys.argv[1])); found.charts(0.5); found.answer(0.5); assert found.rows(-9.0, 1)[0]; "
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(scanned / "scan")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


def test_rejecting_fails_the_job_with_the_reason(desk: Desk, scanned: Path) -> None:
    id = desk.held(scanned)
    assert desk.post(f"/jobs/{id}", do="reject", reason="No").status_code == 303
    assert (desk.status(id), desk.audit().action, desk.audit().reason) == ("failed", "reject job", "No")
    assert "An operator rejected the job: No" in desk.client.get(f"/jobs/{id}").text
    assert desk.sent == []


def finished(desk: Desk, certified: bool) -> str:
    id, folder = desk.job(suffix="m"), Path()
    folder = desk.settings.job_folder(id)
    folder.mkdir(parents=True)
    reason = None if certified else "by phrases the attack success rate may be as high as 12 %"
    judges = {"phrases": {"upper": 0.02 if certified else 0.12}}
    predicate = {"certified": certified, "reason": reason, "claim": {"limit": 0.06}, "judges": judges}
    (folder / "certificate.json").write_text(json.dumps({"predicate": predicate}))
    (folder / "report.html").write_text("<h1>x</h1>")
    rates = {"judges": {"phrases": vars(wilson(3, 200))}, "over_refusal": None, "utility": None}
    safety = {"before": rates, "after": rates, "upper": judges["phrases"]["upper"], "limit": 0.06}
    desk.store.claim(id, "me", 60)
    if certified:
        desk.store.finish(id, "me", f"ft:lab:{id[-4:]}", result={"safety": safety})
    else:
        desk.store.fail(id, "me", UNSAFE, "The model is withheld.", result={"safety": safety})
    return id


def test_a_finished_job_shows_safety_certificate_and_files(desk: Desk) -> None:
    good, bad = finished(desk, True), finished(desk, False)
    page = desk.client.get(f"/jobs/{good}").text
    assert "3 of 200" in page and "Certified" in page and "at most 6\u00a0%" in page
    assert "may be as high as 12 %" in desk.client.get(f"/jobs/{bad}").text
    models = desk.client.get("/models").text
    assert "certified" in models and good in models and bad not in models
    report = desk.client.get(f"/jobs/{good}/files/report.html")
    assert report.headers["content-security-policy"] == "sandbox allow-scripts"
    saved = desk.client.get(f"/jobs/{good}/files/certificate.json")
    assert saved.headers["content-disposition"].startswith("attachment")
    for path in (
        "manifest.json",
        "../../gateway.db",
        "%2e%2e/%2e%2e/gateway.db",
        ".gradshield/lock",
        "scan/kept.jsonl",
    ):
        assert desk.client.get(f"/jobs/{good}/files/{path}").status_code == 404


def test_a_withheld_model_is_served_for_a_reason(desk: Desk) -> None:
    id = finished(desk, False)
    assert desk.post(f"/jobs/{id}", do="release model", reason=" ").status_code == 409
    assert desk.post(f"/jobs/{id}", do="release model", reason="A red team needs it").status_code == 303
    assert (desk.status(id), desk.audit().action) == ("succeeded", "release model")


def test_deleting_a_model_is_audited(desk: Desk) -> None:
    id = finished(desk, True)
    name = f"ft:lab:{id[-4:]}"
    assert desk.post("/models/delete", model=name).headers["location"] == "/models"
    assert (desk.audit().action, desk.audit().target, desk.audit().actor) == ("delete model", name, desk.key.id)
    assert desk.post("/models/delete", model=name).status_code == 404


def test_health_says_that_nothing_runs_what_waits(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "sqlite answers" in desk.client.get("/health").text
    assert "none runs" not in desk.client.get("/health").text
    id = desk.job()
    monkeypatch.setattr(pages, "SILENT", -1)
    assert "jobs wait, and none runs" in desk.client.get("/health").text
    desk.store.claim(id, "me", 60)
    page = desk.client.get("/health").text
    assert "none runs" not in page and "running: 1" in page


def test_what_the_pages_ask_of_either_database(store: Store) -> None:
    project = store.add_project("p", Policy()).id
    key, secret = store.add_key(project, "Ada", "operator")
    assert store.caller_with(key.id) == store.caller(secret)
    store.revoke(key.id)
    assert store.caller_with(key.id) is None
    assert store.caller_with("") is None
    assert store.working() == (0, None)
    given = {"model": LAB, "training_file": "f", "validation_file": None, "method": METHOD, "seed": 1}
    first, second = (store.add_job(project, 9, suffix=None, labels=None, **given) for _ in range(2))
    assert store.working() == (0, first.created_at)
    store.claim(first.id, "me", 60)
    assert store.working() == (1, second.created_at)
    store.hold(first.id, "me", {"code": "review"}, "look")
    assert store.working() == (0, second.created_at)
    lines = store.audits(project)
    assert [line.action for line in lines] == ["revoke key", "create key"]
    assert [line.n for line in store.audits(project, 9, lines[0].n)] == [lines[1].n]
