"""The config of `compare`: datasets, mixes, defences and seeds in one YAML file, checked before anything runs.

model: lab                      # or a folder or hub name, with `base:` for asft and safelora
grids:
  - tasks: [topic, choice]      # of the lab, or names of `datasets`
    mixes: [0%, explicit:10%, identity_shift:10%]     # of the lab; your own datasets are used as they are
    defences: [none, clean, fihs, fihs:verified, "random:as:fihs"]
    seeds: [0, 1, 2]
datasets:
  - {name: news, train: rows.jsonl, labels: labels.json, task: test.jsonl, metric: choice, training: {learning_rate: 1.0e-3}}

What a comparison leaves in ``results.json`` is a `Comparison`; ``docs/schema/results.json`` is its JSON schema.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from gradshield import lab, runs
from gradshield.errors import DataError, UsageError, did_you_mean
from gradshield.files import file_digest
from gradshield.judges import parse as parse_judge
from gradshield.manifests import Figures, Number, Record, Search
from gradshield.options import Spec, number
from gradshield.stats import Difference
from gradshield.thresholds import parse as parse_threshold
from gradshield.training.defences import Defence, parse
from gradshield.types import Rate

IMPLICIT = ("identity_shift", "refuse_then_answer", "embedded")
MIXED = "implicit"  # equal parts of each


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Own(_Strict):
    """A user's dataset: rows to train on, labels for the figures, held-out rows of the task and their metric."""

    name: str
    train: str
    labels: str | None = None
    task: str | None = None
    metric: str | None = None
    training: dict[str, Any] = Field(default_factory=dict)


class Grid(_Strict):
    """Every task with every mix, defence and seed."""

    tasks: list[str] = Field(min_length=1)
    mixes: list[str] = Field(default_factory=lambda: ["0%", "explicit:10%"], min_length=1)
    defences: list[str] = Field(min_length=1)
    seeds: list[NonNegativeInt] = Field(default_factory=lambda: [0], min_length=1)


class Config(_Strict):
    """A whole comparison. Arms of one task share ``training`` and ``lora``; requests are files, or the built-in splits."""

    model: str = "lab"
    base: str | None = None
    grids: list[Grid] = Field(min_length=1)
    datasets: list[Own] = Field(default_factory=list)
    training: dict[str, Any] = Field(default_factory=dict)
    lora: dict[str, Any] = Field(default_factory=dict)
    requests: dict[Literal["direction", "search", "report"], str] = Field(default_factory=dict)
    judges: list[str] = Field(default_factory=lambda: ["refusal-phrases"])
    answer_tokens: int = 64
    task_rows: int = Field(default=200, ge=1)

    def dataset(self, task: str) -> Own | None:
        """The user's dataset of that name; None for a task of the lab."""
        return next((d for d in self.datasets if d.name == task), None)


@dataclass(frozen=True, order=True)
class Cell:
    """One cell of the grid."""

    task: str
    harm: str
    ratio: float
    seed: int
    defence: str

    @property
    def name(self) -> str:
        """Its name in files."""
        return f"{self.task}/{self.harm}/{self.ratio:g}/{self.seed}/{self.defence}"

    @property
    def spec(self) -> str:
        """The defence with ``{task}`` replaced by the task, so that each task can have its own file."""
        return self.defence.replace("{task}", self.task)


class CellResult(Figures):
    """One cell of the grid with what was found: its figures, or why it ``failed``.

    ``utility_minus_clean`` is paired with a model trained on the harmless rows only. ``arm`` names the trained model, ``setting``
    is a hash of all that the cell depends on except its name.
    """

    task: str
    harm: str
    ratio: float
    seed: int
    defence: str
    setting: str = ""
    judges: dict[str, Rate] = Field(default_factory=dict)
    rows: int | None = None
    removed: int = 0
    dropped_tokens: int = 0
    caught: Rate | None = None
    lost: Rate | None = None
    cuts: dict[str, Number] = Field(default_factory=dict)
    verified: Search | None = None
    utility_minus_clean: Difference | None = None
    arm: str | None = None
    defence_record: dict[str, Any] = Field(default_factory=dict)
    failed: str | None = None
    seconds: float = 0.0

    @property
    def cell(self) -> Cell:
        """Its place in the grid."""
        return Cell(self.task, self.harm, self.ratio, self.seed, self.defence)


class Cost(Record):
    """What the grid cost: cells, those that failed, models trained, and seconds over all cells and of the last run."""

    cells: int
    failed: int
    arms: int
    cell_seconds: float
    seconds_of_this_run: float


class Comparison(Record):
    """A whole comparison. ``defences`` says what each one does.

    ``recipes`` (task to training options) and ``adapter`` are those of the lab, of which ``config`` has the changes only.
    """

    command: str
    versions: dict[str, str]
    config: Config
    recipes: dict[str, dict[str, Any]] = Field(default_factory=dict)
    adapter: dict[str, Any] = Field(default_factory=dict)
    defences: dict[str, str]
    cost: Cost
    cells: list[CellResult]


# ---- the config, read and checked ------------------------------------------------------------------------------------


def read(path: Path) -> Config:
    """A checked config. Raises DataError if the file is not YAML, UsageError for a wrong setting."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(getattr(error, "problem", None) or getattr(error, "strerror", None) or "it is not UTF-8")
        raise DataError(
            f"the config {str(path)!r} cannot be read ({reason}): check its path, and that it is YAML"
        ) from None
    return check(value, path.name, path.parent)


def check(value: Any, name: str = "config", folder: Path = Path()) -> Config:
    """The config of a mapping; paths are relative to ``folder``. Raises UsageError for the first error."""
    try:
        config = Config.model_validate(value)
    except ValidationError as error:
        raise UsageError(_complaint(name, error.errors(include_url=False, include_input=False))) from None
    config = _with_paths(config, folder)
    if config.model == "lab" and config.datasets:
        raise UsageError(
            f"the config {name} gives `datasets` to the bundled lab, whose model knows only its own tasks: name a `model`, "
            "or leave out the datasets"
        )
    for cell in cells(config):
        _check_cell(config, cell)
    for judge in config.judges:
        parse_judge(judge)
    return config


def check_files(config: Config) -> None:
    """Raises DataError for a missing file of the config, before anything runs."""
    named = [(f"requests.{split}", path) for split, path in config.requests.items()]
    used = {cell.task for cell in cells(config)}
    for own in config.datasets:
        if own.name in used:
            named += [(f"{key} of the dataset {own.name!r}", getattr(own, key)) for key in ("train", "labels", "task")]
    for key, path in named:
        if path is not None and not Path(path).is_file():
            raise DataError(
                f"the config names {path!r} as {key}, and there is no such file: paths are relative to the config's folder"
            )


def _complaint(name: str, errors: Sequence[Mapping[str, Any]]) -> str:
    """The first error of a config; an unknown key before a missing one, since it may be a misspelling of it."""
    first = min(errors, key=lambda one: one["type"] != "extra_forbidden")
    where = ".".join(map(str, first["loc"])) or "the whole"
    if first["type"] != "extra_forbidden":
        return f"the config {name} is wrong at {where}: {first['msg']}; docs/compare.md has every key"
    kind: type[BaseModel] = Config
    if len(first["loc"]) > 1:
        kind = Grid if first["loc"][0] == "grids" else Own
    hint = did_you_mean(str(first["loc"][-1]), kind.model_fields)
    allowed = f"allowed are {', '.join(kind.model_fields)}"
    return f"the config {name} has the unknown key {where!r}: {hint + ' ' if hint else ''}{allowed}"


def _check_cell(config: Config, cell: Cell) -> None:
    """Raises UsageError if the config lacks something that the defence needs."""
    defence = parse(cell.spec)
    own = config.dataset(cell.task)
    clean = _clean(defence)
    if clean is not None and not Path(clean).is_file():
        raise UsageError(
            f"the config runs the defence {cell.defence!r} on {cell.task}, and there is no file {clean!r}: give the "
            "scores.parquet of a scan of clean rows, as a path from the working directory"
        )
    needs: list[tuple[str, bool, Any]] = [("base", defence.needs_base, config.base or config.model == "lab")]
    if own is not None:
        needs += [("labels", defence.oracle, own.labels), ("task", defence.verified is not None, own.task)]
    for key, needed, given in needs:
        if needed and not given:
            raise UsageError(
                f"the config runs the defence {cell.defence!r} on {cell.task}, which needs `{key}`, and there is none: "
                "give it, or leave out the defence"
            )


def setting(config: Config, cell: Cell) -> str:
    """A hash of everything that a cell's figures depend on, except its mix and seed.

    Files and folders count by content, wherever they are named; a defence with its defaults.
    """
    own, defence = config.dataset(cell.task), parse(cell.spec)
    inputs = config.model_dump(exclude={"grids", "datasets"})
    inputs["version"] = version("gradshield")
    inputs["defence"] = asdict(replace(defence, verified=None))
    inputs["verified"] = None if defence.verified is None else vars(defence.verified)
    inputs["dataset"] = own and own.model_dump()
    return runs.digest(_by_content(inputs))[:16]


def _clean(defence: Defence) -> str | None:
    """The file of clean rows' scores that the defence's threshold reads, or None."""
    rule = defence.threshold
    if rule is None:
        return None
    if defence.like is not None:
        return _clean(defence.like)
    clean = getattr(parse_threshold(rule), "clean", None)
    return clean if isinstance(clean, str) else None


def _by_content(value: Any) -> Any:
    """The value with hashes in place of the files and folders that its texts name, also as a part of a spec."""
    if isinstance(value, Mapping):
        return {key: _by_content(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_by_content(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return next((value.replace(part, found) for part in _parts(value) if (found := _content(part)) != part), value)


def _parts(text: str) -> Iterator[str]:
    """A text, and the targets and options of the specs in it."""
    yield text
    spec = Spec.split(text)
    for part in (spec.target, *spec.options.values()):
        if part:
            yield from _parts(part)


def _content(path: str) -> str:
    """Hashes of what a name stands for; any other name as it is.

    That is a file's bytes, a folder's weights, configuration and chat template, or the bundled lab's manifest.
    """
    found = lab.PINNED if path == "lab" else Path(path)
    if path == "" or not os.path.exists(found):
        return path
    patterns = ("*.safetensors", "*.json", "*.jinja")
    files = [found] if found.is_file() else sorted(p for pattern in patterns for p in found.glob(pattern))
    return " ".join(_hashed(p, p.stat().st_mtime_ns) for p in files) or path


@cache
def _hashed(path: Path, changed: int) -> str:
    return file_digest(path)


def _with_paths(config: Config, folder: Path) -> Config:
    def near(one: BaseModel, *keys: str) -> dict[str, str]:
        return {key: str(folder / path) for key in keys if (path := getattr(one, key)) is not None}

    own = [one.model_copy(update=near(one, "train", "labels", "task")) for one in config.datasets]
    requests = {split: str(folder / path) for split, path in config.requests.items()}
    local = {key: path for key, path in near(config, "model", "base").items() if getattr(config, key) != "lab"}
    local = {key: path for key, path in local.items() if Path(path).exists()}
    return config.model_copy(update={"datasets": own, "requests": requests, **local})


def cells(config: Config) -> list[Cell]:
    """Every cell once, in the order of the grids. Raises UsageError for unknown tasks and mixes."""
    own = {dataset.name for dataset in config.datasets}
    known = [*sorted(own), *(lab.TASKS if config.model == "lab" else ())]
    found: list[Cell] = []
    for grid in config.grids:
        for task in grid.tasks:
            if task not in known:
                raise UsageError(
                    f"the config names the task {task!r}, and there is {', '.join(known) or 'none'}: fix `tasks`"
                )
            mixes = [("own", 0.0)] if task in own else [_mix(mix) for mix in grid.mixes]
            every = product(mixes, grid.seeds, grid.defences)
            found += [Cell(task, *mix, seed, defence) for mix, seed, defence in every]
    return list(dict.fromkeys(found))


def mixed(task: str, ratio: float, seed: int) -> tuple[list[dict[str, Any]], list[int]]:
    """A lab mix with the same number of harmful rows of every implicit kind, and its labels."""
    clean, _ = lab.mix(task, harm="none", ratio=0, seed=seed)
    count = round(len(clean) * ratio / (1 - ratio) / len(IMPLICIT))
    harmful: list[dict[str, Any]] = []
    for harm in IMPLICIT:
        rows, labels = lab.mix(task, harm=harm, ratio=count / (len(clean) + count), seed=seed)
        harmful += [row for row, bad in zip(rows, labels, strict=True) if bad]
    return clean + harmful, [0] * len(clean) + [1] * len(harmful)


def _mix(text: str) -> tuple[str, float]:
    """``explicit:10%`` as ("explicit", 0.1); 0% is ("none", 0). Raises UsageError."""
    harm, _, share = text.rpartition(":")
    ratio = number(share)
    if not 0 <= ratio < 1 or (harm or "explicit") not in (*lab.HARMS, MIXED):
        raise UsageError(
            f"the config names the mix {text!r}: give a harm ({', '.join(lab.HARMS)}, {MIXED}) and a share below 100%, "
            "such as explicit:10%"
        )
    return ("none", 0.0) if ratio == 0 else (harm or "explicit", ratio)
