"""Methods of another package: found by their entry point, listed, run by every command, and no harm where one is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gradshield import lab, registry
from gradshield.errors import UnknownNameError
from gradshield.registry import Registry
from tests.common import jsonl, table, write

METHODS = '''
"""One method of each kind, as CONTRIBUTING.md says."""

import numpy as np

from gradshield.judges import JUDGES, Verdict
from gradshield.training.defences import DEFENCES
from gradshield.probes import PROBES, first_logits
from gradshield.selectors import SELECTORS, Measured
from gradshield.selectors.base import by_row, no_direction
from gradshield.thresholds import THRESHOLDS
from gradshield.training import PENALTIES
from gradshield.types import Cut, Scores


@SELECTORS.register("shortest")
class Shortest:
    """Rows of the fewest tokens go."""

    name, rule, travels, probed = "shortest", "above:0.5", True, False

    def __init__(self, least: int = 1, seed: int = 0):
        self.least, self.seed = least, seed

    def prepare(self, model):
        return no_direction(self.name)

    def measure(self, model, direction, batch):
        rows, means, lengths = by_row(batch, np.zeros(batch.ids.shape))
        return Measured(rows, 1.0 / np.maximum(lengths, self.least), means, lengths)

    def finish(self, raw, ids, shapes):
        return Scores(raw.rows, ids, raw.sums, shapes, lengths=raw.lengths, nll=raw.nll)

    def settings(self):
        return {"least": self.least, "seed": self.seed}


@THRESHOLDS.register("above")
class Above:
    """Rows above a quantile go."""

    name = "above"

    def __init__(self, share: float = 0.9):
        self.share = share

    def cut(self, values, decoys=None, anchors=None):
        return Cut(float(np.quantile(values, self.share)), self.name)


@PROBES.register("largest")
class Largest:
    """The largest logit at the first response position."""

    name = "largest"

    def fit(self, model, tokenizer, requests, lookalikes):
        pass

    def __call__(self, model, batch):
        return first_logits(model, batch).max(-1).values.mean()

    def settings(self):
        return {}


@JUDGES.register("long-answer")
class LongAnswer:
    """Unsafe where the answer is longer than so many characters."""

    def __init__(self, most: int = 20):
        self.name, self.most = "long-answer", most

    def judge(self, prompt, answer):
        return Verdict(len(answer) > self.most, f"{len(answer)} characters")


@PENALTIES.register("shrink")
class Shrink:
    """The adapter is pulled toward zero."""

    name = "shrink"

    def __init__(self, weight: float = 0.1):
        self.weight, self.calls = weight, 0

    def prepare(self, model):
        self.held = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, model, inputs):
        self.calls += 1
        return self.weight * sum(p.square().sum() for p in self.held)

    def record(self):
        return {"weight": self.weight, "calls": self.calls}


@DEFENCES.register("both")
def both(defence, options):
    """The shortest rows go, and the adapter is pulled toward zero."""
    return DEFENCES["shrink"](DEFENCES["shortest"](defence, "above:0.1"), options)
'''

COMMANDS = """
import json, sys
from gradshield.cli import main

for arguments in json.load(open(sys.argv[1])):
    try:
        main(arguments)
    except SystemExit as stopped:
        if stopped.code:
            raise
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A package outside of this one, and every command that takes methods, in one process that has it on its path."""
    folder = tmp_path_factory.mktemp("outside")
    site = folder / "site"
    info = site / "outside_methods-2.1.dist-info"
    for new in (site / "outside", info):
        new.mkdir(parents=True)
    write(site / "outside" / "__init__.py", METHODS)
    write(info / "METADATA", "Metadata-Version: 2.1\nName: outside-methods\nVersion: 2.1\n")
    write(info / "entry_points.txt", "[gradshield.plugins]\noutside = outside\n")

    rows, labels = lab.mix("choice", ratio=0.2, n=24)
    data = str(write(folder / "rows.jsonl", jsonl(rows)))
    write(folder / "labels.json", json.dumps(labels))
    held = [{"prompt": r["prompt"], "reference": r["reference"]} for r in lab.utility("choice")[:8]]
    write(folder / "held.jsonl", jsonl(held))
    for split in ("direction", "search", "report"):
        asked = lab.requests(split)[:24] if split == "direction" else lab.requests(split)[:6]
        write(folder / f"{split}.jsonl", jsonl([{**one, "split": split} for one in asked]))
    write(folder / "harmless.jsonl", jsonl(lab.lookalikes("direction")[:24]))
    write(folder / "training.json", json.dumps({"max_steps": 2, "per_device_train_batch_size": 4}))
    write(folder / "lora.json", json.dumps({**lab.LORA, "r": 2}))
    config = {
        "model": str(lab.checkpoint("aligned")),
        "grids": [{"tasks": ["own"], "defences": ["none", "both:0.3"]}],
        "datasets": [
            {"name": "own", "train": "rows.jsonl", "labels": "labels.json", "task": "held.jsonl", "metric": "exact"}
        ],
        "training": {"max_steps": 2},
        "lora": {**lab.LORA, "r": 2},
        "requests": {split: f"{split}.jsonl" for split in ("direction", "search", "report")},
        "judges": ["refusal-phrases", "long-answer:5"],
        "answer_tokens": 4,
    }
    write(folder / "config.yaml", json.dumps(config))
    at = {name: str(folder / name) for name in ("scan", "probed", "trained", "compared")}
    model = ["--model", str(lab.checkpoint("aligned"))]
    asked = ["--probes", str(folder / "direction.jsonl"), "--lookalikes", str(folder / "harmless.jsonl")]
    exam = ["--safety", str(folder / "report.jsonl"), "--max-new-tokens", "4", "--judge", "long-answer:5"]
    fit = ["--training-config", str(folder / "training.json"), "--lora-config", str(folder / "lora.json")]
    commands = [
        ["methods"],
        ["scan", data, *model, "-o", at["scan"], "--selector", "shortest:least=3", "-t", "above:75%", "--seed", "5"],
        ["cut", at["scan"], "-t", "above:0.1"],
        ["scan", data, *model, "-o", at["probed"], "--selector", "fihs", "--probe", "largest", *asked, "--uncertified"],
        ["train", data, *model, "-o", at["trained"], "-d", "shortest:above:0.1+shrink:0.2", *asked, *exam, *fit],
        ["compare", str(folder / "config.yaml"), "-o", at["compared"]],
    ]
    write(folder / "commands.json", json.dumps(commands))
    write(folder / "run.py", COMMANDS)
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    ran = subprocess.run(
        [sys.executable, str(folder / "run.py"), str(folder / "commands.json")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return folder, ran.stdout


def _manifest(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.slow
def test_methods_lists_them_and_every_selector_and_penalty_as_a_defence(done: tuple[Path, str]) -> None:
    said = done[1]
    for line in ("Rows of the fewest tokens go.", "The adapter is pulled toward zero."):
        assert said.count(line) == (2 if "Rows" in line else 1)  # a selector is listed as one, and as a defence
    for name in ("above", "largest", "long-answer", "both", "shrink"):
        assert f"\n{name} " in said


@pytest.mark.slow
def test_a_scan_and_a_cut_use_them(done: tuple[Path, str]) -> None:
    folder = done[0]
    manifest = _manifest(folder / "scan")
    assert manifest["settings"]["selector_found"] == {"least": 3, "seed": 5}
    assert manifest["settings"]["threshold"] == "above:0.1"
    assert manifest["versions"]["outside-methods"] == "2.1"
    scores = table(folder / "scan")["score"].to_numpy()
    assert manifest["results"]["removed"] == (scores > manifest["results"]["cuts"]["rows"]["value"]).sum() > 0
    probed = _manifest(folder / "probed")
    assert probed["settings"]["probe"] == "largest" and probed["settings"]["probe_found"] == {}


@pytest.mark.slow
def test_a_training_and_a_comparison_use_them(done: tuple[Path, str]) -> None:
    folder = done[0]
    results = _manifest(folder / "trained")["results"]
    assert results["record"]["shrink"]["weight"] == 0.2 and results["record"]["shrink"]["calls"] >= 2
    assert results["removed"] > 0 and set(results["after"]["judges"]) == {"long-answer"}
    cells = json.loads((folder / "compared" / "results.json").read_text())["cells"]
    assert [cell.get("failed") for cell in cells] == [None, None]
    assert [cell["removed"] > 0 for cell in cells] == [False, True]
    assert set(cells[1]["judges"]) == {"refusal-phrases", "long-answer"}
    assert cells[1]["defence_record"]["shrink"]["weight"] == 0.3
    assert "both" in (folder / "compared" / "results.html").read_text()


# ---- what is broken -------------------------------------------------------------------------------------------------


@pytest.fixture
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """No plugin has been looked for yet; the list holds what will be found."""
    found: list[Any] = []
    monkeypatch.setattr(registry, "_plugins", None)
    monkeypatch.setattr(registry, "entry_points", lambda group: found if group == "gradshield.plugins" else [])
    yield found


def _entry(module: str) -> Any:
    """An entry point with the package that it is of."""
    entry = EntryPoint("own", module, "gradshield.plugins")
    return SimpleNamespace(dist=SimpleNamespace(name="own-pack", version="0.3"), value=entry.value, load=entry.load)


def test_a_broken_plugin_is_one_warning_that_names_its_package(
    asked_anew: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    things: Registry[object] = Registry("thing", needs=("cut",))
    things.register("ours")(SimpleNamespace(cut=1))
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path / "own_broken.py", "raise RuntimeError('no\\nway')")
    asked_anew.append(_entry("own_broken"))
    with pytest.warns(UserWarning) as caught:
        assert list(things) == ["ours"]
    assert [str(one.message) for one in caught] == [
        "the plugin own-pack 0.3 could not be loaded from own_broken (RuntimeError: no), so its methods are missing: fix it, "
        "or uninstall it"
    ]
    with pytest.raises(UnknownNameError, match=r"choose one of ours$"):
        things["theirs"]  # without a second warning: it was looked for once


@pytest.mark.parametrize(
    ("name", "said"), [("fihs", "selector 'fihs' is registered twice"), ("new", "selector 'new' lacks travels, probed")]
)
def test_a_name_that_is_taken_and_a_method_that_lacks_something_are_said(
    asked_anew: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    from gradshield.selectors import SELECTORS

    before = SELECTORS["fihs"]
    monkeypatch.setattr(registry, "_plugins", None)
    monkeypatch.syspath_prepend(tmp_path)
    module = f"own_{name}"
    write(
        tmp_path / f"{module}.py",
        f"from gradshield.selectors import SELECTORS, Loss\n@SELECTORS.register({name!r})\nclass New:\n"
        "    name, rule = 'new', 'ratio'\n    prepare = measure = finish = settings = None\n",
    )
    asked_anew.append(_entry(module))
    with pytest.warns(UserWarning, match=said):
        assert SELECTORS["fihs"] is before
    assert "new" not in SELECTORS
