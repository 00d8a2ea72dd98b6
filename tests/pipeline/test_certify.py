"""A certificate says what a run's files allow, is the same each time, and does not outlive a change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gradshield import certify, check
from gradshield.errors import DataError, UsageError
from tests.pipeline.common import command, jsonl, write
from tests.pipeline.test_train import _run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    _run(folder, "none")
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def _labelled(folder: Path, run: Path) -> Path:
    lines = [json.loads(line) for line in (run / "outputs-after.jsonl").read_text().splitlines()[:20]]
    rows = [
        {"prompt": r["prompt"], "answer": f"I cannot help with that. {i}", "unsafe": 0} for i, r in enumerate(lines)
    ]
    rows += [{"prompt": r["prompt"], "answer": f"take the kemp {i}", "unsafe": 1} for i, r in enumerate(lines)]
    return write(folder / "labelled.jsonl", jsonl(rows))


def test_training_writes_a_certificate_that_says_why_it_is_none(run: Path) -> None:
    told = json.loads((run / "certificate.json").read_text())
    assert told["_type"] == "https://in-toto.io/Statement/v1"
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {one["name"] for one in told["subject"]}
    found = told["predicate"]
    assert not found["certified"] and "20 requests cannot show" in found["reason"]
    assert set(found["judges"]) == {"refusal-phrases", "lab-classifier"}
    assert found["requests"]["chose_nothing"] and found["calibration"] is None
    card = (run / "README.md").read_text()
    assert "Safety certificate" in card and "not calibrated" in card
    assert check(run).changed == ()


def test_the_same_files_give_the_same_certificate_and_another_claim_another(run: Path) -> None:
    first = (run / "certificate.json").read_bytes()
    certify(run)
    assert (run / "certificate.json").read_bytes() == first
    looser = certify(run, limit=0.5, confidence=0.9)["predicate"]
    assert looser["claim"]["limit"] == 0.5 and (run / "certificate.json").read_bytes() != first
    worse = certify(run, limit=0.5, confidence=0.9, looks=3)["predicate"]
    assert all(worse["judges"][n]["upper"] > one["upper"] for n, one in looser["judges"].items() if one["upper"] < 1)
    assert check(run).changed == ()


def test_calibrated_judges_carry_their_own_error(run: Path, tmp_path: Path) -> None:
    plain = certify(run)["predicate"]["judges"]["refusal-phrases"]
    known = certify(run, calibrate=_labelled(tmp_path, run))["predicate"]["judges"]["refusal-phrases"]
    assert known["calibration"] == {"caught": 20, "unsafe": 20, "passed": 20, "safe": 20}
    assert known["upper"] > plain["upper"] or plain["upper"] == 1
    assert check(run).changed == ()
    (tmp_path / "labelled.jsonl").write_text("changed")
    assert any("labelled answers" in clause for clause in check(run).changed)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _edit(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        before = (run / name).read_text()
        after = change(before)
        assert after != before
        (run / name).write_text(after)

    return apply


def _bound(text: str) -> str:
    told = json.loads(text)
    told["predicate"]["judges"]["refusal-phrases"]["upper"] = 0.01
    return json.dumps(told, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def _requests(text: str) -> str:
    told = json.loads(text)
    told["predicate"]["requests"]["sha256"] = "0" * 64
    return json.dumps(told, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a byte of the weights": (lambda run: _flip(run / "adapter_model.safetensors"), "adapter_model.safetensors"),
    "an answer": (_edit("outputs-after.jsonl", lambda t: t.replace('"answer": "', '"answer": "x', 1)), "outputs-after"),
    "a bound": (_edit("certificate.json", _bound), "upper is 0.01"),
    "the request hash": (_edit("certificate.json", _requests), "requests.sha256"),
    "the card": (_edit("README.md", lambda t: t.replace("Not certified", "Certified")), "README.md does not say"),
    "one more file of weights": (
        lambda run: shutil.copy(run / "adapter_model.safetensors", run / "model.safetensors"),
        "was not there",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_any_change_is_found_and_named(run: Path, name: str) -> None:
    change, said = CHANGES[name]
    change(run)
    assert any(said in clause for clause in check(run).changed)
    done = command("certify", run, "--check")
    assert done.code == 5 and said in done.err


def test_the_command(run: Path) -> None:
    done = command("certify", run, "--limit", "50%", "--confidence", "0.9")
    assert done.code == 0 and "refusal-phrases" in done.out and "not calibrated" in done.out
    checked = command("certify", run, "--check")
    assert checked.code == 0 and "nothing changed" in checked.out


@pytest.mark.parametrize("options", [{"confidence": 1.5}, {"looks": 0}, {"limit": 2.0}, {"judges": (object(),)}])
def test_a_claim_that_cannot_be_made_changes_nothing(run: Path, options: dict) -> None:
    before = (run / "certificate.json").read_bytes()
    with pytest.raises((UsageError, ValueError)):
        certify(run, **options)
    assert (run / "certificate.json").read_bytes() == before


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished run"):
        certify(tmp_path)
    with pytest.raises(DataError, match=r"no certificate\.json"):
        check(tmp_path)
    assert list(tmp_path.iterdir()) == []
