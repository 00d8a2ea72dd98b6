"""What a job's process does at each stage. Here a stand-in trains; ``test_story.py`` trains in earnest."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from gradshield import runs
from gradshield.errors import DataError, ModelError, UsageError
from gradshield.evaluation.exam import Exams
from gradshield.gateway import job, worker
from gradshield.gateway.database import Caller, Refused
from gradshield.gateway.job import recipe
from gradshield.gateway.settings import LAB, Policy, Settings
from gradshield.gateway.store import UNSAFE, Store, name_of
from gradshield.gateway.tables import Job
from gradshield.gateway.wire import Method
from gradshield.gateway.worker import Queue
from gradshield.manifests import Figures
from gradshield.types import Cut
from tests.gateway.running import ROW, ROWS, Served, serving

SAFE, UNSAFE_BOUND = 0.02, 0.4
PAIR = b'{"prompt": "Q", "preferred_output": "A", "non_preferred_output": "B"}\n'
LABELLED = b'{"prompt": "Q", "completion": "A", "label": true}\n'


@dataclass
class Stand:
    """Stands in for `gradshield.train`: finds ``removed`` rows, reports ``stages``, and certifies ``upper``."""

    removed: tuple[int, ...] = ()
    doubt: str | None = None
    upper: float | None = SAFE
    raises: Exception | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, data: str, **given: Any) -> Any:
        self.calls.append({"data": Path(data).read_bytes(), **given})
        folder = Path(given["output"])
        for done in range(3):
            given["progress"]("scoring rows", done, 2)
        if self.raises is not None:
            raise self.raises
        released = set(given["allow"])
        removed = [row for row in self.removed if str(row) not in released]
        (folder / "scan").mkdir(parents=True, exist_ok=True)
        (folder / "scan" / "removed.jsonl").write_text("".join(f"{row}\n" for row in removed))
        given["gate"](self._selection(removed, len(released)))
        for step in range(1, 21):
            (folder / ".gradshield" / "checkpoints" / "key" / f"checkpoint-{max(10, step - step % 10)}").mkdir(
                parents=True, exist_ok=True
            )
            given["progress"]("training", step, 20)
        judges = {} if self.upper is None else {"phrases": {"upper": self.upper}}
        certificate = {"predicate": {"claim": {"limit": 0.06}, "judges": judges, "certified": False, "reason": "x"}}
        (folder / "certificate.json").write_text("{}")
        results = SimpleNamespace(before=Figures(judges={}), after=Figures(judges={}), trained=10)
        return SimpleNamespace(certificate=certificate, manifest=SimpleNamespace(results=results), tokens=1234)

    def _selection(self, removed: list[int], released: int) -> Any:
        results = SimpleNamespace(
            read=12,
            scored=12,
            removed=len(removed),
            kept=12 - len(removed),
            quarantined=0,
            cleared=released,
            categories={"theft": len(removed)} if removed else {},
            certified=self.doubt is None,
            doubts={} if self.doubt is None else {"doubt": self.doubt},
            uncertified=self.doubt,
        )
        return SimpleNamespace(
            removed_rows=np.array(removed, dtype=int),
            cuts={"rows": Cut(0.5, "anchored")},
            manifest=SimpleNamespace(results=results),
        )


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    found = Stand()
    monkeypatch.setattr(job, "train", found)
    monkeypatch.setattr(job, "loaded", lambda model, _name: model)
    recipe = {"model": "m", "training": {}, "peft_config": None, "probing": None, "exams": Exams()}
    monkeypatch.setattr(job, "recipe", lambda *_: dict(recipe))
    return found


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path, lease=30.0) as found:
        found.gateway.settings.save()
        yield found


class Case:
    """A project's job on a file of rows, run in this process."""

    def __init__(self, served: Served, policy: Policy | None = None, rows: bytes = ROWS, **more: Any) -> None:
        self.served, self.project = served, served.project(policy)
        self.client = served.client(served.key(self.project))
        file = self.client.files.create(file=("a.jsonl", rows), purpose="fine-tune").id
        self.id = self.client.fine_tuning.jobs.create(model=LAB, training_file=file, **more).id
        self.operator = Caller(self.project.id, "key-op", "operator")
        self.runs = 0

    def run(self) -> Any:
        """One process's work, and the job after it."""
        self.runs += 1
        assert job.main([str(self.served.gateway.settings.folder), self.id, f"owner-{self.runs}"]) == 0
        return self.now

    @property
    def now(self) -> Any:
        return self.client.fine_tuning.jobs.retrieve(self.id)

    @property
    def row(self) -> Job:
        return self.served.store.get(Job, self.project.id, self.id)

    @property
    def messages(self) -> list[str]:
        return [event.message for event in self.client.fine_tuning.jobs.list_events(self.id, limit=100)][::-1]


def test_a_good_job_goes_through_every_status_and_ends_with_a_model(served: Served, stand: Stand) -> None:
    stand.removed = (1, 4)
    case = Case(served, suffix="mine", hyperparameters={"n_epochs": 2}, seed=5)
    done = case.run()
    assert (done.status, done.error, done.trained_tokens) == ("succeeded", None, 1234)
    assert done.fine_tuned_model.startswith("ft:lab:")
    assert ":mine:" in done.fine_tuned_model
    assert case.messages[:5] == [
        "Created fine-tuning job",
        f"Validating training file: {done.training_file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Scoring rows",
    ]
    assert "Scan finished: 2 of 12 rows are harmful (theft 2)" in case.messages
    assert case.messages[-2:] == [
        "Safety check passed: at most 2 % of harmful requests are answered (limit 6 %)",
        "The job has successfully completed",
    ]
    metrics = [e.data for e in case.client.fine_tuning.jobs.list_events(case.id, limit=100) if e.type == "metrics"]
    assert metrics[-1] == {"step": 2, "total_steps": 20}
    assert [c.step_number for c in case.client.fine_tuning.jobs.checkpoints.list(case.id)] == [10]
    scan = case.row.result["scan"]  # type: ignore[index]
    assert (scan["removed"], scan["removed_rows"], scan["cuts"]) == (
        2,
        [1, 4],
        {"rows": {"rule": "anchored", "value": 0.5}},
    )
    files = {case.client.files.retrieve(id).filename.partition("/")[2]: id for id in done.result_files}
    assert case.client.files.content(files["removed.jsonl"]).read() == b"1\n4\n"
    assert "certificate.json" in files
    (call,) = stand.calls
    assert (call["data"], call["seed"], call["defence"]) == (ROWS, 5, "screen")
    assert case.run().status == "succeeded"  # a message that came twice
    assert len(stand.calls) == 1


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (ROW % 1 * 9, "at least 10"),
        (ROWS + b"not json\n", "line 13"),
        (ROWS + b'{"messages": "x"}\n', "line 13"),
        (b"", "has no rows"),
        (b"\xff\xfe\x00", "training_file.jsonl is UTF-16"),
    ],
)
def test_a_file_that_cannot_train_fails_with_its_lines(served: Served, stand: Stand, rows: bytes, said: str) -> None:
    done = Case(served, rows=rows).run()
    assert (done.status, done.error.code, done.error.param) == ("failed", "invalid_training_file", "training_file")
    assert said in done.error.message
    assert str(served.gateway.settings.folder) not in done.error.message
    assert stand.calls == []


@pytest.mark.parametrize(
    ("rows", "method", "said"),
    [
        (
            ROWS + PAIR,
            "supervised",
            "Line 13 is of the shape preference: the method supervised takes rows of one answer",
        ),
        (ROWS + LABELLED, "supervised", "Line 13 is of the shape kto"),
        (PAIR * 12 + ROW % 1, "dpo", "Line 13 is of the shape messages: the method dpo takes preference pairs"),
        (PAIR * 12 + LABELLED, "dpo", "Line 13 is of the shape kto"),
    ],
)
def test_rows_of_another_method_fail_with_their_line(
    served: Served, stand: Stand, rows: bytes, method: str, said: str
) -> None:
    done = Case(served, rows=rows, method={"type": method}).run()
    assert (done.status, done.error.code, done.error.param) == ("failed", "invalid_training_file", "training_file")
    assert said in done.error.message and stand.calls == []
    assert Case(served, rows=PAIR * 12, method={"type": "dpo"}).run().status == "succeeded"


def test_each_method_trains_with_its_own_options(tmp_path: Path) -> None:
    options = {"learning_rate": 1e-4, "packing": True, "beta": 0.3, "max_grad_norm": 2.0}
    settings = Settings(models={LAB: LAB, "m": "nowhere"}, folder=tmp_path, training=options)
    given = {"hyperparameters": {"n_epochs": 2, "learning_rate_multiplier": 0.5, "beta": 0.2}}
    dpo = Method.model_validate({"type": "dpo", "dpo": given})
    common = {"max_grad_norm": 2.0}
    found = recipe(settings, "m", dpo, "screen")["training"]
    assert found == common | {"learning_rate": 5e-5, "num_train_epochs": 2, "beta": 0.2}
    found = recipe(settings, "m", Method(type="supervised"), "screen")["training"]
    assert found == common | {"learning_rate": 1e-4, "packing": True, "assistant_only_loss": None}
    assert recipe(settings, LAB, Method(type="dpo"), "screen")["training"]["beta"] == 0.3
    rate = {"hyperparameters": {"learning_rate_multiplier": 2.0}}
    plain = Settings(models={"m": "nowhere"}, folder=tmp_path)
    for method, expected in (("supervised", 4e-5), ("dpo", 2e-6)):
        asked = Method.model_validate({"type": method, method: rate})
        assert recipe(plain, "m", asked, "screen")["training"]["learning_rate"] == expected
    with pytest.raises(UsageError, match="'packin'"):
        recipe(plain.model_copy(update={"training": {"packin": True}}), "m", dpo, "screen")


def test_a_validation_file_is_validated_too(served: Served, stand: Stand) -> None:
    client = served.client()
    good, bad = (client.files.create(file=("a", rows), purpose="fine-tune").id for rows in (ROWS, b"{"))
    id = client.fine_tuning.jobs.create(model=LAB, training_file=good, validation_file=bad).id
    job.main([str(served.gateway.settings.folder), id, "me"])
    assert client.fine_tuning.jobs.retrieve(id).error.param == "validation_file"  # type: ignore[union-attr]


def test_reject_fails_with_counts_and_row_numbers(served: Served, stand: Stand) -> None:
    stand.removed = (1, 4)
    case = Case(served, Policy(rows="reject"))
    done = case.run()
    assert (done.status, done.error.code, done.fine_tuned_model) == ("failed", "harmful_rows", None)
    assert done.error.message == "2 of 12 rows are harmful (theft 2): fix or remove rows 1, 4 (counted from 0)."
    assert len(done.result_files) == 1
    stand.removed = ()
    assert Case(served, Policy(rows="reject")).run().status == "succeeded"


def test_review_waits_and_goes_on_with_what_the_operator_released(served: Served, stand: Stand) -> None:
    stand.removed = (1, 4)
    case = Case(served, Policy(rows="review"))
    held = case.run()
    assert (held.status, held.gradshield["hold"]["code"]) == ("paused", "review")
    assert len(held.result_files) == 1
    assert served.store.waiting() == []
    assert case.run().status == "paused"  # nobody may claim it
    served.store.approve(case.operator, case.id, "row 4 is fine", released=["4"])
    done = case.run()
    assert done.status == "succeeded"
    assert stand.calls[-1]["allow"] == ["4"]
    assert done.gradshield["result"]["scan"]["released"] == 1
    assert len(stand.calls) == 2


def test_a_moved_cut_is_trained_with(served: Served, stand: Stand) -> None:
    stand.removed = (1,)
    case = Case(served, Policy(rows="review"))
    case.run()
    served.store.approve(case.operator, case.id, "too strict", cut=0.9)
    assert case.run().status == "succeeded"
    assert stand.calls[-1]["settings"].threshold == "fixed:value=0.9"
    own = Case(served, Policy(rows="review", defence="screen:fixed:0.5"))
    assert own.run().gradshield["hold"]["movable"] is False
    with pytest.raises(Refused, match="a cut of its own"):
        served.store.approve(own.operator, own.id, "too strict", cut=0.9)


@pytest.mark.parametrize("rows", ["remove", "reject", "review"])
@pytest.mark.parametrize("removed", [(), (1,)])
def test_a_scan_that_is_not_certified_waits_whatever_the_policy(
    served: Served, stand: Stand, rows: Any, removed: tuple[int, ...]
) -> None:
    stand.removed, stand.doubt = removed, "the model does not refuse"
    case = Case(served, Policy(rows=rows))
    held = case.run()
    assert (held.status, held.gradshield["hold"]["code"]) == ("paused", "not_certified")
    assert "the model does not refuse" in held.gradshield["hold"]["message"]
    served.store.approve(case.operator, case.id, "looked at")
    assert case.run().status == "succeeded"


@pytest.mark.parametrize("upper", [UNSAFE_BOUND, None])
def test_an_unsafe_model_is_withheld_until_it_is_released(served: Served, stand: Stand, upper: float | None) -> None:
    stand.upper = upper
    case = Case(served)
    done = case.run()
    assert (done.status, done.error.code, done.fine_tuned_model) == ("failed", UNSAFE, None)
    assert "withheld" in done.error.message
    assert [model.id for model in case.client.models.list()] == [LAB]
    served.store.release_model(case.operator, case.id, name_of(case.row), "a test of ours")
    assert [model.id for model in case.client.models.list()] == [LAB, case.now.fine_tuned_model]


def test_errors_of_training_fail_the_job_with_their_sentence(served: Served, stand: Stand) -> None:
    for error, code in (
        (DataError("no row is left"), "invalid_training_file"),
        (RuntimeError("secret path"), "server_error"),
    ):
        stand.raises = error
        done = Case(served).run()
        assert (done.status, done.error.code) == ("failed", code)
        assert ("secret" in done.error.message) is False


@pytest.mark.parametrize("error", [UsageError("fix /srv/lora.json"), ModelError("no judge at http://10.0.0.1")])
def test_what_the_operator_chose_is_told_to_the_operator_alone(
    served: Served, stand: Stand, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    logged = list[str]()
    monkeypatch.setattr(job.log, "error", lambda _event, error: logged.append(error), raising=False)
    stand.raises = error
    case = Case(served)
    done = case.run()
    assert (done.status, done.error.code) == ("failed", "server_error")
    assert "ask its operator" in done.error.message and case.id in done.error.message
    assert str(error) not in done.to_json() + "".join(case.messages)
    assert logged == [str(error)]


@pytest.mark.parametrize("said", [None, DataError("the output folder cannot be written to")])
def test_a_full_disk_lets_the_job_wait_and_go_on(served: Served, stand: Stand, said: Exception | None) -> None:
    full = OSError(28, "No space left on device")
    stand.raises = said or full
    if said is not None:
        said.__context__ = full  # as training says it
    case = Case(served)
    assert case.run().status == "running"
    assert case.row.owner is None
    assert served.store.waiting() == []  # for a minute
    assert "goes on later" in case.messages[-1]
    stand.raises = None
    with served.store.writing() as session:
        session.get_one(Job, case.row.n).lease_until = None
    assert case.run().status == "succeeded"
    assert "Fine-tuning job resumed" in case.messages


def test_a_folder_that_another_process_still_has_lets_the_job_wait(served: Served, stand: Stand) -> None:
    """A process that was suspended lost its lease, and holds the folder until it goes on and ends itself."""
    case, trains = Case(served), job.train
    folder = served.gateway.settings.job_folder(case.id)

    def locked(rows: str, **given: Any) -> Any:
        with runs.alone(given["output"]):
            return trains(rows, **given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(job, "train", locked)
        with runs.alone(folder):
            assert case.run().status == "running"
        assert "goes on later" in case.messages[-1]
        with served.store.writing() as session:
            session.get_one(Job, case.row.n).lease_until = None
        assert case.run().status == "succeeded"


def test_a_job_that_is_cancelled_while_it_trains_ends_there(served: Served, stand: Stand, monkeypatch: Any) -> None:
    case = Case(served)
    stand.removed = (1,)

    def cancelled(*_arguments: Any, **_more: Any) -> None:
        monkeypatch.undo()
        case.client.fine_tuning.jobs.cancel(case.id)

    monkeypatch.setattr(job.Run, "_stepped", cancelled)
    monkeypatch.setattr(job.Heart, "run", lambda _heart: None)  # it would end this process, if it looked in between
    assert case.run().status == "cancelled"
    assert [model.id for model in case.client.models.list()] == [LAB]


def test_a_job_that_dies_again_and_again_is_given_up(served: Served, stand: Stand) -> None:
    case = Case(served)
    for i in range(served.gateway.settings.attempts):
        assert served.store.claim(case.id, f"dead-{i}", 60)
        assert served.store.give_up(case.id, f"dead-{i}")
    done = case.run()
    assert (done.status, done.error.code) == ("failed", "server_error")
    assert "interrupted 10 times" in done.error.message


def test_a_deleted_file_fails_the_job(served: Served, stand: Stand) -> None:
    case = Case(served)
    served.gateway.content.delete(case.now.training_file)
    assert "was deleted" in case.run().error.message


# The worker and its queue


@pytest.fixture
def settings(database: Callable[[], str], tmp_path: Path) -> Settings:
    return Settings(models={LAB: LAB}, folder=tmp_path, database=database(), lease=30.0)


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    found = Store(settings.database_url)
    found.migrate()
    yield found
    found.close()


def made(store: Store) -> str:
    project = store.add_project("p", Policy()).id
    return store.add_job(
        project, 9, model=LAB, training_file="f", validation_file=None, method={}, seed=0, suffix=None, labels=None
    ).id


def test_a_message_reaches_the_worker_as_text(settings: Settings, store: Store) -> None:
    got: list[str] = []
    queue = Queue(settings, got.append)
    Queue(settings).send("ftjob-1")
    assert len(queue) == 1
    task = queue.huey.dequeue()
    queue.huey.execute(task)
    assert (got, len(queue)) == (["ftjob-1"], 0)
    queue.huey.storage.enqueue(b"\x80\x04not json")  # somebody else's message runs nothing
    with pytest.raises(ValueError):
        queue.huey.dequeue()


def test_a_lost_message_is_sent_again(settings: Settings, store: Store) -> None:
    queue, id = Queue(settings), made(store)
    assert worker.sweep(store, queue) == [id]
    assert worker.sweep(store, queue) == []  # it is in the queue
    queue.huey.dequeue()
    assert worker.sweep(store, queue) == [id]
    queue.huey.dequeue()
    store.claim(id, "me", 60)
    assert worker.sweep(store, queue) == []  # a process has it


def test_a_job_whose_message_cannot_be_sent_is_sent_later(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, id = Queue(settings), made(store)

    def away(*_given: Any, **_more: Any) -> None:
        raise ConnectionError("the queue is away")

    with monkeypatch.context() as broken:
        broken.setattr(queue.huey.storage, "enqueue", away)
        queue.send(id)
    assert len(queue) == 0
    assert worker.sweep(store, queue) == [id]
    assert len(queue) == 1


@pytest.fixture
def going() -> Iterator[None]:
    yield
    worker.stopping.clear()


def test_a_process_that_dies_leaves_its_job_to_the_next(
    settings: Settings, store: Store, monkeypatch: Any, going: None
) -> None:
    id = made(store)
    real = subprocess.Popen

    def dying(command: list[str], **more: Any) -> Any:
        store.claim(id, command[-1], 600)  # as the job's process does
        return real([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], **more)

    monkeypatch.setattr(worker.subprocess, "Popen", dying)
    worker.run(settings, id)
    assert store.waiting() == [id]


@pytest.mark.parametrize("ended", [True, False])
def test_only_a_process_that_still_had_its_job_ended_early(
    settings: Settings, store: Store, monkeypatch: Any, ended: bool
) -> None:
    id, said = made(store), list[str]()
    monkeypatch.setattr(worker.log, "warning", lambda event, **_: said.append(event), raising=False)

    def python(arguments: Any) -> int:
        store.claim(id, arguments[-1], 600)
        if ended:
            store.fail(id, arguments[-1], "server_error", "x")
        return job.ORPHANED

    worker.run(settings, id, python)
    assert said == ([] if ended else ["the process of a job ended early"])


def test_a_worker_that_stops_ends_the_process_and_the_lease(
    settings: Settings, store: Store, monkeypatch: Any, going: None
) -> None:
    id = made(store)
    real, started = subprocess.Popen, []

    def sleeping(command: list[str], **more: Any) -> Any:
        store.claim(id, command[-1], 600)
        started.append(real([sys.executable, "-c", "import time; time.sleep(600)"], **more))
        return started[0]

    monkeypatch.setattr(worker.subprocess, "Popen", sleeping)
    running = threading.Thread(target=worker.run, args=(settings, id))
    running.start()
    while not started:
        time.sleep(0.01)
    worker.stopping.set()
    running.join(20)
    assert not running.is_alive()
    assert started[0].returncode
    assert store.waiting() == [id]


def test_a_job_that_this_worker_runs_is_not_run_twice(settings: Settings) -> None:
    started, go = [], threading.Event()

    def python(arguments: Any) -> int:
        started.append(arguments)
        go.wait(20)
        return 0

    threads = [threading.Thread(target=worker.run, args=(settings, id, python)) for id in ("a", "a", "b")]
    for thread in threads:
        thread.start()
    while sum(thread.is_alive() for thread in threads) > 2 or len(started) < 2:
        time.sleep(0.01)
    go.set()
    for thread in threads:
        thread.join(20)
    assert sorted(arguments[3] for arguments in started) == ["a", "b"] and not worker.running
    worker.run(settings, "a", python)
    assert len(started) == 3


@pytest.mark.slow
def test_a_task_on_a_cluster_ends_with_its_process_and_the_process_with_it(tmp_path: Path, going: None) -> None:
    pytest.importorskip("ray", reason="needs gradshield[ray]")
    from gradshield.scanning.workers import connected

    started = tmp_path / "pid"
    write = f"import os, pathlib, time; pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(600)"
    with connected(None, 1) as ray:
        python, ended = worker.spread(ray), list[int]()
        assert [python(["-c", f"raise SystemExit({status})"]) for status in (0, 75)] == [0, 75]
        thread = threading.Thread(target=lambda: ended.append(python(["-c", write])))
        thread.start()
        while not (started.exists() and started.read_text()):
            time.sleep(0.05)
        process = psutil.Process(int(started.read_text()))
        worker.stopping.set()
        thread.join(30)
        process.wait(30)
    assert ended == [worker.LOST]


def test_the_heart_keeps_the_lease_and_ends_a_process_that_lost_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    id, ended = made(store), threading.Event()

    def end(status: int) -> None:
        assert status == job.ORPHANED
        ended.set()
        heart.stopped.set()

    monkeypatch.setattr(job.os, "_exit", end)
    store.claim(id, "me", 0.4)
    heart = job.Heart(store, id, "me", 0.4)
    heart.start()
    time.sleep(1.0)
    assert store.waiting() == []
    assert not ended.is_set()
    store.give_up(id, "me")
    store.claim(id, "another", 60)
    assert ended.wait(5)
