"""``gradshield serve`` and ``gradshield keys``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gradshield.cli.serve import _first_key, _loopback, _named
from gradshield.errors import UsageError
from gradshield.gateway.settings import LAB, Policy, Settings, made
from gradshield.gateway.store import Store
from tests.common import command as run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(f"sqlite:///{tmp_path / 'gateway.db'}")
    found.migrate()
    return found


def test_keys_are_made_listed_and_revoked(tmp_path: Path, store: Store) -> None:
    folder = ["--folder", str(tmp_path)]
    made = run("keys", "create", "--project", "a", "--policy", "review", "--limit", "5%", "--role", "operator", *folder)
    secret = re.search(r"^gs-\S+$", made.out, re.MULTILINE)
    assert secret is not None
    caller = store.caller(secret[0])
    assert caller is not None
    assert caller.role == "operator"
    assert store.project("a").policy == Policy(rows="review", limit=0.05).model_dump()
    again = run("keys", "create", "--project", "a", "--limit", "1%", *folder)
    assert again.code == 2 and "gradshield keys policy a" in again.sentence
    assert run("keys", "create", "--project", "a", *folder).code == 0
    listed = run("keys", "list", *folder).out
    assert caller.key in listed
    assert secret[0] not in listed
    assert run("keys", "revoke", caller.key, *folder).code == 0
    assert store.caller(secret[0]) is None
    assert "revoked" in run("keys", "list", *folder).out
    assert run("keys", "revoke", "nobody", *folder).code == 2


def test_a_project_has_the_policy_of_serve_until_an_operator_changes_it(tmp_path: Path, store: Store) -> None:
    Settings(models={LAB: LAB}, folder=tmp_path, policy=Policy(rows="review", limit=0.1)).save()
    folder = ["--folder", str(tmp_path)]
    run("keys", "create", "--project", "a", "--defence", "fihs", *folder)
    assert store.project("a").policy == {"rows": "review", "defence": "fihs", "limit": 0.1}
    change = ["keys", "policy", "a", "--policy", "reject", "--limit", "5%", *folder]
    assert "needs a reason" in run(*change).sentence
    done = run(*change, "--reason", "a new contract")
    assert done.code == 0
    assert done.out.split() == ["rows", "reject", "defence", "fihs", "limit", "0.05"]
    assert run("keys", "policy", "a", *folder).out == done.out
    assert store.project("a").policy == {"rows": "reject", "defence": "fihs", "limit": 0.05}
    line = store.audits(store.project("a").id)[0]
    assert (line.actor, line.action, line.reason) == ("gradshield keys", "policy", "a new contract")
    nobody = run("keys", "policy", "b", *folder)
    assert nobody.code == 2 and "(a)" in nobody.sentence


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--role", "king", "role"),
        ("--policy", "ignore", "policy"),
        ("--defence", "nothing", "nothing"),
        ("--defence", "clean", "labels"),
        ("--limit", "0", "limit"),
    ],
)
def test_a_key_that_cannot_be_is_refused_in_a_sentence(tmp_path: Path, option: str, value: str, said: str) -> None:
    done = run("keys", "create", option, value, "--folder", str(tmp_path))
    assert done.code == 2
    assert said in done.err
    assert not (tmp_path / "gateway.db").exists()


def test_a_key_of_a_gateway_that_is_not_there_yet_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "gateway"
    first, second = (run("keys", "create", "--folder", str(folder)) for _ in range(2))
    assert f"serve --model M --folder {folder}" in " ".join(first.err.split())
    assert (first.code, second.code) == (0, 0) and "no gateway" not in second.err


def test_a_limit_that_is_no_number_is_told_so(tmp_path: Path) -> None:
    for value in ("abc", "nan", "200%"):
        assert f"--limit got '{value}'" in run("keys", "create", "--limit", value, "--folder", str(tmp_path)).sentence


@pytest.mark.parametrize("words", [["list"], ["revoke", "gs-0"], ["policy", "a"]])
def test_what_reads_a_gateway_makes_none(tmp_path: Path, words: list[str]) -> None:
    done = run("keys", *words, "--folder", str(tmp_path / "mistyped"))
    assert done.code == 2 and "no gateway" in done.sentence
    assert not (tmp_path / "mistyped").exists()


def test_beyond_loopback_needs_a_key(tmp_path: Path, store: Store) -> None:
    open_to_all = Settings(models={LAB: LAB}, folder=tmp_path, host="0.0.0.0")
    with pytest.raises(UsageError, match="keys create"):
        _first_key(store, open_to_all)
    assert store.projects() == []
    made, _ = store.add_key(store.add_project("p", Policy()).id, "k")
    assert _first_key(store, open_to_all) is None
    store.revoke(made.id)
    with pytest.raises(UsageError):
        _first_key(store, open_to_all)


def test_the_first_start_on_loopback_makes_one_key(tmp_path: Path, store: Store) -> None:
    here = Settings(models={LAB: LAB}, folder=tmp_path)
    key = _first_key(store, here)
    assert key is not None
    assert store.caller(key) is not None
    assert _first_key(store, here) is None
    assert [_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "10.0.0.1", "my.host")] == [
        *(True,) * 3,
        *(False,) * 4,
    ]


def test_a_model_is_called_by_the_last_part_of_its_name(tmp_path: Path) -> None:
    assert _named("org/tiny-1.5B") == ("tiny-1.5B", "org/tiny-1.5B")
    assert _named(f"mine={tmp_path}") == ("mine", str(tmp_path))
    for wrong in ("a:b", "../..", "=x"):
        with pytest.raises(UsageError):
            _named(wrong)


def test_settings_keep_their_secrets_for_the_owner(tmp_path: Path) -> None:
    chosen = made(Settings, models={LAB: LAB}, folder=tmp_path, webhook_secret="whsec_x", upstream_key="sk-x")
    chosen.save()
    path = tmp_path / "gateway.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert Settings.read(tmp_path) == chosen
    assert "whsec_x" not in repr(chosen)
    with pytest.raises(UsageError, match="port"):
        made(Settings, models={}, folder=tmp_path, port=-1)
    path.write_text("{")
    with pytest.raises(UsageError, match="serve"):
        Settings.read(tmp_path)


def test_a_cluster_has_to_answer_and_to_reach_the_database(tmp_path: Path) -> None:
    typed = ["serve", "--model", LAB, "--folder", str(tmp_path / "gateway"), "--ray", "127.0.0.1:1"]
    done = run(*typed)
    assert done.code == 2 and "cannot share a SQLite file: give --database postgresql" in done.sentence
    done = run(*typed, "--database", "postgresql://u@127.0.0.1:1/n")
    assert done.code == 2 and "no Ray cluster answers at '127.0.0.1:1'" in done.sentence
    assert not (tmp_path / "gateway").exists()


def imported(names: set[str], script: str, *arguments: str) -> str:
    """Which of these packages a script imports, in a process of its own."""
    found = f"import sys; {script}; print({{name.split('.')[0] for name in sys.modules}} & {names})"
    done = subprocess.run([sys.executable, "-c", found, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_package_does_not_need_the_gateway() -> None:
    script = "import gradshield, gradshield.cli.app"
    assert imported({"fastapi", "sqlalchemy", "huey", "uvicorn"}, script) == "set()\n"


def test_server_and_worker_start_without_torch(tmp_path: Path) -> None:
    """It takes seconds to import, and half a gigabyte: jobs need it, and chats that are answered here."""
    start = "create_app(Settings(models={'lab': 'lab'}, folder=Path(sys.argv[1]), policy=Policy(defence='screen')))"
    script = "import gradshield.gateway.worker, gradshield.cli.serve; from pathlib import Path; "
    script += (
        "from gradshield.gateway.app import create_app; from gradshield.gateway.settings import Policy, Settings; "
    )
    assert imported({"torch", "transformers", "sklearn", "datasets"}, script + start, str(tmp_path)) == "set()\n"
    assert imported({"torch"}, "import gradshield.gateway.job") == "{'torch'}\n"  # so that the first line can fail


def test_a_folder_in_an_option_is_whole_whatever_its_judge_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "guard").mkdir()
    typed = ("guard", "guard:guard,words=yes+no", "guard:nowhere", "compliance")
    kept = ("guard", f"guard:{tmp_path}/guard,words=yes+no", "guard:nowhere", "compliance")
    assert Settings(models={}, folder=tmp_path, judges=typed).judges == kept


def test_settings_made_in_python_name_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers and jobs have working folders of their own."""
    monkeypatch.chdir(tmp_path)
    for folder in ("base", LAB, "guard"):
        (tmp_path / folder).mkdir()
    made = Settings(
        models={"base": "base", "hub": "org/base", LAB: LAB, "mine": f"./{LAB}"},
        folder=Path("gateway"),
        database="sqlite:///own.db",
        files="contents",
        probes=Path("probes.jsonl"),
        lookalikes=Path("lookalikes.jsonl"),
        safety="safety.jsonl",
        judges=("guard:guard", "guard:org/name", "refusal-phrases"),
    )
    here = str(tmp_path)
    assert made.models == {"base": f"{here}/base", "hub": "org/base", LAB: LAB, "mine": f"{here}/{LAB}"}
    assert (made.folder, made.probes) == (tmp_path / "gateway", tmp_path / "probes.jsonl")
    assert (made.lookalikes, made.safety) == (tmp_path / "lookalikes.jsonl", f"{here}/safety.jsonl")
    assert (made.database, made.files) == (f"sqlite:///{here}/own.db", f"{here}/contents")
    assert made.judges == (f"guard:{here}/guard", "guard:org/name", "refusal-phrases")
    kept = Settings(folder=tmp_path, models={"base": "~no-one/base"}, database="sqlite:///:memory:", safety="")
    assert (kept.models, kept.database, kept.safety) == ({"base": "~no-one/base"}, "sqlite:///:memory:", "")
    made.save()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "org" / "base").mkdir(parents=True)
    (elsewhere / "org" / "name").mkdir()
    monkeypatch.chdir(elsewhere)  # a worker's folder, where the hub names are folders
    assert Settings.read(tmp_path / "gateway") == made


def test_urls_and_words_of_settings_stay_as_they_are(tmp_path: Path) -> None:
    for name, value in (
        ("files", "s3://bucket/files"),
        ("files", "simplecache::s3://bucket/files"),
        ("files", ""),
        ("database", "postgresql://u@h/n"),
        ("database", "sqlite:////data/own.db"),
        ("database", ""),
        ("safety", "builtin"),
        ("safety", "none"),
    ):
        assert getattr(Settings(models={}, folder=tmp_path, **{name: value}), name) == value  # type: ignore[arg-type]
