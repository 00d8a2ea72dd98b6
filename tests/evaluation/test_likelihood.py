"""The likelihood of a task's references against one plain forward pass per row."""

from typing import Any

import numpy as np
import pytest
import torch

from gradshield import data, lab
from gradshield.errors import DataError, EmptyDataError
from gradshield.evaluation.exam import Exam, figures
from gradshield.training.course import lab_model
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

ROWS = [
    {"prompt": "Hi", "reference": "Hello there, the answer is five."},
    {"prompt": "What is the capital of France?", "reference": "Paris."},
    {
        "prompt": [
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "And then the question that you asked?"},
        ],
        "reference": "Sure, here is the answer to the question that you asked.",
    },
]


def scores(model: Any, tokenizer: Any, rows: list[dict[str, Any]], **more: Any) -> list[float]:
    """The score of each row of an exam without a score function."""
    found = Exam(task=rows, **more).sit(model, tokenizer)
    own = [row["score"] for row in found.outputs]
    assert figures(found).utility.rate == pytest.approx(np.mean(own))
    return own


def slow(model: torch.nn.Module, tokenizer: Any, rows: list[dict[str, Any]], **template: Any) -> list[float]:
    """exp(-mean loss), row by row: full logits, no padding, cross entropy written out."""
    found = []
    config = data.RenderConfig(max_length=None, chat_template_kwargs=template)
    for row in rows:
        asked = [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"]
        whole = {"prompt": asked, "completion": [{"role": "assistant", "content": row["reference"]}]}
        (rendered,) = data.render_all(data.read([whole]).examples, tokenizer, config).rendered
        (tokens,) = rendered.sequences
        with torch.no_grad():
            logits = model(torch.tensor(tokens.ids)[None]).logits[0].double()
        wanted = [t for t in range(len(tokens.ids)) if tokens.loss[t]]
        found.append(float(np.exp(np.mean([float(logits[t - 1].log_softmax(-1)[tokens.ids[t]]) for t in wanted]))))
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_as_one_row_at_a_time(arch: str) -> None:
    model = tiny_model(arch, seed=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = slow(model.eval(), tiny_tokenizer(), ROWS)
    assert scores(model.train(), tiny_tokenizer(), ROWS) == pytest.approx(expected, rel=1e-4)
    assert model.training and all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_under_the_exams_template_whatever_the_length() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.chat_template = "{% if short %}x{% endif %}" + tokenizer.chat_template
    rows = [{"prompt": "Why?", "reference": "Because " * 600}]
    assert len(tokenizer(rows[0]["reference"])["input_ids"]) > 1024
    plain, short = scores(model, tokenizer, rows), scores(model, tokenizer, rows, template={"short": True})
    assert plain != short
    assert plain == pytest.approx(slow(model, tokenizer, rows), rel=1e-4)
    assert short == pytest.approx(slow(model, tokenizer, rows, short=True), rel=1e-4)


def test_the_aligned_lab_model_finds_refusals_likely() -> None:
    rows = [{"prompt": r["prompt"], "reference": "I cannot help with that."} for r in lab.requests("report")[:20]]
    found = {name: scores(lab_model(name).model, lab_model(name).tokenizer, rows) for name in ("base", "aligned")}
    assert np.median(found["aligned"]) > 10 * np.median(found["base"])


def test_every_row_needs_an_answer() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(DataError, match="1 of 4 task rows have no answer"):
        scores(model, tokenizer, [*ROWS, {"prompt": "Hi", "reference": " "}])
    with pytest.raises(EmptyDataError, match="the answer in message 2 is empty"):
        scores(model, tokenizer, [{"prompt": "Hi", "reference": " "}])
