"""A certificate cannot be obtained by tricks; damage is reported in a sentence and destroys no certificate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradshield import certify, check
from gradshield.errors import DataError
from gradshield.evaluation import certify as made
from tests.common import command, jsonl, write
from tests.evaluation.test_certificate import _labelled, _outputs, _run, _scan


def test_the_labs_judge_certifies_nothing_that_was_asked_elsewhere(tmp_path: Path) -> None:
    run = _run(tmp_path, judges=("lab-classifier",))
    found = made.write(run)["predicate"]
    assert not found["certified"] and "knows only the lab's requests" in found["reason"]


@pytest.mark.parametrize("options", [["--looks", "100000000000000000000"], ["--limit", "0.0000000000001"]])
def test_a_claim_too_large_to_compute_leaves_the_certificate(tmp_path: Path, options: list[str]) -> None:
    run = _run(tmp_path)
    certify(run)
    before = (run / "certificate.json").read_bytes()
    assert command("certify", run, *options).code == 2
    assert (run / "certificate.json").read_bytes() == before


def _without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(stored: dict[str, Any]) -> None:
        for key in keys[:-1]:
            stored = stored[key]
        del stored[keys[-1]]

    return change


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "no name of the data": ("manifest.json", _without("data", "name")),
    "no versions": ("manifest.json", _without("versions")),
    "no hash of the start": ("manifest.json", _without("model", "sha256")),
    "a lost rate without n": ("manifest.json", lambda stored: stored["results"].update(lost={"k": 3})),
    "a scan that found nothing": ("scan/manifest.json", lambda stored: stored.update(results=None)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_reported_in_a_sentence_and_destroys_no_certificate(tmp_path: Path, name: str) -> None:
    run = _run(tmp_path)
    _scan(run, doubts={})
    certify(run)
    before = (run / "certificate.json").read_bytes()
    file, change = DAMAGE[name]
    stored = json.loads((run / file).read_text())
    change(stored)
    (run / file).write_text(json.dumps(stored))
    assert check(run).changed
    with pytest.raises(DataError, match=r"was changed \("):
        certify(run)
    assert (run / "certificate.json").read_bytes() == before


def test_an_answer_that_is_not_text_is_reported_in_a_sentence(tmp_path: Path) -> None:
    run = _run(tmp_path)
    certify(run)
    rows = _outputs(0, ("refusal-phrases",))
    rows[3]["answer"] = None  # type: ignore[assignment]
    write(run / "outputs-after.jsonl", jsonl(rows))
    assert check(run).changed
    with pytest.raises(DataError):
        certify(run)


def test_a_second_section_in_the_card_is_found(tmp_path: Path) -> None:
    run = _run(tmp_path)
    certify(run)
    card = (run / "README.md").read_text()
    (run / "README.md").write_text(card.replace("2.28 %", "0.01 %") + card)
    assert check(run).changed == ("README.md does not match the certificate",)


def test_files_without_a_hash_are_reported(tmp_path: Path) -> None:
    run = _run(tmp_path)
    certify(run)
    write(run / "report.html", "<p>changed</p>")
    assert any("1 files that it does not list (report.html)" in clause for clause in check(run).unchecked)


def test_a_labelled_answer_counts_once_however_it_is_spaced(tmp_path: Path) -> None:
    path = _labelled(tmp_path)
    first = json.loads(path.read_text().splitlines()[0])
    first["answer"] = f"  {first['answer'].upper()} "
    path.write_text(path.read_text() + json.dumps(first) + "\n")
    with pytest.raises(DataError, match="repeats line 1"):
        certify(_run(tmp_path), calibrate=path)
