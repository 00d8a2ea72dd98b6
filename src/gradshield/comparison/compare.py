"""Every defence on the same tasks: a grid of fine-tunes, resumable at any point, as one table and one page.

results/
  cells.jsonl      one line per finished cell
  arms/            one file per trained model and measurement, named by a hash of its inputs: equal arms are trained once
  results.json     every cell, the cost, versions and the command; written last
  results.md, results.html
"""

from __future__ import annotations

import gc
import json
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from functools import lru_cache
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, Literal, TypeVar

from gradshield import files, lab, runs
from gradshield.comparison import grid
from gradshield.comparison.grid import Cell, CellResult, Comparison, Config, Cost
from gradshield.errors import DataError, EndpointError, GradShieldError, HubError
from gradshield.evaluation.exam import Exam, check_disjoint, exam, figures, lab_exam
from gradshield.judges import ReadyJudge
from gradshield.models import loading
from gradshield.models.loading import LoadedModel, keep_freed_memory
from gradshield.probes import read_prompts, requests
from gradshield.report import sheet
from gradshield.runs import alone
from gradshield.scanning.rows import prepare
from gradshield.scanning.settings import Probing, ScanSettings, peft_config
from gradshield.stats import Difference, paired_difference
from gradshield.training.arms import Arms
from gradshield.training.course import Course, Job, Needs, lab_job
from gradshield.training.defences import describe, parse
from gradshield.types import EvalResult, Progress, quiet

ARMS, CELLS = "arms", "cells"
R = TypeVar("R", CellResult, Comparison)


def compare(
    config: Config,
    output: Path,
    workers: int = 1,
    command: str = "gradshield.compare",
    progress: Progress = quiet,
) -> Comparison:
    """Run the missing cells of the grid, then write all results. Returns the content of ``results.json``.

    Cells of one task and seed run in one process, since they share models. A cell that fails with a documented error keeps its
    message in place of figures, and the next call retries it. Raises DataError for a missing file of the config, and
    EndpointError or HubError if another machine does not answer, which says nothing about a defence.
    """
    began = time.monotonic()
    grid.check_files(config)
    runs.check(output, ("cells.jsonl", "results.md", "results.html"), "cells.jsonl")
    with alone(output) as locked:
        folder = runs.prepare(output)
        for name in (ARMS, CELLS):
            (folder / name).mkdir(exist_ok=True)
            if locked:
                files.sweep(folder / name)
        _take_over(folder)
        cells = _all(config, folder, workers, progress)
        return _write(config, cells, folder, command, time.monotonic() - began)


def _all(config: Config, folder: Path, workers: int, progress: Progress) -> list[CellResult]:
    """Every cell of the grid: those on disk that were run under the same settings, and the missing ones, which are run.

    Cells that failed in an earlier run count as missing, since the cause may be fixed.
    """
    wanted = grid.cells(config)
    missing = [cell for cell in wanted if not _done(_file(folder, cell), cell, grid.setting(config, cell))]
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in sorted(missing, key=lambda cell: cell.seed):  # an interrupted grid then has whole seeds
        _file(folder, cell).unlink(missing_ok=True)
        groups.setdefault((cell.task, cell.seed), []).append(cell)

    def report() -> None:
        left = sum(not _file(folder, cell).exists() for cell in missing)
        progress("comparing", len(wanted) - left, len(wanted))

    report()
    if workers <= 1 or len(groups) <= 1:
        for cells in groups.values():
            _run_group(config, cells, folder, report)
    else:
        _share_out(workers, _run_group, [(config, cells, folder) for cells in groups.values()], report)
    report()
    return [_read(_file(folder, cell), CellResult) for cell in wanted]


def _read(path: Path, kind: type[R]) -> R:
    """A stored record. Raises OSError, or ValueError or RecursionError if it is damaged or of a version with other fields."""
    return kind.model_validate(
        json.loads(path.read_text(encoding="utf-8"))
    )  # unlike pydantic's, it takes lone surrogates


def _done(path: Path, cell: Cell, setting: str) -> bool:
    """Whether the cell was run under this setting."""
    try:
        found = _read(path, CellResult)
    except (OSError, ValueError, RecursionError):
        return False
    return found.setting == setting and found.cell == cell and found.failed is None


def _share_out(
    workers: int, run: Callable[..., None], groups: Sequence[tuple[Any, ...]], report: Callable[[], None]
) -> None:
    """``run`` for every group, ``workers`` at a time. The first error and Ctrl-C stop all of them."""
    others = set(active_children())
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_ready)
    try:
        running = {pool.submit(run, *group) for group in groups}
        while running:
            finished, running = wait(running, timeout=2, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
            report()
    except BaseException:
        for process in set(active_children()) - others:  # their finished cells are on disk
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _ready() -> None:
    """Set up a worker: one thread, and the libraries excluded from the garbage collection that TRL runs at every training.

    Ctrl-C is left to the parent process, which stops every worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch
    import trl.trainer.sft_trainer  # noqa: F401

    import gradshield.training.fit  # noqa: F401

    keep_freed_memory()
    torch.set_num_threads(1)
    gc.freeze()


def _file(folder: Path, cell: Cell) -> Path:
    name = cell.name.replace("/", "~").replace(":", "=")
    short = name if len(name) <= 150 else f"{name[:150]}-{runs.digest(name)[:12]}"
    return folder / CELLS / f"{short}.json"


def _take_over(folder: Path) -> None:
    """Take the cells of a ``results.json`` in the folder as done, so that a grid can continue on another machine."""
    path = folder / "results.json"
    if not path.exists():
        return
    try:
        found = _read(path, Comparison)
    except (ValueError, RecursionError):
        raise DataError(f"{path} is not a comparison's results.json: move it away, or give another --output") from None
    for one in found.cells:
        path = _file(folder, one.cell)
        if one.setting and not path.exists():
            runs.write_json(path, one)


def _run_group(config: Config, cells: Sequence[Cell], folder: Path, tick: Callable[[], None] = lambda: None) -> None:
    """Run the missing cells of one task and seed, mix by mix."""
    mixes = dict.fromkeys((cell.harm, cell.ratio) for cell in cells)
    for harm, ratio in mixes:
        own = [cell for cell in cells if (cell.harm, cell.ratio) == (harm, ratio)]
        bench = Bench(config, own[0], folder)
        for cell in sorted(own, key=lambda c: (c.defence != "clean", c.defence != "none")):
            parent = parent_process()
            if parent is not None and not parent.is_alive():  # another process may have restarted this work
                return
            runs.write_json(_file(folder, cell), bench.run(cell))
            tick()


class Bench:
    """One mix of one task and seed, with everything that its cells share."""

    def __init__(self, config: Config, cell: Cell, folder: Path) -> None:
        self.config, self.course = config, Course(_job(config, cell))
        self.arms = Arms(self.course, folder / ARMS)
        self.report = _exam(config, cell, "report")
        # One set of judges for both: a guard may be as large as the model.
        self.search = replace(_exam(config, cell, "search"), judges=self.report.judges)
        asked = {"report": self.report.requests, "search": self.search.requests}
        check_disjoint(direction=self.course.job.probing.requests or requests(), **asked)
        for judge in self.report.judges:
            if isinstance(judge, ReadyJudge):  # a judge that cannot run is reported before any training
                judge.ready()

    def run(self, cell: Cell) -> CellResult:
        """Run one cell."""
        began = time.monotonic()
        found: dict[str, Any] = {**asdict(cell), "setting": grid.setting(self.config, cell)}
        defence = parse(cell.spec)
        try:
            if defence.verified is not None:
                found["verified"], chosen = self.arms.search(defence, self.search)
            else:
                chosen = self.course.chosen(defence)
            found |= self.course.counts(chosen)
            found["cuts"] = {name: cut.value for name, cut in chosen.cuts.items()}
            measured, arm = self.arms.measure(defence, chosen, self.report)
            found |= figures(measured).plain() | {"arm": arm["key"], "defence_record": arm["record"]}
            if cell.defence != "clean" and self.course.job.labels is not None:
                found["utility_minus_clean"] = self._minus_clean(measured)
        except (EndpointError, HubError):
            raise
        except GradShieldError as error:
            found["failed"] = str(error)
        found["seconds"] = round(time.monotonic() - began, 1)
        return CellResult.model_validate(runs.finite(found))

    def _minus_clean(self, measured: EvalResult) -> Difference | None:
        """Utility minus that of training on the harmless rows only, paired over the task's rows."""
        if "utility" not in measured.rates:
            return None
        defence = parse("clean")
        clean, _ = self.arms.measure(defence, self.course.chosen(defence), self.report)
        return paired_difference(_scores(measured), _scores(clean))


def _scores(result: EvalResult) -> list[float]:
    return [float(row["score"]) for row in result.outputs if "score" in row]


@lru_cache(maxsize=2)
def _model(name: str) -> LoadedModel:
    return loading.load(name, dtype="float32")


def _job(config: Config, cell: Cell) -> Job:
    own = config.dataset(cell.task)
    if own is None:
        if cell.harm == grid.MIXED:
            rows, labels = grid.mixed(cell.task, cell.ratio, cell.seed)
        else:
            rows, labels = lab.mix(cell.task, harm=cell.harm, ratio=cell.ratio, seed=cell.seed)
        # By content, so that the rows that two arms share are in the same order.
        paired = sorted(zip(rows, labels, strict=True), key=lambda pair: json.dumps(pair[0], sort_keys=True))
        data, truth = [row for row, _ in paired], [label for _, label in paired]
        return lab_job(cell.task, data, truth, cell.seed, config.training, config.lora)
    options = {**config.training, **own.training}
    asked = config.requests.get("direction")
    known = files.read_labels(None if own.labels is None else Path(own.labels), "the labels")
    prepared = prepare(own.train, _model(config.model), training_args=options, labels=known)
    return Job(
        rows=prepared,
        options=options,
        peft_config=peft_config(config.lora),
        needs=Needs(base=_model(config.base) if config.base else None),
        labels=known,
        settings=ScanSettings(seed=cell.seed),
        probing=Probing(requests=read_prompts(asked, "direction") if asked else ()),
        seed=cell.seed,
    )


def _exam(config: Config, cell: Cell, split: Literal["report", "search"]) -> Exam:
    own = config.dataset(cell.task)
    if own is None:
        return lab_exam(cell.task, split, cell.seed)
    return exam(
        split,
        safety=config.requests.get(split, "builtin"),
        judges=config.judges,
        task=own.task,
        metric=own.metric,
        tokens=config.answer_tokens,
        most=config.task_rows,
        halved=True,  # the search and the report use different rows
    )


def _recipes(config: Config, cells: Sequence[CellResult]) -> dict[str, Any]:
    """The full recipe of each lab task, of which the config holds only the changes."""
    if config.model != "lab":
        return {}
    tasks = sorted({cell.task for cell in cells})
    return {
        "recipes": {task: {**lab.recipe(task), **config.training} for task in tasks},
        "adapter": {**lab.LORA, **config.lora},
    }


def _write(config: Config, cells: Sequence[CellResult], folder: Path, command: str, seconds: float) -> Comparison:
    """Write the table, the page and, last, ``results.json``."""
    from gradshield.comparison import page

    whole = Comparison(
        command=command,
        versions=runs.versions(),
        config=Config.model_validate(config.model_dump()),  # every default counts as set, and is written
        **_recipes(config, cells),
        defences={cell.defence: " ".join(describe(cell.defence)) for cell in cells},
        cost=Cost(
            cells=len(cells),
            failed=sum(cell.failed is not None for cell in cells),
            arms=len({cell.arm for cell in cells if cell.arm is not None}),
            cell_seconds=round(sum(cell.seconds for cell in cells), 1),
            seconds_of_this_run=round(seconds, 1),
        ),
        cells=list(cells),
    )
    runs.write_lines(folder / "cells.jsonl", cells)
    files.write_text(folder / "results.md", page.markdown(whole))
    sheet.write(page.page(whole), folder / "results.html")
    runs.write_json(folder / "results.json", whole)
    return whole
