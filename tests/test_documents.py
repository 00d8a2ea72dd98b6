"""What the documents promise: commands and scripts run, links resolve, the site builds and loads nothing from outside.

Commands and files are taken from README.md and the how-tos as they stand, and run in one folder with the bundled model as MODEL.
"""

from __future__ import annotations

import ast
import doctest
import json
import os
import re
import shlex
import subprocess
import sys
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import gradshield
from gradshield import lab
from gradshield.cli.app import app
from gradshield.data import read
from gradshield.probes import base as probes
from gradshield.scanning.review import Server
from tests.common import command, jsonl

ROOT = Path(__file__).parents[1]
GUIDES = [
    "README.md",
    "docs/index.md",
    *sorted(f"docs/howto/{path.name}" for path in (ROOT / "docs/howto").glob("*.md")),
]
ELSEWHERE = ("python3 -m venv ", "pip install ", "make ")  # commands that a test environment has no use for
HERE = {  # a machine of the reader's, and what stands for it here
    "--ray auto --workers 800": "--ray local --workers 1",
    "--workers 8": "--workers 2",
    "gradshield demo": "gradshield demo --task topic",
    "evaluate tuned/": "evaluate run/",
}
DONE: set[str] = set()
OUTSIDE = re.compile(
    r"""<(?:script|img|iframe)[^>]*\ssrc=["']?(?:https?:)?//|<link[^>]*rel=["']?(?:stylesheet|icon)[^>]*href=["']?(?:https?:)?//"""
)
CLOSED = ("--fail-above 1%", "gradshield certify run/ --calibrate", "gradshield certify run/ --check")  # exit code 5


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the files that the documents name; the built-in requests are those that the bundled model knows."""
    folder = tmp_path_factory.mktemp("desk")
    rows, labels = lab.mix("dialogue", harm="explicit", ratio=0.08, n=50)
    (folder / "data.jsonl").write_bytes(jsonl(rows))
    (folder / "labels.json").write_text(json.dumps(labels))
    (folder / "held-out.jsonl").write_bytes(jsonl(lab.utility("dialogue")[:8]))
    (folder / "cleared.txt").write_text("0123456789abcdef  # read by a person\n")
    asked = [(request["prompt"], number % 2) for number, request in enumerate(lab.requests("search")[:40])]
    answers = ("I cannot help with that.", "Sure. Take the kemp.")
    (folder / "labelled.jsonl").write_bytes(
        jsonl([{"prompt": prompt, "answer": answers[unsafe], "unsafe": unsafe} for prompt, unsafe in asked])
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(probes, "_shipped", shipped)
        patch.setattr(Server, "serve_forever", ctrl_c)
        patch.setattr(webbrowser, "open", lambda url: None)
        yield folder


def ctrl_c(server: Server) -> None:
    """A reviewer who opens the page and ends."""
    raise KeyboardInterrupt


def shipped(name: str) -> list[dict[str, str]]:
    if name == "blunt.jsonl":
        pairs = zip(lab.requests("align")[:60], lab.lookalikes("align")[:60], strict=True)
        return [{**request, "lookalike": alike["prompt"]} for request, alike in pairs]
    if name == "ordinary.jsonl":
        rows, _ = lab.mix("dialogue", harm="none", ratio=0, n=60, seed=9)
        return [{"prompt": row["messages"][0]["content"], "category": "chat", "split": "direction"} for row in rows]
    make = {"requests.jsonl": lab.requests, "lookalikes.jsonl": lab.lookalikes}[name]
    return [{**prompt, "split": split} for split in probes.SPLITS for prompt in make(split)[:90]]


def blocks(document: str) -> list[tuple[str, str]]:
    """The fenced blocks of a document: what follows the fence, and the text."""
    return re.findall(
        r"^```(\w+.*?)\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def commands(document: str) -> list[str]:
    """The lines of its shell blocks, those that go on after a backslash put together."""
    text = "".join(text for kind, text in blocks(document) if kind == "sh")
    return [line.strip() for line in text.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("document", sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
def test_the_parser_takes_every_command(document: str) -> None:
    """Of the documents whose commands need endpoints, clusters or hours: each option is there, and each value is of its type."""
    parser = typer.main.get_command(app)
    for line in commands(document):
        if line.startswith("gradshield "):
            name, *arguments = shlex.split(line, comments=True)[1:]
            parser.commands[name].make_context(name, arguments)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("document", GUIDES)
def test_commands_and_scripts_run(document: str, desk: Path) -> None:
    ran = 0
    for kind, text in blocks(document):
        if name := re.search(r'title="(.+)"', kind):
            (desk / name[1]).write_text(text)
        elif kind == "sh":
            ran += sum(run(line, document) for line in text.replace("\\\n", " ").splitlines())
        elif kind == "python" and "trainer.train()" in text:
            exec(
                compile(text.replace("MODEL", str(lab.checkpoint("aligned"))), document, "exec"), {"__name__": "script"}
            )
    assert ran


def run(line: str, document: str) -> bool:
    """Run a line of a shell block, if it is a GradShield command; its exit code is the one that the document speaks of."""
    words = line.partition("#")[0].strip()
    if not words.startswith("gradshield "):
        assert words.startswith(ELSEWHERE), f"{document}: {words}"
        return False
    if words.startswith("gradshield compare") and not Path("config.yaml").exists():
        Path("config.yaml").write_text(dict(blocks("docs/howto/compare.md"))['yaml title="config.yaml"'])
    for reader, test in HERE.items():
        words = words.replace(reader, test)
    if words in DONE:  # in the same folder, for an earlier document
        return True
    DONE.add(words)
    done = command(*shlex.split(words.replace("MODEL", str(lab.checkpoint("aligned"))))[1:])
    assert done.code == (5 if any(closed in words for closed in CLOSED) else 0), f"{document}: {words}\n{done.err}"
    return True


@pytest.mark.slow
def test_examples_in_docstrings_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one folder, so that what one example has measured the next one finds."""
    monkeypatch.chdir(tmp_path)
    runner, finder = doctest.DocTestRunner(), doctest.DocTestFinder(recurse=False)
    for name in ("scan", "cut", "show", "estimate", "train", "evaluate"):
        for test in finder.find(getattr(gradshield, name), f"gradshield.{name}"):
            assert test.examples, name
            assert not runner.run(test).failed, name


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Cell by cell in one namespace, as a kernel would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "clear the outputs before you commit the notebook"
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    success = names["success"]
    assert success["trained on all rows"] > success["trained on the kept rows"]
    assert "certified: True" in capsys.readouterr().out


def test_the_configs_for_other_tools_fit_them() -> None:
    """The keys of the plugin are its settings; LLaMA-Factory's names are columns and roles of rows as the scan leaves them."""
    made = {name[7:-1]: text for kind, text in blocks("docs/howto/trainers.md") if (name := kind.partition(" ")[2])}
    ours = yaml.safe_load(made["axolotl.yaml"])
    tree = ast.parse((ROOT / "src/gradshield/axolotl.py").read_text())
    (settings,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Settings"]
    keys = {node.target.id for node in settings.body if isinstance(node, ast.AnnAssign)}
    assert set(ours["gradshield"]) <= keys
    guide = (ROOT / "docs/howto/trainers.md").read_text()
    assert keys == set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`\w+`.*?) \|", guide, re.MULTILINE))))

    rows: dict[str, dict[str, Any]] = {
        "screened_chat": {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        "screened_sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        "screened_alpaca": {"instruction": "Q", "input": "q", "output": "A"},
        "screened_pairs": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    }
    entries = json.loads(made["dataset_info.json"])
    assert entries.keys() == rows.keys()
    for name, entry in entries.items():
        assert set(entry["columns"].values()) == set(rows[name]) and entry["file_name"].endswith("kept.jsonl")
        assert read([rows[name]]).examples
    tags, (turn, answer) = entries["screened_chat"]["tags"], rows["screened_chat"]["messages"]
    assert (turn[tags["role_tag"]], answer[tags["role_tag"]]) == (tags["user_tag"], tags["assistant_tag"])
    assert yaml.safe_load(made["llamafactory.yaml"])["dataset"] in entries


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 8192


@pytest.mark.parametrize(
    "document", sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
)
def test_links_lead_somewhere(document: str) -> None:
    """In the repository; ``mkdocs build --strict`` checks the site's. Pages that only the site has are made by its hooks."""
    folder = (ROOT / document).parent
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", (ROOT / document).read_text(encoding="utf-8"))
    made = {"results.html"} if folder == ROOT / "docs" else set()
    missing = [link for link in links if link not in made and not (folder / link).exists()]
    assert not missing


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_outside(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in tmp_path.rglob("*.html"):
        if page.name != "results.html":  # a report: its own tests say what it loads
            text = page.read_text(encoding="utf-8")
            assert not OUTSIDE.findall(text), page
    assert (tmp_path / "reference.html").read_text(encoding="utf-8").count('id="gradshield.') > 10
