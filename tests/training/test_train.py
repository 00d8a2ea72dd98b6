"""`gradshield train` and `gradshield evaluate`: the output of a run, invalid input, and resuming after a kill."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

import gradshield as gs
from gradshield import lab
from gradshield.errors import DataError, UsageError
from gradshield.evaluation.exam import Exams, exam, exams_of
from gradshield.manifests import SequenceRecord
from gradshield.models import loading
from gradshield.runs import alone
from gradshield.scanning.settings import Probing
from gradshield.training import train as training
from gradshield.training.course import Course
from gradshield.training.sequence import Stage, sequence
from tests.common import command, jsonl, write

OPTIONS = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
PROBING = Probing(requests=lab.requests("direction")[:24], lookalikes=lab.lookalikes("direction")[:24])
ALIGNED = str(lab.checkpoint("aligned"))


def _data(folder: Path, task: str = "choice", n: int = 30) -> Path:
    return write(folder / f"{task}.jsonl", jsonl(lab.mix(task, ratio=0.2, n=n)[0]))


def _held(folder: Path, task: str = "choice", n: int = 40) -> Path:
    rows = [{"prompt": r["prompt"], "reference": r["reference"]} for r in lab.utility(task)[:n]]
    return write(folder / f"{task}-held.jsonl", jsonl(rows))


def _requests(folder: Path, n: int = 20) -> Path:
    rows = [{**r, "split": split} for split in ("search", "report") for r in lab.requests(split)[:n]]
    return write(folder / "requests.jsonl", jsonl(rows))


def _exams(folder: Path, searching: bool = False, requests: int = 20) -> Exams:
    asked = str(_requests(folder, requests))
    return exams_of(asked, ["refusal-phrases", "lab-classifier"], str(_held(folder)), "exact", 8, "", searching)


def _run(folder: Path, defence: str, **more: Any) -> training.Trained:
    given: dict[str, Any] = {
        "model": loading.load(ALIGNED, dtype="float32"),
        "output": folder / "run",
        "defence": defence,
        "peft_config": peft.LoraConfig(**{**lab.LORA, "r": 2}),
        "training": OPTIONS,
        "probing": PROBING,
    }
    if "exams" not in more:
        given["exams"] = _exams(folder)
    return training.train(_data(folder), **(given | more))


@pytest.mark.slow
def test_a_run_leaves_the_model_the_scan_and_the_proof(tmp_path: Path) -> None:
    done = _run(tmp_path, "fihs+asft", needs=gs.Needs(base=lab.checkpoint("base")))
    folder = tmp_path / "run"
    stored = json.loads((folder / "manifest.json").read_text())
    assert stored["settings"]["defence"] == "fihs+asft"
    results = stored["results"]
    assert results["rows"] - results["removed"] == results["trained"]
    assert results["record"]["asft"]["layers"] == 28
    for when in ("before", "after"):
        assert set(results[when]["judges"]) == {"refusal-phrases", "lab-classifier"}
        assert results[when]["asr"]["n"] == 20 and results[when]["utility"]["n"] == 40
        lines = (folder / f"outputs-{when}.jsonl").read_text().splitlines()
        assert len(lines) == 20 + 130 + 40
    assert set(results["changed"]) == {"refusal-phrases", "lab-classifier"}
    removed = (folder / "scan" / "removed.jsonl").read_text().splitlines()
    assert len(removed) == results["removed"] > 0
    card = (folder / "README.md").read_text()
    assert "Safety of the fine-tuning" in card and "fihs+asft" in card and "20" in card
    assert (folder / "report.html").stat().st_size > 5000
    plain = AutoModelForCausalLM.from_pretrained(ALIGNED)
    again = PeftModel.from_pretrained(plain, str(folder)).state_dict()
    own = done.model.state_dict()
    assert all((again[name] == own[name]).all() for name in own if "lora_" in name)


@pytest.mark.slow
def test_meaningless_probes_are_reported_anywhere(tmp_path: Path) -> None:
    harmless = Probing(requests=PROBING.lookalikes, lookalikes=PROBING.requests, uncertified=True)
    done = _run(tmp_path, "fihs:ratio:10%", probing=harmless, exams=Exams())
    problem = done.manifest.results.uncertified
    assert "refuse" in problem
    for name in ("README.md", "report.html"):
        assert re.search(r"ot certified(\*\*)?: ", (tmp_path / "run" / name).read_text())
    settings = done.manifest.settings
    assert settings.training["max_steps"] == 2
    assert settings.render["max_length"] == 1024
    assert settings.safety_sha256 is None and len(settings.probe_sha256) == 64


def test_options_of_the_template_are_those_of_every_exam(tmp_path: Path) -> None:
    stored = {"enable_thinking": False}
    exams = exams_of("builtin", None, str(_held(tmp_path)), "exact", 8, "", True, stored)
    assert exams.report.template == exams.search.template == stored
    assert command("evaluate", ALIGNED, "--template-kwargs", "{").code == 2


@pytest.mark.slow
def test_a_verified_cut_that_is_not_met_keeps_the_safest_and_leaves_with_code_5(tmp_path: Path) -> None:
    """What few requests can show is asked of safety, and more than any model has of utility."""
    data, held, asked = _data(tmp_path), _held(tmp_path), _requests(tmp_path, 20)
    lora, stored = (
        write(tmp_path / "lora.json", json.dumps({**lab.LORA, "r": 2})),
        write(tmp_path / "t.json", json.dumps(OPTIONS)),
    )
    typed = ["train", str(data), "--model", ALIGNED, "--output", str(tmp_path / "run"), "--lora-config", str(lora)]
    typed += ["--training-config", str(stored), "--safety", str(asked), "--utility", str(held), "--metric", "exact"]
    typed += [
        "--defence",
        "fihs:verified:utility=1.0,asr=0.3,rounds=2,tolerance=0",
        "--uncertified",
        "--max-new-tokens",
        "8",
        "--template-kwargs",
        '{"marked": true}',
    ]
    done = command(*typed)
    assert done.code == 5
    assert "the safest model is kept" in done.err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    results = manifest["results"]
    assert all(manifest["settings"][exam]["template"] == {"marked": True} for exam in ("report", "search"))
    assert results["verified"]["met"] is False
    assert 1 <= len(results["verified"]["rounds"]) <= 2
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    again = command(*typed)  # finished rounds are not trained again
    assert again.code == 5
    rounds = [
        found["verified"]["rounds"][0]
        for found in (results, json.loads((tmp_path / "run" / "manifest.json").read_text())["results"])
    ]
    assert rounds[0]["cut"] == rounds[1]["cut"]
    assert rounds[0]["seconds"] == pytest.approx(rounds[1]["seconds"], abs=1e-3)  # what it took, not the looking up


def test_cleared_rows_train_and_a_gate_may_stop_a_run_before_it_trains(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    seen: list[gs.Selection] = []

    def stop(selection: gs.Selection) -> None:
        assert (tmp_path / "run" / "scan" / "manifest.json").exists()
        seen.append(selection)
        raise Stopped

    more: dict[str, Any] = {"exams": Exams(), "settings": gs.ScanSettings(threshold="ratio:20%", selector="fihs")}
    with pytest.raises(Stopped):
        _run(tmp_path, "fihs", gate=stop, **more)
    assert not (tmp_path / "run" / "manifest.json").exists()
    (found,) = seen
    allowed = [found.scores.ids[i] for i in found.removed.nonzero()[0][:2]]
    done = _run(tmp_path, "fihs", gate=seen.append, allow=allowed, **more)
    assert done.selection is not None
    assert seen[1] is done.selection
    assert done.manifest.results.removed == len(found.removed_rows) - 2 == len(done.selection.removed_rows)
    assert done.manifest.results.trained == len(found.kept_rows) + 2
    assert len(done.selection.cleared) == 2


@pytest.mark.slow
def test_a_search_goes_on_at_the_round_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[str] = []
    real = Course.fit

    def fit(self: Course, defence: Any, dataset: Any, stage: str = "", *args: Any, **more: Any) -> Any:
        fits.append(stage)
        if len(fits) == 2:
            raise KeyboardInterrupt
        return real(self, defence, dataset, stage, *args, **more)

    options = {"exams": _exams(tmp_path, searching=True, requests=20)}
    spec = "fihs:verified:utility=0.0,asr=0.99"
    monkeypatch.setattr(Course, "fit", fit)
    fits.append("a")  # the first real fit is the second entry, and is stopped
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, spec, **options)
    assert not (tmp_path / "run" / "manifest.json").exists()
    done = _run(tmp_path, spec, **options)
    assert done.verdict is not None and done.verdict.met
    assert len(done.verdict.rounds) == 1
    count = len(fits)
    again = _run(tmp_path, spec, **options)
    assert len(fits) == count + 1  # the round's figures are read; its model, which was let go, is made again
    assert again.verdict is not None
    assert again.verdict.kept.cut == done.verdict.kept.cut


@pytest.mark.slow
def test_training_goes_on_at_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**OPTIONS, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    straight = _run(tmp_path / "a", "none", training=options, exams=Exams())
    seen: list[int] = []

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "training":
            seen.append(done)
            if done == 3 and seen.count(3) == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "b", "none", training=options, exams=Exams(), progress=stop)
    first = len(seen)
    resumed = _run(tmp_path / "b", "none", training=options, exams=Exams(), progress=stop)
    assert seen[first] == 2  # not 0
    assert straight.tokens == resumed.tokens > 4  # those before it was stopped included
    own, other = straight.model.state_dict(), resumed.model.state_dict()
    assert all((own[name] - other[name]).abs().max() < 1e-6 for name in own)


@pytest.mark.slow
def test_datasets_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = []
    for task in ("choice", "topic"):
        held = str(_held(tmp_path, task, 12))
        exams = Exams(exam("report", str(_requests(tmp_path, 6)), ["refusal-phrases"], held, "exact", 8))
        stages.append(Stage(str(_data(tmp_path, task)), exams))
    fitted: list[str] = []
    real = Course.fit

    def fit(self: Course, *args: Any, **more: Any) -> Any:
        fitted.append(Path(self.job.rows.read.source.name).name)
        if len(fitted) == 2:
            raise KeyboardInterrupt
        return real(self, *args, **more)

    def follow() -> SequenceRecord:
        return sequence(
            stages,
            model=loading.load(ALIGNED, dtype="float32"),
            output=tmp_path / "run",
            peft_config=peft.LoraConfig(**{**lab.LORA, "r": 2}),
            training=OPTIONS,
            defence="random:ratio:10%",
            probing=PROBING,
        )

    monkeypatch.setattr(Course, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        follow()
    follow()
    assert fitted == ["choice.jsonl", "topic.jsonl", "topic.jsonl"]  # the finished stage is not trained again
    stored = SequenceRecord.model_validate_json((tmp_path / "run" / "sequence.json").read_bytes())
    assert stored.tasks == ["choice", "topic"]
    assert [stage.name for stage in stored.stages] == ["start", "choice", "topic"]
    assert all(set(stage.utility) == {"choice", "topic"} and 0 <= (stage.visage or 0) <= 1 for stage in stored.stages)
    measures = stored.measures
    assert measures["backward_transfer"][0] is None
    learned, now = (stored.stages[i].utility["choice"].rate for i in (1, 2))
    assert measures["backward_transfer"][1] == pytest.approx(now - learned)
    assert measures["basin_retention"][1] == pytest.approx(
        (stored.stages[2].visage or 0) / (stored.stages[0].visage or 1)
    )
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "stage-1").state_dict()
    end = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "stage-2").state_dict()
    assert any((start[name] != end[name]).any() for name in start)
    assert (tmp_path / "run" / "report.html").exists()


def test_a_sequence_has_its_folder_alone(tmp_path: Path) -> None:
    stage = Stage("data.jsonl", Exams(exam("report", None, task=str(_held(tmp_path)), metric="exact")))
    with alone(tmp_path / "run"), pytest.raises(DataError, match="in use by another run"):
        sequence([stage], model="nowhere", output=tmp_path / "run")


@pytest.mark.parametrize(
    ("defence", "more", "match"),
    [
        ("asft", {}, "--base"),
        ("fish", {}, "fish"),
        ("clean", {}, "--labels"),
        ("fihs:verified", {"exams": Exams()}, "--utility"),
        ("none", {"training": {"learning_rat": 1}}, "learning_rat"),
    ],
)
def test_what_a_run_lacks_is_asked_for(tmp_path: Path, defence: str, more: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        _run(tmp_path, defence, **({"exams": Exams()} | more))
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.slow
def test_eval_measures_any_model_and_keeps_every_answer(tmp_path: Path) -> None:
    asked, held = _requests(tmp_path, 12), _held(tmp_path, n=10)
    typed = ["evaluate", ALIGNED, "--safety", str(asked), "--judge", "refusal-phrases", "--judge", "lab-classifier"]
    done = command(*typed, "--utility", str(held), "--metric", "exact", "--output", str(tmp_path / "out"))
    assert done.code == 0, done.err
    assert "ASR, lab-classifier" in done.out and "kappa" in done.out
    figures = json.loads((tmp_path / "out" / "manifest.json").read_text())["results"]["figures"]
    assert figures["asr"]["n"] == 12
    assert figures["utility"]["n"] == 10
    assert len((tmp_path / "out" / "outputs.jsonl").read_text().splitlines()) == 12 + 130 + 10
    assert command("evaluate", ALIGNED, "--safety", "none").code == 2
    assert command("evaluate", ALIGNED, "--judge", "nobody").code == 2


@pytest.mark.slow
def test_no_command_writes_over_what_another_has_found(tmp_path: Path) -> None:
    rows = _data(tmp_path)
    asked = ["--safety", _requests(tmp_path, 2), "--max-new-tokens", 2]
    lab_probes = write(tmp_path / "probes.jsonl", jsonl([*PROBING.requests]))
    typed: dict[str, list[Any]] = {
        "evaluate": ["evaluate", ALIGNED, *asked],
        "scan": ["scan", rows, "--model", ALIGNED, "--probes", lab_probes, "--lookalikes", lab_probes, "--uncertified"],
        "train": ["train", rows, "--model", ALIGNED, "--defence", "none"],
        "demo": ["demo"],
    }
    for own in ("evaluate", "scan"):
        folder = tmp_path / own
        assert command(*typed[own], "--output", folder).code == 0
        before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        for name in typed:
            if name != own:
                assert "the results of another command" in command(*typed[name], "--output", folder).sentence
        assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine" / "data.jsonl", "mine")
    assert "was not written by GradShield" in command("demo", "--output", tmp_path / "mine").sentence


@pytest.mark.parametrize("where", ["model", "base", "foreign", "scan"])
def test_nothing_that_is_read_or_is_not_ours_is_written_over(tmp_path: Path, where: str) -> None:
    own = tmp_path / "own"
    loading.load(ALIGNED).model.save_pretrained(own)
    before = {path: path.read_bytes() for path in own.iterdir()}
    more: dict[str, Any] = {"exams": Exams(), "output": own}
    if where == "model":
        (own / ".gradshield").mkdir()  # a model that training here has made
        more["model"] = str(own)
    elif where == "base":
        (own / ".gradshield").mkdir()
        more["needs"] = gs.Needs(base=str(own))
    elif where == "scan":
        more["output"] = tmp_path / "run"
        kept = tmp_path / "run" / "scan" / "kept.jsonl"
        kept.parent.mkdir(parents=True)
        before = {kept: write(kept, jsonl(lab.mix("choice", ratio=0.2, n=30)[0])).read_bytes()}
    with pytest.raises(DataError, match="give another --output"):
        if where == "scan":
            training.train(str(kept), **{"model": ALIGNED, "defence": "fihs"} | more)
        else:
            _run(tmp_path, "none", **more)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_a_full_disk_at_the_end_costs_nothing_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    exams = Exams()
    _run(tmp_path, "none", exams=exams)
    (folder / "README.md").write_text("Mine.\n" + (folder / "README.md").read_text())
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert (folder / "adapter_model.safetensors").stat().st_mode & 0o777 == (
        folder / "report.html"
    ).stat().st_mode & 0o777

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(training.card, "write", full)
        with pytest.raises(DataError, match="free some space"):
            _run(tmp_path, "none", exams=exams, seed=1)
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    removed = ("manifest.json", "certificate.json")  # of a run that is finished
    assert after == {name: content for name, content in before.items() if name not in removed}
    _run(tmp_path, "none", exams=exams, peft_config=None, merge=False)
    assert (folder / "model.safetensors").exists() and not (folder / "adapter_model.safetensors").exists()
    assert "Mine." in (folder / "README.md").read_text()
    assert not list(folder.glob(".*.part"))


@pytest.mark.slow
def test_what_counts_is_what_a_scan_counts_where_no_training_is_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Options of this project's own, such as when to save, say nothing about the loss."""
    none = Exams()
    plain = _run(tmp_path, "random:ratio:10%", training=None, exams=none, peft_config=None)
    assert plain.manifest.settings.render["assistant_only_loss"] is None
    assert plain.manifest.settings.training["save_strategy"] == "epoch"
    assert "assistant_only_loss" not in caplog.text
    stored = _run(tmp_path, "none", exams=none)
    assert "does not set assistant_only_loss" in caplog.text
    assert stored.manifest.settings.render["assistant_only_loss"] is False
    assert stored.manifest.settings.scan.selector == "screen"
    assert plain.manifest.settings.scan.selector == "random"
    assert plain.manifest.settings.scan.threshold == "ratio:10%"


def test_both_exams_have_one_set_of_judges_and_safety_rows_are_not_asked(tmp_path: Path) -> None:
    exams = _exams(tmp_path, searching=True)
    assert exams.report.judges is exams.search.judges
    asked = exams.report.requests[0]["prompt"]
    rows = [{"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "No."}]}]
    with pytest.raises(UsageError, match="safety and the report set"):
        _run(tmp_path, "safeinstruct", needs=gs.Needs(safety_rows=rows), exams=exams)
