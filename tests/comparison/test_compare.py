"""The grid: its config, that nothing is run twice, and that a killed grid resumes."""

from __future__ import annotations

import json
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradshield.comparison import compare, grid
from gradshield.comparison.grid import Comparison
from gradshield.errors import DataError, UsageError
from gradshield.runs import alone
from gradshield.scanning.settings import peft_config
from gradshield.training.course import Course

SMALL: dict[str, Any] = {
    "grids": [
        {"tasks": ["choice"], "mixes": ["0%", "explicit:20%"], "defences": ["none", "clean", "random:ratio:10%"]}
    ],
    "training": {"max_steps": 2},
}
OWN = {"name": "a", "train": "b.jsonl"}


def _config(**more: Any) -> grid.Config:
    return grid.check(json.loads(json.dumps(SMALL | more)))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A lab of few rows and short exams; the list holds what was trained."""
    trained: list[str] = []
    real_mix, real_exam, real_fit = compare.lab.mix, compare.lab_exam, Course.fit

    def fit(self: Course, defence: Any, dataset: Any, *args: Any, **more: Any) -> Any:
        trained.append(defence.spec)
        return real_fit(self, defence, dataset, *args, **more)

    def exam(*args: Any) -> Any:
        whole = real_exam(*args)
        return compare.Exam(whole.requests[:6], whole.judges, whole.lookalikes[:4], whole.task[:6], whole.score, 4)

    monkeypatch.setattr(compare.lab, "mix", lambda task, **more: real_mix(task, **{**more, "n": 24}))
    monkeypatch.setattr(compare, "lab_exam", exam)
    monkeypatch.setattr(Course, "fit", fit)
    return trained


@pytest.mark.slow
def test_a_grid_is_run_once_and_resumes_where_it_stopped(quick: list[str], tmp_path: Path) -> None:
    config = _config()
    whole = compare.compare(config, tmp_path / "whole")
    assert sorted(quick) == ["clean", "none", "random:ratio:10%", "random:ratio:10%"]  # clean rows are trained on once
    assert len(whole.cells) == 6
    for cell in whole.cells:
        assert cell.utility is not None and cell.utility.n == 6
        assert set(cell.judges) == {"refusal-phrases", "lab-classifier"}
    assert Comparison.model_validate_json((tmp_path / "whole" / "results.json").read_bytes()) == whole

    quick.clear()
    again = compare.compare(config, tmp_path / "whole")
    assert quick == []
    assert again.cells == whole.cells

    class Killed(Exception):
        pass

    def killed(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        compare.compare(config, tmp_path / "part", progress=killed)
    first = len(quick)
    with alone(tmp_path / "part"), pytest.raises(DataError, match="in use by another run"):
        compare.compare(config, tmp_path / "part")
    (tmp_path / "part" / "cells" / f".x.json.{'0' * 12}.part").mkdir()
    rest = compare.compare(config, tmp_path / "part")
    assert len(quick) == 4 and 0 < first < 4
    untimed = {"seconds": 0.0}
    assert [c.model_copy(update=untimed) for c in rest.cells] == [c.model_copy(update=untimed) for c in whole.cells]
    assert not list((tmp_path / "part" / "cells").glob(".*"))
    for arm in (tmp_path / "part" / "arms").iterdir():
        assert json.loads(arm.read_text())["seconds"] > 0


@pytest.mark.slow
def test_a_command_that_is_not_utf8_is_written_too(quick: list[str], tmp_path: Path) -> None:
    grids = [{"tasks": ["choice"], "mixes": ["0%"], "defences": ["none"]}]
    compare.compare(_config(grids=grids), tmp_path, command="gradshield compare \udcff.yaml")
    for name in ("results.md", "results.html", "results.json"):
        assert "gradshield compare" in (tmp_path / name).read_text(encoding="utf-8")
    compare.compare(_config(grids=grids), tmp_path)  # and read again
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.md").write_text("mine")
    with pytest.raises(DataError, match=r"results\.md"):
        compare.compare(_config(grids=grids), tmp_path / "other")


@pytest.mark.slow
def test_a_grid_resumes_from_results_copied_elsewhere(quick: list[str], tmp_path: Path) -> None:
    grids = [{"tasks": ["choice"], "mixes": ["0%"], "defences": ["none"]}]
    compare.compare(_config(grids=grids), tmp_path / "here")
    there = tmp_path / "there"
    there.mkdir()
    (there / "results.json").write_bytes((tmp_path / "here" / "results.json").read_bytes())
    quick.clear()
    grids[0]["defences"] = ["none", "random:ratio:10%"]
    assert len(compare.compare(_config(grids=grids), there).cells) == 2
    assert sorted(quick) == ["clean", "random:ratio:10%"]  # the reference for utility was not copied
    (there / "results.json").write_text("[]")
    with pytest.raises(DataError, match=r"results\.json"):
        compare.compare(_config(grids=grids), there)


@pytest.mark.slow
def test_damaged_cells_and_arms_are_measured_again(quick: list[str], tmp_path: Path) -> None:
    grids = [{"tasks": ["choice"], "mixes": ["0%"], "defences": ["none"]}]
    whole = compare.compare(_config(grids=grids), tmp_path)
    (cell,), (arm,) = ([*(tmp_path / name).iterdir()] for name in ("cells", "arms"))
    first, timed = cell.read_text(), arm.read_text()
    older = json.loads(first)
    del older["harm"]
    impossible = json.loads(timed)
    next(iter(impossible["rates"].values()))["k"] = 99
    less = [
        json.dumps({k: v for k, v in json.loads(timed).items() if k != gone}) for gone in ("key", "seconds", "record")
    ]
    arms = ["x", "[]", "{}", timed[:50], '{"rates": {}, "outputs": []}', json.dumps(impossible), *less]
    cells = ["{}", first[:50], "[]", json.dumps(older)]
    for junk in arms:
        (tmp_path / "results.json").unlink()
        cell.write_text(cells[len(junk) % len(cells)])
        arm.write_text(junk)
        quick.clear()
        again = compare.compare(_config(grids=grids), tmp_path).cells
        assert quick == ["none"]
        assert (
            again[0].judges == whole.cells[0].judges
            and json.loads(arm.read_text())["rates"] == json.loads(timed)["rates"]
        )
    for junk in cells:
        (tmp_path / "results.json").unlink()
        cell.write_text(junk)
        quick.clear()
        assert compare.compare(_config(grids=grids), tmp_path).cells[0].judges == whole.cells[0].judges
        assert quick == []  # its arm is whole


@pytest.mark.slow
def test_a_failed_cell_is_kept_with_its_error_and_retried(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = [{"tasks": ["choice"], "mixes": ["explicit:20%"], "defences": ["fihs:fixed:-1000", "none"]}]
    cells = compare.compare(_config(grids=grids), tmp_path).cells
    assert "no row to train on" in (cells[0].failed or "")
    assert cells[1].judges
    assert "no row to train on" in (tmp_path / "results.md").read_text()

    run: list[str] = []
    real = compare.Bench.run
    monkeypatch.setattr(compare.Bench, "run", lambda self, cell: run.append(cell.defence) or real(self, cell))
    assert compare.compare(_config(grids=grids), tmp_path).cells[1] == cells[1]
    assert run == ["fihs:fixed:-1000"]


def _begin(name: str, folder: Path) -> None:
    """A group of cells: one fails once the other has begun, the other would take long."""
    if name == "long":
        (folder / "begun").touch()
        time.sleep(600)
    while not (folder / "begun").exists():
        time.sleep(0.01)
    raise DataError("no such rows")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True], ids=["error", "ctrl-c"])
def test_an_error_or_ctrl_c_ends_all_workers(tmp_path: Path, stopped: bool) -> None:
    names = ["long", "long" if stopped else "fails", "long", "long"]

    def report() -> None:
        if stopped and (tmp_path / "begun").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt if stopped else DataError):
        compare._share_out(2, _begin, [(name, tmp_path) for name in names], report)
    assert active_children() == []


@pytest.mark.parametrize("key", ["train", "labels", "task", "report"])
def test_a_missing_file_is_reported_before_anything_runs(tmp_path: Path, key: str) -> None:
    files = {name: tmp_path / name for name in ("train", "labels", "task", "report")}
    for name, path in files.items():
        if name != key:
            path.touch()
    given = {
        "model": "m",
        "datasets": [{"name": "a", **{name: str(files[name]) for name in ("train", "labels", "task")}}],
        "requests": {"report": str(files["report"])},
        "grids": [{"tasks": ["a"], "defences": ["none"]}],
    }
    with pytest.raises(DataError, match=f"{key}.*no such file"):
        compare.compare(grid.check(given), tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"grids": []}, "grids"),
        ({"grid": []}, "did you mean 'grids'"),
        ({"grids": [{"tasks": ["choice"], "defences": ["none"], "mix": ["0%"]}]}, "did you mean 'mixes'"),
        ({"lora": {"rank": 3}, "datasets": [{"name": "a", "train": "b"}]}, "bundled lab"),
        ({"judges": ["nobody"]}, "nobody"),
        ({"model": "m", "datasets": [OWN], "grids": [{"tasks": ["a"], "defences": ["clean"]}]}, "`labels`"),
        ({"model": "m", "datasets": [OWN], "grids": [{"tasks": ["a"], "defences": ["asft"]}]}, "`base`"),
        ({"model": "m", "datasets": [OWN], "grids": [{"tasks": ["a"], "defences": ["fihs:verified"]}]}, "`task`"),
        ({"grids": [{"tasks": ["poetry"], "defences": ["none"]}]}, "poetry"),
        ({"grids": [{"tasks": ["choice"], "mixes": ["much"], "defences": ["none"]}]}, "much"),
        ({"grids": [{"tasks": ["choice"], "mixes": ["explicit:100%"], "defences": ["none"]}]}, "100%"),
        ({"grids": [{"tasks": ["choice"], "defences": ["fish"]}]}, "fish"),
        ({"grids": [{"tasks": ["choice"], "defences": ["none"], "seeds": "all"}]}, "seeds"),
        ({"grids": [{"tasks": ["choice"], "defences": ["none"], "seeds": [-1]}]}, "seeds"),
        ({"requests": {"reprot": "mine.txt"}}, "'direction', 'search' or 'report'"),
    ],
)
def test_a_wrong_config_is_reported_before_anything_runs(change: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        _config(**change)


def test_a_cell_depends_on_its_settings_and_the_content_of_its_files(tmp_path: Path) -> None:
    def setting(**more: Any) -> str:
        given = {
            "model": "m",
            "datasets": [{**OWN, "train": str(path)}],
            "grids": [{"tasks": ["a"], "defences": [spec]}],
        }
        config = grid.check(given | more)
        return grid.setting(config, grid.cells(config)[0])

    path, spec = tmp_path / "rows.jsonl", "fihs"
    path.write_text("one")
    first = setting()
    assert setting() == first
    assert setting(training={"learning_rate": 1.0}) != first
    path.write_text("other")
    second = setting()
    assert second != first
    spec = "fihs:verified:asr=0.05"
    assert len({first, second, setting(datasets=[{**OWN, "train": str(path), "task": str(path)}])}) == 3


@pytest.mark.parametrize("place", ["model", "judge", "defence"])
def test_a_cell_depends_on_the_content_of_its_model_folders(tmp_path: Path, place: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "weights.safetensors").write_text("one")
    given: dict[str, Any] = {"model": str(tmp_path) if place == "model" else "m", "datasets": [OWN]}
    if place == "judge":
        given["judges"] = ["refusal-phrases", f"classifier:{tmp_path},unsafe=bad"]
    defence = f"guard:classifier:{tmp_path},unsafe=bad" if place == "defence" else "none"
    config = grid.check({**given, "grids": [{"tasks": ["a"], "defences": [defence]}]})
    found = [grid.setting(config, grid.cells(config)[0])]
    for name, content in (("config.json", "[1]"), ("weights.safetensors", "two"), ("chat_template.jinja", "{{ a }}")):
        (tmp_path / name).write_text(content)
        found.append(grid.setting(config, grid.cells(config)[0]))
    assert len(set(found)) == 4


def test_as_many_rows_as_another_removes_depends_on_the_others_clean_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"grids": [{"tasks": ["topic"], "mixes": ["0%"], "defences": ["random:as:fihs:conformal:clean=c.parquet"]}]}
    with pytest.raises(UsageError, match=r"there is no file 'c\.parquet'"):
        grid.check(given)


def test_each_task_has_its_own_clean_rows_and_a_cell_depends_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {
        "grids": [{"tasks": ["choice", "topic"], "mixes": ["0%"], "defences": ["fihs:conformal:clean={task}.parquet"]}]
    }
    for task in ("choice", "topic"):
        with pytest.raises(UsageError, match=f"there is no file '{task}.parquet'"):
            grid.check(given)
        (tmp_path / f"{task}.parquet").write_text("scores")
    config = grid.check(given)
    cells = grid.cells(config)
    assert [cell.spec for cell in cells] == [f"fihs:conformal:clean={task}.parquet" for task in ("choice", "topic")]
    before = [grid.setting(config, cell) for cell in cells]
    (tmp_path / "topic.parquet").write_text("other scores")
    after = [grid.setting(config, cell) for cell in cells]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False]


def test_the_lab_has_default_mixes() -> None:
    found = grid.cells(grid.check({"grids": [{"tasks": ["choice"], "defences": ["none"]}]}))
    assert [(cell.harm, cell.ratio) for cell in found] == [("none", 0.0), ("explicit", 0.1)]


def test_an_unknown_option_of_the_adapter_is_reported() -> None:
    with pytest.raises(UsageError, match="unknown option 'rank'"):
        peft_config({"rank": 3})
    assert peft_config({"r": 3}).r == 3


def test_paths_are_relative_to_the_configs_folder(tmp_path: Path) -> None:
    own = {"name": "mine", "train": "rows.jsonl", "task": "held.jsonl"}
    given = {"model": "some/model", "datasets": [own], "grids": [{"tasks": ["mine"], "defences": ["none"]}]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(given))
    found = grid.read(path)
    assert found.datasets[0].train == str(tmp_path / "rows.jsonl")
    assert found.model == "some/model"
    assert [cell.name for cell in grid.cells(found)] == ["mine/own/0/0/none"]
    path.write_text("a: [")
    with pytest.raises(DataError, match="YAML"):
        grid.read(path)


def test_the_shipped_configs_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for task in compare.lab.TASKS:  # as benchmarks.lab_clean leaves them
        (tmp_path / "clean" / task).mkdir(parents=True)
        (tmp_path / "clean" / task / "scores.parquet").touch()
    folder = Path(__file__).parents[2] / "benchmarks" / "configs"
    assert {path.name for path in folder.glob("*.yaml")} == {"lab.yaml", "lab_screen.yaml", "english.yaml"}
    for path in folder.glob("*.yaml"):
        assert len(grid.cells(grid.read(path))) >= 30


def test_the_implicit_mix_has_a_third_of_each_kind() -> None:
    rows, labels = grid.mixed("topic", 0.1, 0)
    clean, _ = compare.lab.mix("topic", harm="none", ratio=0, seed=0)
    assert rows[: len(clean)] == clean
    assert sum(labels) == len(rows) - len(clean) == 57
