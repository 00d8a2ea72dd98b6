"""The files that other machines run: the GitHub Action, the pre-commit hook, the workflows."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from gradshield.cli.app import app
from tests.common import chats, jsonl, save_model, write, write_probes

ROOT = Path(__file__).parents[1]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
GUIDE = (ROOT / "docs" / "howto" / "gate.md").read_text()
QUOTED = {
    name: yaml.safe_load(text)
    for name, text in re.findall(r'^```yaml title="(.+?)"\n(.*?)^```', GUIDE, re.MULTILINE | re.DOTALL)
}


def steps(*files: Any) -> Iterator[dict[str, Any]]:
    for file in files:
        jobs = file["jobs"].values() if "jobs" in file else [file["runs"]]
        yield from (step for job in jobs for step in job["steps"])


ALL = list(steps(ACTION, *(yaml.safe_load(path.read_text()) for path in WORKFLOWS), QUOTED["gate-workflow.yml"]))


def test_what_is_used_has_a_version() -> None:
    used = [step["uses"] for step in ALL if "uses" in step]
    assert len(used) >= 10
    assert [one for one in used if not re.fullmatch(r"[\w/-]+@v\d+\.\d+\.\d+|\./gradshield", one)] == []


def test_no_value_becomes_code() -> None:
    """An expression is put into a script as text, so that what it holds would run: values come by the environment."""
    scripts = [step["run"] for step in ALL if "run" in step]
    assert len(scripts) >= 8 and not any("${{" in script for script in scripts)


def test_the_action_has_the_inputs_that_the_guide_gives_and_every_input_is_used() -> None:
    (step,) = [step for step in steps(QUOTED["gate-workflow.yml"]) if step.get("uses") == "./gradshield"]
    required = {name for name, one in ACTION["inputs"].items() if one.get("required")}
    assert required <= step["with"].keys() <= ACTION["inputs"].keys()
    used = set(re.findall(r"\$\{\{ inputs\.([\w-]+) \}\}", (ROOT / "action.yml").read_text()))
    assert used == ACTION["inputs"].keys()
    (upload,) = [step for step in steps(QUOTED["gate-workflow.yml"]) if "upload-sarif" in step.get("uses", "")]
    assert upload["with"]["sarif_file"] == ACTION["inputs"]["sarif"]["default"]


@pytest.mark.parametrize(("gate", "code"), [("10%", 5), ("100%", 0)])
def test_the_scan_of_the_action(gate: str, code: int, tmp_path: Path) -> None:
    """Its script, with hostile values; a file of the name of an option's pattern is no argument."""
    probes = write_probes(tmp_path / "probes.jsonl")
    hostile = "my $(touch injected) `touch injected`; touch injected.jsonl"
    write(tmp_path / hostile, jsonl(chats(4)))
    write(tmp_path / "extra", b"")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "gradshield"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m gradshield "$@"\n')
    command.chmod(0o755)
    prompts = f"--probes {probes} --lookalikes {probes} --uncertified --selector fihs"
    given = {
        **{name: one.get("default", "") for name, one in ACTION["inputs"].items()},
        "data": hostile,
        "model": str(save_model(tmp_path / "model")),
        "fail-above": gate,
        "options": f"{prompts} --threshold ratio:50%",
    }
    (step,) = [step for step in ACTION["runs"]["steps"] if step.get("name") == "Scan"]
    values = {name: given[re.fullmatch(r"\$\{\{ inputs\.(.+) \}\}", text)[1]] for name, text in step["env"].items()}  # type: ignore[index]
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=tmp_path,
        env={**os.environ, **values, "PATH": path, "GITHUB_ACTIONS": "true", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stderr
    level = "error" if code else "warning"
    assert len(re.findall(rf"^::{level} file=my .*,line=\d,", done.stdout, re.MULTILINE)) == 2
    results = json.loads((tmp_path / "gradshield.sarif").read_text())["runs"][0]["results"]
    assert [result["level"] for result in results] == [level] * 2
    assert (tmp_path / "screened" / "report.html").exists() and not (tmp_path / "injected").exists()


def test_the_hook_is_one_that_pre_commit_takes_and_its_arguments_are_those_of_scan() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pre_commit", "validate-manifest", ".pre-commit-hooks.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    (own,) = QUOTED["pre-commit.yaml"]["repos"][0]["hooks"]
    assert own["id"] == hook["id"]
    assert re.search(hook["files"], "data.jsonl") and re.search(own["files"], own["args"][0])
    _, name, *arguments = [*hook["entry"].split(), *own["args"]]
    typer.main.get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]
