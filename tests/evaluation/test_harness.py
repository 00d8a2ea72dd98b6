"""The bridges to other harnesses give the numbers that our own evaluation gives on the same rows.

Skipped where the optional harnesses are not installed: pip install 'gradshield[harness]'.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradshield import lab
from gradshield.errors import DataError, UsageError
from gradshield.evaluation.generate import generator
from gradshield.evaluation.harness import inspect_task, lm_eval_tasks
from gradshield.evaluation.metrics import metric
from gradshield.evaluation.task_files import task_file, utility
from gradshield.types import EvalResult

N = 24
INSPECT = """
import json
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import exact, scorer, Score, mean
from inspect_ai.solver import generate

@scorer(metrics=[mean()])
def half():
    async def score(state, target):
        return Score(value=0.5)
    return score

@task
def held_out():
    with open("rows.jsonl") as lines:
        rows = [json.loads(line) for line in lines]
    samples = [Sample(input=row["prompt"], target=row["reference"]) for row in rows]
    return Task(dataset=samples, solver=generate(), scorer=[exact(), half()], epochs=2)
"""


@pytest.fixture(scope="module")
def aligned() -> tuple[Any, Any]:
    folder = lab.checkpoint("aligned")
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, aligned: tuple[Any, Any]) -> Path:
    """Rows of which the model answers two in three as their reference says, and a task of either harness on them."""
    folder = tmp_path_factory.mktemp("harness")
    prompts = [row["prompt"] for row in (*lab.lookalikes("report")[: N // 2], *lab.requests("report")[: N // 2])]
    answers = generator(*aligned, max_new_tokens=48)(prompts)
    rows = [
        {"prompt": prompt, "reference": answer if i % 3 else "something else"}
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "gradshield_test",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{reference}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 48, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "task.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    (folder / "held_out.py").write_text(INSPECT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path, aligned: tuple[Any, Any]) -> EvalResult:
    task = task_file(folder / "rows.jsonl", metric="exact")
    found = utility(generator(*aligned, max_new_tokens=48), task.rows, task.score)
    assert found.rates["utility"].k == N * 2 // 3
    return found


def test_lm_eval_gives_our_numbers(folder: Path, aligned: tuple[Any, Any], ours: EvalResult) -> None:
    pytest.importorskip("lm_eval")
    model, tokenizer = aligned
    model.train()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    side = tokenizer.padding_side
    found = lm_eval_tasks(model, tokenizer, ["gradshield_test"], include=folder)
    assert dict(found.rates) == {"lm-eval/gradshield_test/exact_match": ours.rates["utility"]}
    assert [row["answer"] for row in found.outputs] == [row["answer"] for row in ours.outputs]
    assert [row["scores"]["exact_match"] for row in found.outputs] == [row["score"] for row in ours.outputs]
    json.dumps(found.outputs)
    assert model.training and tokenizer.padding_side == side
    for name, p in model.named_parameters():
        assert id(p) == before[name][0] and torch.equal(p, before[name][1])
    few = lm_eval_tasks(model, tokenizer, ["gradshield_test"], limit=5, include=folder)
    assert few.rates["lm-eval/gradshield_test/exact_match"].n == 5
    tokenizer.chat_template, own = None, tokenizer.chat_template
    bare = lm_eval_tasks(model, tokenizer, ["gradshield_test"], include=folder)
    tokenizer.chat_template = own
    assert bare.outputs[0]["prompt"] == json.loads((folder / "rows.jsonl").read_text().splitlines()[0])["prompt"]


def test_lm_eval_says_what_it_does_not_have(folder: Path, aligned: tuple[Any, Any]) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(UsageError, match="no task 'there_is_none'"):
        lm_eval_tasks(*aligned, ["there_is_none"], include=folder)


def test_inspect_gives_our_numbers(folder: Path, aligned: tuple[Any, Any], ours: EvalResult) -> None:
    pytest.importorskip("inspect_ai")
    generate, batches = generator(*aligned, max_new_tokens=48), []

    def counted(prompts: Any) -> list[str]:
        batches.append(len(prompts))
        return generate(prompts)

    handlers, here = list(logging.getLogger().handlers), Path.cwd()
    found = inspect_task(folder / "held_out.py", counted)
    assert found.rates["inspect/held_out/exact"] == ours.rates["utility"]
    assert found.rates["inspect/held_out/half"].rate == 0.5 and found.rates["inspect/held_out/half"].n == N
    assert {row["prompt"]: row["answer"] for row in found.outputs} == {
        row["prompt"]: row["answer"] for row in ours.outputs
    }
    assert sum(batches) == N and len(batches) < N  # calls that wait together are answered together
    assert logging.getLogger().handlers == handlers and Path.cwd() == here
    assert inspect_task(folder / "held_out.py", generate, limit=5).rates["inspect/held_out/exact"].n == 5


def test_a_failing_inspect_task_is_reported(folder: Path) -> None:
    pytest.importorskip("inspect_ai")

    def fails(prompts: Any) -> list[str]:
        raise DataError("the prompt is too long")

    with pytest.raises(DataError, match=r"held_out of held_out\.py did not finish .*the prompt is too long"):
        inspect_task(folder / "held_out.py", fails)
    with pytest.raises(UsageError, match="no Inspect task file"):
        inspect_task(folder / "there-is-none.py", fails)


def test_what_is_not_installed_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, aligned: tuple[Any, Any]
) -> None:
    for name in ("lm_eval", "inspect_ai", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=r"lm-eval is not installed.*pip install 'gradshield\[harness\]'"):
        lm_eval_tasks(*aligned, ["any"])
    with pytest.raises(UsageError, match=r"inspect-ai is not installed.*pip install 'gradshield\[harness\]'"):
        inspect_task("any.py", lambda prompts: [])
    with pytest.raises(UsageError, match=r"pip install 'gradshield\[eval\]'"):
        metric("rouge-l")
