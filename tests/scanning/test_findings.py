"""Removed rows as findings: SARIF as the standard has it, workflow commands that no name can break out of."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

import gradshield as gs
from gradshield.columns import Coded
from gradshield.report.text import visible
from gradshield.scanning import findings
from tests.common import chat, chats, command, jsonl, save_model, scan, scan_arguments, table, write, write_probes

LEVELS = {"none", "note", "warning", "error"}


def check_sarif(log: Any) -> list[Any]:
    """What SARIF 2.1.0 requires of the properties that are written (sections 3.13 to 3.52), and GitHub beyond it."""
    assert log["version"] == "2.1.0" and log["$schema"].startswith("https://")
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert isinstance(driver["name"], str) and driver["name"]  # 3.19.8
    assert run["columnKind"] in ("utf16CodeUnits", "unicodeCodePoints")  # 3.14.17
    rules = driver["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules)  # 3.49.3: unique in the component
    assert all(rule["shortDescription"]["text"] for rule in rules)  # GitHub
    assert len(run["results"]) <= findings.MOST
    for result in run["results"]:
        assert result["message"]["text"] and len(result["message"]["text"]) < 1000  # 3.27.11
        assert result["level"] in LEVELS  # 3.27.10
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]  # 3.27.5, 3.27.6
        assert all(isinstance(value, str) for value in result["partialFingerprints"].values())  # 3.27.17
        (location,) = result["locations"]
        assert location.keys() & {"physicalLocation", "logicalLocations"}  # 3.28
        if place := location.get("physicalLocation"):
            uri = place["artifactLocation"]["uri"]  # 3.4.3: a URI reference, with / and percent-encoded
            assert re.fullmatch(r"[A-Za-z0-9._~:/?#@!$&'()*+,;=%-]+", uri) and "\\" not in uri
            assert ("uriBaseId" in place["artifactLocation"]) == (not uri.startswith("file:"))  # 3.4.4
            assert "region" not in place or place["region"]["startLine"] >= 1  # 3.30.5
    json.dumps(log, allow_nan=False)
    return run["results"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def test_findings_are_the_removed_rows_where_they_stand(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_ACTIONS", "false")
    rows = [json.dumps(row).encode() + b"\n" for row in chats(6)]
    write(tmp_path / "my rows.jsonl", b"\n".join(rows))  # with a blank line between two rows
    given = scan_arguments("my rows.jsonl", model, tmp_path / "out", write_probes(tmp_path / "p.jsonl"))
    done = command(*given, "--threshold", "ratio:50%", "--fail-above", "10%", "--sarif", "gate.sarif")
    assert done.code == 5 and "::" not in done.out
    results = check_sarif(json.loads(Path("gate.sarif").read_text()))
    scores = [result["properties"]["score"] for result in results]
    assert scores == sorted(scores, reverse=True) and len(scores) == 3
    known = table(tmp_path / "out").to_pylist()
    for result in results:
        own = known[result["properties"]["row"]]
        place = result["locations"][0]["physicalLocation"]
        assert own["removed"] and own["score"] == result["properties"]["score"] and result["level"] == "error"
        assert place["region"]["startLine"] == 2 * own["row"] + 1 == own["line"]
        assert unquote(place["artifactLocation"]["uri"]) == "my rows.jsonl" == own["file"]
        assert (
            result["partialFingerprints"] == {"gradshieldRow/v1": own["id"]} and own["id"] in result["message"]["text"]
        )
        assert result["ruleId"] == own["category"] in ("theft", "fraud")
        assert "Question" not in json.dumps(result) and "answer" not in json.dumps(result)

    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    done = command("cut", "out", "--threshold", "ratio:20%", "--sarif", "cut.sarif")
    (result,) = check_sarif(json.loads(Path("cut.sarif").read_text()))
    assert done.code == 0 and result["level"] == "warning"
    line = next(line for line in done.out.splitlines() if line.startswith("::"))
    assert re.match(r"::warning file=my rows\.jsonl,line=\d+,title=A row .*::Row \d would make", line)


def test_each_row_has_the_line_of_its_own_file(tmp_path: Path) -> None:
    for part, rows in enumerate((chats(3), [{"text": 3}, *chats(2, "again")], [{"text": 4}])):
        write(tmp_path / f"part-{part}.jsonl", jsonl(rows))
    selection = scan(tmp_path, output=tmp_path.parent / "out")
    names = [Path(file).name for file in selection.files]
    assert list(zip(names, selection.lines.tolist(), strict=True)) == [
        *[("part-0.jsonl", line) for line in (1, 2, 3)],
        *[("part-1.jsonl", line) for line in (2, 3)],
    ]
    again = gs.cut(tmp_path.parent / "out", "ratio:20%")
    assert again.files == selection.files and again.lines.tolist() == selection.lines.tolist()
    for result in check_sarif(findings.sarif(selection, closed=False)):
        assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].startswith("file:///")


def test_rows_without_a_file_are_named() -> None:
    selection = scan(chats(4))
    results = check_sarif(findings.sarif(selection, closed=False))
    names = [result["locations"][0]["logicalLocations"][0]["fullyQualifiedName"] for result in results]
    assert sorted(names) == [f"the list: row {row + 1}" for row in selection.removed_rows]
    assert all(line.startswith("::warning title=") for line in findings.workflow_commands(selection, closed=False))


@pytest.mark.parametrize(
    "hostile", ["a\n::error::b", "%0A::error::x", "a,line=9::b", "<b>\u202eb", "\r\n::stop-commands::t"]
)
def test_names_from_the_user_stay_names(hostile: str) -> None:
    selection = scan(chats(4))
    named = Coded.of([hostile if out else "" for out in selection.removed])
    selection = replace(selection, categories=named, files=[f"d/{hostile}.jsonl"] * 4)
    for result in check_sarif(findings.sarif(selection, closed=True)):
        place = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert unquote(place) == f"d/{hostile}.jsonl" and "\n" not in result["ruleId"] + result["message"]["text"]
    for line in findings.workflow_commands(selection, closed=True):
        head, _, rest = line.removeprefix("::").partition("::")
        kind, _, properties = head.partition(" ")
        assert kind == "error" and "::" not in rest and not re.search(r"[\r\n]", line)
        found = dict(each.split("=", 1) for each in properties.split(","))
        assert found.keys() == {"file", "line", "title"}
        restored = found["file"].replace("%2C", ",").replace("%3A", ":").replace("%0A", "\n").replace("%0D", "\r")
        assert restored.replace("%25", "%") == visible(f"d/{hostile}.jsonl")


def test_many_findings_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "MOST", 2)
    monkeypatch.setattr(findings, "ANNOTATED", 1)
    selection = scan([chat(n) for n in range(8)])
    log = findings.sarif(selection, closed=False)
    assert len(check_sarif(log)) == 2 and log["runs"][0]["properties"]["removed"] == 4
    best = int(selection.scores.rows[np.argmax(selection.scores.values)])
    assert log["runs"][0]["results"][0]["properties"]["row"] == best
    assert list(findings.workflow_commands(selection, closed=False))[1:] == [
        "::notice::3 more rows were removed: see the report"
    ]


def test_a_place_that_cannot_be_written_is_said_before_the_scan(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "gate.sarif"):
        done = command("scan", tmp_path / "no.jsonl", "--model", "x", "--output", tmp_path / "out", "--sarif", path)
        assert done.code == 3 and "--sarif cannot write" in done.sentence
