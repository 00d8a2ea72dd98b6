"""report_to: a tracker sees the training, and our rates before its run is closed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerState
from transformers.integrations import integration_utils

import gradshield as gs
from gradshield import lab
from gradshield.errors import UsageError
from gradshield.evaluation.exam import Exams
from gradshield.judges import RefusalPhrases
from gradshield.models import loading
from gradshield.training.train import Reporters
from tests.common import command, jsonl, write

PROBING = gs.Probing(requests=lab.requests("direction")[:24], lookalikes=lab.lookalikes("direction")[:24])


class Recorder(TrainerCallback):
    """A stand-in with MLflow's habit: what is logged after the end of a training opens another run."""

    runs: list[list[tuple[str, Any]]]

    def __init__(self) -> None:
        self.open = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        assert "model" in more
        self._note("begin", state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        self._note("log", {**logs, "step": state.global_step})

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._note("end", None)
        self.open = False

    def _note(self, event: str, value: Any) -> None:
        if not self.open:
            self.runs.append([])
            self.open = True
        self.runs[-1].append((event, value))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    Recorder.runs = []
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    return Recorder


def test_a_tracker_sees_the_steps_and_the_rates_in_one_run(recorder: type[Recorder], tmp_path: Path) -> None:
    rows, _ = lab.mix("dialogue", harm="explicit", ratio=0.1, n=20)
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
    asked = gs.Exam(requests=lab.requests("report")[:6], judges=(RefusalPhrases(),))
    done = gs.train(
        rows,
        model=loading.load(str(lab.checkpoint("aligned")), dtype="float32"),
        output=tmp_path / "run",
        training={**options, "report_to": ["none", "recorder"]},
        probing=PROBING,
        exams=Exams(report=asked),
    )
    (run,) = recorder.runs
    events = [event for event, _ in run]
    assert events[0] == "begin" and events[-2:] == ["log", "end"] and events.count("end") == 1
    logged = [value for event, value in run if event == "log"]
    assert [one["step"] for one in logged if "loss" in one] == [1, 2, 3]
    last = logged[-1]
    assert last.pop("step") == 3
    results = done.manifest.results
    assert last == {
        **{f"eval_{name.replace('/', '_')}": rate.rate for name, rate in done.after.rates.items()},
        **{f"eval_before_{name.replace('/', '_')}": rate.rate for name, rate in done.before.rates.items()},
        "eval_rows_removed": results.removed,
        "eval_rows_trained": results.trained,
    }
    assert any("asr" in name for name in last)
    assert "report_to" not in done.manifest.settings.training


def test_the_end_waits_for_the_rates(recorder: type[Recorder], tmp_path: Path) -> None:
    reporters = Reporters(["recorder"], tmp_path)
    reporters.finish({"eval_utility": 1.0})
    assert not recorder.runs  # no training has ended
    (callback,) = reporters.callbacks
    callback.on_train_end(None, TrainerState(global_step=3), None, model=None)
    assert not recorder.runs
    reporters.finish({"eval_utility": 1.0})
    assert recorder.runs == [[("log", {"eval_utility": 1.0, "step": 3}), ("end", None)]]


@pytest.mark.parametrize(
    ("name", "words"), [("nowhere", "nowhere is not supported"), ("mlflow", "mlflow"), ("wandb", "wandb")]
)
def test_what_cannot_be_used_is_said_before_anything_is_loaded(name: str, words: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    data = write(tmp_path / "data.jsonl", jsonl(lab.mix("dialogue", ratio=0.1, n=8)[0]))
    done = command("train", data, "--model", tmp_path, "--output", tmp_path / "run", "--report-to", name)
    assert done.code == 2 and "report_to cannot use" in done.sentence and words in done.sentence
    assert not (tmp_path / "run").exists()


def test_several_trainings_are_not_one_run(recorder: type[Recorder], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="follows one training, and a verified threshold trains once for every cut"):
        gs.train(
            [{"prompt": "a", "completion": "b"}],
            model="none",
            output=tmp_path,
            defence="fihs:verified:asr=5%",
            training={"report_to": "recorder"},
        )


def test_tensorboard_is_not_in_the_folder_of_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Board(Recorder):
        logging_dir: str | None = None

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "board", Board)
    (board,) = Reporters(["board"], tmp_path).callbacks
    assert board.logging_dir == str(tmp_path / "tensorboard")
