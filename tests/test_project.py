"""The tree keeps its promises: layers, public names, and documents that say what is there."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gradshield
from gradshield import errors
from gradshield.registry import Registry

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "gradshield"
PUBLIC = {
    "Exam",
    "Exams",
    "Format",
    "GradShieldError",
    "Needs",
    "Probing",
    "ScanSettings",
    "Selection",
    "Workers",
    "__version__",
    "certify",
    "check",
    "compare",
    "cut",
    "estimate",
    "evaluate",
    "scan",
    "show",
    "train",
}
REGISTRIES = {
    "selector": "gradshield.selectors.SELECTORS",
    "probe": "gradshield.probes.PROBES",
    "threshold": "gradshield.thresholds.THRESHOLDS",
    "engine": "gradshield.gradients.ENGINES",
    "defence": "gradshield.training.defences.DEFENCES",
    "judge": "gradshield.judges.JUDGES",
    "metric": "gradshield.evaluation.metrics.METRICS",
    "online selection": "gradshield.selectors.ONLINE",
    "penalty": "gradshield.training.PENALTIES",
}
PUBLISHED = ("selector", "probe", "threshold")  # an engine computes; it is not a method of its own


def registry(kind: str) -> Registry:
    module, _, name = REGISTRIES[kind].rpartition(".")
    return getattr(importlib.import_module(module), name)


def entries(*kinds: str) -> list[tuple[str, str]]:
    return [(kind, name) for kind in kinds for name in registry(kind)]


# ---- layers and names -----------------------------------------------------------------------------------------------


def test_layers() -> None:
    """In a process of its own: the linter starts others, which must not inherit what tests have done to this one."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_room_has_its_layer() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    named = {room.strip() for layer in layers for room in layer.split("|")}
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__"} == named


def test_public_names() -> None:
    assert set(gradshield.__all__) == PUBLIC
    assert all(getattr(gradshield, name) is not None for name in PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'torch'"):
        gradshield.torch  # noqa: B018


def test_importing_is_cheap() -> None:
    heavy = (
        "import gradshield, sys; print([m for m in ('torch', 'transformers', 'datasets', 'trl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- sources ----------------------------------------------------------------------------------------------------------


def test_no_docstring_holds_the_quotes_of_a_string_that_was_wrapped() -> None:
    broken = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (ast.get_docstring(node) or "").splitlines()
                broken += [
                    f"{path.name}: {line}" for line in lines if line.endswith(' "') or line.lstrip().startswith('"')
                ]
    assert not broken


@pytest.mark.parametrize("room", ["gradients", "probes", "selectors", "judges", "training", "evaluation"])
def test_float64_is_asked_of_a_device_by_one_function_alone(room: str) -> None:
    for path in (PACKAGE / room).rglob("*.py"):
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not any(isinstance(f, ast.Attribute) and f.attr == "double" for f in calls), (
            f"{path}: modules.in_float64"
        )


# ---- documents ------------------------------------------------------------------------------------------------------


def test_architecture_names_every_room() -> None:
    said = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    assert [room for room in rooms if f"\n  {room}/ " not in said] == []


@pytest.mark.parametrize(("kind", "name"), entries(*PUBLISHED))
def test_method_names_its_paper_and_departures(kind: str, name: str) -> None:
    words = inspect.getdoc(registry(kind)[name]) or ""
    assert "Paper:" in words, words
    assert "Departures:" in words, words


@pytest.mark.parametrize(("kind", "name"), entries(*REGISTRIES))
def test_entry_is_explained(kind: str, name: str) -> None:
    words = inspect.getdoc(registry(kind)[name]) or ""
    assert registry(kind).summary(name)
    assert ("Paper:" in words) <= ("Departures:" in words)
    assert f"`{name}`" in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def test_every_row_shape_is_documented() -> None:
    from gradshield.data import SHAPES, read

    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `([\w-]+)` \| (.*?) \| `(\{.*?\})`", text, re.MULTILINE)
    assert [name for name, _, _ in lines] == list(SHAPES)
    for name, keys, example in lines:
        assert tuple(re.findall(r"`(\w+)`", keys)) == SHAPES[name].keys
        (one,) = read([json.loads(example)]).examples
        assert one.shape == name


def test_exit_codes() -> None:
    """The table of exit codes is the tree of errors."""
    text = (ROOT / "docs" / "outputs.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*?) \|$", text, re.MULTILINE)
    tops = [errors.GradShieldError, *errors.GradShieldError.__subclasses__()]
    assert {int(code) for code, _ in rows} == {0, 130} | {error.exit_code for error in tops}


def test_score_columns_are_documented() -> None:
    from gradshield.scanning import outputs

    text = (ROOT / "docs" / "outputs.md").read_text(encoding="utf-8")
    documented = {
        name for first in re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", first)
    }
    assert outputs.COLUMNS.keys() <= documented


def test_ci_runs() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
