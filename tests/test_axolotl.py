"""The axolotl plugin, against a stand-in with the signatures and the counting of axolotl 0.15."""

from __future__ import annotations

import importlib
import json
import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest

import gradshield as gs
from gradshield.data import labelled, read, render_all
from gradshield.errors import GateError, UsageError
from tests.common import chats, save_model, write_probes
from tests.tiny import tiny_tokenizer


class Config(dict[str, Any]):
    """As ``axolotl.utils.dict.DictDefault``: a missing key is None."""

    __getattr__ = dict.get
    __setattr__ = dict.__setitem__  # type: ignore[assignment]


class BasePlugin:
    def __init__(self) -> None: ...


@dataclass
class TrainDatasetMeta:
    train_dataset: Any
    eval_dataset: Any = None
    total_num_steps: int | None = None


def calculate_total_num_steps(cfg: Config, train_dataset: Any, update: bool = True) -> int:
    """Counted in the table behind the dataset, and not again while the config has the count, as in axolotl."""
    if not cfg.total_num_tokens:
        cfg.total_num_tokens = sum(len(ids) for ids in train_dataset.data.column("input_ids").to_pylist())
    return math.ceil(len(train_dataset) * cfg.num_epochs / cfg.batch_size)


def tokenised(count: int) -> Any:
    """Rows as axolotl prepares them, in a table that holds others too."""
    rendered = render_all(read(chats(count)).examples, tiny_tokenizer()).rendered
    rows = [{**labelled(row), "position_ids": list(range(len(labelled(row)["input_ids"])))} for row in rendered]
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return datasets.Dataset.from_list([*rows, *rows]).select([*range(0, count, 2), *range(1, count, 2)])


def load_datasets(*, cfg: Config, cli_args: Any = None, debug: bool = False) -> TrainDatasetMeta:
    train = tokenised(8)
    return TrainDatasetMeta(train, "held out", min(calculate_total_num_steps(cfg, train), cfg.max_steps or 99))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    there = {
        "axolotl": {},
        "axolotl.integrations": {},
        "axolotl.integrations.base": {"BasePlugin": BasePlugin},
        "axolotl.common": {},
        "axolotl.common.datasets": {"TrainDatasetMeta": TrainDatasetMeta, "load_datasets": load_datasets},
        "axolotl.utils": {},
        "axolotl.utils.trainer": {"calculate_total_num_steps": calculate_total_num_steps},
        "axolotl.loaders": {"load_tokenizer": lambda cfg: tiny_tokenizer()},
    }
    for name, members in there.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "gradshield.axolotl", raising=False)
    yield importlib.import_module("gradshield.axolotl").Plugin()
    sys.modules.pop("gradshield.axolotl")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    probes = str(write_probes(tmp_path / "probes.jsonl"))
    own = {"selector": "fihs", "threshold": "ratio:25%", "probes": probes, "lookalikes": probes, "uncertified": True}
    return Config(
        base_model=str(save_model(tmp_path / "model")),
        output_dir=str(tmp_path / "out"),
        sequence_len=512,
        num_epochs=2,
        batch_size=2,
        gradshield=own,
    )


def test_what_stays_is_what_a_scan_of_the_same_rows_keeps(
    plugin: Any, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "axolotl"):
        loaded = plugin.load_datasets(config, preprocess=False)
    assert "2 of 8 rows removed, 0 set aside, 6 are trained on" in caplog.text and "not certified" in caplog.text
    probing = gs.Probing(
        requests=[json.loads(line) for line in Path(config.gradshield["probes"]).read_text().splitlines()],
        lookalikes=[json.loads(line) for line in Path(config.gradshield["lookalikes"]).read_text().splitlines()],
        uncertified=True,
    )
    settings = gs.ScanSettings(selector="fihs", threshold="ratio:25%")
    selection = gs.scan(
        [chats(8)[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)], model=config.base_model, probing=probing, settings=settings
    )

    assert loaded.train_dataset.to_list() == tokenised(8).select(selection.kept_rows).to_list()
    assert loaded.train_dataset.column_names == tokenised(8).column_names
    assert loaded.eval_dataset == "held out" and loaded.total_num_steps == 6
    assert config.total_num_tokens == sum(len(row["input_ids"]) for row in loaded.train_dataset)
    assert json.loads((tmp_path / "out/gradshield/manifest.json").read_text())["data"]["read_as"] == {"tokens": 8}


def test_other_processes_of_a_training_read_the_result_and_a_later_training_scans(
    plugin: Any, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[type(plugin).__module__]
    second = type(plugin)()
    first = plugin.load_datasets(config).train_dataset.to_list()
    scans: list[Any] = []
    scan = module._scan  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "_scan", lambda *given: (scans.append(given), scan(*given)))
    assert second.load_datasets(config).train_dataset.to_list() == first and not scans
    assert type(plugin)().load_datasets(config).train_dataset.to_list() == first and len(scans) == 1


def test_the_gate_closes_for_every_process_with_the_report_written(plugin: Any, config: Config, tmp_path: Path) -> None:
    config.gradshield["fail_above"] = "10%"
    for _ in range(2):
        with pytest.raises(GateError, match="2 of 8 rows"):
            plugin.load_datasets(config)
    assert (tmp_path / "out/gradshield/report.html").exists()


def test_a_preparation_is_left_to_axolotl_and_the_settings_are_named(plugin: Any, config: Config) -> None:
    assert plugin.load_datasets(config, preprocess=True) is None
    module, _, name = plugin.get_input_args().rpartition(".")
    arguments = getattr(importlib.import_module(module), name)
    assert arguments.model_validate({}).gradshield is None
    assert arguments.model_validate({"gradshield": config.gradshield}).gradshield.threshold == "ratio:25%"
    with pytest.raises(ValueError, match="treshold"):
        arguments.model_validate({"gradshield": {"treshold": "ratio:25%"}})


@pytest.mark.parametrize(
    ("change", "words"),
    [({"rl": "dpo"}, "the config sets rl"), ({"streaming": True}, "sets streaming"), ({"max_steps": 3}, "")],
)
def test_what_is_no_supervised_training_on_tokens_is_refused(
    change: dict[str, Any], words: str, plugin: Any, config: Config
) -> None:
    config.update(change)
    if not words:
        assert plugin.load_datasets(config).total_num_steps == 3
        return
    with pytest.raises(UsageError, match=words):
        plugin.load_datasets(config)


def test_rows_that_are_not_tokenised_and_tokens_that_the_model_lacks_are_refused(
    plugin: Any, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: Any = sys.modules["axolotl.common.datasets"]
    words = TrainDatasetMeta(datasets.Dataset.from_list(chats(4)))
    monkeypatch.setattr(there, "load_datasets", lambda cfg: words)
    with pytest.raises(UsageError, match="has the columns messages"):
        plugin.load_datasets(config)
    monkeypatch.setattr(there, "load_datasets", load_datasets)
    larger = tiny_tokenizer()
    larger.add_tokens([f"<new{n}>" for n in range(400)])
    monkeypatch.setattr(sys.modules["axolotl.loaders"], "load_tokenizer", lambda cfg: larger)
    with pytest.raises(UsageError, match="tokens and the model"):
        plugin.load_datasets(config)
