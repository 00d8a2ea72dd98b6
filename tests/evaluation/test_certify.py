"""A certificate says what a run's files allow, is the same each time, and does not outlive a change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gradshield import certify, check, lab
from gradshield.errors import DataError, UsageError
from gradshield.evaluation import certificate, exam
from gradshield.evaluation.bounds import Claim, least, upper
from gradshield.evaluation.certify import _check_judges
from gradshield.stats import wilson
from gradshield.training import train as training
from gradshield.training.course import Course
from tests.common import command, jsonl, write
from tests.evaluation.test_certificate import UNMET, scanned
from tests.training.test_train import _run

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
    stored = json.loads((run / "certificate.json").read_text())
    assert stored["_type"] == "https://in-toto.io/Statement/v1"
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {one["name"] for one in stored["subject"]}
    found = stored["predicate"]
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


def _edited(change: Callable[[dict], Any], name: str = "manifest.json") -> Callable[[Path], None]:
    """Change what a file of the run says, as if the training had written it so."""

    def apply(run: Path) -> None:
        stored = json.loads((run / name).read_text())
        change(stored)
        (run / name).write_text(json.dumps(stored))

    return apply


def _scanned(run: Path) -> None:
    (run / "scan").mkdir()
    write(
        run / "scan" / "manifest.json",
        json.dumps(scanned(doubts={"task": "its signals disagree."})),
    )


def _same_requests(stored: dict) -> None:
    stored["settings"]["search"] = stored["settings"]["report"]


AGAINST: dict[str, tuple[Callable[[Path], None], str]] = {
    "the run": (
        _edited(lambda t: t["results"].update(uncertified="its signals disagree.")),
        "the scan is not certified: its signals disagree",
    ),
    "the scan": (_scanned, "the scan is not certified: its signals disagree"),
    "the search": (
        _edited(lambda t: t["results"].update(verified=UNMET | {"sentence": "no cut of five met them"})),
        "the verified threshold met its targets at no cut: no cut of five met them",
    ),
    "the requests": (
        _edited(_same_requests),
        "the requests that measured the model overlap with those that chose its rows or its cut",
    ),
}


@pytest.mark.parametrize("name", AGAINST)
def test_what_speaks_against_a_run_leaves_it_uncertified_for_one_reason(run: Path, name: str) -> None:
    assert certify(run, limit=0.3)["predicate"]["certified"]  # by its bounds alone
    change, said = AGAINST[name]
    change(run)
    found = certify(run, limit=0.3)["predicate"]
    assert not found["certified"] and found["reason"] == said
    assert f"**Not certified**: {said}." in (run / "README.md").read_text()
    assert check(run).changed == ()


def _succeed(run: Path) -> None:
    """Three answers are no refusals, with the verdicts and counts that both judges give them."""
    path = run / "outputs-after.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[:3]:
        row["answer"] = "the answer is 7"
        for name, said in row["verdicts"].items():
            judge = certificate.offline(name, None)
            assert judge is not None
            said["unsafe"] = judge.judge(row["prompt"], row["answer"]).unsafe
    path.write_bytes(jsonl(rows))

    def count(stored: dict) -> None:
        for name, rate in stored["results"]["after"]["judges"].items():
            rate |= asdict(wilson(sum(row["verdicts"][name]["unsafe"] for row in rows[:20]), 20))

    _edited(count)(run)


def test_a_bound_above_the_limit_is_not_certified(run: Path) -> None:
    _succeed(run)
    found = certify(run)["predicate"]["judges"]
    assert found["refusal-phrases"]["k"] == 3
    worst = max(one["upper"] for one in found.values())
    assert worst >= upper(3, 20, 0.025)
    stored = certify(run, limit=worst - 0.01)["predicate"]
    assert not stored["certified"] and "the attack success rate may be as high as" in stored["reason"]
    assert {n for n, one in stored["judges"].items() if not one["holds"]} == {
        n for n, one in found.items() if one["upper"] == worst
    }
    assert certify(run, limit=worst + 0.01)["predicate"]["certified"]


def test_an_answer_that_a_judge_could_not_tell_counts_as_a_success(run: Path) -> None:
    whole = certificate.read(run)
    rows = [dict(row) for row in whole.asked]
    rows[0]["verdicts"] = {"refusal-phrases": {"unsafe": None}}
    assert certificate.attacks(whole, "refusal-phrases") == (0, 20)
    assert certificate.attacks(replace(whole, asked=rows), "refusal-phrases") == (1, 20)


def test_a_verdict_that_its_judge_does_not_give_is_refused(run: Path) -> None:
    """The manifest agrees with it, so that no count gives it away."""

    def claim(line: str) -> str:
        row = json.loads(line)
        row["verdicts"]["refusal-phrases"]["unsafe"] = True
        return json.dumps(row, ensure_ascii=False)

    first, _, rest = (run / "outputs-after.jsonl").read_text().partition("\n")
    (run / "outputs-after.jsonl").write_text(claim(first) + "\n" + rest)
    _edited(lambda t: t["results"]["after"]["judges"]["refusal-phrases"].update(k=1))(run)
    said = "line 1 of outputs-after.jsonl has another verdict than refusal-phrases gives that answer"
    assert said in check(run).changed
    before = (run / "certificate.json").read_bytes()
    with pytest.raises(DataError, match=said):
        certify(run)
    assert (run / "certificate.json").read_bytes() == before


def test_lost_harmless_rows_are_bounded_where_labels_say_which(run: Path) -> None:
    assert certify(run)["predicate"]["lost"] is None
    _edited(lambda t: t["results"].update(lost=asdict(wilson(1, 40))))(run)
    assert certify(run)["predicate"]["lost"] == {"k": 1, "n": 40, "upper": pytest.approx(upper(1, 40, 0.05))}
    assert certify(run, looks=2)["predicate"]["lost"]["upper"] == pytest.approx(upper(1, 40, 0.025))
    assert "Harmless rows removed: 1 of 40" in (run / "README.md").read_text()


def test_calibration_asks_for_more_requests(run: Path, tmp_path: Path) -> None:
    limit = next(i / 100 for i in range(1, 99) if least(i / 100, Claim().error(2)) <= 20)
    needed = least(limit, Claim().error(2) / 3)
    assert needed > 20
    assert certify(run, limit=limit)["predicate"]["certified"]
    found = certify(run, limit=limit, calibrate=_labelled(tmp_path, run))["predicate"]
    few, *bounds = found["reason"].split("; and ")
    assert few.endswith(f"{needed} are needed") and len(bounds) == len(found["judges"]) == 2


def test_changed_data_and_a_changed_start_are_found_and_missing_ones_reported(run: Path, tmp_path: Path) -> None:
    data = Path(json.loads((run / "manifest.json").read_text())["data"]["name"])
    rows, start = shutil.copy(data, tmp_path / "rows.jsonl"), shutil.copytree(lab.checkpoint("aligned"), tmp_path / "a")
    _edited(lambda t: (t["data"].update(name=str(rows)), t["model"].update(name=str(start))))(run)
    found = certify(run)["predicate"]
    assert (found["data"]["name"], found["start"]["name"]) == ("rows.jsonl", "a")
    assert str(tmp_path) not in (run / "certificate.json").read_text()  # whoever gets it learns nothing of this machine
    assert all("does not list" in clause for clause in check(run).unchecked)
    rows.write_text("{}\n")
    _flip(start / "model.safetensors")
    found = " ".join(check(run).changed)
    assert "are not the ones that were trained on" in found and "is not the model that training started from" in found
    rows.unlink()
    shutil.rmtree(start)
    found = check(run)
    assert found.changed == () and len(found.unchecked) == 3


def test_another_guard_of_the_same_name_does_not_calibrate(run: Path) -> None:
    asked = {"guard:g": {"model": "/there/g", "sha256": "a", "tokens": 8}}
    whole = replace(certificate.read(run), judges=asked)

    def guard(**record: Any) -> Any:
        return SimpleNamespace(name="guard:g", guard=SimpleNamespace(record=lambda: record))

    _check_judges(whole, [guard(model="/here/g", sha256="a", tokens=8)])  # moved, and the same
    with pytest.raises(UsageError, match="is not the one that judged the run"):
        _check_judges(whole, [guard(model="/there/g", sha256="b", tokens=8)])


def _nearly(text: str) -> str:
    stored = json.loads(text)
    stored["predicate"]["judges"]["refusal-phrases"]["upper"] *= 1 - 1e-6
    return json.dumps(stored, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def _bound(text: str) -> str:
    stored = json.loads(text)
    stored["predicate"]["judges"]["refusal-phrases"]["upper"] = 0.01
    return json.dumps(stored, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def _requests(text: str) -> str:
    stored = json.loads(text)
    stored["predicate"]["requests"]["sha256"] = "0" * 64
    return json.dumps(stored, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a byte of the weights": (lambda run: _flip(run / "adapter_model.safetensors"), "adapter_model.safetensors"),
    "an answer": (_edit("outputs-after.jsonl", lambda t: t.replace('"answer": "', '"answer": "x', 1)), "outputs-after"),
    "a bound": (_edit("certificate.json", _bound), "upper is 0.01"),
    "a bound's sixth digit": (_edit("certificate.json", _nearly), "refusal-phrases.upper is"),
    "the request hash": (_edit("certificate.json", _requests), "requests.sha256"),
    "the card": (_edit("README.md", lambda t: t.replace("Not certified", "Certified")), "README.md does not match"),
    "one more file of weights": (
        lambda run: shutil.copy(run / "adapter_model.safetensors", run / "model.safetensors"),
        "was added",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_any_change_is_found_and_named(run: Path, name: str) -> None:
    change, said = CHANGES[name]
    change(run)
    assert any(said in clause for clause in check(run).changed)
    done = command("certify", run, "--check")
    assert done.code == 5 and said in done.err


def test_the_start_is_compared_where_it_still_lies(run: Path) -> None:
    assert "the weights of the model that training started from" in check(run).same


def test_an_interrupted_run_has_no_certificate(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    monkeypatch.setattr(Course, "fit", _stop)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, "none")
    assert not (run / "certificate.json").exists() and not (run / "manifest.json").exists()
    assert (run / "adapter_model.safetensors").exists()  # the earlier model, of which nothing is claimed any more


def _stop(*_args: Any, **_more: Any) -> None:
    raise KeyboardInterrupt


def test_labelled_answers_of_another_model_are_removed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certify(run, calibrate=_labelled(tmp_path, run))
    monkeypatch.setattr(training.certify, "write", _stop)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, "none", exams=exam.Exams())
    assert (run / "manifest.json").exists()
    assert not (run / "calibration.jsonl").exists() and not (run / "certificate.json").exists()


def test_a_new_training_leaves_nothing_of_the_old_calibration(run: Path, tmp_path: Path) -> None:
    certify(run, calibrate=_labelled(tmp_path, run))
    _run(tmp_path, "none", exams=exam.Exams())
    stored = json.loads((run / "certificate.json").read_text())["predicate"]
    assert "no request was asked" in stored["reason"] and stored["calibration"] is None
    assert not (run / "calibration.jsonl").exists() and check(run).changed == ()


@pytest.mark.parametrize("options", [{"confidence": 1.5}, {"looks": 0}, {"limit": 2.0}, {"judges": (object(),)}])
def test_a_claim_that_cannot_be_made_changes_nothing(run: Path, options: dict[str, Any]) -> None:
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
